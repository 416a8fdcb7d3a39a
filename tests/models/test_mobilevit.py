"""MobileViT: published counts, the outputs of timm and transformers, images of any size."""

from dataclasses import fields, replace
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

from vitrail.errors import UsageError
from vitrail.models.mobilevit import (
    ROWS,
    InvertedResidual,
    MobileViT,
    MobileViTBlock,
    MobileViTConfig,
    fold,
    unfold,
)
from vitrail.weights import mobilevit as weights

COUNTS = {  # timm's: 1.27, 2.32 and 5.58 million in the paper
    "mobilevit_xxs": 1_272_024,
    "mobilevit_xs": 2_317_848,
    "mobilevit_s": 5_578_632,
}
TINY = MobileViTConfig(
    stem_width=8,
    widths=(8, 16, 24),
    depths=(1, 2, 1),
    expansion=2,
    token_widths=(16, 24),
    token_depths=(2, 1),
    mlp=(24, 40),
    heads=2,
    last_width=32,
    image_size=(50, 75),
    classes=5,
    dropout=0.0,
)
close = partial(torch.testing.assert_close, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ROWS)
def test_as_many_parameters_as_published(name):
    assert list(ROWS) == list(COUNTS)
    with torch.device("meta"):
        assert sum(p.numel() for p in MobileViT(ROWS[name]).parameters()) == COUNTS[name]


# --- the same outputs ---


class Transformers(nn.Module):
    """A model of theirs that gets images as their processor gives them: blue, green, red."""

    def __init__(self, config: MobileViTConfig) -> None:
        super().__init__()
        self.model = hf.MobileViTForImageClassification(
            hf.MobileViTConfig(
                num_channels=config.channels,
                hidden_sizes=list(config.token_widths),
                neck_hidden_sizes=[config.stem_width, *config.widths, config.last_width],
                expand_ratio=float(config.expansion),
                num_labels=config.classes,
            )
        )
        self.state_dict = self.model.state_dict

    def forward(self, x):
        return self.model(x.flip(1)).logits


XXS = ROWS["mobilevit_xxs"]
# Config; theirs; our layout of theirs.
CASES = {
    "xxs, timm": (XXS, partial(timm.create_model, "mobilevit_xxs"), weights.TIMM_MOBILEVIT),
    "xs, timm, one channel": (
        replace(ROWS["mobilevit_xs"], channels=1, classes=7),
        partial(timm.create_model, "mobilevit_xs", in_chans=1, num_classes=7),
        weights.TIMM_MOBILEVIT,
    ),
    "s, timm": (
        ROWS["mobilevit_s"],
        partial(timm.create_model, "mobilevit_s"),
        weights.TIMM_MOBILEVIT,
    ),
    "xxs, transformers": (XXS, partial(Transformers, XXS), weights.HUGGINGFACE_MOBILEVIT),
    "xs, transformers": (
        ROWS["mobilevit_xs"],
        partial(Transformers, ROWS["mobilevit_xs"]),
        weights.HUGGINGFACE_MOBILEVIT,
    ),
}
SIZES = [(64, 96), (128, 64), (75, 33), (97, 130), (16, 16)]


