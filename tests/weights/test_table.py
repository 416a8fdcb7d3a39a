"""The table of published weights says what can be built, fetched and compared."""

import re
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch

from vitrail.models import (
    MODELS,
    BiTConfig,
    ModelConfig,
    ResNetConfig,
    ViTConfig,
    build,
    count_parameters,
)
from vitrail.weights.layouts import FAMILY_LAYOUTS, LAYOUTS
from vitrail.weights.places import Hub, Url, WheelMember
from vitrail.weights.table import WEIGHTS

NAMES = sorted(WEIGHTS)
SPDX = {
    *("Apache-2.0", "MIT", "CC-BY-NC-4.0", "BSD-3-Clause"),
    *("LicenseRef-Apple-Sample-Code", "LicenseRef-DINOv3", "LicenseRef-FAIR-NC"),
}


@cache
def output(config: ModelConfig) -> torch.Size:
    """The shape of what the model makes of one image; once for all rows that are alike.

    Blocks are repeated less often: all are counted in tests/models/test_parameters.py.
    """
    if isinstance(config, ViTConfig) and config.family == "vit":
        config = replace(config, depth=1, global_blocks=())
    elif isinstance(config, ResNetConfig | BiTConfig):
        config = replace(config, depths=(1,) * len(config.depths))
    with torch.device("meta"):
        return build(config)(torch.empty(1, config.channels, *config.image_size)).shape


@pytest.mark.parametrize("name", NAMES)
def test_a_row_builds_and_takes_the_images_it_names(name: str) -> None:
    row = WEIGHTS[name]
    config = row.config
    config.check_size(row.preprocess.size)
    alike = replace(config, image_size=MODELS[row.model].image_size, classes=7)
    if isinstance(config, ViTConfig):
        alike = replace(alike, resample="bicubic", rope_grid=MODELS[row.model].rope_grid)
    assert output(alike) == (1, 7)
    assert row.preprocess.channels == row.config.channels


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_written_out(name: str) -> None:
    row = WEIGHTS[name]
    assert re.fullmatch(r"[a-z0-9_]+", name)
    assert name not in MODELS or row.model == name
    assert row.licence in SPDX
    assert row.layout in LAYOUTS or row.layout in FAMILY_LAYOUTS
    assert re.fullmatch(r"\d{4}\.\d{5}", row.paper)
    assert row.sha256 is None or re.fullmatch(r"[0-9a-f]{8}|[0-9a-f]{64}", row.sha256)
    assert row.score is None or (50 < row.score.top1 < 90 and row.score.where)
    for field, value in row.changes.items():
        assert getattr(MODELS[row.model], field) != value, f"{field} says nothing new"


def test_names_fall_into_place() -> None:
    """A name ends in the size of its images, unless that is the usual one. SigLIP 2's always say
    it, for some are of any size.
    """
    for name, row in WEIGHTS.items():
        if name.startswith("siglip2"):
            any_size = row.preprocess.resize == "native"
            assert name.endswith("naflex" if any_size else f"_{row.config.image_size[0]}"), name
            continue
        side = row.config.image_size[0]
        assert name.endswith(f"_{side}") == (side not in (224, 518)), name


def test_hashes_in_the_names_of_files_are_held_to() -> None:
    for row in WEIGHTS.values():
        if found := re.search(r"-([0-9a-f]{8})\.pth$", row.place.file_name):
            assert row.sha256 == found[1]


def test_no_two_rows_are_one_file() -> None:
    assert Counter(row.place for row in WEIGHTS.values()).most_common(1)[0][1] == 1
    hosts = Counter(
        row.place.url.split("/")[2] for row in WEIGHTS.values() if type(row.place) is Url
    )
    google, facebook = "storage.googleapis.com", "dl.fbaipublicfiles.com"
    assert set(hosts) == {google, facebook, "download.pytorch.org"}
    assert sum(isinstance(row.place, Hub) for row in WEIGHTS.values()) == 135
    assert sum(isinstance(row.place, WheelMember) for row in WEIGHTS.values()) == 1


