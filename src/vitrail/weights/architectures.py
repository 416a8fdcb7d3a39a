"""What the config.json beside weights says of their architecture, and whether we have it.

Several architectures share the names and shapes of a ViT's tensors and compute something else:
norms behind attention and MLP, learned rotary positions, the mean of the tokens instead of the
class token. Only the name beside the file tells them apart. So a name is either one whose
models are ours, checked against its own code, or it is refused: names that came later too.
"""

import re
from collections.abc import Mapping
from typing import Any

from vitrail.errors import DataError

_TIMM_SIZES = {  # width and heads, where timm has one size of that name
    "tiny": (192, 3),
    "wee": (256, 4),
    "little": (320, 5),
    "small": (384, 6),
    "medium": (512, 8),
    "mediumd": (512, 8),
    "betwixt": (640, 10),
    "base": (768, 12),
    "so150m": (896, 14),
    "so150m2": (832, 13),
    "large": (1024, 16),
    "so400m": (1152, 16),
    "huge": (1280, 16),
    "giant": (1408, 16),
    "giantopt": (1536, 16),
    "gigantic": (1664, 16),
}
_TIMM_OTHERS = {  # where it has two
    r"vit_base_patch\d+_plus(_clip)?_\d+": (896, 14),
    r"vit_base_patch16_gap_224": (768, 16),
    r"vit_giant_patch14_(reg\d_)?(dinov2|tipsv2)": (1536, 24),
    r"vit_xsmall_patch16_clip_224": (256, 4),
    r"vit_pe_[a-z]+_gigantic_patch14_448": (1536, 16),
    r"vit_huge_plus_patch16_dinov3(_qkvb)?": (1280, 20),
    r"vit_7b_patch16_dinov3": (4096, 32),
    r"vit_giant_patch16_lingbot": (1536, 24),
}
_TIMM_VIT = re.compile(
    rf"(vit|deit|deit3|flexivit|naflexvit)_({'|'.join(_TIMM_SIZES)}|xsmall)"
    r"(_distilled)?(_patch\d+|_r\d*_s\d+(_p8)?)?(_36x1)?"
    r"(_plus|_reg\d|_clip|_quickgelu|_siglip|_gap|_map|_dinov2|_tipsv2)*(_\d+)?(_miil)?"
    r"|vit_(tiny|small|small_plus|base|large|huge_plus|7b)_patch16_dinov3(_qkvb)?"
    r"|vit_(small|base|large|giant)_patch16_lingbot"
    r"|eva_(large|giant)_patch14_(clip_)?\d+|eva02_(tiny|small|base|large)_patch\d+_(clip_)?\d+"
    r"|vit_pe_(core|spatial|lang)_(tiny|small|base|large|gigantic)_patch\d+_\d+"
    r"|vit_[a-z]+_patch16_rope_(ape_|reg\d_gap_)?\d+|test_vit2?"
)
_TIMM_FAMILIES = re.compile(
    r"(mixer|gmlp)_[a-z]+\d+(_\d+)?(_miil|_goog)?\w*|twins_(svt|pcpvt)_\w+|mobilevit_(xxs|xs|s)"
    r"|resnet(18|50)|resnetv2_(50|101|152)x\d_bit"
)
_TIMM_REASONS = {  # a part of the name
    "resnetblur18": "a blur before its strides",
    "resnetblur50": "a blur before its strides",
    "resnetaa50": "a blur before its strides",
    "rpn": "residual post-norm: norms behind attention and MLP",
    "mixed": "rotary positions whose periods are learned",
    "sapiens2": "rotary positions and grouped queries",
    "enormous": "norms behind attention and MLP",
    "relpos": "positions relative to each other",
    "srelpos": "positions relative to each other",
    "beit": "positions relative to each other",
    "beitv2": "positions relative to each other",
    "beit3": "norms within attention and MLP",
    "samvit": "positions relative to each other, attention in windows",
    "swin": "attention in windows",
    "xp": "attention and MLP side by side",
    "18x2": "two attentions side by side",
    "dlittle": "differential attention",
    "dwee": "differential attention",
    "dpwee": "differential attention",
    "pwee": "attention and MLP side by side",
    "radio": "positions cropped from a table, several class tokens",
    "aimv2": "RMS norms and a gated MLP",
    "cait": "attention that mixes its heads",
    "xcit": "attention across channels",
    "mci": "MobileCLIP's stem of convolutions",
    "resnet26d": "a ResNet-D before the encoder, not Google's ResNet",
    "resnet50d": "a ResNet-D before the encoder, not Google's ResNet",
    "intern300m": "no norm after the last block",
    "par": "positions that keep their proportions on every grid",
    "parfac": "positions of rows and of columns, that keep their proportions on every grid",
    "hiera": "stages of attention in windows",
}

