"""Hugging Face's checkpoint layouts: ViT, DeiT, DINOv2, the encoders of MAE, MSN and I-JEPA, CLIP's
and SigLIP's images.

These are the names in the files (`model.safetensors`), the same since transformers 4. In memory
transformers 5 calls some modules otherwise, and translates whenever it reads or writes.

A config with `classes=0` stands for the bare model (`ViTModel`, `DeiTModel`, `Dinov2Model`);
`layer_scale` tells DINOv2 from ViT, `pre_norm` CLIP. Not in the weights, and different:
transformers' ViT, DeiT and MAE default to a LayerNorm epsilon of 1e-12, ours to 1e-6.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from vitrail.models import ViTConfig
from vitrail.weights.clip import ACTIVATION
from vitrail.weights.facebook import TIPSV2
from vitrail.weights.naflex import COLOURS, kernel_of, matrix_of
from vitrail.weights.names import (
    Layout,
    Names,
    State,
    query_apart,
    query_joined,
    rename,
    under,
)

_LAYER = "encoder.layer.{i}"

_COMMON: Names = {
    "prefix.class": "embeddings.cls_token",
    "position.table": "embeddings.position_embeddings",
    "stem.proj": "embeddings.patch_embeddings.projection",
    "encoder.blocks.{i}.attn.qkv": (
        f"{_LAYER}.attention.attention.query",
        f"{_LAYER}.attention.attention.key",
        f"{_LAYER}.attention.attention.value",
    ),
    "encoder.blocks.{i}.attn.proj": f"{_LAYER}.attention.output.dense",
    "encoder.norm": "layernorm",
}
_VIT: Names = {
    **_COMMON,
    "encoder.blocks.{i}.norm1": f"{_LAYER}.layernorm_before",
    "encoder.blocks.{i}.norm2": f"{_LAYER}.layernorm_after",
    "encoder.blocks.{i}.mlp.fc1": f"{_LAYER}.intermediate.dense",
    "encoder.blocks.{i}.mlp.fc2": f"{_LAYER}.output.dense",
}
_DEIT: Names = {**_VIT, "prefix.distilled": "embeddings.distillation_token"}
_DINOV2: Names = {
    **_COMMON,
    "prefix.registers": "embeddings.register_tokens",
    "encoder.blocks.{i}.norm1": f"{_LAYER}.norm1",
    "encoder.blocks.{i}.norm2": f"{_LAYER}.norm2",
    "encoder.blocks.{i}.mlp.fc1": f"{_LAYER}.mlp.fc1",
    "encoder.blocks.{i}.mlp.fc2": f"{_LAYER}.mlp.fc2",
    "encoder.blocks.{i}.scale1.gamma": f"{_LAYER}.layer_scale1.lambda1",
    "encoder.blocks.{i}.scale2.gamma": f"{_LAYER}.layer_scale2.lambda1",
}
_TOWER: Names = {
    "position.table": "embeddings.position_embedding.weight",
    "stem.proj": "embeddings.patch_embedding",
    "encoder.blocks.{i}.norm1": "encoder.layers.{i}.layer_norm1",
    "encoder.blocks.{i}.attn.qkv": (
        "encoder.layers.{i}.self_attn.q_proj",
        "encoder.layers.{i}.self_attn.k_proj",
        "encoder.layers.{i}.self_attn.v_proj",
    ),
    "encoder.blocks.{i}.attn.proj": "encoder.layers.{i}.self_attn.out_proj",
    "encoder.blocks.{i}.norm2": "encoder.layers.{i}.layer_norm2",
    "encoder.blocks.{i}.mlp.fc1": "encoder.layers.{i}.mlp.fc1",
    "encoder.blocks.{i}.mlp.fc2": "encoder.layers.{i}.mlp.fc2",
    "encoder.norm": "post_layernorm",
}
_CLIP: Names = {
    **_TOWER,
    "prefix.class": "embeddings.class_embedding",
    "pre_norm": "pre_layrnorm",  # their spelling
}
_SIGLIP: Names = {
    **_TOWER,
    "pool.probe": "head.probe",
    "pool.q": "head.attention.q",
    "pool.kv": "head.attention.kv",
    "pool.proj": "head.attention.out_proj",
    "pool.norm": "head.layernorm",
    "pool.mlp.fc1": "head.mlp.fc1",
    "pool.mlp.fc2": "head.mlp.fc2",
}

_MASK = "embeddings.mask_token"
_GELUS = ("gelu", "gelu_tanh", "gelu_quick")
_ROWS = {"class_token": (True,), "prefix_position": (True,), "pool": ("class",)}
_LINEAR = {"activation": _GELUS, "stem_bias": (True,), "head_bias": (True,)}
_TWO_TOWERS = ("text_model.*", "text_projection.*", "logit_*", "*.position_ids")
_POOLER = "pooler.dense"
"""In front of a head of none: the tanh layer that ImageNet-21k's checkpoints call pre-logits."""

_NO_TOKEN = {"class_token": (False,), "prefix_position": (False,), "registers": (0,)}