def test_what_no_shape_shows_is_told() -> None:
    """The traps: shapes that fit, and numbers that are wrong."""
    assert WEIGHTS["mocov3_s16"].config.heads == 12
    assert WEIGHTS["deit_s16"].config.heads == 6
    for name, row in WEIGHTS.items():
        expected = {"google": "gelu_tanh", "open_clip": "gelu_quick"}.get(row.layout)
        if expected:
            assert row.config.activation == expected, name
    assert WEIGHTS["timm_vit_b16"].config.activation == "gelu"
    assert WEIGHTS["clip_b16_openai"].config.norm_eps == 1e-5


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # timm 1.0.31's counts, which agree with the makers' own in millions
        ("augreg_vit_b16", 86_567_656),
        ("augreg_vit_b16_384", 86_859_496),
        ("augreg_vit_b16_in21k", 102_595_923),
        # timm's ViT-S/16 without class token and table, with a layer of 384 before its head
        ("vit_s16_in1k_90ep", 22_050_664 - 198 * 384 + 385 * 384),
        # timm's ViT-S/32 without a row for the class token
        ("flexivit_s", 22_878_952 - 384),
        ("deit_b16_distilled_384", 87_630_032),
        ("deit3_h14", 632_126_440),
        ("dinov2_g14", 1_136_479_232),
        ("clip_b32_openai", 87_849_216),
        ("siglip_b16", 92_884_224),
        ("augreg_r26_s32_384", 36_468_392),
        ("r50_b16_in1k_384", 98_950_952),
        ("resnet50_v2", 25_557_032),
        ("bit_r50x1_in21k", 68_256_659),
        ("mixer_b16_in21k", 75_908_739),
        ("timm_gmlp_s16", 19_422_656),
    ],
)
def test_parameters(name: str, parameters: int) -> None:
    with torch.device("meta"):
        assert count_parameters(build(WEIGHTS[name].config)) == parameters


def timm_rows() -> dict[str, tuple[str, str]]:
    """Our name -> timm's, where timm's table has the same file."""
    return {
        "augreg_vit_ti16": ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", "url"),
        "augreg_vit_s32_384": ("vit_small_patch32_384.augreg_in21k_ft_in1k", "url"),
        "augreg_vit_s16_in1k_384": ("vit_small_patch16_384.augreg_in1k", "url"),
        "augreg_vit_b32": ("vit_base_patch32_224.augreg_in21k_ft_in1k", "url"),
        "augreg_vit_b32_384": ("vit_base_patch32_384.augreg_in21k_ft_in1k", "url"),
        "augreg_vit_b32_in1k": ("vit_base_patch32_224.augreg_in1k", "url"),
        "augreg_vit_b16": ("vit_base_patch16_224.augreg_in21k_ft_in1k", "url"),
        "augreg_vit_b16_in21k": ("vit_base_patch16_224.augreg_in21k", "url"),
        "augreg_vit_b16_in1k": ("vit_base_patch16_224.augreg_in1k", "url"),
        "augreg_vit_b8": ("vit_base_patch8_224.augreg_in21k_ft_in1k", "url"),
        "augreg_vit_l16_384": ("vit_large_patch16_384.augreg_in21k_ft_in1k", "url"),
        "augreg_r_ti16": ("vit_tiny_r_s16_p8_224.augreg_in21k_ft_in1k", "url"),
        "augreg_r_ti16_384": ("vit_tiny_r_s16_p8_384.augreg_in21k_ft_in1k", "url"),
        "augreg_r26_s32": ("vit_small_r26_s32_224.augreg_in21k_ft_in1k", "url"),
        "augreg_r26_s32_384": ("vit_small_r26_s32_384.augreg_in21k_ft_in1k", "url"),
        "augreg_r26_s32_in21k": ("vit_small_r26_s32_224.augreg_in21k", "url"),
        "augreg_r50_l32": ("vit_large_r50_s32_224.augreg_in21k_ft_in1k", "url"),
        "augreg_r50_l32_384": ("vit_large_r50_s32_384.augreg_in21k_ft_in1k", "url"),
        "augreg_r50_l32_in21k": ("vit_large_r50_s32_224.augreg_in21k", "url"),
        "sam_vit_b32": ("vit_base_patch32_224.sam_in1k", "url"),
        "deit_ti16": ("deit_tiny_patch16_224.fb_in1k", "url"),
        "deit_s16_distilled": ("deit_small_distilled_patch16_224.fb_in1k", "url"),
        "deit_b16_384": ("deit_base_patch16_384.fb_in1k", "url"),
        "deit3_m16": ("deit3_medium_patch16_224.fb_in1k", "url"),
        "deit3_b16_384": ("deit3_base_patch16_384.fb_in1k", "url"),
        "deit3_h14_in21k_in1k": ("deit3_huge_patch14_224.fb_in22k_ft_in1k", "url"),
        "dino_s8": ("vit_small_patch8_224.dino", "url"),
        "dino_b16": ("vit_base_patch16_224.dino", "url"),
        "dinov2_s14": ("vit_small_patch14_dinov2.lvd142m", "url"),
        "dinov2_g14_reg": ("vit_giant_patch14_reg4_dinov2.lvd142m", "url"),
        "mae_h14": ("vit_huge_patch14_224.mae", "url"),
        "clip_l14_openai": ("vit_large_patch14_clip_224.openai", "hub"),
        "siglip_so400m14_378": ("vit_so400m_patch14_siglip_378.webli", "hub"),
        "resnet18": ("resnet18.tv_in1k", "url"),
        "resnet50": ("resnet50.tv_in1k", "url"),
        "resnet50_v2": ("resnet50.tv2_in1k", "url"),
        "timm_r_ti16": ("vit_tiny_r_s16_p8_224.augreg_in21k_ft_in1k", "hub"),
        "timm_r26_s32": ("vit_small_r26_s32_224.augreg_in21k_ft_in1k", "hub"),
        "timm_resnet50": ("resnet50.a1_in1k", "hub"),
        "timm_bit_r50x1_in21k": ("resnetv2_50x1_bit.goog_in21k", "hub"),
        "twins_svt_s": ("twins_svt_small.in1k", "hub"),
        "twins_pcpvt_l": ("twins_pcpvt_large.in1k", "hub"),
        "timm_mixer_b16": ("mixer_b16_224.goog_in21k_ft_in1k", "hub"),
        "timm_mixer_b16_miil": ("mixer_b16_224.miil_in21k_ft_in1k", "hub"),
        "timm_mixer_l16": ("mixer_l16_224.goog_in21k_ft_in1k", "hub"),
        "timm_gmlp_s16": ("gmlp_s16_224.ra3_in1k", "hub"),
        "timm_vit_b16": ("vit_base_patch16_224.augreg2_in21k_ft_in1k", "hub"),
        "timm_vit_l16": ("vit_large_patch16_224.augreg_in21k_ft_in1k", "hub"),
    }


