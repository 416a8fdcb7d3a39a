"""What Facebook's own files call otherwise than timm: DeiT-III, DINO, DINOv2, MAE, MoCo v3; and
TIPS, which Google publishes in DINOv2's names.

And Google's TIPSv2, whose files have DINOv2's names. DINOv3 is in `dinov3.py`.

DeiT's files have timm's names throughout, and so have the bare encoders of DINO, MAE and MoCo v3.
Those of the last two are known by their position tables, which are fixed sines and cosines; a bare
DINO by nothing, and is read as timm's.
"""

import math
import re
from collections.abc import Callable
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from vitrail.models import ViTConfig
from vitrail.nn import sincos_table
from vitrail.nn.position import SinCos
from vitrail.weights.names import Ask, Names, State, rename
from vitrail.weights.timm import MARKS, NAMES, TIMM, TIMM_ROPE_VIT

DEIT3 = replace(
    TIMM,
    name="deit3",
    whose="DeiT-III",
    marks=(*MARKS, "blocks.0.gamma_1"),
    names=TIMM_ROPE_VIT.names,
    # timm's vit_*_rope_ape has these names too, and only being told shows it.
    always={"position": ("learned", "learned_rope")},
    resample="bicubic",
)

_NEAR = 0.95
"""Of a table and the one it is, or was before fine-tuning. The two orders have 0.81 at 14x14."""


def _table(state: State, prefix: str, kind: SinCos) -> bool:
    """Whether the patches' positions are the fixed ones of `kind`, or began as them."""
    table = state[f"{prefix}pos_embed"]
    rows, width = table.shape[-2:] if table.ndim == 3 else (0, 0)
    side = math.isqrt(max(rows - 1, 0))
    if table.is_meta or width % 4 or side < 2 or side * side != rows - 1:
        return False
    kinds: tuple[SinCos, ...] = ("sincos_moco", "sincos_mae", "sincos_bigvision")
    near = {
        x: float(
            F.cosine_similarity(
                table[0, 1:].float().flatten(), sincos_table((side, side), width, x).flatten(), 0
            )
        )
        for x in kinds
    }
    return near[kind] > _NEAR and near[kind] == max(near.values())


def _beside(word: str) -> Callable[[State], bool]:
    return lambda state: any(f".{word}." in f".{key}" for key in state)


DINO = replace(  # a whole checkpoint; the projector lies beside the backbone
    TIMM,
    name="dino",
    whose="DINO",
    own=lambda state, prefix: _beside("head.last_layer")(state),
    resample="bicubic_offset",
)

MAE = replace(
    TIMM,
    name="mae",
    whose="MAE",
    marks=(*MARKS, "pos_embed"),
    own=lambda state, prefix: (
        f"{prefix}decoder_embed.weight" in state or _table(state, prefix, "sincos_mae")
    ),
    aside=("mask_token", "decoder_*"),
    resample="bicubic",
)

MOCO = replace(
    TIMM,
    name="mocov3",
    whose="MoCo v3",
    marks=(*MARKS, "pos_embed"),
    own=lambda state, prefix: (
        _beside("base_encoder")(state) or _table(state, prefix, "sincos_moco")
    ),
    aside=("head.[0-9]*",),  # the projector
    asks={
        "heads": Ask(
            "no shape shows the heads, and with width 384 MoCo v3's ViT-S has 12 and DeiT's 6: "
            "say {} or {}",
            (12, 6),
            when={"width": 384},
        )
    },
    resample="bicubic",
)


def _renamed(*rules: tuple[str, str]) -> Callable[[State], dict[str, Tensor]]:
    """Tensors renamed by regular expressions."""

    def one(key: str) -> str:
        for pattern, new in rules:
            key = re.sub(pattern, new, key)
        return key

    return lambda state: rename(state, one)


def _as_dinov2(state: dict[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """DINOv2's code wants the token of its pre-training, and calls the gated MLP otherwise."""
    if config.activation == "swiglu":
        state = _renamed((r"\.fc1\.", ".w12."), (r"\.fc2\.", ".w3."))(state)
    return {**state, "mask_token": state["cls_token"].new_zeros(1, config.width)}


_DINOV2: Names = {**NAMES, "prefix.registers": "register_tokens"}
DINOV2 = replace(
    TIMM,
    name="dinov2",
    whose="DINOv2",
    marks=("mask_token", "pos_embed", "patch_embed.proj.weight"),
    names=_DINOV2,
    # Its training code cuts the blocks into chunks: blocks.{chunk}.{block}, blocks counted through.
    turn=_renamed(
        (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."), (r"\.w12\.", ".fc1."), (r"\.w3\.", ".fc2.")
    ),
    back=_as_dinov2,
    aside=("mask_token",),
    always={"class_token": (True,), "prefix_position": (True,)},
    resample="bicubic_offset",
)
DINOV2_REGISTERS = replace(
    DINOV2,
    name="dinov2-registers",
    marks=(*DINOV2.marks, "register_tokens"),
    resample="bicubic_antialias",
)


def _one_register(state: State, prefix: str) -> bool:
    """DINOv2 has four; TIPS has one, a second class token."""
    tokens = state[f"{prefix}register_tokens"]
    return tokens.ndim == 3 and tokens.shape[1] == 1


def _as_tipsv2(state: dict[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    plain = _renamed((r"\.fc1\.", ".c_fc."), (r"\.fc2\.", ".c_proj."))
    return _as_dinov2(state if config.activation == "swiglu" else plain(state), config)


TIPS = replace(  # arXiv 2410.16512, 2604.12012: DINOv2's code, resized otherwise
    DINOV2_REGISTERS,
    name="tips",
    whose="TIPS",
    own=_one_register,
    always={**DINOV2.always, "registers": (1,)},
    resample="bilinear_antialias",
)
TIPSV2 = replace(
    TIPS,
    name="tipsv2",
    whose="TIPSv2",
    own=lambda state, prefix: (
        _one_register(state, prefix) and f"{prefix}blocks.0.mlp.fc1.weight" not in state
    ),
    turn=_renamed(
        *((rf"\.{theirs}\.", ".fc1.") for theirs in ("c_fc", "w12")),
        *((rf"\.{theirs}\.", ".fc2.") for theirs in ("c_proj", "w3")),
    ),
    back=_as_tipsv2,
)
