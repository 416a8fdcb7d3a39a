"""Boxes around the objects of each image, each with a class.

Boxes are (left, top, right, bottom). They are kept in the image's unit square, where `Seen` finds
them, so that the size at which somebody drew them is of no account: 0 and 1 are the image's edges.

Letters: n images, m boxes of one, k boxes of all.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int, Int64, UInt64

from vitrail.data.pixels.decode import UnreadableImage
from vitrail.data.views.seen import Seen

ANY = -2
"""The label of a region, to be ignored, of whatever classes lie in it."""
LEAST_SEEN = 0.2
"""The share of a box that a view must show, for what is seen of it to be learned from."""
_THIN = 1.0
"""Pixels of a view: what is thinner has nothing to show."""


class Said(NamedTuple):
    """What is said of one image."""

    corners: Float64[np.ndarray, "m 4"]
    """In the image's unit square."""
    labels: Int64[np.ndarray, " m"]
    """Class indices; ANY only of what is ignored."""
    ignored: Bool[np.ndarray, " m"]
    """What is neither learned from nor measured by: crowds, difficult ones, regions. What a model
    finds there is no mistake."""


class Sizes:
    """(height, width) of each image, upright, where that is known of all; 0 of those that nobody
    can read, which raise `UnreadableImage`.
    """

    def __init__(self, sizes: Int64[np.ndarray, "n 2"]) -> None:
        self._sizes = sizes

    def __call__(self, i: int) -> tuple[int, int]:
        height, width = self._sizes[i].tolist()
        if not height:
            raise UnreadableImage("its header cannot be read")
        return height, width


NO_BOXES = Said(np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0, bool))


class Boxes:
    """The boxes of each image, none or any number.

    `frame(i)` gives (height, width) of image `i`, upright, without decoding it; and it may raise
    `UnreadableImage` where boxes cannot be that image's.

    >>> one = Said(np.array([[0.25, 0.0, 0.75, 1.0]]), np.array([0]), np.array([False]))
    >>> boxes = Boxes.listed(("cat",), [one, NO_BOXES], lambda i: (100, 200))
    >>> boxes.target(0, None)["boxes"].tolist(), boxes.text(0), boxes.text(1)
    ([[50.0, 0.0, 150.0, 100.0]], 'cat 1', '')
    >>> half = Seen.of_box((0.0, 0.0, 100.0, 100.0), (100, 200), (50, 50))
    >>> boxes.target(0, half)["boxes"].tolist()
    [[25.0, 0.0, 50.0, 50.0]]
    """

    kind: ClassVar[str] = "boxes"
    placed: ClassVar[bool] = True

    def __init__(
        self,
        names: tuple[str, ...],
        said: Said,
        starts: Int64[np.ndarray, " n1"],
        frame: Callable[[int], tuple[int, int]],
        chosen: Int[np.ndarray, " n"] | None = None,
    ) -> None:
        """`said` is of all images, one after another: those of image `i` from `starts[i]` up to
        `starts[i + 1]`.
        """
        self.names = names
        self._all = said
        self._starts = starts
        self._frame = frame
        self._chosen = np.arange(len(starts) - 1) if chosen is None else chosen

    @classmethod
    def listed(
        cls, names: tuple[str, ...], said: Iterable[Said], frame: Callable[[int], tuple[int, int]]
    ) -> "Boxes":
        """From what is said of each image."""
        each = list(said)
        starts = np.cumsum([0, *(len(one.labels) for one in each)])
        parts = zip(*(each or [NO_BOXES]), strict=True)
        return cls(names, Said(*(np.concatenate(part) for part in parts)), starts, frame)

    def __len__(self) -> int:
        return len(self._chosen)

    @classmethod
    def joined(cls, parts: "Sequence[Boxes]") -> "Boxes":
        """Those of several sources one after another, which have the same names."""
        first = parts[0]
        if all(part._all is first._all for part in parts):  # they are parts of one
            chosen = np.concatenate([part._chosen for part in parts])
            return cls(first.names, first._all, first._starts, first._frame, chosen)
        images = [(part, i) for part in parts for i in range(len(part))]

        def frame(i: int) -> tuple[int, int]:
            part, within = images[i]
            return part.size(within)

        return cls.listed(first.names, (part.of(i) for part, i in images), frame)

    def rows(self, chosen: Int[np.ndarray, " m"]) -> "Boxes":
        """Those of the images `chosen`, with all names."""
        return Boxes(self.names, self._all, self._starts, self._frame, self._chosen[chosen])

    def of(self, i: int) -> Said:
        """What is said of image `i`."""
        at = self._chosen[i]
        own = slice(self._starts[at], self._starts[at + 1])
        return Said(*(part[own] for part in self._all))

    def size(self, i: int) -> tuple[int, int]:
        """(height, width) of image `i`, upright. Raises `UnreadableImage`."""
        return self._frame(int(self._chosen[i]))

    @property
    def most(self) -> int:
        """The largest number of objects, ignored ones too, that an image has."""
        return int(self._counts().max(initial=0))

    def counts(self) -> Int64[np.ndarray, " c"]:
        """How many objects are of each class, without what is ignored."""
        own = np.repeat(self._times(), np.diff(self._starts)) * ~self._all.ignored
        labels = self._all.labels.clip(min=0)
        return np.bincount(labels, own, len(self.names)).astype(np.int64)

    def empty(self) -> int:
        """How many images have no object that counts: they show what is none. What nobody can read
        shows nothing.
        """
        inside = np.concatenate([[0], np.cumsum(~self._all.ignored)])[self._starts]
        bare = np.flatnonzero(np.diff(inside)[self._chosen] == 0)
        return sum(self._is_readable(i) for i in bare.tolist())

    def present(self) -> tuple[str, ...]:
        """The names that any object has."""
        return tuple(self.names[k] for k in np.flatnonzero(self.counts()))

    def renumbered(self, names: tuple[str, ...]) -> "Boxes":
        """The same in another table of names, which has all that are present; what is ignored of
        another class becomes a region of whatever classes.
        """
        if names == self.names:
            return self
        index = {name: k for k, name in enumerate(names)}
        table = np.array([*(index.get(name, ANY) for name in self.names), ANY])
        labels = table[np.where(self._all.labels < 0, len(self.names), self._all.labels)]
        said = self._all._replace(labels=labels)
        return Boxes(names, said, self._starts, self._frame, self._chosen)

    def target(self, i: int, seen: Seen | None) -> dict[str, np.ndarray]:
        """`boxes [m 4]` in pixels, float32, `labels [m]` and `ignored [m]`, int8, 0 or 1.

        Of the whole image: all of them, in its own pixels, with its `size [2]`, (height, width). Of
        a view: those that lie in it, cut to it; of which there is less than LEAST_SEEN left, or
        less than a pixel across, it is ignored. A box that is turned becomes the one around it.
        """
        height, width = self.size(i)
        if seen is None:
            corners, labels, ignored = self.of(i)
            boxes = corners * [width, height, width, height]
            size = {"size": np.array([height, width])}
            return _row(boxes, labels, ignored) | size
        return _row(*_in_view(self.of(i), seen))

    def joined_target(self, parts: Iterable[tuple[int, Seen]]) -> dict[str, np.ndarray]:
        """As `target`, of a view that shows parts of several images: which, and how."""
        found = [NO_BOXES, *(_in_view(self.of(i), seen) for i, seen in parts)]
        return _row(*(np.concatenate(each) for each in zip(*found, strict=True)))

    def blank(self, size: tuple[int, int]) -> dict[str, np.ndarray]:
        """No boxes."""
        return _row(*NO_BOXES)

    def strata(self) -> None:
        """All images are one group."""

    def hashes(self) -> UInt64[np.ndarray, " n"]:
        """Of the names of the classes, and of each image's boxes."""
        common = "\0".join(self.names).encode()
        return np.array([self._hash(common, i) for i in range(len(self))], np.uint64)

    def text(self, i: int) -> str:
        """How many objects of each class: "cat 1|dog 3"; what is ignored is not told."""
        found = self.of(i)
        count = Counter(found.labels[~found.ignored].tolist())
        return "|".join(f"{self.names[k]} {n}" for k, n in sorted(count.items()))

    def _hash(self, common: bytes, i: int) -> int:
        digest = hashlib.blake2b(common, digest_size=8)
        for part in self.of(i):
            digest.update(np.ascontiguousarray(part).tobytes())
        return int.from_bytes(digest.digest(), "little")

    def _is_readable(self, i: int) -> bool:
        try:
            self.size(i)
        except UnreadableImage:
            return False
        return True

    def _counts(self) -> Int64[np.ndarray, " n"]:
        return np.diff(self._starts)[self._chosen]

    def _times(self) -> Int64[np.ndarray, " _n"]:
        """How often each image of all is chosen."""
        return np.bincount(self._chosen, minlength=len(self._starts) - 1)


