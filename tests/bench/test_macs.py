"""Counted multiply-accumulates against published ones and against a count by hand."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vitrail.bench.macs import macs
from vitrail.errors import UsageError
from vitrail.models import ViTConfig, model_config

# In billions, at 224 pixels and at 384: the rows of google-research's configs, by the formula
# (systems.md 1.1; timm's table has 0.1% more, for it counts pooling and norms).
VIT = {
    "vit_ti16": (1.254, 4.682),
    "vit_s32": (1.143, 3.443),
    "vit_s16": (4.599, 15.490),
    "vit_b32": (4.409, 13.044),
    "vit_b16": (17.564, 55.484),
    "vit_b8": (78.148, 294.0),
    "vit_l32": (15.378, 45.276),
    "vit_l16": (61.555, 191.066),
}
# At the row's own size. [dyn] DynamicViT at keep ratio 0.7, predictors included. [vj] Mixer.
# [timm] its results table.
OTHERS = {
    "vit_h14": 167.295,
    "vit_s8": 22.41,
    "vit_l14": 81.01,
    "dynamicvit_s16": 2.981,  # [dyn]
    "dynamicvit_b16": 11.476,  # [dyn]
    "mixer_s32": 1.002,  # [vj]
    "mixer_s16": 3.777,  # [vj]
    "mixer_b32": 3.238,  # [vj]
    "mixer_b16": 12.602,  # [vj]
    "mixer_l32": 11.253,  # [vj]
    "mixer_l16": 44.548,  # [vj]
    "mixer_h14": 120.99,  # the formula
    "gmlp_ti16": 1.34,  # [timm]
    "gmlp_s16": 4.42,  # [timm]
    "gmlp_b16": 15.78,  # [timm]
    "twins_svt_s": 2.94,  # [timm]
    "twins_svt_b": 8.59,  # [timm]
    "twins_svt_l": 15.15,  # [timm]
    "twins_pcpvt_s": 3.83,  # [timm]
    "twins_pcpvt_b": 6.68,  # [timm]
    "twins_pcpvt_l": 9.84,  # [timm]
    "r50_b16": 21.66,  # [timm]
    "r50_l32": 19.58,  # [timm]
    "resnet50": 4.11,  # [timm]
}
# timm's table adds what norms, activations, weight standardisation and pooling cost, which is more
# than a hundredth of these: name -> timm's name, and its table's number.
LIGHT = {
    "r_ti16": ("vit_tiny_r_s16_p8_224", 0.44),
    "r26_s32": ("vit_small_r26_s32_224", 3.56),
    "mobilevit_s": ("mobilevit_s", 2.03),
    "mobilevit_xs": ("mobilevit_xs", 1.05),
    "mobilevit_xxs": ("mobilevit_xxs", 0.42),
}


def billions(name: str, side: int | None = None) -> float:
    return macs(model_config(name), side and (side, side)) / 1e9


def first_of_their_kind(names: Iterable[str], *kept: str) -> list[Any]:
    """Those to count; the others are larger ones of the same build, and slow."""
    return [pytest.param(name, marks=[] if name in kept else [pytest.mark.slow]) for name in names]


@pytest.mark.parametrize("name", first_of_their_kind(VIT, "vit_ti16", "vit_s32", "vit_b16"))
def test_vit_as_published(name):
    assert billions(name) == pytest.approx(VIT[name][0], rel=0.001)
    assert billions(name, 384) == pytest.approx(VIT[name][1], rel=0.001)


@pytest.mark.parametrize(
    "name",
    first_of_their_kind(
        OTHERS,
        *("vit_h14", "dynamicvit_s16", "mixer_s32", "mixer_b16", "gmlp_s16", "twins_svt_s"),
        *("twins_pcpvt_s", "r50_b16", "resnet50"),
    ),
)
def test_others_as_published(name):
    assert billions(name) == pytest.approx(OTHERS[name], rel=0.01)


@pytest.mark.parametrize("name", LIGHT)
def test_as_timms_own_model_by_the_same_counter(name):
    import timm

    theirs, table = LIGHT[name]
    config = model_config(name)
    with torch.device("meta"):
        model = timm.create_model(theirs).eval().requires_grad_(False)
        image = torch.empty(1, 3, *config.image_size)
        with FlopCounterMode(display=False) as counter:
            model(image)
    assert macs(config) == counter.get_total_flops() // 2
    assert 0.96 * table < billions(name) <= table


def test_by_hand():
    config = ViTConfig(
        depth=3, width=48, heads=4, mlp=100, patch=(8, 4), image_size=(32, 24), classes=7
    )
    n, d = 4 * 6, 48
    t = n + 1
    block = t * (4 * d * d + 2 * d * 100) + 2 * t * t * d
    assert macs(config) == n * (3 * 8 * 4) * d + 3 * block + d * 7


def test_what_drops_tokens_is_counted_as_it_runs():
    full, fewer = billions("deit_s16"), billions("dynamicvit_s16")
    assert 1 - fewer / full == pytest.approx(0.352, abs=0.001)  # the paper: 31% to 37% at 0.7


def test_attention_grows_with_the_square_of_the_tokens():
    at = [billions("vit_ti16", side) for side in (224, 448)]
    assert 4 < at[1] / at[0] < 16


def test_nothing_is_allocated():
    before = torch.get_default_device()
    assert macs(model_config("vit_e14")) > 9e11  # 3.9 billion parameters
    assert torch.get_default_device() == before


def test_a_size_that_cannot_be():
    with pytest.raises(UsageError, match="cannot be cut into patches"):
        macs(model_config("vit_b16"), (225, 224))
