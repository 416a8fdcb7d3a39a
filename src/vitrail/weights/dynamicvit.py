"""DynamicViT's own checkpoint layout: DeiT's names, and `score_predictor` with its two halves.

Its files are published on Google Drive and Tsinghua's cloud, behind pages and not as addresses to
fetch: https://github.com/raoyongming/DynamicViT has the links.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitrail.models import DynamicViTConfig
from vitrail.weights.family import FamilyLayout, renamed
from vitrail.weights.names import State

_NAMES = {"prefix": "cls_token", "position.table": "pos_embed"}
_MODULES = {"stem": "patch_embed", "encoder.blocks": "blocks", "encoder.norm": "norm"}
_PREDICTOR = {
    "norm": "in_conv.0",
    "embed": "in_conv.1",
    "fc1": "out_conv.0",
    "fc2": "out_conv.2",
    "fc3": "out_conv.4",
}


def _theirs(key: str) -> str:
    if key.startswith("predictors."):
        _, stage, part, leaf = key.split(".")
        return f"score_predictor.{stage}.{_PREDICTOR[part]}.{leaf}"
    return renamed(key, _NAMES | _MODULES)


def _back(state: dict[str, Tensor], config: DynamicViTConfig) -> dict[str, Tensor]:
    """Tokens and positions with the axis of images that they have there."""
    return {key: x[None] if key in _NAMES.values() else x for key, x in state.items()}


def _sized(state: State) -> Mapping[str, Any]:
    """The size of square images in patches as the kernel's, that the position table is for."""
    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    height, width = state["patch_embed.proj.weight"].shape[2:]
    return {"image_size": (side * height, side * width)}


LAYOUTS = (
    FamilyLayout(
        name="dynamicvit",
        whose="DynamicViT",
        family=DynamicViTConfig,
        marks=("score_predictor.0.in_conv.1.weight", "cls_token", "pos_embed"),
        theirs=_theirs,
        back=_back,
        sized=_sized,
    ),
)
