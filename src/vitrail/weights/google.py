"""Google's checkpoints (.npz): original ViT, AugReg, SAM, big_vision, image towers of LiT, SigLIP.

One family of files, written by flax over five years under changing names:

- pre-linen (google-research/vision_transformer): one counter numbers all the parts of a block, and
  the position table lies in a module of its own, with a row for the class token
- linen (big_vision): each class of parts has its counter; the table has no row for the class token
- scanned: one `encoderblock`, whose arrays have a leading axis of blocks
- attention pooling once lay at the top, later in `MAPHead_0`
- a hybrid has its ResNet's arrays besides, stages (`block1`) and units counted from 1

`turn` brings all of them to big_vision's names and torch's order of axes. A file of Google's goes
back as it came. Anything else is written as the original code has it, whose table has a row for the
class token, which big_vision reads too; with attention pooling, as big_vision has it, for the
original has none. Arrays: systems.md, section 3.1, from the repositories' own loaders.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Size, Tensor

from vitrail.errors import DataError
from vitrail.models import ViTConfig
from vitrail.weights.names import Ask, Layout, Names, State, position_rows, rename

_BLOCK = "Transformer/encoderblock_{i}"
_ATTENTION = f"{_BLOCK}/MultiHeadDotProductAttention_0"
_POOL = "MAPHead_0/MultiHeadDotProductAttention_0"

NAMES: Names = {
    "prefix.class": "cls",
    "position.table": "pos_embedding",
    "stem.proj": "embedding",
    "encoder.blocks.{i}.norm1": f"{_BLOCK}/LayerNorm_0",
    "encoder.blocks.{i}.attn.qkv": tuple(f"{_ATTENTION}/{x}" for x in ("query", "key", "value")),
    "encoder.blocks.{i}.attn.proj": f"{_ATTENTION}/out",
    "encoder.blocks.{i}.norm2": f"{_BLOCK}/LayerNorm_1",
    "encoder.blocks.{i}.mlp.fc1": f"{_BLOCK}/MlpBlock_0/Dense_0",
    "encoder.blocks.{i}.mlp.fc2": f"{_BLOCK}/MlpBlock_0/Dense_1",
    "encoder.norm": "Transformer/encoder_norm",
    "pool.probe": "MAPHead_0/probe",
    "pool.q": f"{_POOL}/query",
    "pool.kv": (f"{_POOL}/key", f"{_POOL}/value"),
    "pool.proj": f"{_POOL}/out",
    "pool.norm": "MAPHead_0/LayerNorm_0",
    "pool.mlp.fc1": "MAPHead_0/MlpBlock_0/Dense_0",
    "pool.mlp.fc2": "MAPHead_0/MlpBlock_0/Dense_1",
    "stem.root.conv": "conv_root",
    "stem.root.norm": "gn_root",
    **{f"stem.stages.{{i}}.{{j}}.conv{n}": f"stages/{{i}}/{{j}}/conv{n}" for n in (1, 2, 3)},
    **{f"stem.stages.{{i}}.{{j}}.norm{n}": f"stages/{{i}}/{{j}}/gn{n}" for n in (1, 2, 3)},
    "stem.stages.{i}.{j}.shortcut.conv": "stages/{i}/{j}/conv_proj",
    "stem.stages.{i}.{j}.shortcut.norm": "stages/{i}/{j}/gn_proj",
    "representation": "pre_logits",
    "head": "head",
}

_PRE_LINEN = {  # in a block, behind its number
    "/MultiHeadDotProductAttention_1/": "/MultiHeadDotProductAttention_0/",
    "/LayerNorm_2/": "/LayerNorm_1/",
    "/MlpBlock_3/": "/MlpBlock_0/",
}
_TABLES = ("Transformer/posembed_input/pos_embedding", "Transformer/pos_embedding")
_INLINED = ("probe", "MultiHeadDotProductAttention_0/", "LayerNorm_0/", "MlpBlock_0/")
_SCANNED = "Transformer/encoderblock/"
_EMBEDDING = "embedding/kernel"


def _turn(state: State) -> dict[str, Tensor]:
    """Arrays of any of the ages under big_vision's names, as torch lays out its own."""
    state = rename(_unscanned(state), _modern)
    turned = {name: _to_torch(name, array) for name, array in state.items()}
    return rename(turned, _dotted)


