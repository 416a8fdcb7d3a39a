"""Which boxes have which objects, exactly as COCO matches them (pycocotools, cocoeval.py).

Letters: m objects, d boxes found, p pairs, q questions.
"""

import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

ANY = -2
"""The label of what is ignored whatever a box is said to be."""
IOUS = tuple(np.linspace(0.5, 0.95, 10).tolist())
AREAS = ((0.0, 1e10), (0.0, 32.0**2), (32.0**2, 96.0**2), (96.0**2, 1e10))
"""All, small, medium and large, in square pixels; both ends belong to each, as COCO has it."""
LEAST = 0.1
"""The IoU from which on a box has to do with an object."""
LOOSE = 0.4
"""The IoU at which DeepForest counts a tree as found (Weinstein 2020, Methods in Ecology and
Evolution 11)."""
LOOSE_ONE = len(AREAS) * len(IOUS)
"""The question that comes after those of each area at each IoU: of all objects, at LOOSE.

Answers are kept as bits of one number, of which bit `len(IOUS) * area + iou` is that of a question.
"""
_IOU = np.array([*IOUS] * len(AREAS) + [LOOSE]).clip(max=1 - 1e-10)
_AREA = np.array([AREAS[k] for k, _ in enumerate(AREAS) for _ in IOUS] + [AREAS[0]])
_BITS = 1 << np.arange(LOOSE_ONE + 1)
_ROOM = 2**22
"""Pairs of boxes that are compared at once."""


class Said(NamedTuple):
    """What a model found, the best first."""

    boxes: Float64[np.ndarray, "d 4"]
    scores: Float64[np.ndarray, " d"]
    labels: Int64[np.ndarray, " d"]


class Objects(NamedTuple):
    """What is there."""

    boxes: Float64[np.ndarray, "m 4"]
    labels: Int64[np.ndarray, " m"]
    region: Bool[np.ndarray, " m"]
    """What is ignored and takes any number of boxes."""


class Pairs(NamedTuple):
    """Of boxes and objects those that overlap by at least LEAST: by box, and then by object."""

    box: Int64[np.ndarray, " p"]
    object: Int64[np.ndarray, " p"]
    iou: Float64[np.ndarray, " p"]

    def where(self, chosen: Bool[np.ndarray, " p"]) -> "Pairs":
        """Some of them."""
        return Pairs(self.box[chosen], self.object[chosen], self.iou[chosen])


def overlaps(boxes: Float64[np.ndarray, "d 4"], real: Objects) -> Pairs:
    """All pairs whose IoU is at least LEAST; of a region, by the share of the box."""
    step = max(1, _ROOM // max(1, len(real.boxes)))
    left, top, right, bottom = real.boxes.T
    parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
    for start in range(0, len(boxes), step):
        x, y, end, low = boxes[start : start + step].T[..., None]
        meet = (x < right) & (end > left) & (y < bottom) & (low > top)
        above, across = np.nonzero(meet)
        parts.append((above + start, across))
    box, thing = (np.concatenate(part) for part in zip(*parts, strict=True))
    some, others = boxes[box], real.boxes[thing]
    sides = np.minimum(some[:, 2:], others[:, 2:]) - np.maximum(some[:, :2], others[:, :2])
    shared, area = sides[:, 0] * sides[:, 1], _area(some)
    either = np.where(real.region[thing], area, area + _area(others) - shared)
    pairs = Pairs(box, thing, shared / either)  # what meets has an area
    return pairs.where(pairs.iou >= LEAST)


class Matches(NamedTuple):
    """Of each box."""

    matched: Int64[np.ndarray, " d"]
    """To which questions it has an object."""
    ignored: Int64[np.ndarray, " d"]
    """To which it does not count."""
    holds: Int64[np.ndarray, " d"]
    """The object that it has at an IoU of 0.5, of any size; or -1."""


def match(said: Said, real: Objects, pairs: Pairs) -> Matches:
    """Box by box, the best first: each takes, of the objects of its class that overlap it enough
    and are not taken, the one that it overlaps most, and of equals the last; one that does not
    count only where there is no other.
    """
    d, label = len(said.labels), real.labels[pairs.object]
    own = (label == said.labels[pairs.box]) | (label == ANY)
    pairs = pairs.where(own & (pairs.iou >= LOOSE))
    order = np.lexsort((-pairs.object, -pairs.iou, pairs.box))
    enough = (pairs.iou[order, None] >= _IOU) @ _BITS
    outside, region = outside_of(real).tolist(), real.region.tolist()
    # Python's own whole numbers, for each step has few objects to look at.
    matched, ignored, holds, taken = [0] * d, [0] * d, [-1] * d, [0] * len(region)
    steps = zip(
        pairs.box[order].tolist(), pairs.object[order].tolist(), enough.tolist(), strict=True
    )
    for box, near in itertools.groupby(steps, key=lambda step: step[0]):
        candidates = list(near)
        for counts in (True, False):
            for _, k, asked in candidates:
                asked &= ~matched[box] & (~outside[k] if counts else outside[k])
                if not region[k]:
                    asked &= ~taken[k]
                    taken[k] |= asked
                matched[box] |= asked
                ignored[box] |= 0 if counts else asked
                if asked & 1:
                    holds[box] = k
    has, out = np.array(matched, np.int64), _other_sizes(said.boxes)
    return Matches(has, np.array(ignored, np.int64) | (out & ~has), np.array(holds, np.int64))


def outside_of(real: Objects) -> Int64[np.ndarray, " m"]:
    """To which questions each object does not count."""
    return np.where(real.region, _BITS.sum(), _other_sizes(real.boxes))


def _other_sizes(boxes: Float64[np.ndarray, "k 4"]) -> Int64[np.ndarray, " k"]:
    """Which questions are of boxes of another size than each."""
    area, (low, high) = _area(boxes)[:, None], _AREA.T
    return ((area < low) | (area > high)) @ _BITS


def _area(boxes: Float64[np.ndarray, "k 4"]) -> Float64[np.ndarray, " k"]:
    sides = boxes[:, 2:] - boxes[:, :2]
    return sides[:, 0] * sides[:, 1]
