"""MobileViT in the layouts of timm and of transformers, both of which have the authors' files.

The authors trained it on blue, green, red, in this order. transformers has their kernels and turns
the images (`do_flip_channel_order`). timm has turned the kernels, as it does with all such files
(its discussion 439), and scores what they published with images of red, green, blue. So do our
models take them: reading a file of transformers turns its first kernel, writing one turns it back.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from vitrail.models.mobilevit import MobileViTConfig
from vitrail.weights.family import BLOCK, FamilyLayout, renamed
from vitrail.weights.names import State

# --- timm ---

_TIMM = {"stem.norm": "stem.bn", "expand.conv": "final_conv.conv", "expand.norm": "final_conv.bn"}
_TIMM |= {"head": "head.fc"}
_TIMM_PARTS = {
    **{
        f"{ours}.{x}": f"{theirs}.{y}"
        for ours, theirs in {
            "conv1": "conv1_1x1",
            "conv2": "conv2_kxk",
            "conv3": "conv3_1x1",
            "local": "conv_kxk",
            "to_map": "conv_proj",
            "fuse": "conv_fusion",
        }.items()
        for x, y in {"conv": "conv", "norm": "bn"}.items()
    },
    "to_tokens": "conv_1x1",
    "blocks": "transformer",
}


def _timm(key: str) -> str:
    if block := BLOCK.fullmatch(key):
        return f"stages.{block[1]}.{block[2]}.{renamed(block[3], _TIMM_PARTS)}"
    return renamed(key, _TIMM)


TIMM_MOBILEVIT = FamilyLayout(
    name="timm-mobilevit",
    whose="timm's MobileViT",
    family=MobileViTConfig,
    marks=("stem.conv.weight", "stages.2.1.conv_kxk.conv.weight", "final_conv.conv.weight"),
    theirs=_timm,
    stem="stem.conv.weight",
    writes=("timm",),
    changes={"norm_eps": 1e-5},
)

# --- transformers ---

_STEM = "conv_stem.convolution.weight"
_CONVOLUTIONAL = 2
"""Stages without a transformer, in transformers' code: the others have one inverted residual."""
_LEAVES = {"conv": "convolution", "norm": "normalization"}


def _with_leaves(names: Mapping[str, str]) -> dict[str, str]:
    """The names of convolutions, and of the batch norms behind them."""
    return {f"{o}.{x}": f"{t}.{y}" for o, t in names.items() for x, y in _LEAVES.items()}


_HUGGINGFACE = _with_leaves({"stem": "conv_stem", "expand": "conv_1x1_exp"})
_HUGGINGFACE |= {"head": "classifier"}
_RESIDUAL = _with_leaves({"conv1": "expand_1x1", "conv2": "conv_3x3", "conv3": "reduce_1x1"})
_MIXED = {
    **_with_leaves({"local": "conv_kxk", "to_map": "conv_projection", "fuse": "fusion"}),
    "to_tokens": "conv_1x1.convolution",
    "norm": "layernorm",
}
_TRANSFORMER = re.compile(r"blocks\.(\d+)\.(.+)")
_TRANSFORMER_PARTS = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def _huggingface(key: str) -> str | tuple[str, ...]:
    block = BLOCK.fullmatch(key)
    if block is None:
        return renamed(key, _HUGGINGFACE)
    stage, part = f"encoder.layer.{block[1]}", block[3]
    if inner := _TRANSFORMER.fullmatch(part):
        layer, part = f"{stage}.transformer.layer.{inner[1]}", inner[2]
        if part.startswith("attn.qkv."):
            leaf = part.removeprefix("attn.qkv.")
            return tuple(f"{layer}.attention.attention.{x}.{leaf}" for x in _QKV)
        return f"{layer}.{renamed(part, _TRANSFORMER_PARTS)}"
    if part.startswith(tuple(_RESIDUAL)):
        convolutional = int(block[1]) < _CONVOLUTIONAL
        place = f"layer.{block[2]}" if convolutional else "downsampling_layer"
        return f"{stage}.{place}.{renamed(part, _RESIDUAL)}"
    return f"{stage}.{renamed(part, _MIXED)}"


_QKV = ("query", "key", "value")


def _turned(stem: str) -> Callable[[State], dict[str, Tensor]]:
    """Red, green, blue for blue, green, red, or the other way round; as they are, if not three."""

    def turn(state: State) -> dict[str, Tensor]:
        kernel = state.get(stem)
        if kernel is None or kernel.ndim != 4 or kernel.shape[1] != 3:
            return dict(state)
        return {**state, stem: kernel.flip(1)}

    return turn


HUGGINGFACE_MOBILEVIT_BARE = FamilyLayout(
    name="huggingface-mobilevit-bare",
    whose="Hugging Face MobileViT",
    family=MobileViTConfig,
    marks=(_STEM, "encoder.layer.2.conv_kxk.convolution.weight"),
    theirs=_huggingface,
    stem="stem.conv.weight",
    turn=_turned(_STEM),
    back=lambda state, config: _turned(_STEM)(state),
    changes={"norm_eps": 1e-5},
)


def _with_head(key: str) -> str | tuple[str, ...]:
    names = _huggingface(key)
    if key.startswith("head"):
        return names
    return (
        f"mobilevit.{names}" if isinstance(names, str) else tuple(f"mobilevit.{x}" for x in names)
    )


HUGGINGFACE_MOBILEVIT = replace(
    HUGGINGFACE_MOBILEVIT_BARE,
    name="huggingface-mobilevit",
    marks=(
        *(f"mobilevit.{mark}" for mark in HUGGINGFACE_MOBILEVIT_BARE.marks),
        "classifier.weight",
    ),
    writes=("huggingface",),
    theirs=_with_head,
    turn=_turned(f"mobilevit.{_STEM}"),
    back=lambda state, config: _turned(f"mobilevit.{_STEM}")(state),
)

LAYOUTS = (TIMM_MOBILEVIT, HUGGINGFACE_MOBILEVIT, HUGGINGFACE_MOBILEVIT_BARE)
