"""EoMT's files: transformers' own models give the same, and ours come back as they were."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers as hf

from close import close
from vitrail.errors import DataError
from vitrail.heads import SegmentHeadConfig, build_segmenter
from vitrail.models import ViTConfig, build
from vitrail.tasks.matching import SetLossConfig, objects_of, set_loss
from vitrail.weights.eomt import from_eomt, head_of, layout_of, to_eomt

DINOV2 = ViTConfig(
    depth=4,
    width=32,
    heads=2,
    mlp=128,
    image_size=(64, 64),
    classes=0,
    layer_scale=1e-5,
    registers=4,
    prefix_position=False,
)
DINOV3 = replace(DINOV2, position="rope", mlp=48)
CONFIGS = {
    "dinov2": DINOV2,
    "patches of 14": replace(DINOV2, patch=(14, 14), image_size=(42, 42)),
    "a gated MLP": replace(DINOV2, activation="swiglu", mlp=88),
    "dinov3": DINOV3,
}
HEAD = SegmentHeadConfig(head="queries", queries=7, joint_blocks=2)
CLASSES = 5


def theirs(config: ViTConfig) -> torch.nn.Module:
    common = {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "image_size": config.image_size[0],
        "patch_size": config.patch[0],
        "layer_norm_eps": config.norm_eps,
        "num_blocks": HEAD.joint_blocks,
        "num_queries": HEAD.queries,
        "num_upscale_blocks": 1 if config.patch[0] == 14 else 2,
        "num_labels": CLASSES,
        "train_num_points": 500,
    }
    if config.position == "rope":
        shape = hf.EomtDinov3Config(**common, intermediate_size=config.mlp, pos_embed_rescale=None)
        return hf.EomtDinov3ForUniversalSegmentation(shape)
    gated = config.activation == "swiglu"
    return hf.EomtForUniversalSegmentation(hf.EomtConfig(**common, use_swiglu_ffn=gated))


def segmenter(config: ViTConfig):
    return build_segmenter(build(config), HEAD, CLASSES)


@pytest.mark.parametrize("case", CONFIGS)
def test_the_same_outputs_as_transformers(case, randomised):
    config = CONFIGS[case]
    other = randomised(theirs(config))
    state = other.state_dict()
    assert head_of(state) == (HEAD, CLASSES)
    model = segmenter(config).eval()
    model.load_state_dict(from_eomt(state, config))
    x = torch.randn(2, 3, *config.image_size)
    other.attn_mask_probs.zero_()  # a new one has ones, and then masks in eval too
    with torch.inference_mode():
        expected, (found,) = other(x), model.predictions(x)
    close(found.classes, expected.class_queries_logits)
    close(found.masks, expected.masks_queries_logits)


@pytest.mark.parametrize("case", CONFIGS)
def test_the_same_training_as_transformers(case, randomised):
    """With every query looking through its mask: what each block is shown, and its gradients."""
    config = CONFIGS[case]
    other = randomised(theirs(config)).train()
    model = segmenter(config).train()
    model.load_state_dict(from_eomt(other.state_dict(), config))
    other.attn_mask_probs.fill_(1)
    x = torch.randn(2, 3, *config.image_size)
    expected, found = other(x), model.predictions(x)
    assert len(found) == 3
    close(found[-1].classes, expected.class_queries_logits)
    close(found[-1].masks, expected.masks_queries_logits)
    plain = model.eval().predictions(x)[0]
    assert (plain.masks - found[-1].masks).abs().max() > 0.01 * plain.masks.abs().max()
    found[-1].masks.square().mean().backward()
    expected.masks_queries_logits.square().mean().backward()
    close(model.head.queries.grad, other.query.weight.grad, 1e-4)


@pytest.mark.parametrize("case", ["dinov2", "dinov3"])
def test_the_same_loss_as_transformers(case, randomised):
    """Of all three predictions, with the points of one seed."""
    config = CONFIGS[case]
    other = randomised(theirs(config)).train()
    model = segmenter(config).train()
    model.load_state_dict(from_eomt(other.state_dict(), config))
    other.attn_mask_probs.fill_(1)
    other.criterion.empty_weight.copy_(torch.tensor([*[1.0] * CLASSES, 0.1]))
    x = torch.randn(2, 3, 64, 64)
    labels = F.interpolate(torch.rand(2, 1, 3, 4), (64, 64))[:, 0] * CLASSES
    objects = [objects_of(one.long()) for one in labels]
    torch.manual_seed(5)
    expected = other(
        x,
        mask_labels=[one.masks.float() for one in objects],
        class_labels=[one.classes for one in objects],
    ).loss
    generator = torch.Generator().manual_seed(5)
    found = set_loss(
        model.predictions(x, torch.zeros(2, 2, HEAD.queries)),
        objects,
        SetLossConfig(points=500),
        lambda i, shape: torch.rand(shape, generator=generator),
    )
    close(found.total, expected)


@pytest.mark.parametrize("layout", ["huggingface", "authors"])
@pytest.mark.parametrize("case", CONFIGS)
def test_there_and_back(case, layout, randomised):
    config = CONFIGS[case]
    model = randomised(segmenter(config))
    state = model.state_dict()
    if config.position == "rope":
        for key, tensor in state.items():
            if key.endswith("qkv.bias"):
                tensor[32:64] = 0  # keys have none there
        if layout == "authors":
            written = {"q.weight": state["head.queries"]}
            with pytest.raises(DataError, match="differences to DINOv3's weights"):
                from_eomt(written, config)
            return
    written = to_eomt(state, config, 2, layout)
    assert layout_of(written) == layout
    assert head_of(written) == (HEAD, CLASSES)
    if layout == "huggingface":
        other = theirs(config).state_dict()
        assert {k: t.shape for k, t in written.items()} == {k: t.shape for k, t in other.items()}
        assert torch.equal(written["criterion.empty_weight"], other["criterion.empty_weight"])
    else:
        assert {"network.encoder.backbone.pos_embed", "network.upscale.0.norm.weight"} <= set(
            written
        )
    back = from_eomt(written, config)
    assert list(back) and set(back) == set(state)
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())


def test_differences_are_added(randomised):
    model = randomised(segmenter(DINOV3))
    state = from_eomt(randomised(theirs(DINOV3)).state_dict(), DINOV3)
    base = model.backbone.state_dict()
    parts = {
        key: tensor - base[key.removeprefix("backbone.")] if key.startswith("backbone.") else tensor
        for key, tensor in state.items()
    }
    for key, tensor in parts.items():
        if key.endswith("qkv.bias"):
            base[key.removeprefix("backbone.")][32:64] = tensor[32:64] = 0
    written = to_eomt(parts, DINOV3, 2)
    with pytest.raises(DataError, match=r"differences to DINOv3's weights, not weights: .*base="):
        from_eomt(written, DINOV3)
    whole = from_eomt(written, DINOV3, base)
    close(whole["backbone.stem.proj.weight"], state["backbone.stem.proj.weight"])
    close(whole["head.queries"], state["head.queries"])
    with pytest.raises(DataError, match=r"'stem.proj.weight' are missing, or of another shape"):
        from_eomt(written, DINOV3, {k: t for k, t in base.items() if k != "stem.proj.weight"})


def test_a_class_tokens_row_is_added_to_it(randomised):
    config = replace(DINOV2, prefix_position=True)
    model = randomised(segmenter(config))
    again = segmenter(DINOV2).eval()
    again.load_state_dict(from_eomt(to_eomt(model.state_dict(), config, 2), DINOV2))
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        close(again(x), model(x))


def test_what_does_not_fit(randomised):
    state = to_eomt(randomised(segmenter(DINOV2)).state_dict(), DINOV2, 2)
    with pytest.raises(DataError, match="this is no EoMT: it has neither"):
        layout_of({"vit.head": torch.zeros(1)})
    with pytest.raises(DataError, match=r"no 'class_predictor.weight': it is not whole"):
        head_of({k: t for k, t in state.items() if not k.startswith("class_")})
    with pytest.raises(DataError, match=r"missing 'upscale_block.block.1.conv1.weight'"):
        from_eomt({k: t for k, t in state.items() if "block.1.conv1" not in k}, DINOV2)
    with pytest.raises(DataError, match=r"of another shape 'mask_head.fc1.bias \(3,\)'"):
        from_eomt({**state, "mask_head.fc1.bias": torch.zeros(3)}, DINOV2)
    with pytest.raises(DataError, match=r"unexpected 'layers.9.norm1.weight'"):
        from_eomt({**state, "layers.9.norm1.weight": torch.zeros(32)}, DINOV2)
    with pytest.raises(DataError, match="no counterpart of qk_norm=True"):
        normed = replace(DINOV2, qk_norm=True)
        to_eomt(segmenter(normed).state_dict(), normed, 2)
    with pytest.raises(DataError, match=r"no counterpart of 'head.norm.weight'"):
        linear = build_segmenter(build(DINOV2), SegmentHeadConfig(), CLASSES)
        to_eomt({**linear.state_dict(), "head.queries": torch.zeros(1, 32)}, DINOV2, 2)
    with pytest.raises(DataError, match="one activation for its blocks and its head"):
        gated = replace(DINOV3, activation="swiglu")
        to_eomt(segmenter(gated).state_dict(), gated, 2)
