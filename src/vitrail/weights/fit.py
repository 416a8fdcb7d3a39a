"""Weights for a model of another geometry: other images, patches, channels, classes.

What can follow by rule does so, and is named; whatever else differs is refused with the tensors
and shapes, and with the models that the weights would fit. Pure: a state dict in, a state dict out.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import NamedTuple, TypeGuard

import torch
from torch import Size, Tensor

from vitrail.data.views.preprocess import Preprocess
from vitrail.errors import DataError
from vitrail.models import MODELS, GmlpConfig, MixerConfig, ModelConfig, ViTConfig
from vitrail.nn import adapt_channels, resample_patch, resample_table
from vitrail.weights.mixer import resize_tokens
from vitrail.weights.names import State, our_shapes, some

_FREE = {
    *("image_size", "patch", "channels", "classes", "distilled", "class_token", "prefix_position"),
    *("pool", "representation", "head_bias", "resample", "indivisible", "norm_eps"),
    *("dropout", "drop_path", "layer_scale", "activation", "keep", "merge", "fine", "family"),
    *("merge_schedule",),
    *("eps", "stem_eps"),
}
"""Fields in which a model may differ from the weights' own; the rest is its very structure."""
_HEADS = ("head.", "head_distilled.", "representation.")
_NEW = (*_HEADS, "predictors.")
"""What may start at random: a head for other classes; DynamicViT's judges of tokens."""


class Fitted(NamedTuple):
    """Weights as a model takes them."""

    state: dict[str, Tensor]
    """Under the model's names and of its shapes; without what is new."""
    new: tuple[str, ...]
    """Keys of the model that the weights have nothing for: a head for other classes."""
    left_out: tuple[str, ...]
    """Keys of the weights that the model has no use for."""
    notes: tuple[str, ...]
    """What was changed, in words."""


def fit(
    state: State,
    stored: ModelConfig,
    wanted: ModelConfig,
    whose: str,
    new_head: str = "",
    shown: Preprocess | None = None,
) -> Fitted:
    """The weights `state` of a model `stored` for a model `wanted`.

    `new_head` is a reason to leave the old head out even if it would fit. `shown` is how the model
    was shown its images, if that is known: a model of one channel is then for `shown.grey`.

    Raises `DataError` where the two differ in more than rules can bridge.
    """
    check_structure(stored, wanted, whose)
    notes: list[str] = []
    ours = dict(state)
    if isinstance(stored, ViTConfig) and isinstance(wanted, ViTConfig):
        _fit_prefix(ours, stored, wanted, notes)
        _fit_table(ours, stored, wanted, notes)
        _fit_stem(ours, stored, wanted, notes)
        _fit_biases(ours, stored, wanted, notes)
        if wanted.depth < stored.depth:
            notes.append(f"depth: the first {wanted.depth} of {stored.depth} blocks")
    elif _is_mixer(stored) and _is_mixer(wanted) and stored.grid != wanted.grid:
        ours = resize_tokens(ours, stored, wanted)
        notes.append(
            f"tokens: weights for {_x(stored.grid)} of them resampled to {_x(wanted.grid)}"
        )
    _fit_channels(ours, stored, wanted, shown, notes)
    if new_head or _head(stored) != _head(wanted):
        if wanted.classes:
            why = new_head or _other_head(stored, wanted)
            notes.append(f"head: a new one for {wanted.classes} classes; {why}")
        ours = {k: v for k, v in ours.items() if not k.startswith(_HEADS)}
    shapes = our_shapes(wanted)
    new = tuple(key for key in shapes if key not in ours)
    left_out = tuple(key for key in state if key not in shapes or key in new)
    ours = {key: tensor for key, tensor in ours.items() if key in shapes}
    wrong = [key for key, tensor in ours.items() if tensor.shape != shapes[key]]
    lacking = [key for key in new if not key.startswith(_NEW)]
    if wrong or lacking:
        there = {key: tensor.shape for key, tensor in state.items()}
        raise DataError(
            f"{whose} does not fit the model: {_tensors(there, shapes)}{_fitting(stored)}"
        )
    return Fitted(ours, new, left_out, tuple(notes))


def models_like(config: ModelConfig) -> list[str]:
    """The names in MODELS that the weights of `config` can be loaded into."""
    return [
        name
        for name, row in MODELS.items()
        if type(row) is type(config)
        and getattr(row, "patch", None) == getattr(config, "patch", None)
        and not _differences(config, row)
        and _is_vit(config, row)
    ]