def _row(
    boxes: Float64[np.ndarray, "m 4"],
    labels: Int64[np.ndarray, " m"],
    ignored: Bool[np.ndarray, " m"],
) -> dict[str, np.ndarray]:
    return {
        "boxes": boxes.astype(np.float32),
        "labels": labels,
        "ignored": ignored.astype(np.int8),
    }


def _in_view(said: Said, seen: Seen) -> Said:
    """What lies in a view, cut to it, in its pixels; what of too little is seen is ignored."""
    part, whole = np.array(seen.part), _moved(said.corners, seen)
    inside = said.corners.clip(np.tile(part[:2], 2), np.tile(part[2:], 2))
    shown = _moved(inside, seen).clip(0, np.tile(seen.size[::-1], 2))
    sides, whole = shown[:, 2:] - shown[:, :2], whole[:, 2:] - whole[:, :2]
    kept = (sides > 0).all(axis=1) & (inside[:, 2:] > inside[:, :2]).all(axis=1)
    little = sides.prod(axis=1) < LEAST_SEEN * whole.prod(axis=1)
    little |= (sides < _THIN).any(axis=1)
    return Said(shown[kept], said.labels[kept], (said.ignored | little)[kept])


def _moved(corners: Float64[np.ndarray, "m 4"], seen: Seen) -> Float64[np.ndarray, "m 4"]:
    """Boxes of the image's unit square in a view's pixels, not cut to it."""
    around = corners[:, [[0, 1], [2, 1], [2, 3], [0, 3]]]
    placed = seen.there(around.reshape(-1, 2)).reshape(-1, 4, 2)
    return np.concatenate([placed.min(axis=1), placed.max(axis=1)], axis=1)
