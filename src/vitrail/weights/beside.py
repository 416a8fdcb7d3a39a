"""What the JSON files beside weights say: config.json and preprocessor_config.json.

Hugging Face's, timm's on the hub, and open_clip's. They tell what no shape shows (heads, which
GELU, epsilon, image size) and how images are to be prepared. A field that is not understood is not
told, and then assumed or asked for like any other. Names of architectures are for
`architectures.py`.
"""

import math
from collections.abc import Mapping
from typing import Any

from vitrail.data.views.preprocess import Preprocess, Resize
from vitrail.errors import DataError, UsageError
from vitrail.models import ModelConfig
from vitrail.weights.architectures import told_by_timm
from vitrail.weights.files import WeightsFile

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "quick_gelu": "gelu_quick",
}
_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_TIMM_CROPS = {"center": "crop", "squash": "squash"}
_OPEN_CLIP_RESIZES = {"shortest": "crop", "squash": "squash"}
_OPENAI: Mapping[str, Any] = {  # what open_clip takes unless its config says otherwise
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}


def told_by_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of our config that a config.json tells, those that shapes show too.

    >>> told_by_config({"hidden_act": "quick_gelu", "num_attention_heads": 16, "image_size": 336})
    {'heads': 16, 'activation': 'gelu_quick', 'image_size': (336, 336)}

    Raises `DataError` for an activation function that no model of ours has.
    """
    if isinstance(config.get("architecture"), str) or "pretrained_cfg" in config:
        told = _told_by_timm(config)
    elif "model_cfg" in config:
        told = _told_by_open_clip(part(config, "model_cfg"))
    else:
        told = _told_by_transformers(part(config, "vision_config") or config)
    return {name: value for name, value in told.items() if value is not None}


def preprocess_by(file: WeightsFile, config: ModelConfig) -> Preprocess | None:
    """How the makers of a model of `config` prepare images, if a file beside the weights says it.

    Raises `DataError` for values that make no sense.
    """
    try:
        if file.preprocessor:
            found = _by_transformers(file.preprocessor)
        elif "pretrained_cfg" in file.config:
            found = _by_timm(part(file.config, "pretrained_cfg"))
        elif "preprocess_cfg" in file.config:
            found = _by_open_clip(part(file.config, "preprocess_cfg"), config.image_size)
        else:
            found = None
    except (UsageError, TypeError, ValueError, KeyError, ArithmeticError) as error:
        raise DataError(
            f"the preprocessing in the JSON file beside {file.path} cannot be read: {error}. "
            f"Mend it or move it away"
        ) from error
    return found if found is not None and found.channels == config.channels else None


_CLASS = {"pool": "class"}
_DINOV3 = {"position": "rope", "rope": "dinov3", "pool": "class"}
_NEAREST = ("idefics2", "idefics3", "smolvlm")
_TIPS = {"resample": "bilinear_antialias", "pool": "class"}
_BY_KIND: Mapping[str, Mapping[str, str]] = {  # what the code of a `model_type` fixes
    "chinese_clip": _CLASS,
    "chinese_clip_vision_model": _CLASS,
    "clip": _CLASS,
    "clip_vision_model": _CLASS,
    "deit": _CLASS,
    "dinov2": _CLASS,
    "dinov2_with_registers": _CLASS,
    "dinov3_vit": _DINOV3,
    "eomt": _CLASS,
    "eomt_dinov3": _DINOV3,
    "ijepa": {"pool": "mean"},
    "metaclip_2": _CLASS,
    "metaclip_2_vision_model": _CLASS,
    "siglip": {"pool": "mean"},  # where it has no head for pooling
    "siglip_vision_model": {"pool": "mean"},
    "tipsv2": _TIPS,
    "tipsv2_vision_model": _TIPS,
    "vit": _CLASS,
    "vit_mae": _CLASS,
    "vit_msn": _CLASS,
    **{
        kind: {"resample": "nearest", "pool": "mean"}
        for name in _NEAREST
        for kind in (name, f"{name}_vision")
    },
}


def _told_by_transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    kind = str(config.get("model_type"))
    act = config.get("hidden_act")
    if act is None and kind.startswith(("clip", "metaclip_2", "chinese_clip")):
        act = "quick_gelu"  # the default, and a part's defaults are not in its file
    if config.get("use_swiglu_ffn") or (config.get("use_gated_mlp") and act == "silu"):
        act = None  # the shapes show a gated MLP
    elif config.get("use_gated_mlp") or (act is not None and str(act) not in ACTIVATIONS):
        raise _no_activation(f"{act}, gated" if config.get("use_gated_mlp") else act)
    eps = config.get("layer_norm_eps", 1e-6 if kind == "vit_msn" else None)
    return {
        "heads": whole(config.get("num_attention_heads")),
        "activation": ACTIVATIONS.get(str(act)),
        "norm_eps": eps if isinstance(eps, float) else None,
        **_BY_KIND.get(kind, {}),
        # A VitDet's image is the detector's; its position table is for that of the pre-training.
        "image_size": _pair(config.get("pretrain_image_size", config.get("image_size"))),
        "width": whole(config.get("hidden_size")),
        "depth": whole(config.get("num_hidden_layers")),
        "mlp": whole(config.get("intermediate_size")),
        "patch": _pair(config.get("patch_size")),
    }


_TIMM_POOLS = {"avg": "mean", "token": "class", "map": "map"}


def _told_by_timm(config: Mapping[str, Any]) -> dict[str, Any]:
    weights, arguments = part(config, "pretrained_cfg"), part(config, "model_args")
    size = weights.get("input_size", config.get("input_size"))
    act = arguments.get("act_layer")
    if act is not None and str(act) not in ACTIVATIONS:
        raise _no_activation(act)
    by_name = told_by_timm(str(config.get("architecture")))
    changed = {
        "heads": whole(arguments.get("num_heads")),
        "activation": ACTIVATIONS.get(str(act)) or _timm_clip(config),
        "image_size": _pair(size[1:]) if isinstance(size, list) else None,
        "pool": _TIMM_POOLS.get(str(arguments.get("global_pool", config.get("global_pool")))),
        "width": whole(arguments.get("embed_dim")),
        "depth": whole(arguments.get("depth")),
        "patch": _pair(arguments.get("patch_size")),
    }
    return by_name | {name: value for name, value in changed.items() if value is not None}


def _no_activation(act: object) -> DataError:
    return DataError(
        f"the config.json beside the weights asks for the activation {act!r}: "
        f"vitrail has {', '.join(ACTIVATIONS)}"
    )


def _timm_clip(config: Mapping[str, Any]) -> str | None:
    """Which GELU a CLIP of timm's was trained with last."""
    name = str(config.get("architecture"))
    tag = str(part(config, "pretrained_cfg").get("tag"))
    if "quickgelu" in name or ("_clip_" in name and tag == "openai"):
        return "gelu_quick"
    return "gelu" if "_clip_" in name and "_ft_" in tag else None  # timm's fine-tuning: exact