def _is_mixer(config: ModelConfig) -> TypeGuard[MixerConfig | GmlpConfig]:
    return isinstance(config, MixerConfig | GmlpConfig)


def _is_vit(config: ModelConfig, row: ModelConfig) -> bool:
    """Whether a row is not merely reached by rules, but the same ViT; true of other families."""
    if not (isinstance(config, ViTConfig) and isinstance(row, ViTConfig)):
        return True
    return (
        row.depth == config.depth
        and not (row.distilled and not config.distilled)
        and not (row.class_token and not config.class_token)
        and (row.pool == "map") == (config.pool == "map")
    )


def _head(config: ModelConfig) -> tuple[object, ...]:
    """What a head is for: where any of it differs, the old one means nothing."""
    fields = ("classes", "pool", "representation", "head_bias")
    return tuple(getattr(config, name, None) for name in fields)


def _other_head(stored: ModelConfig, wanted: ModelConfig) -> str:
    """Why the head of the one is none for the other."""
    if not stored.classes:
        return "the weights have none"
    if stored.classes != wanted.classes:
        return f"the old one tells {stored.classes} apart"
    return "the old one reads something else"


def _differences(stored: ModelConfig, wanted: ModelConfig) -> list[str]:
    """Fields in which two models differ beyond what rules can bridge."""
    different = [
        item.name
        for item in fields(stored)
        if item.name not in _FREE and getattr(stored, item.name) != getattr(wanted, item.name)
    ]
    if not (isinstance(stored, ViTConfig) and isinstance(wanted, ViTConfig)):
        return different
    if wanted.depth < stored.depth:  # its first blocks are a model too
        different.remove("depth")
    if wanted.qkv_bias and not stored.qkv_bias:  # zeros are the same function
        different.remove("qkv_bias")
    if (stored.layer_scale is None) != (wanted.layer_scale is None):
        different.append("layer_scale")
    if (stored.activation == "swiglu") != (wanted.activation == "swiglu"):
        different.append("activation")
    return different


def check_structure(stored: ModelConfig, wanted: ModelConfig, whose: str) -> None:
    """Raise `DataError` where two models differ in more than rules can bridge, with what fits."""
    if not isinstance(wanted, type(stored)):
        raise DataError(
            f"{whose} are weights of the family '{stored.family}', not of '{wanted.family}'"
        )
    different = _differences(stored, wanted)
    if different:
        shown = ", ".join(
            f"{name} {getattr(stored, name)} there and {getattr(wanted, name)} here"
            for name in different
        )
        there, here = our_shapes(stored), our_shapes(wanted)
        raise DataError(
            f"{whose} does not fit the model: {shown}. {_tensors(there, here)}{_fitting(stored)}"
        )


def _tensors(there: Mapping[str, Size], here: Mapping[str, Size]) -> str:
    """Which tensors differ, in words."""
    wrong = [
        f"'{key}' is {tuple(there[key])}, the model's {tuple(here[key])}"
        for key in there
        if key in here and there[key] != here[key] and not key.startswith(_HEADS)
    ]
    lacking = [key for key in here if key not in there and not key.startswith(_HEADS)]
    words = wrong[:3] + ([f"and {len(wrong) - 3} more tensors"] if len(wrong) > 3 else [])
    words += [f"the model also has {some(lacking)}"] if lacking else []
    return "; ".join(words) or "Every tensor has the same shape, and another meaning"


def _fitting(stored: ModelConfig) -> str:
    names = models_like(stored)
    return f". It fits {some(names, 6)}" if names else ""


def _fit_prefix(
    ours: dict[str, Tensor], stored: ViTConfig, wanted: ViTConfig, notes: list[str]
) -> None:
    """Class and distillation token, and their rows in the position table.

    Such a token only ever appears with its row added, so that adding the row once and for all, or
    giving a token a row of zeros, changes no output.
    """
    there = [name for name in ("class_token", "distilled") if getattr(stored, name)]
    kept = [i for i, name in enumerate(there) if getattr(wanted, name)]
    same = len(kept) == len(there) and stored.prefix_position == wanted.prefix_position
    if "prefix" not in ours or same:
        return
    tokens, registers = ours["prefix"][: len(there)], ours["prefix"][len(there) :]
    table = ours.get("position.table")
    if table is not None and wanted.has_table:
        rows = table[: len(there)] if stored.prefix_position else torch.zeros_like(tokens)
        patches = table[len(there) :] if stored.prefix_position else table
        if not wanted.prefix_position:
            tokens, rows = tokens + rows, rows[:0]
        else:
            rows = rows[kept]
        ours["position.table"] = torch.cat([rows, patches])
    ours["prefix"] = torch.cat([tokens[kept], registers])
    if len(kept) < len(there):
        gone = [name for i, name in enumerate(there) if i not in kept]
        notes.append(f"left out: {' and '.join(gone)}")
    if not len(ours["prefix"]):
        del ours["prefix"]


