"""A class for each pixel."""

import hashlib
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

import numpy as np
from jaxtyping import Bool, Int, Shaped, UInt64

from vitrail.data.pixels.decode import UnreadableImage
from vitrail.data.pixels.values import Values
from vitrail.data.targets.coding import IGNORE, Coding
from vitrail.data.views.seen import Seen

_TIE = 1e-6
"""Of a pixel. Where a mask is halved each centre lies on an edge: all fall to the same side, not to
where rounding leaves them."""


class MaskStore(Protocol):
    """Where the masks of images lie, or what draws them."""

    def __len__(self) -> int: ...

    def values(self, i: int) -> Values:
        """As they are stored. Raises `UnreadableImage` where they cannot be read."""
        ...

    def stamp(self, i: int) -> str:
        """What is another text once mask `i` has changed; much cheaper than to read it."""
        ...

    def name(self, i: int) -> str:
        """What to call mask `i`, printable."""
        ...


class MaskArrays:
    """Masks in memory, each `[h w]`, or `[h w 3]` of colours."""

    def __init__(self, arrays: Sequence[Values], prefix: str) -> None:
        self._arrays = arrays
        self._prefix = prefix

    def __len__(self) -> int:
        return len(self._arrays)

    def values(self, i: int) -> Values:
        return self._arrays[i]

    def stamp(self, i: int) -> str:
        array = self._arrays[i]
        content = f"{array.dtype} {array.shape}".encode() + array.tobytes()
        return hashlib.blake2b(content, digest_size=16).hexdigest()

    def name(self, i: int) -> str:
        return f"{self._prefix}/{i}"


class Masks:
    """A class for each pixel of each image, in a mask that reaches over the whole image.

    `coding` says what its values mean. `image_size` gives (height, width) of image `i` of `store`
    without decoding it: a mask of another size, by more than a pixel, is refused; without it, any
    size will do.

    >>> masks = Masks(("sky", "sea"), MaskArrays([np.array([[0, 1]])], "m"), Coding({0: 0, 1: 1}))
    >>> masks.target(0, None)["mask"].tolist()
    [[0, 1]]
    >>> mirrored = Seen(np.array([[-4.0, 0, 4], [0, 1, 0], [0, 0, 1]]), (1, 5), (1, 2))
    >>> masks.target(0, mirrored)["mask"].tolist()
    [[1, 1, 0, 0, -1]]
    """

    kind: ClassVar[str] = "masks"
    placed: ClassVar[bool] = True

    def __init__(
        self,
        names: tuple[str, ...],
        store: MaskStore,
        coding: Coding,
        image_size: Callable[[int], tuple[int, int]] | None = None,
        chosen: Int[np.ndarray, " n"] | None = None,
    ) -> None:
        self.names = names
        self.store = store
        self.coding = coding
        self._image_size = image_size
        self._chosen = np.arange(len(store)) if chosen is None else chosen
        self._fits = np.zeros(len(store), bool)
        """Masks whose size is known to be their image's."""

    def __len__(self) -> int:
        return len(self._chosen)

    @classmethod
    def joined(cls, parts: "Sequence[Masks]") -> "Masks":
        """Those of several parts of one data set, one after another. Raises `ValueError` for parts
        whose masks lie in several stores.
        """
        first = parts[0]
        if any(part.store is not first.store for part in parts):
            raise ValueError("masks of several stores cannot be joined")
        chosen = np.concatenate([part._chosen for part in parts])
        return cls(first.names, first.store, first.coding, first._image_size, chosen)

    def rows(self, chosen: Int[np.ndarray, " m"]) -> "Masks":
        """Those of the images `chosen`, with all names."""
        picked = self._chosen[chosen]
        return Masks(self.names, self.store, self.coding, self._image_size, picked)

    def present(self) -> tuple[str, ...]:
        """All names: which classes the masks show is not known before they are read."""
        return self.names

    def renumbered(self, names: tuple[str, ...]) -> "Masks":
        """The same in another table of names, which has all of ours."""
        if names == self.names:
            return self
        index = {name: k for k, name in enumerate(names)}
        coding = self.coding.renumbered([index[name] for name in self.names])
        return Masks(names, self.store, coding, self._image_size, self._chosen)

    def at(self, i: int) -> int:
        """The number of mask `i` in `store`."""
        return int(self._chosen[i])

    def target(self, i: int, seen: Seen | None) -> dict[str, np.ndarray]:
        """`mask [h w]`, int16: of the view, each pixel has the class that lies under its centre,
        and IGNORE where it shows nothing of the image; of the whole image, at the mask's own size,
        with that as `size [2]`. Raises `UnreadableImage` as `values` does, and names the mask.
        """
        try:
            values = self.values(i)
        except UnreadableImage as error:  # told of the image, which is not at fault
            raise UnreadableImage(
                f"its mask {self.text(i)}: {error.reason}", self.text(i)
            ) from error
        if seen is None:
            mask = self.coding.indices(values)
            return {"mask": mask, "size": np.array(mask.shape)}
        shown, outside = nearest(values, seen)
        mask = self.coding.indices(shown)
        mask[outside] = IGNORE
        return {"mask": mask}

    def values(self, i: int) -> Values:
        """The mask as it is stored. Raises `UnreadableImage` for one of another size than its
        image, or that cannot be read.
        """
        at = self.at(i)
        values = self.store.values(at)
        if not self._fits[at] and self._image_size is not None:
            if complaint := size_complaint(values.shape[:2], self._image_size(at)):
                raise UnreadableImage(complaint, self.store.name(at))
            self._fits[at] = True
        return values

    def blank(self, size: tuple[int, int]) -> dict[str, np.ndarray]:
        """`mask [h w]`, all IGNORE."""
        return {"mask": np.full(size, IGNORE, np.int16)}

    def strata(self) -> None:
        """All images are one group."""

    def hashes(self) -> UInt64[np.ndarray, " n"]:
        """Of the stamps of the masks, of their names, and of what their values mean."""
        common = "\0".join(self.names).encode() + self.coding.digest
        return np.array([self._hash(common, int(at)) for at in self._chosen], np.uint64)

    def _hash(self, common: bytes, at: int) -> int:
        said = f"{self.store.name(at)}\0{self.store.stamp(at)}\0".encode() + common
        return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "little")

    def text(self, i: int) -> str:
        """The name of its file."""
        return self.store.name(self.at(i))


