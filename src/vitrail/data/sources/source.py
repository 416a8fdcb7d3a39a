"""Source: labelled images, decoded one at a time; and the sources made of arrays or other sources.

folder.py and csvfile.py read sources from disk, arrays.py whole data sets. What a data set's maker
has set apart for training, validation and test is kept beside it (`PartedSource.part`); split.py
makes the rest. Nothing in these files writes into the data.
"""

import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from vitrail.data.names import printable
from vitrail.data.pixels.decode import Encoded
from vitrail.data.targets import Classes, Targets
from vitrail.data.targets.classes import Values
from vitrail.errors import DataError, UsageError, setting

PARTS = ("train", "val", "test")

_EXAMPLES = 5
"""Names of what is left out that are kept."""


@runtime_checkable
class Source(Protocol):
    """Images and what is said of them, in an order that depends on nothing but the data."""

    @property
    def targets(self) -> Targets:
        """What is said of the images."""
        ...

    def __len__(self) -> int: ...

    def key(self, i: int) -> str:
        """Name image `i`: unique, printable, the same in every run (a path, or "train/123")."""
        ...

    def load(self, i: int) -> Image.Image:
        """Decode image `i` to mode RGB, or L for arrays of one channel, or I or F for greys of more
        than 8 bits; or UnreadableImage.
        """
        ...

    def stamp(self, i: int) -> str:
        """What is another text once image `i` has changed; much cheaper than to decode it."""
        ...


@dataclass(frozen=True)
class LeftOut:
    """Files or rows of a data set that are not used, and for what reason; told, never silent."""

    kind: str
    """What they are, in the plural: "symbolic links", "rows without a label"."""
    count: int
    reason: str
    """Why, and what the user can do."""
    examples: tuple[str, ...] = ()
    """The names of the first few, printable."""

    def sentence(self) -> str:
        """One line for the user."""
        shown = ", ".join(self.examples[:3])
        more = self.count - len(self.examples[:3])
        names = f": {shown}{f' and {more:,} more' if more else ''}" if shown else ""
        return f"left out: {self.kind}, {self.count:,} ({self.reason}){names}"


