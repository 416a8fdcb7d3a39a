"""OpenAI's CLIP and open_clip: the image tower of a file that holds two. Meta's own files of
Perception Encoders, which have these names too.

The class token has one axis, the position table two, and the projection to the joint embedding,
our head without bias, has its inputs before its outputs. The SigLIP models of open_clip have a
tower of timm's (`visual.trunk.*`), which timm's layouts read.
"""

from dataclasses import replace

from torch import Tensor

from vitrail.models import ViTConfig
from vitrail.weights.names import Ask, Layout, Names, State, query_apart, query_joined

_BLOCK = "transformer.resblocks.{i}"

NAMES: Names = {
    "prefix.class": "class_embedding",
    "position.table": "positional_embedding",
    "stem.proj": "conv1",
    "pre_norm": "ln_pre",
    "encoder.blocks.{i}.norm1": f"{_BLOCK}.ln_1",
    "encoder.blocks.{i}.attn.qkv.weight": f"{_BLOCK}.attn.in_proj_weight",
    "encoder.blocks.{i}.attn.qkv.bias": f"{_BLOCK}.attn.in_proj_bias",
    "encoder.blocks.{i}.attn.proj": f"{_BLOCK}.attn.out_proj",
    "encoder.blocks.{i}.scale1": f"{_BLOCK}.ls_1",
    "encoder.blocks.{i}.norm2": f"{_BLOCK}.ln_2",
    "encoder.blocks.{i}.mlp.fc1": f"{_BLOCK}.mlp.c_fc",
    "encoder.blocks.{i}.mlp.fc2": f"{_BLOCK}.mlp.c_proj",
    "encoder.blocks.{i}.scale2": f"{_BLOCK}.ls_2",
    "encoder.norm": "ln_post",
    "head.weight": "proj",
}

ACTIVATION = Ask(
    "no tensor shows which GELU a CLIP was trained with: say {} for OpenAI's weights and for what "
    "open_clip calls -quickgelu, {} for its others (LAION-2B, DataComp)",
    ("gelu_quick", "gelu"),
)


def _turn(state: State) -> dict[str, Tensor]:
    return {k: t.T if k == "proj" and t.ndim == 2 else t for k, t in state.items()}


def _back(state: dict[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    return _turn(state)


OPEN_CLIP = Layout(
    name="open_clip",
    whose="CLIP",
    marks=(
        *("class_embedding", "conv1.weight", "ln_pre.weight"),
        "transformer.resblocks.0.attn.in_proj_weight",
    ),
    names=NAMES,
    turn=_turn,
    back=_back,
    batch_axis=False,
    assumes={"norm_eps": 1e-5, "pool": "class"},
    asks={"activation": ACTIVATION},
    always={
        "class_token": (True,),
        "prefix_position": (True,),
        "pool": ("class",),
        "stem_bias": (False,),
        "head_bias": (False,),
    },
)


_POOL = "attn_pool.attn"
_PE_NAMES: Names = {
    **NAMES,
    "pool.probe": "attn_pool.probe",
    "pool.q": f"{_POOL}.q",
    "pool.kv": f"{_POOL}.kv",
    "pool.proj": f"{_POOL}.out_proj",
    "pool.norm": "attn_pool.layernorm",
    "pool.mlp.fc1": "attn_pool.mlp.c_fc",
    "pool.mlp.fc2": "attn_pool.mlp.c_proj",
}


def _pe_turn(state: State) -> dict[str, Tensor]:
    return query_apart(_turn(state), _POOL)


def _pe_back(state: dict[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    return query_joined(_turn(state), _POOL)


_PE = {
    "activation": "gelu",
    "norm_eps": 1e-5,
    "position": "learned_rope",
    "rope": "pe",
    "rope_grid": None,
}
_PE_ALWAYS = {name: (_PE[name],) for name in ("position", "rope")}

PE = replace(
    OPEN_CLIP,
    name="pe",
    whose="Perception Encoder",
    marks=("conv1.weight", "ln_pre.weight", "attn_pool.probe"),
    names=_PE_NAMES,
    turn=_pe_turn,
    back=_pe_back,
    assumes={**_PE, "pool_heads": 8, "pool_prefix": True},
    asks={},
    always={
        **_PE_ALWAYS,
        "pool": ("map",),
        "pool_heads": (8,),
        "pool_prefix": (True,),
        "stem_bias": (False,),
        "head_bias": (False,),
    },
    resample="bilinear",
)
PE_DENSE = replace(  # PE-Spatial and PE-Lang, whose output is the last block's
    PE,
    name="pe-dense",
    marks=("conv1.weight", "ln_pre.weight", "transformer.resblocks.0.attn.in_proj_weight"),
    own=lambda state, prefix: f"{prefix}ln_post.weight" not in state,
    shows=lambda state: {"final_norm": False},
    assumes={**_PE, "pool": "mean"},
    always={**_PE_ALWAYS, "pool": ("mean",), "final_norm": (False,), "stem_bias": (False,)},
)