def _back(state: dict[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """The inverse, under big_vision's names."""
    arrays = {}
    for key, tensor in state.items():
        module, _, leaf = key.rpartition(".")
        if leaf == "weight":
            leaf = "kernel" if tensor.ndim > 1 else "scale"
        name = f"{module}/{leaf}" if module else key
        arrays[name] = _to_flax(name, tensor, config.heads)
    return arrays


def _as_it_came(arrays: State, like: Mapping[str, Size]) -> dict[str, Tensor]:
    """Arrays under big_vision's names as the ones in the file `like` were called and shaped."""
    kernel = next(key for key in like if key.endswith(_EMBEDDING))
    prefix = kernel.removesuffix(_EMBEDDING)
    back = {}
    for key, shape in like.items():
        name = key.removeprefix(prefix)
        if name.startswith(_SCANNED):
            part = name.removeprefix(_SCANNED)
            blocks = (f"Transformer/encoderblock_{i}/{part}" for i in range(shape[0]))
            array = torch.stack([arrays[_modern(block)] for block in blocks])
        else:
            array = arrays[_modern(name)]
        back[key] = array.reshape(shape)
    return back


def _unscanned(state: State) -> dict[str, Tensor]:
    """Every block's own arrays."""
    blocks: dict[str, Tensor] = {}
    for key, array in state.items():
        if key.startswith(_SCANNED) and array.ndim:
            for i, block in enumerate(array):
                blocks[f"Transformer/encoderblock_{i}/{key.removeprefix(_SCANNED)}"] = block
        else:
            blocks[key] = array
    return blocks


def _from_zero(key: str) -> str:
    """The ResNet's stages and units counted as we do."""
    return re.sub(
        r"^block(\d+)/unit(\d+)/", lambda m: f"stages/{int(m[1]) - 1}/{int(m[2]) - 1}/", key
    )


def _from_one(key: str) -> str:
    return re.sub(
        r"^stages/(\d+)/(\d+)/", lambda m: f"block{int(m[1]) + 1}/unit{int(m[2]) + 1}/", key
    )


def _modern(key: str) -> str:
    key = _from_zero(key)
    if key in _TABLES:
        return "pos_embedding"
    if key.startswith(_INLINED):
        return f"MAPHead_0/{key}"
    if key.startswith("Transformer/encoderblock_"):
        for old, new in _PRE_LINEN.items():
            key = key.replace(old, new)
    return key


def _original(key: str) -> str:
    if key == "pos_embedding":
        return _TABLES[0]
    if key.startswith("Transformer/encoderblock_"):
        for old, new in _PRE_LINEN.items():
            key = key.replace(new, old)
    return key


def _dotted(key: str) -> str:
    for theirs, ours in {"/kernel": ".weight", "/scale": ".weight", "/bias": ".bias"}.items():
        if key.endswith(theirs):
            return key.removesuffix(theirs) + ours
    return key


def _to_torch(name: str, array: Tensor) -> Tensor:
    """Outputs before inputs, and the heads side by side on one axis."""
    module, _, leaf = name.rpartition("/")
    if leaf in ("bias", "scale"):
        return array.flatten()  # a head's bias is [H, d], an old group norm's scale [1, 1, 1, c]
    if leaf != "kernel" or array.ndim < 2:
        return array
    if array.ndim == 4:
        return array.permute(3, 2, 0, 1)  # HWIO
    # The output projection's is [H, d, D], a query's [D, H, d].
    return (array.flatten(0, -2) if module.endswith("/out") else array.flatten(1)).T


def _to_flax(name: str, tensor: Tensor, heads: int) -> Tensor:
    module, _, leaf = name.rpartition("/")
    if leaf == "kernel" and tensor.ndim == 4:
        return tensor.permute(2, 3, 1, 0)
    if leaf == "kernel":
        tensor = tensor.T
    if module.endswith(("/query", "/key", "/value")):
        return tensor.unflatten(-1, (heads, -1))
    if leaf == "kernel" and module.endswith("/out"):
        return tensor.unflatten(0, (heads, -1))
    return tensor


def _shows(state: State) -> Mapping[str, Any]:
    """The heads: a query's kernel is [D, H, d]."""
    for key, array in state.items():
        if key.startswith("Transformer/") and key.endswith("/query/kernel") and array.ndim >= 3:
            return {"heads": array.shape[-2]}
    return {}


GOOGLE = Layout(
    name="google",
    whose="Google",
    marks=(_EMBEDDING, "Transformer/encoder_norm/scale"),
    names=NAMES,
    turn=_turn,
    back=_back,
    shows=_shows,
    aside=("txt/*", "t", "b"),  # of two towers without a prefix: LiT, SigLIP
    assumes={"activation": "gelu_tanh", "norm_eps": 1e-6},
    doubts={
        "pool": Ask(
            "big_vision's pool_type '0' has the same tensors: for that say {}",
            ("first",),
            when={"class_token": False},
        ),
        "resample": Ask("a FlexiViT has the same tensors: for that say {}", ("flexivit",)),
    },
    tableless=("sincos_bigvision", " for big_vision's posemb='sincos2d'"),
    always={
        "activation": ("gelu_tanh",),
        "norm_eps": (1e-6,),
        "stem_eps": ("vision_transformer",),
        "qkv_bias": (True,),
        "stem_bias": (True,),
        "head_bias": (True,),
    },
    resample="bilinear_aligned",
)


def from_google(state: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """The arrays of a Google file, without their prefix, under our names.

    Raises `DataError` with the name of a key that is missing, unexpected or of another shape.
    """
    return GOOGLE.read(state, config)


def to_google(
    state: Mapping[str, Tensor], config: ViTConfig, like: Mapping[str, Size] | None = None
) -> dict[str, Tensor]:
    """The inverse of `from_google`, for `write_npz`.

    `like` has the names and shapes of the file of Google's that the weights came from, if they
    did: it goes back as it came. Raises `DataError` for a model that Google has no counterpart of.
    """
    if config.class_token and config.pool != "class":
        raise DataError(
            f"Google has no counterpart of pool='{config.pool}' beside a class token: its code "
            f"reads the class token where there is one"
        )
    if like:
        return _as_it_came(GOOGLE.write(state, config), like)
    if config.class_token and config.position == "learned" and not config.prefix_position:
        state, config = position_rows(state, 0, 1), replace(config, prefix_position=True)
    arrays = rename(GOOGLE.write(state, config), _from_one)
    return arrays if config.pool == "map" else rename(arrays, _original)
