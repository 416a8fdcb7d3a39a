"""What a checkpoint layout is, and the two ways to apply one: their state dict to ours, and back.

A layout is data: a table says, for each of our modules, what the other side calls it. This is the
one place where such a table is applied, and the one that knows how our tensors are made up of
theirs: q, k and v in one matrix, prefix tokens in one tensor, position tables without a batch axis.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import combinations
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Size, Tensor

from vitrail.errors import DataError, setting
from vitrail.models import ModelConfig, ViTConfig, build
from vitrail.nn import Position, Resample, sincos_table

Names: TypeAlias = Mapping[str, str | tuple[str, ...]]
"""Our module or tensor -> theirs; `{i}` is the block, or the stage and `{j}` its block. Several are
concatenated into our one."""

State: TypeAlias = Mapping[str, Tensor]
"""Tensors by name: theirs or ours."""


class Ask(NamedTuple):
    """Something that only the user knows."""

    words: str
    """What to say of it, with a place for each answer."""
    answers: tuple[Any, ...]
    """Values of the field."""
    when: Mapping[str, Any] = {}
    """Asked only of models with these fields; of every one, if there are none."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one code base names and arranges the tensors of a ViT."""

    name: str
    whose: str
    """For messages."""
    marks: tuple[str, ...]
    """Keys, behind one prefix, that all of its files have and, with `own`, no later layout's."""
    own: Callable[[State, str], bool] = lambda state, prefix: True
    """Whether the marks of a file, behind the prefix, are this layout's, where another has them
    too: by what lies beside the image model, or by values. Never by the prefix, which wrappers
    put there."""
    names: Names
    turn: Callable[[State], State] = lambda state: state
    """Their tensors, as the table `names` calls them and as torch lays out its own."""
    back: Callable[[dict[str, Tensor], ViTConfig], dict[str, Tensor]] = lambda state, config: state
    """The inverse of `turn`."""
    batch_axis: bool = True
    """Whether tokens and position table have a leading axis of one, as images have."""
    shows: Callable[[State], Mapping[str, Any]] = lambda state: {}
    """Fields of the config that the shapes of this layout show, and no other's."""
    aside: tuple[str, ...] = ()
    """Globs of keys, behind the prefix, of parts that are no image model: a decoder, a text tower.
    They are left out, and named."""
    assumes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the config that its code fixes and no shape shows; a function of the other fields,
    where it depends on them."""
    takes: tuple[str, ...] = ()
    """What else no shape shows of models with these names, and is taken to be so, in words."""
    asks: Mapping[str, Ask] = field(default_factory=dict)
    """Fields that its files differ in, though their shapes do not."""
    doubts: Mapping[str, Ask] = field(default_factory=dict)
    """Fields that are as its code has them, unless it is a rarer model with the same tensors."""
    tableless: tuple[Position, str] | None = None
    """What its code has for positions where there is no table, and what it calls that."""
    always: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Fields of which its code knows these values alone: another model cannot be written so."""
    windowed: bool = False
    """Whether its code knows attention in windows of a size, and relative positions."""
    resample: Resample = "bicubic_antialias"
    """How its own code brings a position table to another grid."""

    def leaves_out(self, key: str) -> bool:
        """Whether `key`, behind the prefix, is of a part that is no image model."""
        return any(fnmatchcase(key, glob) for glob in self.aside)

    def read(self, state: State, config: ViTConfig) -> dict[str, Tensor]:
        """Their tensors, without the prefix, under our names, for `ViT(config).load_state_dict`.

        Raises `DataError` with the name of a key that is missing, unexpected or of another shape.
        """
        wanted = {key: tensor for key, tensor in state.items() if not self.leaves_out(key)}
        layout = self
        if config.pool_norm and "pool_norm" not in self.names:  # its one norm, told to be there
            names = {ours: x for ours, x in self.names.items() if ours != "encoder.norm"}
            layout = replace(self, names=names | {"pool_norm": self.names["encoder.norm"]})
        return gather(self.turn(wanted), config, layout)

    def write(self, state: State, config: ViTConfig) -> dict[str, Tensor]:
        """The inverse of `read`. Raises `DataError` for what has no counterpart there."""
        if config.position not in self.always.get("position", ()):
            state, config = _with_table(state, config, self.whose)
        for name, known in {**_PLAIN, **({} if self.windowed else _GLOBAL), **self.always}.items():
            value = getattr(config, name)
            matters = {"head_bias": config.classes, "pool_heads": config.pool == "map"}
            if value not in known and matters.get(name, True):
                values = " or ".join(map(repr, known))
                raise DataError(
                    f"{self.whose} has no counterpart of {name}={value!r}: there it is {values}"
                )
        return self.back(scatter(state, config, self), config)


