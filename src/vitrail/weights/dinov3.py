"""DINOv3 (arXiv 2508.10104) in three layouts: its makers' own, Hugging Face's, timm's.

The models of LingBot-Vision and EUPE have the same shape and the same names. Beyond the names, the
layouts differ in

|                      | its own               | Hugging Face          | timm                      |
|----------------------|-----------------------|-----------------------|---------------------------|
| biases of q, k and v | the keys' masked to 0 | none of the keys      | none; q, v in _qkvb       |
| gated MLP            | w1, w2, w3            | gate_, up_, down_proj | fc1_g, fc1_x, fc2         |
| periods of the rope  | in the file, bfloat16 | computed in float32   | computed in float32       |
| an image's vector    | the class token       | the class token       | the patches' mean         |

The distilled S to H+ ended with biases of q, k and v that are all zero, so that files of timm's
without them are the same function. Ours has the periods in float32, as Hugging Face's and timm's
code have them: that a file's own are these, but for the rounding, is checked.
"""

import re
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from vitrail.errors import DataError
from vitrail.models import ViTConfig
from vitrail.nn import RotaryPosition
from vitrail.weights.names import (
    Layout,
    Names,
    State,
    check_key_bias,
    rename,
    with_key_bias,
    without_key_bias,
)
from vitrail.weights.timm import MARKS, NAMES

_MODEL = {"position": "rope", "rope": "dinov3", "activation": "gelu", "norm_eps": 1e-5}
_ALWAYS = {
    "position": ("rope",),
    "rope": ("dinov3",),
    "class_token": (True,),
    "distilled": (False,),
    "stem_bias": (True,),
    "qk_norm": (False,),
    "pre_norm": (False,),
    "head_bias": (True,),
}


def is_one(config: ViTConfig) -> bool:
    """Whether a model has what tells DINOv3's from others that turn queries and keys."""
    return (
        config.position == "rope"
        and config.rope == "dinov3"
        and config.class_token
        and config.registers > 0
        and config.layer_scale is not None
    )


def _joined(state: State, gated: str, gate: str, name: str) -> dict[str, Tensor]:
    """With a gated MLP's two first layers as one called `name`: ours."""
    theirs = dict(state)
    for key in state:
        other = key.replace(f".{gated}.", f".{gate}.")
        if other == key or other not in state:
            continue
        first, second = state[key], state[other]
        if first.ndim and first.shape == second.shape:
            del theirs[key], theirs[other]
            theirs[key.replace(f".{gated}.", f".{name}.")] = torch.cat([first, second])
    return theirs


def _apart(state: State, gated: str, gate: str, name: str) -> dict[str, Tensor]:
    """The inverse of `_joined`."""
    theirs = {}
    for key, tensor in state.items():
        if f".{name}." in key:
            for part, half in zip((gated, gate), tensor.chunk(2), strict=True):
                theirs[key.replace(f".{name}.", f".{part}.")] = half
        else:
            theirs[key] = tensor
    return theirs


# --- its own, of facebookresearch/dinov3 ---

_PERIODS = "rope_embed.periods"


def _shows(state: State) -> dict[str, int]:
    """The heads: a period turns four of a head's channels."""
    periods, kernel = state.get(_PERIODS), state.get("patch_embed.proj.weight")
    if periods is None or kernel is None or not kernel.ndim:
        return {}
    heads, rest = divmod(kernel.shape[0], 4 * max(periods.numel(), 1))
    if rest or periods.ndim != 1 or not periods.numel():
        raise DataError(
            f"'{_PERIODS}' of {tuple(periods.shape)} is none of width {kernel.shape[0]}"
        )
    expected = RotaryPosition(4 * periods.numel()).periods
    if not periods.is_meta and not torch.allclose(periods.float(), expected, rtol=2**-8, atol=0):
        raise DataError(
            f"'{_PERIODS}' are not those of DINOv3, which are from 1 to 100: vitrail has no others"
        )
    return {"heads": heads}


def _own_turn(state: State) -> dict[str, Tensor]:
    """Without buffers: the mask is applied to the bias, the periods are computed."""
    theirs = {key: tensor for key, tensor in state.items() if key != _PERIODS}
    for key, bias in state.items():
        mask = theirs.pop(f"{key}_mask", None) if key.endswith(".qkv.bias") else None
        if mask is None:
            continue
        if mask.shape != bias.shape or not (mask.is_meta or torch.equal(mask, _mask(bias))):
            raise DataError(
                f"'{key}_mask' does not have ones for queries and values and zeros for keys: it "
                f"was never initialised, or is damaged. Fetch the file again"
            )
        theirs[key] = bias * mask
    theirs = _joined(theirs, "w1", "w2", "fc1")
    return rename(theirs, lambda key: key.replace(".mlp.w3.", ".mlp.fc2."))


