"""DynamicViT: fewer tokens are really fewer, and training hides exactly those."""

from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from close import close
from parts import labelled, named
from vitrail.data.batches.batch import Batch
from vitrail.data.views.preprocess import Preprocess
from vitrail.errors import DataError, UsageError
from vitrail.models import (
    DynamicViT,
    DynamicViTConfig,
    ViT,
    ViTConfig,
    build,
    model_config,
)
from vitrail.models.dynamicvit import attend_left, pruned
from vitrail.nn.attention import attend
from vitrail.tasks import ClassifyConfig, Teacher
from vitrail.tasks.prune import Prune, PruneConfig, ratio_loss, token_loss
from vitrail.weights.dynamicvit import LAYOUTS
from vitrail.weights.layouts import understand

TINY = DynamicViTConfig(
    depth=4, width=32, heads=4, mlp=48, classes=7, prune_before=(1, 2, 3), image_size=(64, 64)
)


@pytest.mark.parametrize(
    "keep, left",
    [
        (0.9, (176, 158, 142)),
        (0.8, (156, 125, 100)),
        (0.7, (137, 96, 67)),
        (0.5, (98, 49, 24)),
        (0.001, (1, 1, 1)),
        (1.0, (196, 196, 196)),
    ],
)
@torch.inference_mode()
def test_as_many_tokens_go_on_as_published(keep, left, randomised):
    config = replace(TINY, keep=keep, image_size=(224, 224))
    assert config.kept(196) == left
    model = randomised(DynamicViT(config))
    seen = []
    for block in model.encoder.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(out.shape[1] - 1))
    reduced = model.reduced(torch.randn(2, 3, 224, 224))
    assert seen == [196, *left]
    assert [d.sum(dim=1).tolist() for d in reduced.decisions] == [[n, n] for n in left]


# The same weights must do in every kind of ViT.
KINDS = {
    "class token": {},
    "distilled": {"distilled": True},
    "mean": {"pool": "mean", "class_token": False, "pool_norm": True},
    "class_mean, registers": {"pool": "class_mean", "registers": 2},
    "attention pooling": {"pool": "map", "class_token": False},
    "rotary": {"position": "rope"},
    "LayerScale": {"layer_scale": 0.5, "prefix_position": False, "pre_norm": True},
    "a convolutional stem": {"stem": "conv", "stem_norm": True},
}