@torch.no_grad()
def lively(model: nn.Module) -> nn.Module:
    """With the statistics of the batch norms' own inputs, so that images tell in the logits: at
    random the signal fades from block to block, and faults with it.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    first = next(p for p in model.parameters() if p.ndim == 4)
    model.train()(images(16, first.shape[1], (64, 96)))
    assert all(norm.running_var.min() > 0 for norm in norms)
    return model.eval()


def images(count: int, channels: int, size: tuple[int, int]) -> torch.Tensor:
    """Large shapes and some noise: of noise alone, every image has the same mean."""
    shapes = F.interpolate(torch.rand(count, channels, 2, 2).round(), size)
    return 0.8 * shapes + 0.2 * torch.rand(count, channels, *size)


def ours_with(theirs: nn.Module, config: MobileViTConfig, layout: weights.FamilyLayout):
    """Ours with their weights, by the names of our layout."""
    turned = layout.turn(theirs.state_dict())
    ours = MobileViT(config).eval()
    state, used = {}, []
    for key in ours.state_dict():
        names = layout.theirs(key)
        names = [names] if isinstance(names, str) else list(names)
        state[key] = torch.cat([turned[n] for n in names]) if names[1:] else turned[names[0]]
        used += names
    assert sorted(used) == sorted(turned)
    ours.load_state_dict(state)
    return ours


@pytest.mark.parametrize("case", CASES)
def test_logits_with_their_weights(case, randomised):
    config, build, layout = CASES[case]
    theirs = lively(randomised(build()))
    ours = ours_with(theirs, config, layout)
    for size in SIZES:  # where a map has an odd side, it is scaled
        x = images(3, config.channels, size)
        with torch.inference_mode():
            expected = theirs(x)
            scale = expected.std().clamp(min=1)
            assert (expected - expected.mean(0)).std() > 5e-3 * scale, "images tell"
            close(ours(x) / scale, expected / scale)
            close(ours(x[:1]) / scale, theirs(x[:1]) / scale)


def test_the_order_of_the_channels_matters_to_transformers_files(randomised):
    """Else the test above would say nothing of it."""
    theirs = lively(randomised(Transformers(XXS)))
    x = images(2, 3, (64, 64))
    with torch.inference_mode():
        assert (theirs(x) - theirs.model(x).logits).abs().max() > 0.01


@pytest.mark.parametrize("size", [(64, 96), (75, 97)], ids=str)
def test_the_maps_are_timms(size, randomised):
    theirs = lively(randomised(timm.create_model("mobilevit_xxs", features_only=True)))
    whole = randomised(timm.create_model("mobilevit_xxs"))
    loaded = whole.load_state_dict(
        {k.replace("stages_", "stages."): t for k, t in theirs.state_dict().items()}, strict=False
    )
    assert set(loaded.missing_keys) == {"head.fc.weight", "head.fc.bias"}
    ours = ours_with(whole, XXS, weights.TIMM_MOBILEVIT)
    x = images(2, 3, size)
    with torch.inference_mode():
        features = ours.features(x)
        *maps, last = theirs(x)
    # timm calls the expanded map the last stage's.
    for map_, expected in zip(features.maps[:-1], maps, strict=True):
        close(map_, expected)
    close(features.patches.mT.reshape(last.shape), last)


def test_every_norm_has_timms_epsilon():
    theirs = dict(timm.create_model("mobilevit_xxs").named_modules())
    kinds = set()
    for name, module in MobileViT(XXS).named_modules():
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            other = theirs[weights.TIMM_MOBILEVIT.theirs(f"{name}.weight").removesuffix(".weight")]
            assert module.eps == other.eps, name
            kinds.add(type(module).__name__)
    assert kinds == {"LayerNorm", "BatchNorm"}


# --- what attends to what ---


def test_unfolding_takes_the_same_place_of_every_patch():
    x = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    tokens = unfold(x, side=2)
    assert tokens.shape == (2 * 4, 6, 3)
    # Image 1, the right cell of a patch's lower row; the fifth patch lies in row 1, column 1.
    assert torch.equal(tokens[1 * 4 + 3, 4], x[1, :, 3, 3])
    assert torch.equal(fold(tokens, (2, 3), side=2), x)


def test_a_cell_attends_to_those_at_its_own_place(randomised):
    """Without the convolutions, one cell moves every second cell of every second row, no other."""
    block = randomised(MobileViTBlock(TINY, 8, 0, 0.0))
    y = torch.randn(1, 16, 6, 8)
    moved = y.clone()
    moved[0, :, 2, 3] += 1
    ways = [fold(block.blocks(unfold(z, 2)), (3, 4), 2) for z in (y, moved)]
    changed = (ways[0] - ways[1]).abs().amax(dim=(0, 1)) > 1e-7
    expected = torch.zeros(6, 8, dtype=torch.bool)
    expected[0::2, 1::2] = True
    assert torch.equal(changed, expected)


# --- the contract of a family ---


def test_features(randomised):
    model = randomised(MobileViT(TINY))
    x = torch.rand(3, 3, 50, 75)
    features = model.features(x)
    assert features.grid == TINY.grid == (7, 10)
    assert features.strides == ((2, 2), (4, 4), (8, 8))
    assert TINY.stride == (8, 8)
    assert [m.shape[1:] for m in features.maps] == [(8, 25, 38), (16, 13, 19), (24, 7, 10)]
    assert features.prefix.shape == (3, 0, 32)
    expanded = model.expand(features.maps[-1])
    close(features.patches[1, 11], expanded[1, :, 1, 1])
    close(features.pooled, expanded.mean((2, 3)))
    assert model.logits(features).shape == (3, 1, 5)
    assert torch.equal(model(x), model.logits(features)[:, 0])
    bare = MobileViT(replace(TINY, classes=0)).eval()
    assert bare.head is None
    bare.load_state_dict({k: t for k, t in model.state_dict().items() if "head" not in k})
    assert torch.equal(bare(x), features.pooled)
    strided = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    close(model(strided), model(x))


@pytest.mark.parametrize("size", [(256, 256), (225, 224), (31, 65), (1, 1)], ids=str)
def test_the_grid_is_known_beforehand(size):
    config = replace(XXS, image_size=size)
    assert config.stride == (32, 32)
    assert MobileViT(config).eval().features(torch.zeros(1, 3, *size)).grid == config.grid


def test_shape():
    assert ROWS["mobilevit_s"].shape == (
        "5 stages, widths 32, 64, 96, 128, 160, the last 3 with transformers of 2, 4, 3 blocks, "
        "widths 144, 192, 240"
    )


def test_blocks_are_named_first_to_last():
    model = MobileViT(TINY)
    names = ["stages.0.0", "stages.1.0", "stages.1.1", "stages.1.2", "stages.2.0", "stages.2.1"]
    assert model.block_names() == names
    assert [name for name, _ in model.named_modules() if name in names] == names
    kinds = [type(model.get_submodule(name)) for name in names]
    assert kinds == [InvertedResidual] * 3 + [MobileViTBlock, InvertedResidual, MobileViTBlock]


@pytest.mark.parametrize("size", [(1, 1), (32, 32), (50, 31)], ids=str)
def test_it_trains_on_one_image_of_any_size_in_bfloat16(size):
    model = MobileViT(replace(TINY, dropout=0.1)).train()
    x = torch.rand(1, *size[::-1], 3).permute(0, 3, 2, 1)
    if size == (1, 1):  # torch 2.13 on CPUs: strided kernels get no gradient of one pixel, but NaN
        x = torch.rand(1, 3, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(x).float(), torch.tensor([1]))
    loss.backward()
    assert model.head.weight.grad.abs().sum() > 0
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_inference_in_bfloat16_is_near(randomised):
    model = randomised(MobileViT(TINY))
    x = torch.rand(2, 3, 50, 75)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        low = model(x).float()
    torch.testing.assert_close(low, model(x), atol=0.1, rtol=0)


def test_a_new_model_says_nothing_and_can_learn():
    model = MobileViT(TINY).train()
    x = torch.rand(4, 3, 48, 64)
    assert model(x).abs().max() == 0, "a head of zeros"
    step = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(model(x), torch.arange(4))
        step.zero_grad()
        loss.backward()
        step.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


CHANGES = {
    "stem_width": 16,
    "widths": (8, 16, 32),
    "depths": (2, 2, 1),
    "expansion": 3,
    "token_widths": (16, 16),
    "token_depths": (2, 2),
    "mlp": (24, 24),
    "heads": 4,
    "unfold": 3,
    "last_width": 16,
    "image_size": (50, 76),
    "channels": 1,
    "classes": 6,
    "norm_eps": 0.5,
    "dropout": 0.5,
    "drop_path": 0.5,
}


def test_every_field_is_tried():
    assert {field.name for field in fields(MobileViTConfig)} == {"family", *CHANGES}


@pytest.mark.parametrize("field", [f for f in CHANGES if f != "image_size"])
def test_every_field_has_an_effect(field, randomised):
    def outputs(config: MobileViTConfig) -> list[torch.Tensor]:
        model = MobileViT(config)
        model.load_state_dict(state)
        torch.manual_seed(1)
        return [model.train()(x), model.eval()(x)]

    before, after = MobileViT(TINY), MobileViT(replace(TINY, **{field: CHANGES[field]}))
    shapes = [{k: t.shape for k, t in m.state_dict().items()} for m in (before, after)]
    if shapes[0] == shapes[1]:
        state, x = randomised(before).state_dict(), torch.rand(4, 3, 50, 75)
        pairs = zip(outputs(TINY), outputs(after.config), strict=True)
        assert max((a - b).abs().max() for a, b in pairs) > 1e-4


def test_stochastic_depth_grows_and_acts_in_training_alone(randomised):
    model = randomised(MobileViT(replace(TINY, drop_path=0.5)))
    rates = []
    for name in model.block_names():
        block = model.get_submodule(name)
        inner = block.blocks if isinstance(block, MobileViTBlock) else [block]
        rates.append({part.drop_path.rate for part in inner})
    assert rates == [{0.5 * i / 5} for i in range(6)]
    plain = MobileViT(TINY).eval()
    plain.load_state_dict(model.state_dict())
    x = torch.rand(8, 3, 32, 48)
    assert torch.equal(model(x), plain(x))


def test_only_a_residual_with_a_shortcut_is_left_out():
    """Without one, there would be nothing left."""
    x = torch.rand(64, 8, 6, 6)
    halved = InvertedResidual(8, 8, 2, expansion=2, drop_path=0.9).train()(x)
    assert (halved.flatten(1).abs().sum(1) > 0).all()
    kept = InvertedResidual(8, 8, 1, expansion=2, drop_path=0.9).train()(x)
    assert 40 < (kept == x).flatten(1).all(1).sum() < 64


def test_what_it_does_not_take_is_refused():
    model = MobileViT(TINY)
    with pytest.raises(UsageError, match="have 1 channels, the model takes 3: build it with chan"):
        model(torch.zeros(1, 1, 32, 48))
    with pytest.raises(UsageError, match="mobilevit takes resize crop or squash"):
        model(torch.zeros(1, 3, 32, 48), torch.tensor([[1, 1]]))
    with pytest.raises(UsageError, match="at least 1x1 pixels, not 0x32"):
        TINY.check_size((0, 32))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"family": "vit"}, "of the family"),
        ({"depths": (1, 0, 1)}, r"depths has a number from 1 for each stage, not \(1, 0, 1\)"),
        ({"mlp": ()}, "mlp has a number from 1"),
        ({"depths": (1, 2)}, "are of the same stages: give as many of each"),
        ({"mlp": (24,)}, "are of the same stages: give as many of each"),
        (
            {"mlp": (8,) * 4, "token_widths": (8,) * 4, "token_depths": (1,) * 4},
            "are of the last of 3 stages, and cannot have 4 entries",
        ),
        ({"heads": 3}, "width 16 is not divisible by 3 heads"),
        ({"expansion": 0}, "expansion must be at least 1, not 0"),
        ({"unfold": 0}, "unfold must be at least 1, not 0"),
        ({"channels": 0}, "channels must be at least 1"),
        ({"classes": -1}, "classes cannot be negative"),
        ({"norm_eps": 0.0}, "norm_eps must be in"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\)"),
        ({"image_size": (32,)}, "image_size is a pair"),
    ],
    ids=str,
)
def test_a_config_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        replace(TINY, **changes)