def _mask(bias: Tensor) -> Tensor:
    mask = torch.ones_like(bias)
    mask[len(bias) // 3 : 2 * (len(bias) // 3)] = 0
    return mask


def _own_back(state: dict[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """With all that its code wants: mask, periods as it rounds them, the token of pre-training."""
    if config.activation == "swiglu":
        state = _apart(state, "w1", "w2", "fc1")
        state = rename(state, lambda key: key.replace(".mlp.fc2.", ".mlp.w3."))
    masks = {}
    for key, bias in state.items():
        if key.endswith(".qkv.bias"):
            check_key_bias(key, bias.chunk(3)[1])
            masks[f"{key}_mask"] = _mask(bias)
    token = state["cls_token"]
    periods = RotaryPosition(config.width // config.heads).periods
    return {
        **state,
        **masks,
        _PERIODS: periods.to(token.device, torch.bfloat16),
        "mask_token": token.new_zeros(1, config.width),
    }


DINOV3 = Layout(
    name="dinov3",
    whose="DINOv3",
    marks=(*MARKS, "cls_token", "storage_tokens"),
    own=lambda state, prefix: f"{prefix}pos_embed" not in state,
    names={**NAMES, "prefix.registers": "storage_tokens"},
    turn=_own_turn,
    back=_own_back,
    shows=_shows,
    # The second norm is for small crops, in training; projectors are those of EUPE's distillation.
    aside=("mask_token", "local_cls_norm.*", "projectors.*"),
    assumes={**_MODEL, "pool": "class"},
    takes=("periods of the rope in float32: its own code has them in bfloat16, 3 digits",),
    always={**_ALWAYS, "pool": ("class",)},
)


# --- Hugging Face's ---

_LAYER = "layer.{i}"
_HF_NAMES: Names = {
    "prefix.class": "embeddings.cls_token",
    "prefix.registers": "embeddings.register_tokens",
    "stem.proj": "embeddings.patch_embeddings",
    "encoder.blocks.{i}.norm1": f"{_LAYER}.norm1",
    "encoder.blocks.{i}.attn.qkv": (
        f"{_LAYER}.attention.q_proj",
        f"{_LAYER}.attention.k_proj",
        f"{_LAYER}.attention.v_proj",
    ),
    "encoder.blocks.{i}.attn.proj": f"{_LAYER}.attention.o_proj",
    "encoder.blocks.{i}.scale1.gamma": f"{_LAYER}.layer_scale1.lambda1",
    "encoder.blocks.{i}.norm2": f"{_LAYER}.norm2",
    "encoder.blocks.{i}.mlp.fc1": f"{_LAYER}.mlp.up_proj",
    "encoder.blocks.{i}.mlp.fc2": f"{_LAYER}.mlp.down_proj",
    "encoder.blocks.{i}.scale2.gamma": f"{_LAYER}.layer_scale2.lambda1",
    "encoder.norm": "norm",
}
_MASK_TOKEN = "embeddings.mask_token"
_HF_GATED = ("gate_proj", "up_proj", "up_proj")


def _hf_turn(state: State) -> dict[str, Tensor]:
    """From the files' names, or those in the memory of transformers 5."""
    theirs = rename(state, lambda key: re.sub(r"^model\.layer\.", "layer.", key))
    return _joined(with_key_bias(theirs), *_HF_GATED)


def _hf_back(state: dict[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    theirs = {
        key: tensor
        for key, tensor in state.items()
        if not (key.endswith("k_proj.bias") and (tensor.is_meta or not tensor.any()))
    }
    if config.activation == "swiglu":
        theirs = _apart(theirs, *_HF_GATED)
    return {**theirs, _MASK_TOKEN: torch.zeros_like(state["embeddings.cls_token"])}


HUGGING_FACE = Layout(
    name="huggingface-dinov3",
    whose="Hugging Face DINOv3",
    marks=("embeddings.register_tokens", "embeddings.patch_embeddings.weight", "norm.weight"),
    names=_HF_NAMES,
    turn=_hf_turn,
    back=_hf_back,
    aside=(_MASK_TOKEN,),
    assumes={**_MODEL, "pool": "class"},
    always={**_ALWAYS, "pool": ("class",)},
)


# --- timm's ---

_TIMM_GATED = ("fc1_g", "fc1_x", "fc1")


def _timm_turn(state: State) -> dict[str, Tensor]:
    return _joined(with_key_bias(state), *_TIMM_GATED)


def _timm_back(state: dict[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    theirs = without_key_bias(state, config)
    return _apart(theirs, *_TIMM_GATED) if config.activation == "swiglu" else theirs


TIMM = replace(
    DINOV3,
    name="timm-dinov3",
    whose="timm's DINOv3",
    marks=(*MARKS, "cls_token", "reg_token", "blocks.0.gamma_1"),
    own=lambda state, prefix: not {f"{prefix}pos_embed", f"{prefix}rope.freqs"} & state.keys(),
    names={
        **NAMES,
        "encoder.blocks.{i}.attn.qkv.weight": "blocks.{i}.attn.qkv.weight",
        "encoder.blocks.{i}.attn.qkv.bias": tuple(
            f"blocks.{{i}}.attn.{part}_bias" for part in "qkv"
        ),
        "encoder.blocks.{i}.scale1.gamma": "blocks.{i}.gamma_1",
        "encoder.blocks.{i}.scale2.gamma": "blocks.{i}.gamma_2",
    },
    turn=_timm_turn,
    back=_timm_back,
    shows=lambda state: {},
    aside=(),
    assumes={**_MODEL, "pool": "mean"},
    takes=("the mean of the patches, as timm takes it where DINOv3's makers take the class token",),
    always=_ALWAYS,
)

WRITTEN: dict[str, Callable[[State, ViTConfig], dict[str, Tensor]]] = {
    "timm": TIMM.write,
    "huggingface": HUGGING_FACE.write,
}
"""How a model that `is_one` is written."""