_TRANSFORMERS = {
    *("vit", "vit_mae", "vit_msn", "ijepa", "deit"),
    *("dinov2", "dinov2_with_registers", "dinov3_vit", "tipsv2", "tipsv2_vision_model"),
    *("clip", "clip_vision_model", "metaclip_2", "metaclip_2_vision_model"),
    *("chinese_clip", "chinese_clip_vision_model"),
    *("siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model"),
    *("idefics2", "idefics2_vision", "idefics3", "idefics3_vision", "smolvlm", "smolvlm_vision"),
    *("bit", "mobilevit", "vision-text-dual-encoder", "eomt", "eomt_dinov3"),
    "rf_detr",
}
_QWEN = "pairs of frames, rotary positions"
_TRANSFORMERS_REASONS = {
    "audio-spectrogram-transformer": "spectrograms in overlapping patches",
    "beit": "positions relative to each other",
    "aimv2": "RMS norms and a gated MLP",
    "aimv2_vision_model": "RMS norms and a gated MLP",
    "data2vec-vision": "positions relative to each other",
    "dinov3_convnext": "a ConvNeXt",
    "dpt": "a head for depth on several blocks",
    "hiera": "stages of attention in windows",
    "intern_vit_6b": "no norm after the last block",
    "internvl": "no norm after the last block",
    "internvl_vision": "no norm after the last block",
    "mlcd": "rotary positions",
    "mlcd_vision_model": "rotary positions",
    "qwen2_vl": _QWEN,
    "qwen2_vl_vision": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen2_5_vl_vision": _QWEN,
    "qwen3_vl": _QWEN,
    "qwen3_vl_vision": _QWEN,
    "radio": "positions cropped from a table, several class tokens",
    "sam": "positions relative to each other, attention in windows",
    "sam_vision_model": "positions relative to each other, attention in windows",
    "sam2": "a Hiera: stages of attention in windows",
    "sam2_vision_model": "a Hiera: stages of attention in windows",
    "swin": "attention in windows",
    "swinv2": "attention in windows",
    "timesformer": "videos",
    "vit_hybrid": "a BiT before the encoder; transformers itself has dropped it",
    "videomae": "videos",
    "vivit": "videos",
    "vjepa2": "videos",
    "yolos": "tokens for detection, positions in every block",
}

_OPEN_CLIP_PLAIN: Mapping[str, Any] = {  # fields whose other values are other architectures
    "attentional_pool": False,
    "pool_type": "tok",
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
    "act_kwargs": None,
    "norm_kwargs": None,
}


def named(config: Mapping[str, Any]) -> str:
    """What a config.json calls the architecture; empty if it does not.

    >>> named({"architecture": "vit_base_patch16_224"})
    "timm's vit_base_patch16_224"
    """
    if name := _timm_name(config):
        return f"timm's {name}"
    if "model_cfg" in config:
        return "a tower of open_clip's"
    kind = _kind(config)
    return f"transformers' {kind}" if kind else ""


def check_architecture(config: Mapping[str, Any], where: str) -> None:
    """Raise `DataError` for a config.json that names an architecture which we do not have."""
    why = _refusal(config)
    if why is not None:
        raise DataError(
            f"{named(config)}, which the config.json beside {where} names, is not a model of "
            f"vitrail ({why}): its tensors may fit, its outputs would be another model's. "
            f"`vitrail models` lists what there is; if the config.json is of other weights, move "
            f"it away"
        )