class Tally:
    """What is left out, counted as it is met."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, str], list[str]] = {}
        self._count: Counter[tuple[str, str]] = Counter()

    def add(self, kind: str, reason: str, *names: str) -> None:
        """Leave out the files of these names."""
        what = kind, reason
        self._count[what] += len(names)
        first = self._names.setdefault(what, [])
        first += map(printable, names[: _EXAMPLES - len(first)])

    def told(self) -> tuple[LeftOut, ...]:
        """All of it, in the order in which it was met."""
        return tuple(
            LeftOut(kind, count, reason, tuple(self._names[kind, reason]))
            for (kind, reason), count in self._count.items()
            if count
        )


@runtime_checkable
class PartedSource(Source, Protocol):
    """A whole data set: `part` is each image's index in PARTS.

    `left_out` is what lies there too and is not used; `notes` are further sentences for the user.
    """

    part: UInt8[np.ndarray, " n"]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]


class Arrays:
    """Images in memory, called PREFIX/0, PREFIX/1, ..."""

    _images: Any
    """An array `[n h w ...]`, or a sequence of them, one an image."""
    _prefix: str

    def __len__(self) -> int:
        return len(self._images)

    def key(self, i: int) -> str:
        return f"{self._prefix}/{i}"

    def load(self, i: int) -> Image.Image:
        return Image.fromarray(self._images[i])

    def stamp(self, i: int) -> str:
        pixels = np.ascontiguousarray(self._images[i])
        return blake2b(pixels.tobytes(), digest_size=16).hexdigest()


class ArraySource(Arrays):
    """Images in memory: uint8 `[n h w]` or `[n h w c]`, of 1 channel (grey) or 3 (RGB).

    Raises DataError for arrays of another type or shape.

    >>> black = np.zeros((2, 28, 28), np.uint8)
    >>> source = ArraySource(black, np.array([1, 0]), classes=("cat", "dog"), prefix="train")
    >>> source.key(1), source.load(1).size, source.targets.text(1)
    ('train/1', (28, 28), 'cat')
    """

    def __init__(
        self,
        images: UInt8[np.ndarray, "n h w"] | UInt8[np.ndarray, "n h w c"],
        labels: Values,
        classes: tuple[str, ...],
        prefix: str,
    ) -> None:
        grey_or_rgb = images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3))
        if images.dtype != np.uint8 or not grey_or_rgb or 0 in images.shape:
            raise DataError(
                f"{prefix} images are {images.dtype} {list(images.shape)}: "
                "they must be uint8 [n h w], [n h w 1] or [n h w 3]"
            )
        if len(labels) != len(images):
            raise DataError(f"{prefix} has {len(images)} images but {len(labels)} labels")
        self.targets = Classes(classes, labels)
        self._images = images[..., 0] if images.shape[3:] == (1,) else images
        self._prefix = prefix


class Joined:
    """Sources of the same targets, one a part (a name in PARTS), as one data set."""

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._sources = tuple(sources.values())
        self._starts = np.cumsum([0, *map(len, self._sources)]).tolist()
        said = [source.targets for source in self._sources]
        self.targets: Targets = type(said[0]).joined(said)
        parts = np.array([PARTS.index(name) for name in sources], np.uint8)
        self.part = np.repeat(parts, [len(source) for source in self._sources])
        self.left_out: tuple[LeftOut, ...] = ()
        self.notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def key(self, i: int) -> str:
        source, within = self._find(i)
        return source.key(within)

    def load(self, i: int) -> Image.Image:
        source, within = self._find(i)
        return source.load(within)

    def encoded(self, i: int) -> Encoded | None:
        """Image `i` as its file, or a part of one; None if it lies in memory as pixels."""
        source, within = self._find(i)
        return encoded(source, within)

    def stamp(self, i: int) -> str:
        source, within = self._find(i)
        return source.stamp(within)

    def _find(self, i: int) -> tuple[Source, int]:
        number = bisect_right(self._starts, i) - 1
        return self._sources[number], i - self._starts[number]


class Subset:
    """The images `indices` of a source; `targets` is what is said of them, in their order, instead
    of what the source says.
    """

    def __init__(
        self, source: Source, indices: Int[np.ndarray, " n"], targets: Targets | None = None
    ) -> None:
        self._source = source
        self._indices = indices
        self.targets = source.targets.rows(indices) if targets is None else targets

    def __len__(self) -> int:
        return len(self._indices)

    def key(self, i: int) -> str:
        return self._source.key(int(self._indices[i]))

    def load(self, i: int) -> Image.Image:
        return self._source.load(int(self._indices[i]))

    def encoded(self, i: int) -> Encoded | None:
        """Image `i` as its file, or a part of one; None if it lies in memory as pixels."""
        return encoded(self._source, int(self._indices[i]))

    def stamp(self, i: int) -> str:
        return self._source.stamp(int(self._indices[i]))


def encoded(source: Source, i: int) -> Encoded | None:
    """Image `i` as a file, or a part of one; None where it lies in memory as pixels.

    A source of files has a method `encoded(i)` for that: what its `load(i)` gives to `read_image`,
    so that another process can. It may raise `UnreadableImage`.
    """
    give = getattr(source, "encoded", None)
    return give(i) if give else None


def refuse_inside(place: Path, data: Path) -> None:
    """Raise `UsageError` if `place`, which is to be written, lies in the folder `data`."""
    if data.is_dir() and place.resolve().is_relative_to(data.resolve()):
        raise UsageError(
            f"{place} lies within the data, which is never written to: choose another place (of a "
            f"run with {setting('out')})"
        )


def file_stamp(file: Path | str) -> str:
    """A file's size and the time of its last change; empty if there is no such file."""
    try:
        status = os.stat(file)
    except OSError:
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"