_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "final_norm": (True,),
    "pool_heads": (0,),
    "pool_prefix": (False,),
    "windows": (0,),
}
"""What `always` is where a layout does not say otherwise."""
_GLOBAL: Mapping[str, tuple[Any, ...]] = {"window": (None,), "relative": (None,)}
"""And where its code has no windows."""


_BIASES = (".{}_bias", ".{}_proj.bias")
"""How those of queries, keys and values are called where they are apart."""


def with_key_bias(state: State) -> dict[str, Tensor]:
    """With zeros for the bias of the keys, in code where queries and values alone have one."""
    zeros = {
        key.removesuffix(name.format("q")) + name.format("k"): torch.zeros_like(tensor)
        for key, tensor in state.items()
        for name in _BIASES
        if key.endswith(name.format("q"))
    }
    return {**zeros, **state}


def without_key_bias(state: dict[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """The inverse. Raises `DataError` for a bias that is not zero: there is no place for it."""
    keys = tuple(name.format("k") for name in _BIASES)
    for key, tensor in state.items():
        if key.endswith(keys):
            check_key_bias(key, tensor)
    return {key: tensor for key, tensor in state.items() if not key.endswith(keys)}


def check_key_bias(key: str, bias: Tensor) -> None:
    """Raise `DataError` for a bias of keys that is not zero, where keys have none."""
    if not bias.is_meta and bias.any():
        raise DataError(
            f"keys have no bias there, and that in '{key}' is not zero, so it has been trained: "
            f"set the middle third of each attn.qkv.bias to zero, or write the layout vitrail"
        )


def query_apart(state: State, attention: str) -> dict[str, Tensor]:
    """With the query of an attention pooling apart from keys and values, whose matrix it shares."""
    theirs = dict(state)
    for leaf in ("weight", "bias"):
        whole = theirs.get(f"{attention}.in_proj_{leaf}")
        if whole is not None and whole.ndim:
            width = len(whole) // 3
            theirs[f"{attention}.q.{leaf}"] = whole[:width]
            theirs[f"{attention}.kv.{leaf}"] = whole[width:]
            del theirs[f"{attention}.in_proj_{leaf}"]
    return theirs


def query_joined(state: State, attention: str) -> dict[str, Tensor]:
    """The inverse of `query_apart`."""
    theirs = dict(state)
    for leaf in ("weight", "bias"):
        if f"{attention}.q.{leaf}" in theirs:
            parts = [theirs.pop(f"{attention}.{part}.{leaf}") for part in ("q", "kv")]
            theirs[f"{attention}.in_proj_{leaf}"] = torch.cat(parts)
    return theirs


def gather(state: State, config: ViTConfig, layout: Layout) -> dict[str, Tensor]:
    """Their state dict, turned, under our names.

    Their position table may have rows for more or fewer of the prefix tokens than ours.
    Raises `DataError` with the name of a key that is missing, unexpected or of another shape.
    """
    shapes = our_shapes(config)
    rows = _given_rows(state, config, layout)
    theirs = shapes if rows is None else shapes | {"position.table": Size((rows, config.width))}
    pieces = _pieces(theirs, config, layout)
    check_shapes(state, {n: shape for parts in pieces.values() for n, shape in parts}, layout.whose)
    ours: dict[str, Tensor] = {}
    for key, parts in pieces.items():
        tensors = [state[name].reshape(-1, *shapes[key][1:]) for name, _ in parts]
        ours[key] = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    return ours if rows is None else position_rows(ours, rows - _patches(config), _rows(config))


def scatter(state: State, config: ViTConfig, layout: Layout) -> dict[str, Tensor]:
    """Our state dict under their names: the inverse of `gather`."""
    shapes = our_shapes(config)
    check_shapes(state, shapes, "vitrail")
    theirs: dict[str, Tensor] = {}
    for key, pieces in _pieces(shapes, config, layout).items():
        row = shapes[key][1:].numel()
        parts = state[key].split([shape.numel() // row for _, shape in pieces])
        for (name, shape), part in zip(pieces, parts, strict=True):
            theirs[name] = part.reshape(shape)
    return theirs


def position_rows(state: State, given: int, wanted: int) -> dict[str, Tensor]:
    """Our state dict with position rows for the first `wanted` prefix tokens, not `given` ones.

    A prefix token only ever appears with its row added. Adding the row once and for all, or giving
    a token a row of zeros, changes no output.
    """
    if given == wanted:
        return dict(state)
    table = state["position.table"]
    kept = min(given, wanted)
    zeros = table.new_zeros(wanted - kept, table.shape[1])
    moved = {"position.table": torch.cat([table[:kept], zeros, table[given:]])}
    if given > wanted:
        moved["prefix"] = state["prefix"].clone()
        moved["prefix"][kept:given] += table[kept:given]
    return {**state, **moved}


def rename(state: State, rule: Callable[[str], str]) -> dict[str, Tensor]:
    """The same tensors under other names; `DataError` where two of them get the same one."""
    old: dict[str, str] = {}
    for key in state:
        if (name := rule(key)) in old:
            raise DataError(f"'{old[name]}' and '{key}' are the same part of a model: give one")
        old[name] = key
    return {name: state[key] for name, key in old.items()}


def under(module: str, names: Names) -> dict[str, str | tuple[str, ...]]:
    """The names of a model that is the part `module` of another."""
    return {
        ours: f"{module}.{name}" if isinstance(name, str) else tuple(f"{module}.{x}" for x in name)
        for ours, name in names.items()
    }


def _with_table(state: State, config: ViTConfig, whose: str) -> tuple[State, ViTConfig]:
    """The model with a position table, which every layout has: a fixed one is written out."""
    kind = config.position
    if kind == "learned":
        return state, config
    if kind == "none" or kind == "rope" or kind == "learned_rope" or kind == "peg":
        raise DataError(f"{whose} has no counterpart of position='{kind}'")
    learned = replace(config, position="learned", prefix_position=True)
    table = sincos_table(config.grid, config.width, kind)
    table = table.to(state["stem.proj.weight"])
    return position_rows({**state, "position.table": table}, 0, _rows(learned)), learned


def translate(state: State, names: Names) -> dict[str, list[Size]]:
    """Whatever of their state dict the table knows, as shapes under our names.

    For finding out what a file is, before there is a config: nothing needs to be whole. Several
    tensors of theirs that make up one of ours keep their own shapes. Prefix tokens keep the names
    of the table (`prefix.class`).
    """
    table = {
        template: ours
        for ours, theirs in names.items()
        for template in ((theirs,) if isinstance(theirs, str) else theirs)
    }
    found: dict[str, list[Size]] = {}
    for key, tensor in state.items():
        if (ours := _ours(key, table)) is not None:
            found.setdefault(ours, []).append(tensor.shape)
    return found


def _ours(key: str, table: Mapping[str, str]) -> str | None:
    """Our name of their `key`, whichever numbers in it are the stage's and the block's."""
    for pattern, numbers in _numbered(key):
        module, _, leaf = pattern.rpartition(".")
        if pattern in table:
            return table[pattern].format_map(numbers)
        if module in table and leaf in ("weight", "bias", "gamma"):
            return f"{table[module]}.{leaf}".format_map(numbers)
    return None


_NUMBER = re.compile(r"(?<=[._/])\d+(?=[./])")
_LETTERS = "ij"


def _numbered(key: str) -> Iterator[tuple[str, dict[str, str]]]:
    """`key` with none, each one, and each two of its numbers as `{i}` and `{j}`; and the numbers.

    >>> [pattern for pattern, _ in _numbered("a.0.b.1.c")]
    ['a.0.b.1.c', 'a.{i}.b.1.c', 'a.0.b.{i}.c', 'a.{i}.b.{j}.c']
    """
    found = list(_NUMBER.finditer(key))
    for count in range(len(_LETTERS) + 1):
        for chosen in combinations(found, count):
            pattern = key
            for letter, match in reversed(list(zip(_LETTERS, chosen, strict=False))):
                pattern = f"{pattern[: match.start()]}{{{letter}}}{pattern[match.end() :]}"
            yield pattern, {x: match[0] for x, match in zip(_LETTERS, chosen, strict=False)}


def oblong(
    counts: Iterable[int], patch: Sequence[int], like: tuple[int, int]
) -> tuple[int, int] | None:
    """The image size of the proportions of `like` that has one of these numbers of patches.

    >>> oblong([20], (16, 16), like=(64, 320))
    (32, 160)
    """
    height, width = (side / p for side, p in zip(like, patch, strict=True))
    for count in counts:
        rows = round(math.sqrt(count * height / width))
        if rows and count % rows == 0 and rows * width == count // rows * height:
            return rows * patch[0], count // rows * patch[1]
    return None


def ask_for_grid(counts: Iterable[int], patch: Sequence[int]) -> str:
    """How to ask for the image size of so many positions as are no square, with an example."""
    for count in counts:
        for rows in range(math.isqrt(count), 1, -1):
            if count % rows == 0:
                grid = rows, count // rows
                size = grid[0] * patch[0], grid[1] * patch[1]
                return (
                    f"say the image size that it was trained at, as height and width in pixels: "
                    f"{setting('model.image_size', size)} if that was {grid[0]}x{grid[1]} patches"
                )
    return "and so many are no other grid either"


def our_shapes(config: ModelConfig) -> dict[str, Size]:
    """Every key of our state dict and its shape, without memory for the weights."""
    with torch.device("meta"):
        return {key: tensor.shape for key, tensor in build(config).state_dict().items()}


def _rows(config: ViTConfig) -> int:
    """How many prefix tokens have a row in our position table."""
    return int(config.prefix_position) * (int(config.class_token) + int(config.distilled))


def _patches(config: ViTConfig) -> int:
    return config.grid[0] * config.grid[1]


def _given_rows(state: State, config: ViTConfig, layout: Layout) -> int | None:
    """The rows of their table, if they are for all, some or none of the prefix tokens."""
    key = layout.names.get("position.table")
    if not config.has_table or not isinstance(key, str) or key not in state:
        return None  # `check_shapes` says what is missing
    tokens = int(config.class_token) + int(config.distilled)
    patches, given = _patches(config), state[key].shape[int(layout.batch_axis) :][:1].numel()
    possible = [patches + n for n in (0, tokens, tokens + config.registers)]
    return given if given in possible else patches + _rows(config)


def _pieces(
    shapes: Mapping[str, Size], config: ViTConfig, layout: Layout
) -> dict[str, list[tuple[str, Size]]]:
    """For each key of ours, name and shape of the tensors of theirs that make it up, in order."""
    tokens = {
        "prefix.class": int(config.class_token),
        "prefix.distilled": int(config.distilled),
        "prefix.registers": config.registers,
    }
    pieces: dict[str, list[tuple[str, Size]]] = {}
    for key, shape in shapes.items():
        if key == "prefix":  # one tensor a token there
            width = shape[1]
            pieces[key] = [
                (name, Size((1, count, width) if layout.batch_axis else (width,)))
                for token, count in tokens.items()
                if count
                for name in their_names(token, layout)
            ]
        elif key == "position.table":
            axes = (1, *shape) if layout.batch_axis else shape
            pieces[key] = [(name, Size(axes)) for name in their_names(key, layout)]
        else:
            theirs = their_names(key, layout)
            pieces[key] = [(name, Size((shape[0] // len(theirs), *shape[1:]))) for name in theirs]
    return pieces


class Named(Protocol):
    """A layout: what it calls things, and whose it is."""

    @property
    def names(self) -> Names:
        """Its table."""

    @property
    def whose(self) -> str:
        """For messages."""


def their_names(key: str, layout: Named) -> tuple[str, ...]:
    """Their name or names for our `key`, as a tensor or as a module's `.weight`, `.bias`, ..."""
    names = layout.names
    *_, (pattern, numbers) = _numbered(key)  # ours have no others
    module, _, leaf = pattern.rpartition(".")
    if pattern in names:
        found, ending = names[pattern], ""
    elif module in names:
        found, ending = names[module], f".{leaf}"
    else:
        raise DataError(f"{layout.whose} has no counterpart of '{key}', which this config asks for")
    templates = (found,) if isinstance(found, str) else found
    return tuple(name.format_map(numbers) + ending for name in templates)


def check_shapes(state: State, wanted: Mapping[str, Size], source: str) -> None:
    """Refuse a state dict whose keys or shapes are not exactly the `wanted` ones."""
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    faults = [f"missing {some(missing)}"] * bool(missing)
    faults += [f"unexpected {some(unexpected)}"] * bool(unexpected)
    if faults:
        raise DataError(f"these {source} weights do not fit the config: {'; '.join(faults)}")
    for key, shape in wanted.items():
        if state[key].shape != shape:
            raise DataError(
                f"these {source} weights do not fit the config: '{key}' has shape "
                f"{tuple(state[key].shape)}, the config asks for {tuple(shape)}"
            )


def prefixes(state: Mapping[str, Any], marks: tuple[str, ...]) -> list[str]:
    """Whatever stands before the marks, all of them: what wrapped the model, part by part."""
    first, *others = marks
    return [
        prefix
        for key in state
        if key.endswith(first) and (prefix := key[: -len(first)])[-1:] in ("", ".", "/")
        if all(prefix + mark in state for mark in others)
    ]


def some(keys: list[str], limit: int = 3) -> str:
    """The first few of `keys`, and how many more.

    >>> some(["a", "b", "c", "d"])
    "'a', 'b', 'c' and 1 more"
    """
    named = ", ".join(f"'{key}'" for key in keys[:limit])
    return named + (f" and {len(keys) - limit} more" if len(keys) > limit else "")
