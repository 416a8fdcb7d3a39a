"""Boxes that a model says of an image, as arrays: which of them are one object's, and which lie in
windows that were looked at apart.

Nothing here imports torch: a model that was exported answers without it.

Letters: d boxes found, k kept.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int64

LEAST_SCORE = 0.02
MOST_COMPARED = 1000
"""Boxes of an image that suppression compares with each other: a million numbers."""
OVERLAP = 0.25
"""The share of its side that a window shares with the next."""
_ALIKE = 0.6
"""The IoU above which two boxes of a class are one object's."""
_LEAST = 1e-9
"""Of an area that something is divided by."""
_EDGE = 1.0
"""Pixels of a view: a box that ends so near to where a window does is cut by it."""
_WITHIN = 0.8
"""The share of a box that a window cuts, that lies in one that another window has whole."""


class Found(NamedTuple):
    """What was found in one image or view, the best first."""

    boxes: Float[np.ndarray, "d 4"]
    """(left, top, right, bottom) in its pixels."""
    scores: Float[np.ndarray, " d"]
    """0 to 1."""
    labels: Int64[np.ndarray, " d"]
    """Class indices."""

    def of(self, chosen: slice | Bool[np.ndarray, " d"] | Int64[np.ndarray, " k"]) -> "Found":
        """Some of them."""
        return Found(*(part[chosen] for part in self))

    def whole(self) -> "Found":
        """Those that have an inside."""
        return self.of(np.all(self.boxes[:, 2:] > self.boxes[:, :2], axis=1))


def suppress(
    boxes: Float[np.ndarray, "d 4"],
    scores: Float[np.ndarray, " d"],
    labels: Int64[np.ndarray, " d"],
    most_alike: float,
) -> Int64[np.ndarray, " k"]:
    """Non-maximum suppression: which boxes to keep, the best first.

    A box goes where a better one of its class, that is kept, overlaps it by an IoU above
    `most_alike`. Of equal scores the earlier one is better. All pairs are compared at once, `d * d`
    numbers: the caller bounds `d`.

    >>> boxes = np.array([[0.0, 0, 9, 9], [0, 0, 10, 10], [20, 0, 30, 10]])
    >>> suppress(boxes, np.array([0.5, 0.9, 0.7]), np.zeros(3, np.int64), 0.6)
    array([1, 2])
    """
    order = np.argsort(-scores, kind="stable")
    boxes, labels = boxes[order], labels[order]
    shared = _shared(boxes[:, None], boxes[None])
    either = _area(boxes)[:, None] + _area(boxes)[None] - shared
    alike = shared / np.maximum(either, _LEAST) > most_alike
    alike &= labels[:, None] == labels[None]
    kept = np.ones(len(boxes), bool)
    for place in np.flatnonzero(np.triu(alike, 1).any(axis=1)):
        if kept[place]:
            kept[place + 1 :] &= ~alike[place, place + 1 :]
    return order[kept]


def best_of(found: Found, most: int) -> Found:
    """At most `most`, the best first, and of what is one object's the best alone."""
    found = found.whole()
    return found.of(suppress(*found, _ALIKE)[:most])


def cut(
    found: Found, place: tuple[int, int], window: tuple[int, int], view: tuple[int, int]
) -> tuple[Bool[np.ndarray, " k"], Found]:
    """Which boxes the edge of a `window` at a `place` (y, x) of a `view` cuts, of those that no
    other window has whole; and these: what is cut and so small that it lies in where windows
    overlap is left to the other.
    """
    is_cut, whole_elsewhere = np.zeros((2, len(found.scores)), bool)
    for axis in (0, 1):  # x, y; sizes and places are (y, x)
        start, side, end = place[1 - axis], window[1 - axis], view[1 - axis]
        low, high = found.boxes[:, axis], found.boxes[:, 2 + axis]
        here = (low <= _EDGE) & (start > 0) | (high >= side - _EDGE) & (start + side < end)
        is_cut |= here
        whole_elsewhere |= here & (high - low < OVERLAP * side - 2 * _EDGE)
    return is_cut[~whole_elsewhere], found.of(~whole_elsewhere)


def merged(
    parts: Sequence[Found],
    places: Sequence[tuple[int, int]],
    window: tuple[int, int],
    view: tuple[int, int],
    most: int,
) -> Found:
    """What windows at `places` (y, x) of a view found, in its pixels, without parts of what another
    window found whole.
    """
    kept: list[Found] = []
    cuts: list[np.ndarray] = []
    for (y, x), found in zip(places, parts, strict=True):
        is_cut, found = cut(found, (y, x), window, view)
        moved = found.boxes + np.array([x, y, x, y], found.boxes.dtype)
        kept.append(found._replace(boxes=moved))
        cuts.append(is_cut)
    together = Found(*(np.concatenate(part) for part in zip(*kept, strict=True)))
    best = np.argsort(-together.scores, kind="stable")[: max(MOST_COMPARED, 2 * most)]
    found, is_cut = together.of(best), np.concatenate(cuts)[best]
    some, others = found.of(is_cut), found.of(~is_cut)
    shared = _shared(some.boxes[:, None], others.boxes[None])
    within = shared > _WITHIN * _area(some.boxes)[:, None]
    within &= some.labels[:, None] == others.labels[None]
    there = np.ones_like(is_cut)
    there[is_cut] = ~within.any(axis=1)
    return best_of(found.of(there), most)


def _area(boxes: Float[np.ndarray, "*d 4"]) -> Float[np.ndarray, "*d"]:
    sides = np.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    return sides[..., 0] * sides[..., 1]


def _shared(
    first: Float[np.ndarray, "*#d 4"], second: Float[np.ndarray, "*#d 4"]
) -> Float[np.ndarray, "..."]:
    """The areas that two boxes share; shapes are broadcast."""
    sides = np.minimum(first[..., 2:], second[..., 2:])
    sides -= np.maximum(first[..., :2], second[..., :2])
    np.maximum(sides, 0, out=sides)
    return sides[..., 0] * sides[..., 1]
