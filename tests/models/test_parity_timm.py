"""The same weights give the same logits as timm, converted both ways."""

from functools import partial

import pytest
import timm
import torch

from close import close
from vitrail.errors import DataError
from vitrail.models import ViT, ViTConfig, build, model_config
from vitrail.weights import from_timm, to_timm

# Ours and its changes, theirs and its changes. Width and heads are the published ones but where
# that would be slow; depth 2 runs every line that depth 12 does. With an epsilon of 0.1 a norm that
# did not get it would show.
EPS = {"norm_layer": partial(torch.nn.LayerNorm, eps=0.1)}
CASES = {
    "vit_ti16, full depth": ("vit_ti16", {}, "vit_tiny_patch16_224", {}),
    "vit_s16": ("vit_s16", {"depth": 2}, "vit_small_patch16_224", {"depth": 2}),
    "vit_s32": ("vit_s32", {"depth": 2}, "vit_small_patch32_224", {"depth": 2}),
    "vit_b16": ("vit_b16", {"depth": 2}, "vit_base_patch16_224", {"depth": 2}),
    "qk_norm, no qkv bias": (
        "vit_ti16",
        {"depth": 2, "qk_norm": True, "qkv_bias": False, "norm_eps": 0.1},
        "vit_tiny_patch16_224",
        {"depth": 2, "qk_norm": True, "qkv_bias": False} | EPS,
    ),
    "mean pooling": (
        "vit_ti16",
        {"depth": 2, "pool": "mean", "class_token": False},
        "vit_tiny_patch16_224",
        {"depth": 2, "global_pool": "avg", "fc_norm": False, "class_token": False},
    ),
    "registers with positions": (
        "vit_ti16",
        {"depth": 2, "registers": 4},
        "vit_tiny_patch16_224",
        {"depth": 2, "reg_tokens": 4},
    ),
    "deit_s16_distilled": (
        "deit_s16_distilled",
        {"depth": 2},
        "deit_small_distilled_patch16_224",
        {"depth": 2},
    ),
    "deit3_s16": ("deit3_s16", {"depth": 2}, "deit3_small_patch16_224", {"depth": 2}),
    "dinov2_s14": ("dinov2_s14", {"depth": 2}, "vit_small_patch14_dinov2", {"depth": 2}),
    "dinov2_s14_reg": (
        "dinov2_s14_reg",
        {"depth": 2},
        "vit_small_patch14_reg4_dinov2",
        {"depth": 2},
    ),
    "dinov2_g14's gated MLP": (
        "dinov2_g14",
        {"depth": 2, "width": 96, "heads": 3, "mlp": 256},
        "vit_giant_patch14_dinov2",
        {"depth": 2, "embed_dim": 96, "num_heads": 3},  # timm: int(96 * 5.33334) // 2 = 256
    ),
    "vit_so400m14's attention pooling": (
        "vit_so400m14",
        {"depth": 2, "width": 96, "heads": 2, "mlp": 336, "norm_eps": 0.1},
        "vit_so400m_patch14_siglip_224",  # with timm's own exact GELU: 7e-4 from the JAX original
        {
            "depth": 2,
            "embed_dim": 96,
            "num_heads": 2,
            "mlp_ratio": 3.5,
            "num_classes": 1000,
            "act_layer": "gelu_tanh",
        }
        | EPS,
    ),
}
SIZES = [(224, 224), (384, 384), (160, 256)]


def whole(size: tuple[int, int], config: ViTConfig) -> tuple[int, int]:
    """`size`, or the next smaller one of whole patches."""
    return size[0] // config.patch[0] * config.patch[0], size[1] // config.patch[1] * config.patch[
        1
    ]


def pair(case: str, size: tuple[int, int], **theirs: object) -> tuple[ViTConfig, torch.nn.Module]:
    name, changes, timm_name, timm_changes = CASES[case]
    size = whole(size, model_config(name))
    config = model_config(name, image_size=size, **changes)
    return config, timm.create_model(timm_name, img_size=size, **timm_changes, **theirs)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_logits_with_timms_weights(case, size, randomised):
    config, theirs = pair(case, size)
    state = randomised(theirs).state_dict()
    ours = ViT(config).eval()
    ours.load_state_dict(from_timm(state, config))
    x = torch.randn(2, 3, *config.image_size)
    with torch.inference_mode():
        expected = theirs(x)
        assert 0.3 < expected.std() < 3, "logits of order 1"
        close(ours(x), expected)
        close(ours(x[:1]), expected[:1])