@pytest.mark.parametrize("size", [(224, 224), (96, 160)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_hiding_tokens_and_leaving_them_out_are_the_same(kind, size, randomised):
    model = randomised(DynamicViT(replace(TINY, **KINDS[kind])))
    x = torch.randn(3, 3, *size)
    few = model.gathered(x)
    n = size[0] * size[1] // 256
    assert [int(d.sum()) for d in few.decisions] == [3 * m for m in model.config.kept(n)]
    assert not torch.equal(few.decisions[0][0], few.decisions[0][1]), "each image has its own"
    hidden = model.masked(x, few.decisions)
    close(model.logits(few.features), model.logits(hidden.features))
    close(few.features.patches, hidden.features.patches)
    assert torch.equal(few.features.valid, few.decisions[-1].bool())
    assert torch.equal(few.features.valid, hidden.features.valid)
    assert not few.features.patches[~few.features.valid].any()
    assert few.features.grid == (size[0] // 16, size[1] // 16)
    close(model(x), model.logits(few.features).mean(dim=1))
    close(model(x)[:1], model(x[:1]))
    # The published epsilon of training lets through next to nothing.
    soft = model.logits(model.masked(x, few.decisions, eps=1e-6).features)
    assert 0 < (soft - model.logits(few.features)).abs().max() < 1e-4


@torch.inference_mode()
def test_hiding_is_what_masked_attention_does(randomised):
    """Against the plain ViT's own blocks with a mask, stage by stage."""
    model = randomised(DynamicViT(TINY))
    x = torch.randn(2, 3, 64, 64)
    few = model.gathered(x)
    tokens, _, _ = model.embed(x)
    left = torch.ones(2, 16)
    for i, block in enumerate(model.encoder.blocks):
        if i in TINY.prune_before:
            stage = TINY.prune_before.index(i)
            scores = model.predictors[stage](tokens[:, 1:], left).log_softmax(dim=-1)[..., 0]
            best = scores.masked_fill(left == 0, -torch.inf).topk(TINY.kept(16)[stage]).indices
            left = torch.zeros(2, 16).scatter(1, best, 1.0)
            assert torch.equal(left, few.decisions[stage])
        tokens = block(tokens, keys=torch.cat([torch.ones(2, 1), left], dim=1).bool())
    close(few.features.prefix, model.encoder.norm(tokens)[:, :1])


def test_a_predictor_sees_only_what_is_left(randomised):
    predictor = randomised(DynamicViT(TINY)).predictors[0]
    x, left = torch.randn(1, 6, 32), torch.tensor([[1.0, 0, 1, 1, 0, 1]])
    close(predictor(x, left)[:, left[0] > 0], predictor(x[:, left[0] > 0]))


def test_masked_attention_is_equation_11(randomised):
    q, k, v = torch.randn(3, 2, 2, 5, 8)
    left = torch.tensor([[1.0, 1, 0, 1, 0], [1, 0, 0, 0, 1]])
    found = attend_left(q, k, v, left, eps=1e-6)
    for b in range(2):
        for h in range(2):
            logits = q[b, h] @ k[b, h].T / 8**0.5
            for i in range(5):
                e = logits[i].exp() / logits[i].max().exp()
                e = torch.stack([e[j] * (1.0 if i == j else left[b, j]) for j in range(5)])
                weights = (e + 1e-6 / 5) / (e.sum() + 1e-6)
                close(found[b, h, i], weights @ v[b, h])
    all_left = torch.ones(2, 5)
    close(attend_left(q, k, v, all_left, eps=0.0), attend(q, k, v))


def test_training_draws_decisions_that_only_ever_drop(randomised):
    model = randomised(DynamicViT(replace(TINY, keep=0.9))).train()
    x = torch.randn(8, 3, 64, 64)
    one, other = model.reduced(x), model.reduced(x)
    assert not torch.equal(one.decisions[0], other.decisions[0])
    before = torch.ones(8, 16)
    for left in one.decisions:
        assert set(left.unique().tolist()) <= {0.0, 1.0}
        assert (left <= before).all() and left.sum() < before.sum()
        assert left.sum(dim=1).min() >= 1
        before = left
    assert torch.equal(one.features.valid, before.bool())
    exact = model.masked(x, [d.detach() for d in one.decisions])
    close(model.logits(one.features), model.logits(exact.features), 1e-4)


def test_an_image_never_loses_its_last_tokens(randomised):
    model = randomised(DynamicViT(TINY)).train()
    for predictor in model.predictors:
        nn.init.constant_(predictor.fc3.bias, 0.0)
        predictor.fc3.bias.data[1] = 30.0  # drop everything
    out = model(torch.randn(4, 3, 64, 64))
    assert out.isfinite().all()


@pytest.mark.parametrize("kind", ["class token", "mean", "attention pooling"])
def test_everything_learns(kind, randomised):
    model = randomised(DynamicViT(replace(TINY, **KINDS[kind]))).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(4, 3, 64, 64).transpose(2, 3)).float().square().mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    for predictor in model.predictors:
        assert predictor.fc3.weight.grad.any() and predictor.embed.weight.grad.any()


@torch.inference_mode()
def test_a_decision_is_learned_from_what_the_token_would_have_changed():
    """Dropping a token has the gradient of its own share in attention."""
    q, k, v = torch.randn(3, 1, 1, 4, 8)
    with torch.inference_mode(False):
        left = torch.tensor([[1.0, 1, 0, 1]], requires_grad=True)
        attend_left(q.clone(), k.clone(), v.clone(), left, 0.0)[0, 0, 0].sum().backward()
    weights = (q @ k.mT / 8**0.5)[0, 0, 0].exp()
    total = weights[[0, 1, 3]].sum()
    mean = (weights[[0, 1, 3]] @ v[0, 0, [0, 1, 3]]) / total
    expected = weights[2] / total * (v[0, 0, 2] - mean).sum()
    close(left.grad[0, 2], expected, 1e-4)


def test_bfloat16_takes_the_same_way(randomised):
    model = randomised(DynamicViT(TINY))
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert model(x).shape == (2, 7)
        assert model.bfloat16()(x.bfloat16()).isfinite().all()


@torch.inference_mode()
def test_keeping_all_is_the_vit_itself_and_its_weights_load_by_name(randomised):
    vit = randomised(ViT(ViTConfig(depth=4, width=32, heads=4, mlp=48, classes=7)))
    model = DynamicViT(pruned(vit.config, keep=1.0, prune_before=(1, 2, 3))).eval()
    missing, unexpected = model.load_state_dict(vit.state_dict(), strict=False)
    assert not unexpected
    assert missing and all(key.startswith("predictors.") for key in missing)
    x = torch.randn(2, 3, 224, 224)
    assert torch.equal(model(x), vit(x))


def test_any_row_of_vits_can_drop_tokens():
    config = pruned(model_config("vit_mini16"), prune_before=(2, 4), keep=0.5)
    assert (config.pool, config.stem, config.depth, config.kept(36)) == ("mean", "conv", 6, (18, 9))


# --- Weights, with the authors' names ---


class Published(nn.Module):
    """The authors' model: timm's ViT, predictors of theirs, inference as their paper says it."""

    def __init__(self, keep: float, **sizes: int) -> None:
        super().__init__()
        self.vit = timm.create_model("deit_small_patch16_224", img_size=(64, 64), **sizes)
        d = self.vit.embed_dim
        self.keep = keep
        self.score_predictor = nn.ModuleList(
            nn.ModuleDict(
                {
                    "in_conv": nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d), nn.GELU()),
                    "out_conv": nn.Sequential(
                        nn.Linear(d, d // 2),
                        nn.GELU(),
                        nn.Linear(d // 2, d // 4),
                        nn.GELU(),
                        nn.Linear(d // 4, 2),
                    ),
                }
            )
            for _ in range(3)
        )

    def scores(self, stage, x):
        predictor = self.score_predictor[stage]
        z = predictor["in_conv"](x)
        half = z.shape[2] // 2
        whole = z[..., half:].mean(dim=1, keepdim=True).expand(-1, z.shape[1], -1)
        return predictor["out_conv"](torch.cat([z[..., :half], whole], dim=2))

    def forward(self, x):
        vit = self.vit
        x = vit.patch_embed(x)
        x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], dim=1) + vit.pos_embed
        for i, block in enumerate(vit.blocks):
            if i in (1, 2, 3):
                score = F.log_softmax(self.scores(i - 1, x[:, 1:]), dim=-1)[..., 0]
                best = score.argsort(dim=1, descending=True)[:, : int(16 * self.keep**i)]
                x = torch.stack(
                    [row[[0, *(1 + b).tolist()]] for row, b in zip(x, best, strict=True)]
                )
            x = block(x)
        return vit.head(vit.norm(x)[:, 0])

    def state(self):
        return {k.removeprefix("vit."): v for k, v in self.state_dict().items()}


@pytest.mark.parametrize("keep", [0.7, 0.5])
def test_logits_with_the_authors_names_and_weights(keep, randomised):
    theirs = randomised(
        Published(keep, depth=4, embed_dim=32, num_heads=4, mlp_ratio=1.5, num_classes=7)
    )
    config = replace(TINY, keep=keep)
    layout, state = LAYOUTS[0], theirs.state()
    ours = DynamicViT(config).eval()
    ours.load_state_dict(layout.read(state, config))
    x = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        expected = theirs(x)
        assert 0.3 < expected.std() < 3
        close(ours(x), expected)
        small = 0.01 * torch.randn(2, 16, 32)  # where the norm's epsilon shows
        close(ours.predictors[1](small), theirs.scores(1, small))
    back = layout.write(ours.state_dict(), config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_a_file_of_theirs_is_recognised_with_its_size_and_classes():
    config = model_config("dynamicvit_ti16", classes=5, image_size=(96, 96))
    state = LAYOUTS[0].write(build(config).state_dict(), config)
    found = understand({f"module.{k}": v for k, v in state.items()}, {}, "a file")
    assert (found.layout.name, found.config) == ("dynamicvit", config)
    del state["score_predictor.2.out_conv.4.bias"]
    with pytest.raises(DataError, match=r"missing 'score_predictor\.2\.out_conv\.4\.bias'"):
        understand(state, {}, "a file")


# --- Learning what to drop ---


def new_task(model: nn.Module, teacher: nn.Module | None = None, **weights: float) -> Prune:
    sees = Preprocess(size=(64, 64), patch=(16, 16))
    return Prune(
        model,
        ClassifyConfig(),
        named(*"abcdefg"),
        PruneConfig(**weights),
        teacher and Teacher(teacher, sees, sees),
    )


def new_batch() -> Batch:
    targets = F.one_hot(torch.arange(6) % 7, 7).float()
    return labelled(torch.randn(6, 3, 64, 64), targets)


def plain(config: DynamicViTConfig) -> ViT:
    return ViT(ViTConfig(depth=4, width=32, heads=4, mlp=48, classes=7, image_size=(64, 64)))


def test_the_loss_is_the_papers_written_out(randomised):
    model, teacher = randomised(DynamicViT(TINY)), randomised(plain(TINY))
    batch = new_batch()
    model.train()
    torch.manual_seed(1)
    task = new_task(model, teacher)
    losses = task.loss(batch)
    assert "tokens" in task.apart and not new_task(model).apart  # it is no mean over images
    torch.manual_seed(1)
    reduced = model.reduced(batch.images)
    logits = model.head(reduced.features.pooled)
    with torch.no_grad():
        seen = teacher.features(batch.images)
        theirs = teacher.head(seen.pooled).softmax(dim=1)
    ratio = 0.0
    for stage, left in enumerate(reduced.decisions):
        ratio += sum((row.mean() - 0.7 ** (stage + 1)) ** 2 for row in left) / 6 / 3
    chosen = reduced.decisions[-1].bool()
    parts = {
        "labels": -(batch.targets["classes"] * logits.log_softmax(dim=1)).sum(dim=1).mean(),
        "ratio": 2 * ratio,
        "teacher": 0.5 * (theirs * (theirs.log() - logits.log_softmax(dim=1))).sum(dim=1).mean(),
        "tokens": 0.5 * (reduced.features.patches - seen.patches)[chosen].square().mean(),
    }
    for name, expected in parts.items():
        close(losses.parts[name], expected)
    close(losses.total, sum(parts.values()))
    close(losses.parts["left"], chosen.float().mean())


def test_without_a_teacher_labels_and_ratio_remain(randomised):
    losses = new_task(randomised(DynamicViT(TINY)).train()).loss(new_batch())
    assert list(losses.parts) == ["labels", "ratio", "left"]


def test_the_ratio_is_learned(randomised):
    """From half of the tokens at each stage to as many as wanted, by the predictors alone."""
    model = DynamicViT(replace(TINY, keep=0.9)).train()
    model.requires_grad_(False).predictors.requires_grad_(True)
    task, batch = new_task(model, ratio=10.0), new_batch()
    optimizer = torch.optim.AdamW(model.predictors.parameters(), lr=1e-2)
    shares = []
    for _ in range(60):
        losses = task.loss(batch)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        shares.append(losses.parts["left"].item())
    assert sum(shares[:3]) / 3 < 0.4
    assert sum(shares[-10:]) / 10 == pytest.approx(0.9**3, abs=0.1)


def test_the_parts_alone():
    left = (torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1]]),)
    close(ratio_loss(left, (0.5,)), torch.tensor(0.125))
    one, other = torch.zeros(1, 3, 2), torch.tensor([[[1.0, 3.0], [9.0, 9.0], [2.0, 0.0]]])
    close(token_loss(one, other, torch.tensor([[1.0, 0, 1]])), torch.tensor(3.5))


@pytest.mark.parametrize("several", [False, True])
def test_predicts_as_any_classifier(several, randomised):
    task = new_task(randomised(DynamicViT(TINY)))
    task.multi_label = several
    probabilities = task.eval().predict(new_batch())
    assert probabilities.shape == (6, 7)
    if several:
        assert task.train().loss(new_batch()).total.isfinite()
    else:
        close(probabilities.sum(dim=1), torch.ones(6))


def test_what_cannot_be_pruned_or_compared_is_refused(randomised):
    with pytest.raises(UsageError, match="such as dynamicvit_s16, not for the family 'vit'"):
        new_task(plain(TINY))
    narrow = ViT(ViTConfig(depth=1, width=16, heads=2, mlp=8, classes=7, image_size=(64, 64)))
    with pytest.raises(UsageError, match="4x4 of width 32 here, 4x4 of width 16 there"):
        new_task(DynamicViT(TINY), narrow)
    assert new_task(DynamicViT(TINY), narrow, tokens=0.0).loss(new_batch()).total.isfinite()
    with pytest.raises(UsageError, match=r"prune\.ratio cannot be negative"):
        PruneConfig(ratio=-1.0)
