"""timm's checkpoint layout: ViT, DeiT (distilled too), DeiT-III, DINOv2, SigLIP's image tower.

A layout is data: `NAMES` says, for each of our modules, what the other side calls it. `gather` and
`scatter` are the one place where such a table is applied; every other layout uses them too.
"""

import re
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Size, Tensor

from vitrail.errors import DataError
from vitrail.models import ViT, ViTConfig

Names: TypeAlias = Mapping[str, str | tuple[str, ...]]
"""Our module or tensor -> theirs; `{i}` is the block. Several are concatenated into our one."""

NAMES: Names = {
    "prefix.class": "cls_token",
    "prefix.distilled": "dist_token",
    "prefix.registers": "reg_token",
    "position.table": "pos_embed",
    "stem.proj": "patch_embed.proj",
    "stem.norm": "patch_embed.norm",
    "encoder.blocks.{i}.norm1": "blocks.{i}.norm1",
    "encoder.blocks.{i}.attn.qkv": "blocks.{i}.attn.qkv",
    "encoder.blocks.{i}.attn.q_norm": "blocks.{i}.attn.q_norm",
    "encoder.blocks.{i}.attn.k_norm": "blocks.{i}.attn.k_norm",
    "encoder.blocks.{i}.attn.proj": "blocks.{i}.attn.proj",
    "encoder.blocks.{i}.scale1": "blocks.{i}.ls1",
    "encoder.blocks.{i}.norm2": "blocks.{i}.norm2",
    "encoder.blocks.{i}.mlp.fc1": "blocks.{i}.mlp.fc1",
    "encoder.blocks.{i}.mlp.fc2": "blocks.{i}.mlp.fc2",
    "encoder.blocks.{i}.scale2": "blocks.{i}.ls2",
    "encoder.norm": "norm",
    "pool.probe": "attn_pool.latent",
    "pool.q": "attn_pool.q",
    "pool.kv": "attn_pool.kv",
    "pool.proj": "attn_pool.proj",
    "pool.norm": "attn_pool.norm",
    "pool.mlp.fc1": "attn_pool.mlp.fc1",
    "pool.mlp.fc2": "attn_pool.mlp.fc2",
    "head": "head",
    "head_distilled": "head_dist",
}


