"""ResNets in the layouts of torchvision and timm, BiT in those of timm, transformers and Google.

Google's BiT files (.npz of TensorFlow: `BiT-M-R50x1`) count stages and units from 1, have a
kernel's outputs last, and heads that are 1x1 convolutions, as timm has them too.
"""

from dataclasses import replace

import torch
from torch import Tensor

from vitrail.models.bit import BiTConfig
from vitrail.models.resnet import ResNetConfig
from vitrail.weights.family import BLOCK, FamilyLayout, renamed
from vitrail.weights.names import State

# --- ResNet: torchvision's names, which timm has kept ---

_RESNET = {"stem.conv": "conv1", "stem.norm": "bn1", "head": "fc"}
_RESNET_PARTS = {
    "conv": "conv",
    "norm": "bn",
    "shortcut.conv": "downsample.0",
    "shortcut.norm": "downsample.1",
}


def _resnet(key: str) -> str:
    if block := BLOCK.fullmatch(key):
        return f"layer{int(block[1]) + 1}.{block[2]}.{renamed(block[3], _RESNET_PARTS)}"
    return renamed(key, _RESNET)


def _counted(state: State) -> dict[str, Tensor]:
    """With the counters of its batch norms, which the oldest files lack and no output needs."""
    counters = {
        key.replace("running_mean", "num_batches_tracked"): torch.tensor(0)
        for key in state
        if key.endswith("running_mean")
    }
    return {**counters, **state}


RESNET = FamilyLayout(
    name="resnet",
    writes=("timm",),
    whose="torchvision's and timm's ResNet",
    family=ResNetConfig,
    marks=("conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight"),
    theirs=_resnet,
    stem="stem.conv.weight",
    turn=_counted,
    changes={"norm_eps": 1e-5},
    takes=("plain strides (timm's resnetblur and resnetaa blur first, under the same names)",),
)

# --- BiT ---

_HEAD = "head.fc.weight"
_TIMM = {"stem": "stem.conv", "norm": "norm", "head": "head.fc"}
_SHORTCUT = {"shortcut": "downsample.conv"}


def _timm(key: str) -> str:
    if block := BLOCK.fullmatch(key):
        return f"stages.{block[1]}.blocks.{block[2]}.{renamed(block[3], _SHORTCUT)}"
    return renamed(key, _TIMM)


def _timm_turn(state: State) -> dict[str, Tensor]:
    return {k: t[:, :, 0, 0] if k == _HEAD and t.ndim == 4 else t for k, t in state.items()}


def _timm_back(state: dict[str, Tensor], config: BiTConfig) -> dict[str, Tensor]:
    return {k: t[:, :, None, None] if k == _HEAD else t for k, t in state.items()}


TIMM_BIT = FamilyLayout(
    name="timm-bit",
    writes=("timm",),
    whose="timm's BiT",
    family=BiTConfig,
    marks=("stem.conv.weight", "stages.0.blocks.0.norm1.weight", "stages.0.blocks.0.conv3.weight"),
    theirs=_timm,
    stem="stem.weight",
    turn=_timm_turn,
    back=_timm_back,
    changes={"eps": "timm"},
)

_TRANSFORMERS = {"stem": "embedder.convolution", "norm": "norm", "head": "classifier.1"}


def _transformers(key: str) -> str:
    if block := BLOCK.fullmatch(key):
        part = renamed(block[3], _SHORTCUT)
        return f"encoder.stages.{block[1]}.layers.{block[2]}.{part}"
    return renamed(key, _TRANSFORMERS)


HUGGINGFACE_BIT_BARE = FamilyLayout(
    name="huggingface-bit-bare",
    whose="Hugging Face BiT",
    family=BiTConfig,
    marks=("embedder.convolution.weight", "encoder.stages.0.layers.0.norm1.weight"),
    theirs=_transformers,
    stem="stem.weight",
    changes={"eps": "timm"},
)
HUGGINGFACE_BIT = replace(
    HUGGINGFACE_BIT_BARE,
    name="huggingface-bit",
    writes=("huggingface",),
    marks=(*(f"bit.{mark}" for mark in HUGGINGFACE_BIT_BARE.marks), "classifier.1.weight"),
    theirs=lambda key: ("" if key.startswith("head") else "bit.") + _transformers(key),
)

_ROOT = "resnet/root_block/standardized_conv2d"
_GOOGLE = {"stem": _ROOT, "norm": "resnet/group_norm", "head": "resnet/head/conv2d"}
_GOOGLE_PARTS = {
    "shortcut": "a/proj/standardized_conv2d",
    **{f"conv{n}": f"{x}/standardized_conv2d" for n, x in enumerate("abc", start=1)},
    **{f"norm{n}": f"{x}/group_norm" for n, x in enumerate("abc", start=1)},
}


def _google(key: str) -> str:
    if block := BLOCK.fullmatch(key):
        unit = f"resnet/block{int(block[1]) + 1}/unit{int(block[2]) + 1:02d}"
        name = f"{unit}/{renamed(block[3], _GOOGLE_PARTS)}"
    else:
        name = renamed(key, _GOOGLE)
    module, _, leaf = name.rpartition(".")
    if module.endswith("group_norm"):
        return f"{module}/{'gamma' if leaf == 'weight' else 'beta'}"
    return f"{module}/{'kernel' if leaf == 'weight' else 'bias'}"


def _google_turn(state: State) -> dict[str, Tensor]:
    turned = {k: t.permute(3, 2, 0, 1) if t.ndim == 4 else t for k, t in state.items()}
    head = "resnet/head/conv2d/kernel"
    if head in turned and turned[head].ndim == 4:
        turned[head] = turned[head][:, :, 0, 0]
    return turned


def _google_back(state: dict[str, Tensor], config: BiTConfig) -> dict[str, Tensor]:
    return {
        k: t.reshape(*t.shape, *[1] * (4 - t.ndim)).permute(2, 3, 1, 0) if t.ndim > 1 else t
        for k, t in state.items()
    }


GOOGLE_BIT = FamilyLayout(
    name="google-bit",
    writes=("google",),
    whose="Google's BiT",
    family=BiTConfig,
    marks=(f"{_ROOT}/kernel", "resnet/group_norm/gamma"),
    theirs=_google,
    stem="stem.weight",
    turn=_google_turn,
    back=_google_back,
    changes={"eps": "big_transfer"},
)

LAYOUTS = (RESNET, TIMM_BIT, HUGGINGFACE_BIT, HUGGINGFACE_BIT_BARE, GOOGLE_BIT)
