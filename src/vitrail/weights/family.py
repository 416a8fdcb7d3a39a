"""Checkpoint layouts of the families besides ViT: one rule a layout, from our keys to theirs.

A convolutional or hierarchical model has no free choices that a file's tensors would show one by
one, as a ViT has (`layouts.py`). So it is found among the family's own rows: the one whose keys and
shapes are exactly the file's, once its classes, channels and image size are as the file has them.

Each family's module here (`mixer.py`, ...) ends in `LAYOUTS`, a tuple of these; `layouts.py` lists
them all.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Size, Tensor

from vitrail.errors import DataError, UsageError
from vitrail.models import MODELS, ModelConfig
from vitrail.weights.names import State, ask_for_grid, oblong, our_shapes, some

BLOCK = re.compile(r"stages\.(\d+)\.(\d+)\.(.+)")
"""Our key of a part of a block, where there are stages: stage, block, part."""


def renamed(key: str, names: Mapping[str, str]) -> str:
    """`key` with the first of our `names` that it begins with replaced by theirs.

    >>> renamed("norm1.weight", {"conv": "conv", "norm": "bn"})
    'bn1.weight'
    """
    ours = next((name for name in names if key.startswith(name)), "")
    return names.get(ours, "") + key.removeprefix(ours)


@dataclass(frozen=True, kw_only=True)
class FamilyLayout:
    """How one code base names and arranges the tensors of one family."""

    name: str
    whose: str
    """For messages."""
    family: type[Any]
    """The config of the family."""
    marks: tuple[str, ...]
    """Keys, behind one prefix, that all of its files have and no other layout's."""
    theirs: Callable[[str], str | tuple[str, ...]]
    """Our key -> theirs; several are concatenated, along the outputs, into our one."""
    turn: Callable[[State], State] = lambda state: state
    """Their tensors, as `theirs` calls them and as torch lays out its own."""
    back: Callable[[dict[str, Tensor], Any], dict[str, Tensor]] = lambda state, config: state
    """The inverse of `turn`."""
    stem: str = "stem.proj.weight"
    """Our key of the first kernel: its inputs are the channels of the images."""
    aside: tuple[str, ...] = ()
    """Globs of keys that are no part of the model: counters, tables that follow from the config."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the config that its code fixes and no shape shows."""
    takes: tuple[str, ...] = ()
    """What else no shape shows of models with these names, and is taken to be so, in words."""
    writes: tuple[str, ...] = ()
    """The targets of `vitrail weights convert` that this layout is, for its family."""
    sized: Callable[[State], Mapping[str, Any]] = lambda state: {}
    """Fields that depend on the image size, as the turned tensors show them."""

    def leaves_out(self, key: str) -> bool:
        """Whether `key`, behind the prefix, is no part of the model."""
        return any(fnmatchcase(key, glob) for glob in self.aside)

    def read(self, state: State, config: ModelConfig) -> dict[str, Tensor]:
        """Their tensors, without the prefix, under our names.

        Raises `DataError` with the names of keys that are missing, unexpected or of another shape.
        """
        turned = self.turn({k: v for k, v in state.items() if not self.leaves_out(k)})
        shapes = our_shapes(config)
        if fault := self._fault(turned, shapes):
            raise DataError(f"these {self.whose} weights do not fit the config: {fault}")
        ours = {}
        for key, shape in shapes.items():
            parts = [turned[name].reshape(-1, *shape[1:]) for name in self._names(key)]
            ours[key] = (torch.cat(parts) if len(parts) > 1 else parts[0]).reshape(shape)
        return ours

    def write(self, state: State, config: ModelConfig) -> dict[str, Tensor]:
        """The inverse of `read`."""
        theirs: dict[str, Tensor] = {}
        for key in our_shapes(config):
            names = self._names(key)
            theirs |= zip(
                names, state[key].chunk(len(names)) if len(names) > 1 else [state[key]], strict=True
            )
        return self.back(theirs, config)

    def infer(
        self,
        state: State,
        told: Mapping[str, Any],
        where: str,
        like: tuple[int, int] | None = None,
    ) -> ModelConfig:
        """The row of the family whose tensors these are, for their classes, channels and images.

        `like` is an image size whose proportions count where nothing else tells them.
        """
        turned = self.turn({k: v for k, v in state.items() if not self.leaves_out(k)})
        faults: dict[str, str] = {}
        for name, row in MODELS.items():
            if not isinstance(row, self.family):
                continue
            try:
                config = self._adapted(row, turned, told, like)
            except UsageError as error:
                faults[name] = str(error)
                continue
            fault = self._fault(turned, our_shapes(config))
            if fault is None:
                return config
            faults[name] = fault
        near = min(faults, key=lambda name: len(faults[name]))
        raise DataError(
            f"{where} has the layout of {self.whose}, and fits none of {some(list(faults), 9)}; "
            f"of {near}: {faults[near]}"
        )

    def _adapted(
        self, row: Any, turned: State, told: Mapping[str, Any], like: tuple[int, int] | None
    ) -> Any:
        """The row with what the tensors show and what is told besides."""
        head, stem = (turned.get(self._names(key)[0]) for key in ("head.weight", self.stem))
        changes: dict[str, Any] = {
            "classes": 0 if head is None else head.shape[:1].numel(),
            **({} if stem is None or stem.ndim != 4 else {"channels": stem.shape[1]}),
            **self.sized(turned),
            **self.changes,
            **told,
        }
        if (tokens := changes.pop("tokens", None)) and changes["image_size"] is None:
            patch = changes["patch"]
            changes["image_size"] = like and oblong([tokens], patch, like)
            if changes["image_size"] is None:
                raise UsageError(
                    f"its grid of {tokens} tokens is no square: {ask_for_grid([tokens], patch)}"
                )
        known = {item.name for item in fields(row)}
        return replace(row, **{name: value for name, value in changes.items() if name in known})

    def _names(self, key: str) -> tuple[str, ...]:
        names = self.theirs(key)
        return (names,) if isinstance(names, str) else names

    def _wanted(self, shapes: Mapping[str, Size]) -> Iterator[tuple[str, int]]:
        """Every key of theirs, and how many numbers it holds."""
        for key, shape in shapes.items():
            names = self._names(key)
            yield from ((name, shape.numel() // len(names)) for name in names)

    def _fault(self, turned: State, shapes: Mapping[str, Size]) -> str | None:
        """What is missing, too much or of another size; None if nothing is."""
        wanted = dict(self._wanted(shapes))
        missing = [name for name in wanted if name not in turned]
        unexpected = [name for name in turned if name not in wanted]
        wrong = [n for n, size in wanted.items() if n in turned and turned[n].numel() != size]
        faults = [
            f"{words} {some(names)}"
            for words, names in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("of another shape", wrong),
            )
            if names
        ]
        return "; ".join(faults) or None
