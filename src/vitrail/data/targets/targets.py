"""What every kind of targets can do, and how those of several images become a batch's."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol, Self, runtime_checkable

import numpy as np
from jaxtyping import Int, Int64, Num, UInt64

from vitrail.data.views.seen import Seen

PADDING = -1
"""What fills up integers where the images of a batch have targets of different sizes: no class, no
pixel that counts."""


@runtime_checkable
class Targets(Protocol):
    """What is said of `n` images, image by image."""

    kind: ClassVar[str]
    """What such targets are, in words for a message: "classes", "masks"."""
    placed: ClassVar[bool]
    """Whether they lie in the image, and move with what is seen of it."""
    names: tuple[str, ...]
    """Of the classes, index by index; empty where there are none."""

    def __len__(self) -> int: ...

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Those of several sources one after another, which have the same names."""
        ...

    def rows(self, chosen: Int[np.ndarray, " m"]) -> Self:
        """Those of the images `chosen`."""
        ...

    def present(self) -> tuple[str, ...]:
        """The names that any of the images has."""
        ...

    def renumbered(self, names: tuple[str, ...]) -> Self:
        """The same in another table of names, which has all that are present."""
        ...

    def target(self, i: int, seen: Seen | None) -> dict[str, np.ndarray]:
        """What is said of image `i`, by name.

        `seen`: of the view that is learned from; None: of the whole image, as it is measured.
        Raises `UnreadableImage` where it lies in a file that cannot be read.
        """
        ...

    def blank(self, size: tuple[int, int]) -> dict[str, np.ndarray]:
        """What is said of a view of (height, width) pixels that shows nothing."""
        ...

    def strata(self) -> Int64[np.ndarray, " n"] | None:
        """The group of each image, of which a split takes its share; None: they are one group."""
        ...

    def hashes(self) -> UInt64[np.ndarray, " n"]:
        """A number for what is said of each image, another if that is another."""
        ...

    def text(self, i: int) -> str:
        """What is said of image `i`, for a line of split.csv."""
        ...


def stacked(rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Num[np.ndarray, "b ..."]]:
    """The targets of at least one image as a batch's, by name.

    Arrays of different sizes are filled up with `PADDING` at the end of each axis.

    >>> stacked([{"mask": np.zeros((1, 2), int)}, {"mask": np.ones((2, 1), int)}])["mask"].tolist()
    [[[0, 0], [-1, -1]], [[1, -1], [1, -1]]]
    """
    return {name: _padded([row[name] for row in rows]) for name in rows[0]}


def blank_rows(targets: Targets, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """The targets of a batch of no images."""
    return {name: value[None][:0] for name, value in targets.blank(size).items()}


def _padded(arrays: Sequence[np.ndarray]) -> np.ndarray:
    shapes = {array.shape for array in arrays}
    if len(shapes) == 1:
        return np.stack(arrays)
    largest = tuple(max(sides) for sides in zip(*shapes, strict=True))
    whole = np.full((len(arrays), *largest), PADDING, arrays[0].dtype)
    for place, array in zip(whole, arrays, strict=True):
        place[tuple(slice(side) for side in array.shape)] = array
    return whole