def size_complaint(mask: tuple[int, ...], image: tuple[int, int]) -> str:
    """What is wrong with a mask of (height, width) of an image of that; empty for nothing."""
    if all(abs(a - b) <= 1 for a, b in zip(mask, image, strict=True)):
        return ""
    sides = f"{mask[1]} x {mask[0]} pixels, but its image is {image[1]} x {image[0]}"
    if all(abs(a - b) <= 1 for a, b in zip(mask, reversed(image), strict=True)):
        return f"the mask is {sides}: one of them is turned (by EXIF?); save both upright"
    return f"the mask is {sides}: a mask must be as large as its image"


def nearest(
    values: Shaped[np.ndarray, "h w *c"], seen: Seen
) -> tuple[Shaped[np.ndarray, "vh vw *c"], Bool[np.ndarray, "vh vw"]]:
    """The pixels of a mask under the centres of those of a view; and which `[vh vw]` lie outside of
    what the view shows of its image.

    Nothing is averaged: each is one pixel of the mask.
    """
    (height, width), (rows, columns) = values.shape[:2], seen.size
    back = np.diag([width, height, 1.0]) @ np.linalg.inv(seen.matrix)
    x, y = np.arange(columns) + 0.5, (np.arange(rows) + 0.5)[:, None]
    # A map that mirrors and scales needs one row and one column of places, not a grid of them.
    across, down = (
        np.atleast_2d((a * x if a else 0) + (b * y if b else 0) + (c + _TIE))
        for a, b, c in back[:2]
    )
    left, top, right, bottom = np.multiply(seen.part, (width, height, width, height))
    outside = (across < left) | (across >= right) | (down < top) | (down >= bottom)
    row, column = (np.floor(each).astype(np.int64) for each in (down, across))
    found = values[row.clip(0, height - 1), column.clip(0, width - 1)]
    return found, np.broadcast_to(outside, seen.size)