def remarks(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What has to be said of an architecture that is ours, where its library's code does otherwise.

    >>> remarks({"architecture": "vit_base_patch16_224"})
    ()
    """
    if "siglip" in _timm_name(config).split("_"):
        return (
            "activation gelu_tanh, in which SigLIP was trained: timm's code has the exact GELU for "
            "most of them, which differs by 1e-4 of the outputs",
        )
    return ()


def told_by_timm(name: str) -> dict[str, Any]:
    """Fields of our config that the name of a ViT of timm's settles.

    >>> told_by_timm("vit_so400m_patch14_siglip_gap_224")
    {'patch': (14, 14), 'width': 1152, 'heads': 16, 'activation': 'gelu_tanh'}
    """
    told: dict[str, Any] = {}
    if not name.startswith(("vit_", "deit", "flexivit_", "naflexvit_", "eva_", "eva02_")):
        return told
    words = name.split("_")
    if patch := re.search(r"_patch(\d+)", name):
        told["patch"] = (int(patch[1]), int(patch[1]))
    others = (sizes for glob, sizes in _TIMM_OTHERS.items() if re.fullmatch(glob, name))
    sizes = next(others, None) or next((_TIMM_SIZES[x] for x in words if x in _TIMM_SIZES), None)
    if sizes:
        told |= zip(("width", "heads"), sizes, strict=True)
    if "clip" not in words:  # those are known one by one
        # timm runs some of the SigLIPs with the exact one; all were trained with the other.
        told["activation"] = "gelu_tanh" if "siglip" in words else "gelu"
    if "ape" in words:  # RoPE-ViT with a table, which no tensor tells from DeiT-III
        told |= {"position": "learned_rope", "rope": "axial", "resample": "bicubic_antialias"}
    if "pe" in words and patch:  # whatever the size that it was fine-tuned at
        told["rope_grid"] = (int(words[-1]) // int(patch[1]),) * 2
    if "tipsv2" in words or (words[0] == "naflexvit" and "siglip" in words):
        told["resample"] = "bilinear_antialias"
    elif words[0] == "naflexvit":
        told["resample"] = "bicubic_antialias"
    return told


def _refusal(config: Mapping[str, Any]) -> str | None:
    """Why we do not have it; None if we do, or if nothing is named."""
    if name := _timm_name(config):
        return _timm_refusal(name, config.get("model_args"))
    if "model_cfg" in config:
        return _open_clip_refusal(config["model_cfg"])
    kind = _kind(config)
    if kind in ("dinov3_vit", "eomt_dinov3") and (base := _rope_base(config)) != 100.0:
        return f"rotary positions of base {base}, where ours have 100"
    if not kind or kind in _TRANSFORMERS:
        return None
    return _TRANSFORMERS_REASONS.get(kind, "its name is not known here")


def _rope_base(config: Mapping[str, Any]) -> object:
    """Of DINOv3 in transformers: since version 5 in a table of its own."""
    table = config.get("rope_parameters")
    table = table if isinstance(table, dict) else {}
    return config.get("rope_theta", table.get("rope_theta", 100.0))


def _timm_refusal(name: str, arguments: object) -> str | None:
    if isinstance(arguments, dict) and arguments.get("pool_include_prefix"):
        return "its mean is of the prefix tokens too"
    if _TIMM_VIT.fullmatch(name) or _TIMM_FAMILIES.fullmatch(name):
        return None
    words = re.split("_", name)
    found = (why for word, why in _TIMM_REASONS.items() if word in words)
    return next(found, "its name is not known here")


def _open_clip_refusal(model: object) -> str | None:
    tower = model.get("vision_cfg") if isinstance(model, dict) else None
    if not isinstance(tower, dict):
        return None
    if isinstance(tower.get("layers"), list):
        return "CLIP's ResNet, with attention pooling"
    for field, plain in _OPEN_CLIP_PLAIN.items():
        if tower.get(field, plain) not in (plain, None):
            return f"{field} {tower[field]!r}, where ours has {plain!r}"
    return None


def _timm_name(config: Mapping[str, Any]) -> str:
    """The name of timm's that a config.json of timm's or of open_clip's gives."""
    model = config.get("model_cfg")
    tower = model.get("vision_cfg") if isinstance(model, dict) else None
    name = tower.get("timm_model_name") if isinstance(tower, dict) else config.get("architecture")
    return name.split(".")[0] if isinstance(name, str) else ""


def _kind(config: Mapping[str, Any]) -> str:
    """The `model_type` of transformers, of the image tower where there are two."""
    tower = config.get("vision_config")
    kinds = (part.get("model_type") for part in (tower, config) if isinstance(part, dict))
    return next((kind for kind in kinds if isinstance(kind, str)), "")