VIT_BARE = Layout(  # also the encoder of ViTForMaskedImageModeling and ViTMAEForPreTraining
    name="huggingface-vit-bare",
    whose="Hugging Face ViT",
    marks=("embeddings.cls_token", "encoder.layer.0.layernorm_before.weight"),
    names={**_VIT, "representation": _POOLER},
    aside=(_MASK,),
    assumes={"activation": "gelu", "norm_eps": 1e-12},
    always=_ROWS | _LINEAR,
    resample="bicubic",
)
VIT = replace(
    VIT_BARE,
    name="huggingface-vit",
    marks=(*(f"vit.{mark}" for mark in VIT_BARE.marks), "classifier.weight"),
    names={**under("vit", _VIT), "head": "classifier"},
)
IJEPA_BARE = replace(  # the encoder that is kept, the target's
    VIT_BARE,
    name="huggingface-ijepa-bare",
    whose="Hugging Face I-JEPA",
    marks=("embeddings.position_embeddings", "encoder.layer.0.layernorm_before.weight"),
    own=lambda state, prefix: f"{prefix}embeddings.cls_token" not in state,
    names={ours: name for ours, name in _VIT.items() if ours != "prefix.class"},
    aside=(_MASK, "pooler.*"),
    assumes={"activation": "gelu", "norm_eps": 1e-12, "pool": "mean"},
    always=_LINEAR | _NO_TOKEN | {"pool": ("mean",), "pool_norm": (False,)},
)
IJEPA = replace(
    IJEPA_BARE,
    name="huggingface-ijepa",
    marks=(*(f"ijepa.{mark}" for mark in IJEPA_BARE.marks), "classifier.weight"),
    own=lambda state, prefix: True,
    names={**under("ijepa", IJEPA_BARE.names), "head": "classifier"},
    aside=("ijepa.pooler.*",),
)
DEIT_BARE = replace(
    VIT_BARE,
    name="huggingface-deit-bare",
    whose="Hugging Face DeiT",
    marks=(*VIT_BARE.marks, "embeddings.distillation_token"),
    names=_DEIT,
    aside=(_MASK, "pooler.*"),  # DeiT has no such layer: what is there was never trained
)
DEIT_TEACHER = replace(
    DEIT_BARE,
    name="huggingface-deit-teacher",
    marks=("deit.embeddings.distillation_token", "distillation_classifier.weight"),
    aside=(),
    names={
        **under("deit", _DEIT),
        "head": "cls_classifier",
        "head_distilled": "distillation_classifier",
    },
)


