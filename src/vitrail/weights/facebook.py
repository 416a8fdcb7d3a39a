"""What Facebook's own files call otherwise than timm: DeiT-III, DINO, DINOv2, MAE, MoCo v3.

DeiT's files have timm's names throughout, and so have the bare encoders of DINO and MAE.
"""

import re
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from vitrail.models import ViTConfig
from vitrail.weights.names import Ask, Names, State, rename
from vitrail.weights.timm import MARKS, NAMES, TIMM

DEIT3 = replace(
    TIMM,
    name="deit3",
    whose="DeiT-III",
    marks=(*MARKS, "blocks.0.gamma_1"),
    prefixes=("",),
    names={
        **NAMES,
        "encoder.blocks.{i}.scale1.gamma": "blocks.{i}.gamma_1",
        "encoder.blocks.{i}.scale2.gamma": "blocks.{i}.gamma_2",
    },
    resample="bicubic",
)

DINO = replace(  # a whole checkpoint; the projector lies beside the backbone
    TIMM,
    name="dino",
    whose="DINO",
    prefixes=("module.backbone.", "backbone."),
    resample="bicubic_offset",
)

MAE = replace(
    TIMM,
    name="mae",
    whose="MAE",
    marks=(*MARKS, "decoder_embed.weight"),
    prefixes=("module.", ""),
    aside=("mask_token", "decoder_*"),
    resample="bicubic",
)

MOCO = replace(
    TIMM,
    name="mocov3",
    whose="MoCo v3",
    prefixes=("module.base_encoder.", "module."),  # pre-training, linear probe
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
    prefixes=("module.backbone.", "teacher.backbone.", "student.backbone.", "backbone.", ""),
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