def _fit_table(
    ours: dict[str, Tensor], stored: ViTConfig, wanted: ViTConfig, notes: list[str]
) -> None:
    """The position table, resampled to the model's grid as the weights' makers do."""
    table = ours.get("position.table")
    if table is None or stored.grid == wanted.grid:
        return
    prefix = len(table) - stored.grid[0] * stored.grid[1]
    patches = resample_table(table[prefix:], stored.grid, wanted.grid, wanted.resample)
    ours["position.table"] = torch.cat([table[:prefix], patches])
    notes.append(f"positions: {_x(stored.grid)} resampled to {_x(wanted.grid)}, {wanted.resample}")


def _fit_stem(
    ours: dict[str, Tensor], stored: ViTConfig, wanted: ViTConfig, notes: list[str]
) -> None:
    """The patch kernel, for patches of another size."""
    if wanted.stem == "patch" and stored.patch != wanted.patch:
        kernel = ours["stem.proj.weight"]
        ours["stem.proj.weight"] = resample_patch(kernel, wanted.patch, wanted.resample)
        flexible = ", flexivit" if wanted.resample == "flexivit" else ""
        notes.append(
            f"patches: {_x(stored.patch)} to {_x(wanted.patch)} by pseudo-inverse{flexible}"
        )


def _fit_biases(
    ours: dict[str, Tensor], stored: ViTConfig, wanted: ViTConfig, notes: list[str]
) -> None:
    """Biases of queries, keys and values for a model that has some."""
    if stored.qkv_bias or not wanted.qkv_bias:
        return
    for key, tensor in list(ours.items()):
        if key.endswith("attn.qkv.weight"):
            ours[f"{key.removesuffix('weight')}bias"] = tensor.new_zeros(len(tensor))
    notes.append("biases of q, k and v: zeros, for the weights have none")


def _fit_channels(
    ours: dict[str, Tensor],
    stored: ModelConfig,
    wanted: ModelConfig,
    shown: Preprocess | None,
    notes: list[str],
) -> None:
    """The first kernel, for images of other channels."""
    there, here = stored.channels, wanted.channels
    if there == here:
        return
    name = next(key for key, tensor in ours.items() if tensor.ndim == 4)
    if here == 1 and shown is not None and shown.channels == there:
        _fold(ours, name, shown, notes)
        return
    ours[name] = adapt_channels(ours[name], here)
    if here == 1:
        how = "summed to 1"
    elif here > there:
        how = f"repeated to {here}"
    else:
        how = f"cut to the first {here}"
    notes.append(f"channels: {there} {how}")


def _fold(ours: dict[str, Tensor], name: str, shown: Preprocess, notes: list[str]) -> None:
    """The kernel for greys normalised by `shown.grey`, which gives what the old one gave for the
    same greys in all channels, normalised by `shown`.

    Of a channel that has another mean than the grey one's, a share is the same for all images: the
    bias takes it. A kernel without bias, before a norm, goes without.
    """
    grey = shown.grey
    (m, s), kernel = (grey.mean[0], grey.std[0]), ours[name].double()
    mean, std = (kernel.new_tensor(values)[:, None, None] for values in (shown.mean, shown.std))
    ours[name] = (kernel * (s / std)).sum(dim=1, keepdim=True).to(ours[name].dtype)
    bias = f"{name.removesuffix('weight')}bias"
    if bias in ours:
        moved = (kernel * ((m - mean) / std)).sum(dim=(1, 2, 3))
        ours[bias] = (ours[bias].double() + moved).to(ours[bias].dtype)
    notes.append(
        f"channels: {shown.channels} folded into 1{'' if bias in ours else ', nearly,'} for greys "
        f"normalised by mean {m:.4g} and deviation {s:.4g}, the means of the {shown.channels} "
        f"channels'"
    )


def _x(pair: tuple[int, int]) -> str:
    return f"{pair[0]}x{pair[1]}"
