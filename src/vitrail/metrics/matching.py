"""Which boxes have which objects, exactly as COCO matches them (pycocotools, cocoeval.py).

Letters: m objects, d boxes found, p pairs, q questions.
"""

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
"""The question that comes after those of each area at each IoU: of all objects, at LOOSE."""
_ASKED = np.array([*IOUS] * len(AREAS) + [LOOSE]).clip(max=1 - 1e-10)[:, None]
_AREA_OF = np.array([k for k, _ in enumerate(AREAS) for _ in IOUS] + [0])
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
    size, own = _area(boxes), _area(real.boxes)
    step = max(1, _ROOM // max(1, len(own)))
    parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    for start in range(0, len(boxes), step):
        some, area = boxes[start : start + step, None], size[start : start + step, None]
        least = np.maximum(some[..., :2], real.boxes[:, :2])
        sides = np.minimum(some[..., 2:], real.boxes[:, 2:]) - least
        sides = sides.clip(min=0)
        shared = sides[..., 0] * sides[..., 1]
        either = np.where(real.region, area, area + own - shared)
        iou = np.divide(shared, either, out=np.zeros_like(shared), where=either > 0)
        box, thing = np.nonzero(iou >= LEAST)
        parts.append((box + start, thing, iou[box, thing]))
    return Pairs(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def match(
    said: Said, real: Objects, pairs: Pairs, outside: Bool[np.ndarray, "q m"]
) -> tuple[Bool[np.ndarray, "q d"], Bool[np.ndarray, "q d"], Int64[np.ndarray, " d"]]:
    """To each question, which boxes have an object, and which do not count; and which object (or
    -1) each has at an IoU of 0.5.

    Box by box, the best first: each takes, of the objects of its class that overlap it enough and
    are not taken, the one that it overlaps most, and of equals the last; one that does not count
    only where there is no other.
    """
    questions = np.arange(len(_ASKED))
    matched = np.zeros((len(_ASKED), len(said.labels)), bool)
    ignored = outside_of(said.boxes)
    holds = np.full(len(said.labels), -1)
    label = real.labels[pairs.object]
    own = (label == said.labels[pairs.box]) | (label == ANY)
    box, objects, ious = pairs.where(own & (pairs.iou >= LOOSE))
    taken = np.zeros_like(outside)
    starts = np.flatnonzero(np.diff(box, prepend=-1))
    for start, end in zip(starts, np.append(starts, len(box))[1:], strict=True):
        d, near, iou = box[start], objects[start:end], ious[start:end]
        rank = np.empty(len(near), np.int64)
        rank[np.argsort(iou, kind="stable")] = np.arange(1, len(near) + 1)
        free = (iou >= _ASKED) & (~taken[:, near] | real.region[near])
        worth = free * (rank + len(near) * ~outside[:, near])
        best = worth.argmax(axis=1)
        has, chosen = worth[questions, best] > 0, near[best]
        taken[questions[has], chosen[has]] = True
        matched[:, d] = has
        ignored[:, d] = np.where(has, outside[questions, chosen], ignored[:, d])
        if has[0]:
            holds[d] = chosen[0]
    return matched, ignored, holds


def outside_of(boxes: Float64[np.ndarray, "k 4"]) -> Bool[np.ndarray, "q k"]:
    """To each question, which boxes are not of the size that it asks for."""
    area, (low, high) = _area(boxes), np.array(AREAS).T[:, _AREA_OF, None]
    return (area < low) | (area > high)


def _area(boxes: Float64[np.ndarray, "k 4"]) -> Float64[np.ndarray, " k"]:
    sides = boxes[:, 2:] - boxes[:, :2]
    return sides[:, 0] * sides[:, 1]