@pytest.mark.parametrize("name", timm_rows())
def test_places_are_those_of_timm(name: str) -> None:
    models = pytest.importorskip("timm.models")
    theirs, kind = timm_rows()[name]
    config = models.get_pretrained_cfg(theirs)
    place = WEIGHTS[name].place
    if kind == "url":
        assert isinstance(place, Url)
        assert place.url == config.url
    else:
        assert isinstance(place, Hub)
        # A bare "timm/" stands for the model's own name.
        assert place.repo == (f"timm/{theirs}" if config.hf_hub_id == "timm/" else config.hf_hub_id)
    assert WEIGHTS[name].preprocess.mean == config.mean
    assert WEIGHTS[name].licence.lower() == config.license or name.startswith("clip")


EVA = [name for name in NAMES if re.match(r"eva|pe_|vit_.*_rope", name)]


@pytest.mark.parametrize("name", EVA)
def test_a_row_of_timms_class_eva_is_as_timm_has_it(name: str) -> None:
    row = WEIGHTS[name]
    assert isinstance(row.place, Hub)
    theirs = pytest.importorskip("timm.models").get_pretrained_cfg(row.place.repo[5:])
    look = row.preprocess
    assert (3, *look.size) == (3, *row.config.image_size) == theirs.input_size
    assert (look.mean, look.std, look.interpolation) == (
        theirs.mean,
        theirs.std,
        theirs.interpolation,
    )
    crop = theirs.crop_mode.replace("center", "crop")
    assert (look.crop, look.resize) == (theirs.crop_pct, crop)
    assert row.licence.lower() == theirs.license
    assert row.config.classes == theirs.num_classes


def test_every_published_file_of_timms_class_eva_has_a_row() -> None:
    """But for those that others' rows are for, and those that are no models of ours."""
    timm = pytest.importorskip("timm")
    others = ("dinov3", "lingbot", "sapiens2", "mixed", "enormous")
    models = [
        name for name in timm.list_models(module="eva") if not any(word in name for word in others)
    ]
    theirs = {f"timm/{x}" for name in models for x in timm.list_pretrained(f"{name}.*")}
    assert theirs == {row.place.repo for row in map(WEIGHTS.get, EVA) if row is not None}