@pytest.mark.parametrize("case", CASES)
def test_our_weights_in_timm(case, randomised):
    kind = {"no_embed_class": True} if "registers with" in case else {}
    config, theirs = pair(case, (112, 160), **kind)
    ours = randomised(ViT(config))
    theirs.load_state_dict(to_timm(ours.state_dict(), config))
    x = torch.randn(2, 3, *config.image_size)
    with torch.inference_mode():
        close(theirs.eval()(x), ours(x))


@pytest.mark.parametrize("case", [case for case in CASES if "registers with" not in case])
def test_a_timm_state_comes_back_bit_by_bit(case, randomised):
    config, theirs = pair(case, (112, 112))
    state = randomised(theirs).state_dict()
    before = {key: tensor.clone() for key, tensor in state.items()}
    back = to_timm(from_timm(state, config), config)
    assert back.keys() == before.keys()
    for key, tensor in before.items():
        assert torch.equal(back[key], tensor), key
        assert torch.equal(state[key], tensor), f"{key} was changed in place"


@pytest.mark.parametrize("size", [(384, 384), (160, 256), (96, 96)], ids=str)
@pytest.mark.parametrize("case", ["vit_s16", "deit_s16_distilled", "deit3_s16", "dinov2_s14_reg"])
def test_another_image_size_resamples_positions_as_timm_does(case, size, randomised):
    config, theirs = pair(case, (224, 224), dynamic_img_size=True)
    state = randomised(theirs).state_dict()
    ours = ViT(config).eval()
    ours.load_state_dict(from_timm(state, config))
    x = torch.randn(2, 3, *whole(size, config))
    with torch.inference_mode():
        close(ours(x), theirs(x))


@pytest.mark.parametrize("ours, theirs", [(True, True), (False, False)])
def test_whether_the_class_token_has_a_position_may_differ(ours, theirs, randomised):
    """timm's `no_embed_class` is our `prefix_position=False`; here the two disagree."""
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=2, img_size=(64, 96), no_embed_class=theirs
    )
    state = randomised(model).state_dict()
    before = state["cls_token"].clone()
    config = model_config("vit_ti16", depth=2, image_size=(64, 96), prefix_position=ours)
    converted = ViT(config).eval()
    converted.load_state_dict(from_timm(state, config))
    x = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        close(converted(x), model(x))
    assert torch.equal(state["cls_token"], before)


def timm_state(**changes: object) -> tuple[dict[str, torch.Tensor], ViTConfig]:
    config = model_config("vit_ti16", depth=1, image_size=(32, 32), **changes)
    return to_timm(build(config).state_dict(), config), config


def test_a_key_too_many_or_too_few_is_named():
    state, config = timm_state()
    del state["blocks.0.mlp.fc1.bias"]
    with pytest.raises(DataError, match=r"missing 'blocks\.0\.mlp\.fc1\.bias'"):
        from_timm(state, config)
    state, config = timm_state()
    state["norm_pre.weight"] = torch.ones(192)  # CLIP's
    with pytest.raises(DataError, match=r"unexpected 'norm_pre\.weight'"):
        from_timm(state, config)


def test_weights_of_another_shape_are_refused_with_both_shapes():
    state, _ = timm_state()
    with pytest.raises(DataError, match=r"'pos_embed' has shape \(1, 5, 192\).*\(1, 197, 192\)"):
        from_timm(state, model_config("vit_ti16", depth=1))
    state, config = timm_state()
    state["head.weight"] = state["head.weight"].T.contiguous()
    with pytest.raises(DataError, match=r"'head\.weight' has shape \(192, 1000\)"):
        from_timm(state, config)


@pytest.mark.parametrize(
    "changes, what",
    [({"stem": "conv"}, r"'stem\.convs\.0\.0\.weight'"), ({"position": "peg"}, "position='peg'")],
)
def test_what_timm_has_no_name_for_is_named(changes, what):
    config = model_config("vit_ti16", depth=1, **changes)
    with pytest.raises(DataError, match=f"timm has no counterpart of {what}"):
        to_timm(build(config).state_dict(), config)


def test_a_state_that_is_not_ours_is_refused():
    state, config = timm_state()
    with pytest.raises(DataError, match="these vitrail weights do not fit"):
        to_timm(state, config)