def from_timm(state: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """A timm state dict under our names, for `ViT(config).load_state_dict`.

    Raises `DataError` with the name of a key that is missing, unexpected or of another shape.
    """
    return gather(_move_rows(state, config, _rows(config)), config, NAMES, "timm")


def to_timm(state: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """The inverse of `from_timm`: our state dict under timm's names.

    With registers the layout is timm's own for DINOv2, `no_embed_class=True`: the class token's
    position is added to the token. Such a file comes back as the same function, not bit by bit.
    """
    theirs = scatter(state, config, NAMES, "timm")
    return _move_rows(theirs, config, 0) if config.registers else theirs


def _rows(config: ViTConfig) -> int:
    """How many prefix tokens have a row in our position table."""
    return int(config.prefix_position) * (int(config.class_token) + int(config.distilled))


def _move_rows(state: Mapping[str, Tensor], config: ViTConfig, rows: int) -> dict[str, Tensor]:
    """The same `state`, with position rows for the first `rows` prefix tokens.

    timm gives a row to all prefix tokens or, with `no_embed_class`, to none. A prefix token only
    ever appears with its row added, so adding it once and for all changes no output.
    """
    tokens = [name for name in ("cls_token", "dist_token", "reg_token") if name in state]
    shapes = [state[name].shape for name in ("pos_embed", *tokens) if name in state]
    if "pos_embed" not in state or not tokens or {s[::2] for s in shapes} != {(1, config.width)}:
        return dict(state)  # nothing to move, or a fault that `gather` names
    table, lengths = state["pos_embed"], [state[name].shape[1] for name in tokens]
    given = table.shape[1] - config.grid[0] * config.grid[1]
    if given == rows or given not in (0, _rows(config), sum(lengths)):
        return dict(state)
    prefix = torch.cat([state[name] for name in tokens], dim=1)
    prefix[:, :given] += table[:, :given]
    empty = table.new_zeros(1, rows, table.shape[2])
    table = torch.cat([empty, table[:, given:]], dim=1)
    moved = zip(tokens, prefix.split(lengths, dim=1), strict=True)
    return {**state, **dict(moved), "pos_embed": table}


def gather(
    state: Mapping[str, Tensor], config: ViTConfig, names: Names, source: str
) -> dict[str, Tensor]:
    """Their state dict under our names; `source` is what messages call the other side."""
    shapes = _shapes(config)
    layout = _layout(shapes, config, names, source)
    _check(state, {name: shape for pieces in layout.values() for name, shape in pieces}, source)
    ours: dict[str, Tensor] = {}
    for key, pieces in layout.items():
        parts = [state[name].reshape(-1, *shapes[key][1:]) for name, _ in pieces]
        ours[key] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return ours


def scatter(
    state: Mapping[str, Tensor], config: ViTConfig, names: Names, target: str
) -> dict[str, Tensor]:
    """Our state dict under their names: the inverse of `gather`."""
    shapes = _shapes(config)
    _check(state, shapes, "vitrail")
    theirs: dict[str, Tensor] = {}
    for key, pieces in _layout(shapes, config, names, target).items():
        row = shapes[key][1:].numel()
        parts = state[key].split([shape.numel() // row for _, shape in pieces])
        for (name, shape), part in zip(pieces, parts, strict=True):
            theirs[name] = part.reshape(shape)
    return theirs


def _shapes(config: ViTConfig) -> dict[str, Size]:
    """Every key of our state dict and its shape, without memory for the weights."""
    with torch.device("meta"):
        return {key: tensor.shape for key, tensor in ViT(config).state_dict().items()}


def _layout(
    shapes: Mapping[str, Size], config: ViTConfig, names: Names, side: str
) -> dict[str, list[tuple[str, Size]]]:
    """For each key of ours, name and shape of the tensors of theirs that make it up, in order."""
    tokens = {
        "prefix.class": int(config.class_token),
        "prefix.distilled": int(config.distilled),
        "prefix.registers": config.registers,
    }
    layout: dict[str, list[tuple[str, Size]]] = {}
    for key, shape in shapes.items():
        if key == "prefix":  # one tensor a token there, with a leading axis as images have it
            layout[key] = [
                (name, Size((1, count, shape[1])))
                for token, count in tokens.items()
                if count
                for name in _their_names(token, names, side)
            ]
        elif key == "position.table":
            layout[key] = [(name, Size((1, *shape))) for name in _their_names(key, names, side)]
        else:
            theirs = _their_names(key, names, side)
            layout[key] = [(name, Size((shape[0] // len(theirs), *shape[1:]))) for name in theirs]
    return layout


def _their_names(key: str, names: Names, side: str) -> tuple[str, ...]:
    """Their name or names for our `key`, as a tensor or as a module's `.weight`, `.bias`, ..."""
    block = re.search(r"\.(\d+)\.", key)
    pattern = key.replace(block[0], ".{i}.", 1) if block else key
    module, _, leaf = pattern.rpartition(".")
    if pattern in names:
        found, ending = names[pattern], ""
    elif module in names:
        found, ending = names[module], f".{leaf}"
    else:
        raise DataError(f"{side} has no counterpart of '{key}', which this config asks for")
    templates = (found,) if isinstance(found, str) else found
    return tuple(name.format(i=block[1] if block else "") + ending for name in templates)


def _check(state: Mapping[str, Tensor], wanted: Mapping[str, Size], source: str) -> None:
    """Refuse a state dict whose keys or shapes are not exactly the `wanted` ones."""
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    faults = [f"missing {_some(missing)}"] * bool(missing)
    faults += [f"unexpected {_some(unexpected)}"] * bool(unexpected)
    if faults:
        raise DataError(f"these {source} weights do not fit the config: {'; '.join(faults)}")
    for key, shape in wanted.items():
        if state[key].shape != shape:
            raise DataError(
                f"these {source} weights do not fit the config: '{key}' has shape "
                f"{tuple(state[key].shape)}, the config asks for {tuple(shape)}"
            )


def _some(keys: list[str], limit: int = 3) -> str:
    """The first few of `keys`, and how many more."""
    named = ", ".join(f"'{key}'" for key in keys[:limit])
    return named + (f" and {len(keys) - limit} more" if len(keys) > limit else "")