def _told_by_open_clip(config: Mapping[str, Any]) -> dict[str, Any]:
    tower = part(config, "vision_cfg")
    size = _pair(tower.get("image_size"))
    if name := tower.get("timm_model_name"):
        pool = _TIMM_POOLS.get(str(tower.get("timm_pool")))
        return told_by_timm(str(name)) | {"image_size": size, "pool": pool}
    width, head = whole(tower.get("width")) or 768, whole(tower.get("head_width")) or 64
    return {
        "heads": max(1, width // head),
        "activation": "gelu_quick" if config.get("quick_gelu") is True else "gelu",
        "pool": "class",  # `architectures.py` refuses its others
        "image_size": size,
        "width": whole(tower.get("width")),
        "depth": whole(tower.get("layers")),
        "patch": _pair(tower.get("patch_size")),
    }


def _by_transformers(config: Mapping[str, Any]) -> Preprocess | None:
    size = config.get("size")
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type"))
    if isinstance(size, int) and kind.startswith(("CLIP", "Bit", "ConvNext", "MobileViT")):
        size = {"shortest_edge": size}
    turned = config.get("do_flip_channel_order", config.get("do_flip_channels", True))
    if kind.startswith("MobileViT") and not turned:
        raise UsageError(
            "it shows the model red, green, blue (do_flip_channel_order), where every published "
            "MobileViT of Hugging Face's gets blue, green, red, and is read as one that does"
        )
    if (patches := whole(config.get("max_num_patches"))) is not None:
        return _native(config, math.isqrt(patches))
    shown = size
    if config.get("do_center_crop", "crop_size" in config):
        shown = config.get("crop_size")
    short = whole(size.get("shortest_edge")) if isinstance(size, dict) else None
    scaled = (short, short) if short else _pair(size)
    frame = scaled if kind.startswith("Eomt") else _pair(shown)
    scales = config.get("do_resize", True) and config.get("do_rescale", True)
    if not scales or scaled is None or frame is None:
        return None
    crop = _crop(frame[0], scaled[0])
    if not crop or crop != _crop(frame[1], scaled[1]):
        return None  # no such rule here
    normalised = config.get("do_normalize", not kind.startswith("MobileViT"))
    return Preprocess(
        size=frame,
        resize=_eomt_resize(config) if kind.startswith("Eomt") else "crop" if short else "squash",
        crop=crop,
        interpolation=_INTERPOLATIONS[config.get("resample", 2)],  # type: ignore[arg-type]
        mean=tuple(config["image_mean"]) if normalised else (0.0, 0.0, 0.0),
        std=tuple(config["image_std"]) if normalised else (1.0, 1.0, 1.0),
    )


def _eomt_resize(config: Mapping[str, Any]) -> Resize:
    """Semantic models see windows of the scaled image, the others all of it, padded."""
    return "short" if config.get("do_split_image") else "pad"


def _by_timm(config: Mapping[str, Any]) -> Preprocess | None:
    resize = _TIMM_CROPS.get(config.get("crop_mode") or "center")
    size = _pair(config["input_size"][1:])
    if resize is None or size is None:
        return None
    return Preprocess(
        size=size,
        resize=resize,  # type: ignore[arg-type]
        crop=config.get("crop_pct", 0.875),
        interpolation=config.get("interpolation", "bicubic"),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def _native(config: Mapping[str, Any], side: int) -> Preprocess | None:
    """SigLIP 2's, of images with their own proportions: up to `side` by `side` patches."""
    patch = _pair(config.get("patch_size"))
    if patch is None or side**2 != config["max_num_patches"]:
        return None
    return Preprocess(
        size=(side * patch[0], side * patch[1]),
        resize="native",
        interpolation=_INTERPOLATIONS[config.get("resample", 2)],  # type: ignore[arg-type]
        mean=tuple(config["image_mean"]),
        std=tuple(config["image_std"]),
        patch=patch,
    )


def _by_open_clip(config: Mapping[str, Any], size: tuple[int, int]) -> Preprocess | None:
    resize = _OPEN_CLIP_RESIZES.get(config.get("resize_mode") or "shortest")
    if resize is None:
        return None
    return Preprocess(
        size=size,
        resize=resize,  # type: ignore[arg-type]
        interpolation=config.get("interpolation", "bicubic"),
        mean=tuple(config.get("mean", _OPENAI["mean"])),
        std=tuple(config.get("std", _OPENAI["std"])),
    )


def _crop(shown: int, scaled: int) -> float:
    """The part of the scaled side that is shown, such that `floor(shown / it)` is that side."""
    if shown > scaled:
        return 0.0  # theirs would pad
    part = shown / scaled
    return part if math.floor(shown / part) == scaled else math.nextafter(part, 0)


def part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The object of that name in another; empty, if there is none."""
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def whole(value: object) -> int | None:
    """A number from 1; None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _pair(value: object) -> tuple[int, int] | None:
    """(height, width) of any way to write it."""
    if isinstance(value, dict):
        value = [value.get("height"), value.get("width")]
    sides = list(value) if isinstance(value, list | tuple) else [value, value]
    if len(sides) != 2 or (height := whole(sides[0])) is None:
        return None
    width = whole(sides[1])
    return None if width is None else (height, width)
