"""What the values in a mask mean: which class, not to be counted, or nobody knows."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np
from jaxtyping import Int, Int16, Int64

from vitrail.data.pixels.values import Values
from vitrail.errors import UsageError

IGNORE = -1
"""The class index of what does not count: not learned from, and not measured."""
MOST_CLASSES = 32_767
_TABLE = 1 << 16
"""Values below it are looked up at once: all that 16 bits hold."""


class Coding:
    """From values to class indices.

    `classes` gives the index that a value, or a colour of `packed`, has; several may have the same.
    The values `ignored` are not to be counted; what is neither is unknown, and is not counted
    either. Raises `UsageError` for more classes than an index can name.

    >>> coding = Coding({0: 0, 255: 1}, ignored=(128,))
    >>> coding.indices(np.array([[0, 255], [128, 7]], np.uint8)).tolist()
    [[0, 1], [-1, -1]]
    >>> coding.unknown(np.array([[0, 255], [128, 7]], np.uint8))
    {7: 1}
    """

    def __init__(
        self, classes: Mapping[int, int], *, ignored: Iterable[int] = (), colours: bool = False
    ) -> None:
        if max(classes.values(), default=0) >= MOST_CLASSES:
            raise UsageError(f"masks have at most {MOST_CLASSES:,} classes")
        self.ignored = frozenset(ignored)
        self.classes = {v: k for v, k in sorted(classes.items()) if v not in self.ignored}
        self.colours = colours
        """Whether values are colours."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Coding) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def renumbered(self, places: Sequence[int]) -> "Coding":
        """The same values, whose classes have other indices: `places[k]` for `k`."""
        classes = {value: places[k] for value, k in self.classes.items()}
        return Coding(classes, ignored=self.ignored, colours=self.colours)

    @cached_property
    def digest(self) -> bytes:
        """Another one for other values."""
        said = f"{self.colours} {sorted(self.classes.items())} {sorted(self.ignored)}"
        return hashlib.blake2b(said.encode(), digest_size=16).digest()

    def indices(self, values: Values) -> Int16[np.ndarray, "h w"]:
        """The class of each pixel; IGNORE where it has none."""
        numbers = self.numbers(values)
        if not self.colours and numbers.dtype == np.uint8:
            return self._table[numbers]
        if not self.colours and self._small:
            inside = (numbers >= 0) & (numbers < _TABLE)
            return np.where(inside, self._table[np.where(inside, numbers, 0)], np.int16(IGNORE))
        known, index = self._sorted
        at = np.searchsorted(known, numbers).clip(max=len(known) - 1)
        return np.where(known[at] == numbers, index[at], np.int16(IGNORE))

    def numbers(self, values: Values) -> Int[np.ndarray, "h w"]:
        """One number a pixel. Of colours that is `packed`; where colours are not asked for, the
        grey of three equal channels, and -1 where they are not equal.
        """
        if self.colours:
            return packed(values if values.ndim == 3 else values[..., None].repeat(3, axis=2))
        if values.ndim == 2:
            return values
        grey = values[..., 0]
        equal = (grey == values[..., 1]) & (grey == values[..., 2])
        return grey if equal.all() else np.where(equal, grey, np.int32(-1))

    def unknown(self, values: Values) -> dict[int, int]:
        """How many pixels have each value of which nothing is known."""
        found, count = np.unique(self.numbers(values), return_counts=True)
        pairs = zip(found.tolist(), count.tolist(), strict=True)
        return {v: n for v, n in pairs if v not in self.classes and v not in self.ignored}

    def nearest(self, value: int) -> str:
        """What has the value, or the colour, that is nearest to `value`, as a user knows it."""
        known = [*self.classes, *(v for v in self.ignored if v >= 0)]
        if not known:
            return "none"
        far = _distance if self.colours else lambda one, other: abs(one - other)
        return value_text(min(known, key=lambda one: (far(one, value), one)), colours=self.colours)

    @cached_property
    def _small(self) -> bool:
        return all(0 <= v < _TABLE for v in self.classes)

    @cached_property
    def _table(self) -> Int16[np.ndarray, " v"]:
        table = np.full(_TABLE, IGNORE, np.int16)
        for value, index in self.classes.items():
            if 0 <= value < _TABLE:
                table[value] = index
        return table

    @cached_property
    def _sorted(self) -> tuple[Int64[np.ndarray, " v"], Int16[np.ndarray, " v"]]:
        known = self.classes or {-1: IGNORE}
        return np.array(list(known), np.int64), np.array(list(known.values()), np.int16)


def packed(colours: Int[np.ndarray, "... 3"]) -> Int[np.ndarray, "..."]:
    """Colours as one number each, red first.

    >>> int(packed(np.array([1, 2, 3])))
    66051
    """
    red, green, blue = (colours[..., c].astype(np.int32) for c in range(3))
    return (red << 16) | (green << 8) | blue


def _distance(first: int, second: int) -> int:
    """Between two packed colours, squared."""
    return sum(((first >> bits & 255) - (second >> bits & 255)) ** 2 for bits in (0, 8, 16))


def value_text(value: int, *, colours: bool) -> str:
    """A value as a user knows it.

    >>> value_text(66051, colours=True), value_text(7, colours=False)
    ('#010203', '7')
    """
    return f"#{value:06x}" if colours and value >= 0 else str(value)
