"""torchvision's ViT: `vit_b_16` and its like."""

import re

from torch import Tensor

from vitrail.weights.names import Layout, Names, State, rename

_BLOCK = "encoder.layers.encoder_layer_{i}"

NAMES: Names = {
    "prefix.class": "class_token",
    "position.table": "encoder.pos_embedding",
    "stem.proj": "conv_proj",
    "encoder.blocks.{i}.norm1": f"{_BLOCK}.ln_1",
    "encoder.blocks.{i}.attn.qkv.weight": f"{_BLOCK}.self_attention.in_proj_weight",
    "encoder.blocks.{i}.attn.qkv.bias": f"{_BLOCK}.self_attention.in_proj_bias",
    "encoder.blocks.{i}.attn.proj": f"{_BLOCK}.self_attention.out_proj",
    "encoder.blocks.{i}.norm2": f"{_BLOCK}.ln_2",
    "encoder.blocks.{i}.mlp.fc1": f"{_BLOCK}.mlp.0",
    "encoder.blocks.{i}.mlp.fc2": f"{_BLOCK}.mlp.3",
    "encoder.norm": "encoder.ln",
    "representation": "heads.pre_logits",
    "head": "heads.head",
}


def _turn(state: State) -> dict[str, Tensor]:
    """The MLP's layers had names of their own before torchvision 0.13."""
    return rename(state, lambda key: re.sub(r"\.linear_([12])\.", _number, key))


def _number(match: re.Match[str]) -> str:
    return {"1": ".0.", "2": ".3."}[match[1]]


TORCHVISION = Layout(
    name="torchvision",
    whose="torchvision",
    marks=("class_token", "encoder.pos_embedding", "conv_proj.weight"),
    names=NAMES,
    turn=_turn,
    assumes={"activation": "gelu", "norm_eps": 1e-6},
    always={
        "activation": ("gelu",),
        "norm_eps": (1e-6,),
        "class_token": (True,),
        "prefix_position": (True,),
        "pool": ("class",),
        "qkv_bias": (True,),
        "stem_bias": (True,),
        "head_bias": (True,),
    },
    resample="bicubic",
)