def _second_row(state: dict[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    key = "deit.embeddings.position_embeddings"
    first, rest = state[key][:, :1], state[key][:, 1:]
    return {**state, key: torch.cat([first, torch.zeros_like(first), rest], dim=1)}


DEIT = replace(
    DEIT_TEACHER,
    name="huggingface-deit",
    marks=("deit.embeddings.distillation_token", "classifier.weight"),
    # Its one head reads the class token, so that the distillation token is nothing but a register.
    # Registers have no position here: theirs is added to the token, and is zero on the way back.
    names={
        **under("deit", {**_VIT, "prefix.registers": "embeddings.distillation_token"}),
        "head": "classifier",
    },
    back=_second_row,
    always=_ROWS | _LINEAR | {"registers": (1,)},
)


def _dinov2_turn(state: State) -> dict[str, Tensor]:
    """The gated MLP's layers under the plain one's names."""
    return rename(
        state, lambda key: key.replace(".weights_in.", ".fc1.").replace(".weights_out.", ".fc2.")
    )


def _dinov2_back(state: dict[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """And the token of the pre-training, which every DINOv2 file has."""
    if config.activation == "swiglu":
        state = rename(
            state,
            lambda key: key.replace(".fc1.", ".weights_in.").replace(".fc2.", ".weights_out."),
        )
    return {**state, _MASK: torch.zeros_like(state["embeddings.cls_token"][0])}


DINOV2 = Layout(
    name="huggingface-dinov2",
    whose="Hugging Face DINOv2",
    marks=("embeddings.cls_token", "encoder.layer.0.layer_scale1.lambda1"),
    # A classifier beside it reads class token and mean patch, twice the width: it is left out.
    names=_DINOV2,
    turn=_dinov2_turn,
    back=_dinov2_back,
    aside=(_MASK,),
    assumes={"activation": "gelu", "norm_eps": 1e-6},
    always=_ROWS | {"activation": ("gelu", "gelu_tanh", "swiglu"), "stem_bias": (True,)},
    resample="bicubic",
)

DINOV2_REGISTERS = replace(
    DINOV2,
    name="huggingface-dinov2-registers",
    marks=(*DINOV2.marks, "embeddings.register_tokens"),
    resample="bicubic_antialias",
)


def _bare(state: State) -> dict[str, Tensor]:
    """An image tower's tensors: transformers 5 leaves the prefix out where there is no other."""
    return rename(state, lambda key: key.removeprefix("vision_model."))


def _prefixed(state: dict[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """With the prefix, which every transformers reads."""
    return rename(state, lambda key: f"vision_model.{key}")


CLIP_BARE = Layout(
    name="huggingface-clip-bare",
    whose="Hugging Face CLIP",
    marks=("pre_layrnorm.weight", "embeddings.class_embedding"),
    names=_CLIP,
    turn=_bare,
    back=_prefixed,
    batch_axis=False,
    aside=_TWO_TOWERS,
    assumes={"norm_eps": 1e-5},
    asks={"activation": ACTIVATION},
    always=_ROWS | {"activation": _GELUS, "stem_bias": (False,)},
    resample="bicubic",
)
CLIP = replace(
    CLIP_BARE,
    name="huggingface-clip",
    marks=("vision_model.pre_layrnorm.weight", "visual_projection.weight"),
    names={**under("vision_model", _CLIP), "head": "visual_projection"},
    turn=dict,
    back=lambda state, config: state,
    always={**CLIP_BARE.always, "head_bias": (False,)},
)


def _siglip_turn(state: State) -> dict[str, Tensor]:
    return query_apart(_bare(state), "head.attention")


def _siglip_back(state: dict[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    return _prefixed(query_joined(state, "head.attention"), config)


SIGLIP = Layout(
    name="huggingface-siglip",
    whose="Hugging Face SigLIP",
    marks=("head.probe", "embeddings.position_embedding.weight"),
    # A classifier beside it reads the mean patch, not the pooled one: it is left out.
    names=_SIGLIP,
    turn=_siglip_turn,
    back=_siglip_back,
    batch_axis=False,
    aside=_TWO_TOWERS,
    assumes={"activation": "gelu_tanh", "norm_eps": 1e-6},
    always={
        "activation": _GELUS,
        "class_token": (False,),
        "pool": ("map",),
        "stem_bias": (True,),
    },
    resample="bicubic",
)


def _naflex_turn(state: State) -> dict[str, Tensor]:
    return {
        key: kernel_of(tensor) if key == f"{_PROJECTION}.weight" else tensor
        for key, tensor in _siglip_turn(state).items()
    }


def _naflex_back(state: dict[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    matrix = matrix_of(state[f"{_PROJECTION}.weight"])
    return _siglip_back({**state, f"{_PROJECTION}.weight": matrix}, config)


_PROJECTION = "embeddings.patch_embedding"
SIGLIP2 = replace(
    SIGLIP,
    name="huggingface-siglip2",
    whose="Hugging Face SigLIP 2 (NaFlex)",
    own=lambda state, prefix: state.get(f"{prefix}{_PROJECTION}.weight", torch.empty(0)).ndim == 2,
    turn=_naflex_turn,
    back=_naflex_back,
    takes=COLOURS,
    resample="bilinear_antialias",
)


def _without_head(state: State, prefix: str) -> bool:
    return not {f"{prefix}head.probe", f"{prefix}embeddings.class_embedding"} & state.keys()


SIGLIP_HEADLESS = replace(
    SIGLIP,
    name="huggingface-siglip-headless",
    whose="Hugging Face SigLIP",
    marks=(
        "embeddings.position_embedding.weight",
        f"{_PROJECTION}.weight",
        "post_layernorm.weight",
    ),
    own=_without_head,
    names=_TOWER,
    turn=_bare,
    back=_prefixed,
    assumes={**SIGLIP.assumes, "pool": "mean"},
    takes=(
        "an image's vector: the language models that such a tower is for read all its patches",
        "positions of another grid as SigLIP's, resample bicubic (Idefics3, SmolVLM: nearest)",
    ),
    always={
        "activation": _GELUS,
        "stem_bias": (True,),
        "pool": ("mean",),
        "pool_norm": (False,),
        **_NO_TOKEN,
    },
)


def from_huggingface(state: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """The tensors of a Hugging Face file under our names, for `ViT(config).load_state_dict`.

    Raises `DataError` with the name of a key that is missing, unexpected or of another shape.
    """
    return _layout(config).read(state, config)


def to_huggingface(state: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """The inverse of `from_huggingface`: our state dict under the names of their files.

    Raises `DataError` for a model that none of their architectures is.
    """
    return _layout(config).write(state, config)


def _layout(config: ViTConfig) -> Layout:
    """What has the architecture of `config` there."""
    if config.pool == "map":
        return SIGLIP2 if config.resample == "bilinear_antialias" else SIGLIP
    if config.pre_norm:
        return CLIP if config.classes else CLIP_BARE
    if config.layer_scale is not None:
        tips = config.registers == 1 and config.resample == TIPSV2.resample
        return TIPSV2 if tips else DINOV2
    if config.distilled:
        return DEIT_TEACHER if config.classes else DEIT_BARE
    if not config.class_token and config.pool == "mean":
        if not config.classes and config.activation == "gelu_tanh":
            return SIGLIP_HEADLESS
        return IJEPA if config.classes else IJEPA_BARE
    if config.registers == 1 and config.classes:
        return DEIT
    return VIT if config.classes else VIT_BARE
