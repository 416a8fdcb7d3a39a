"""ViTDet's backbones (arXiv 2203.16527): detectron2's files, and Hugging Face's VitDet.

A detector's other parts (pyramid, proposals, boxes, masks) lie outside the prefix `backbone.net.`
and are left out, and named. Tables of relative positions show what no other file's shapes do: the
heads, by their width; the windows, by their length, and with it which blocks are global, for there
it is the image's. Files without them are not read: nothing would show the windows.

Both codes keep a position for the class token of the pre-training, which nothing reads: it is left
out, and is zeros on the way back.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vitrail.errors import DataError
from vitrail.models import ViTConfig
from vitrail.weights.names import Ask, Layout, Names, State
from vitrail.weights.timm import MARKS, NAMES

_ROWS, _COLUMNS = (f"encoder.blocks.{{i}}.attn.relative.{axis}" for axis in ("rows", "columns"))


def _shows(block: str) -> Callable[[State], Mapping[str, Any]]:
    """What the tables of blocks called `block` show; `{i}` is their number."""

    def shows(state: State) -> Mapping[str, Any]:
        sizes: list[tuple[int, int]] = []
        while (name := f"{block.format(i=len(sizes))}.rel_pos_h") in state:
            tables = [state[name], state.get(f"{name[:-1]}w", torch.empty(0))]
            if any(t.ndim != 2 or not t.numel() or len(t) % 2 == 0 for t in tables):
                shapes = " and ".join(str(tuple(t.shape)) for t in tables)
                raise DataError(
                    f"'{name}' and its like for columns are {shapes}: they have an odd number of "
                    f"rows, 2 n - 1 for n tokens, and the width of a head"
                )
            sizes.append((len(tables[0]) // 2 + 1, len(tables[1]) // 2 + 1))
        smallest, largest = min(sizes), max(sizes)
        found: dict[str, Any] = {"window": smallest, "relative": largest}
        if smallest != largest:
            found["global_blocks"] = tuple(i for i, x in enumerate(sizes) if x != smallest)
            if any(x not in (smallest, largest) for x in sizes):
                raise DataError(
                    f"tables of relative positions for {len(set(sizes))} grids: a ViTDet has those "
                    f"of its windows and of its image"
                )
        width = state[f"{block.format(i=0)}.rel_pos_h"].shape[1]
        qkv = state.get(f"{block.format(i=0)}.qkv.weight", torch.empty(0))
        if qkv.ndim == 2 and qkv.shape[1] % width == 0:  # else another check says what is wrong
            found["heads"] = qkv.shape[1] // width
        return found

    return shows


def _unused_row(table: str) -> tuple[Callable[[State], State], Callable[..., dict[str, Tensor]]]:
    """Without the class token's position in `table`, and with one of zeros."""

    def turn(state: State) -> State:
        rows = state.get(table)
        if rows is None or rows.ndim != 3 or rows.shape[1] < 2:
            return state  # what reads it says what is wrong
        return {**state, table: rows[:, 1:]}

    def back(state: dict[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
        rows = state[table]
        return {**state, table: torch.cat([torch.zeros_like(rows[:, :1]), rows], dim=1)}

    return turn, back


_turn, _back = _unused_row("pos_embed")
DETECTRON2 = Layout(
    name="detectron2-vitdet",
    whose="ViTDet in detectron2",
    marks=(*MARKS, "pos_embed", "blocks.0.attn.rel_pos_h"),
    own=lambda state, prefix: f"{prefix}norm.weight" not in state,
    names={
        **{
            ours: name
            for ours, name in NAMES.items()
            if ours in ("position.table", "stem.proj") or ours.startswith("encoder.blocks.")
        },
        _ROWS: "blocks.{i}.attn.rel_pos_h",
        _COLUMNS: "blocks.{i}.attn.rel_pos_w",
    },
    turn=_turn,
    back=_back,
    shows=_shows("blocks.{i}.attn"),
    assumes={
        "activation": "gelu",
        "norm_eps": 1e-6,
        "pool": "mean",
        "final_norm": False,
    },
    takes=("the class token's position, which nothing reads, is left out",),
    asks={
        "global_blocks": Ask(
            "its tables of relative positions are all of one size, so nothing shows which blocks "
            "attend to the whole image: say {}, {} or which",
            ((), (2, 5, 8, 11)),
        )
    },
    always={
        "class_token": (False,),
        "distilled": (False,),
        "registers": (0,),
        "final_norm": (False,),
        "pool": ("mean",),
        "pool_norm": (False,),
        "activation": ("gelu",),
        "stem_bias": (True,),
    },
    windowed=True,
    resample="bicubic",
)

_LAYER = "encoder.layer.{i}"
_HUGGING_FACE: Names = {
    "position.table": "embeddings.position_embeddings",
    "stem.proj": "embeddings.projection",
    "encoder.blocks.{i}.norm1": f"{_LAYER}.norm1",
    "encoder.blocks.{i}.attn.qkv": f"{_LAYER}.attention.qkv",
    "encoder.blocks.{i}.attn.proj": f"{_LAYER}.attention.proj",
    _ROWS: f"{_LAYER}.attention.rel_pos_h",
    _COLUMNS: f"{_LAYER}.attention.rel_pos_w",
    "encoder.blocks.{i}.norm2": f"{_LAYER}.norm2",
    "encoder.blocks.{i}.mlp.fc1": f"{_LAYER}.mlp.fc1",
    "encoder.blocks.{i}.mlp.fc2": f"{_LAYER}.mlp.fc2",
}
_turn, _back = _unused_row("embeddings.position_embeddings")
HUGGING_FACE = replace(
    DETECTRON2,
    name="huggingface-vitdet",
    whose="Hugging Face VitDet",
    marks=("embeddings.projection.weight", "encoder.layer.0.attention.rel_pos_h"),
    own=lambda state, prefix: True,
    names=_HUGGING_FACE,
    turn=_turn,
    back=_back,
    shows=_shows(f"{_LAYER}.attention"),
)
