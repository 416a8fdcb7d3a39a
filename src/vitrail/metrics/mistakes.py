"""Why a box is wrong, after TIDE (Bolya 2020, arXiv 2008.08115), and what it costs.

A box that has no object at an IoU of 0.5 is, in this order:

misplaced   it overlaps an object of its class by at least 0.1, and none by 0.5
misnamed    it overlaps an object of another class by 0.5
doubled     it overlaps an object of its class by 0.5 that a better box has
background  it overlaps none by 0.1
both        misplaced and misnamed

An object is missed where no box has it, is misplaced on it or misnamed. What a kind costs is by how
much the mean AP50 would rise if it alone were mended: boxes that are misplaced or misnamed become
right where no box has their object (the best of them; the others go), the rest goes, and missed
objects no longer count. The costs do not add up to what AP lacks.

Letters: d boxes, m objects, p pairs.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int8, Int32, Int64
from torch import Tensor

from vitrail.metrics.matching import LEAST, Objects, Pairs
from vitrail.metrics.precision import Ranked, averages

KINDS = ("none", "right", "ignored", "misplaced", "misnamed", "doubled", "background", "both")
"""What the number of a kind means; "none" is where there is no box."""
NONE, RIGHT, IGNORED, MISPLACED, MISNAMED, DOUBLED, BACKGROUND, BOTH = range(len(KINDS))
KIND = 7
"""The bits of a kind's number."""
FIRST = 8
"""Added for the best box that an object has: right, misplaced or misnamed."""
MENDS = 16
"""Added for the best box, misplaced or misnamed, of an object that no box has."""
_ENOUGH = 0.5


def mistakes(
    pairs: Pairs,
    labels: Int64[np.ndarray, " d"],
    real: Objects,
    holds: Int64[np.ndarray, " d"],
    ignored: Bool[np.ndarray, " d"],
) -> tuple[Int8[np.ndarray, " d"], Int32[np.ndarray, " d"]]:
    """The kind of each box of an image, the best first, with FIRST and MENDS; and the class of the
    object that it is right about or mistakes, -1 where there is none.

    `labels` are the boxes'; `holds` is the object that each has, or -1, and `ignored` says which of
    them do not count.
    """
    d, pairs = len(labels), pairs.where(~real.region[pairs.object])
    same = real.labels[pairs.object] == labels[pairs.box]
    own, own_object = _closest(pairs.where(same), d)
    other, other_object = _closest(pairs.where(~same), d)
    tests = {
        IGNORED: ignored,
        RIGHT: holds >= 0,
        MISPLACED: (own >= LEAST) & (own < _ENOUGH),
        MISNAMED: other >= _ENOUGH,
        DOUBLED: own >= _ENOUGH,
        BACKGROUND: np.maximum(own, other) < LEAST,
    }
    kinds = np.select(list(tests.values()), list(tests), BOTH)
    objects = {RIGHT: holds, MISPLACED: own_object, MISNAMED: other_object}
    about = np.select([kinds == kind for kind in objects], list(objects.values()), -1)
    meant = np.append(real.labels, -1)[about]
    taken = np.isin(about, holds[kinds == RIGHT])
    flags = FIRST * _first(about, about >= 0)
    for kind in (MISPLACED, MISNAMED):
        flags += MENDS * _first(about, (kinds == kind) & ~taken)
    return (kinds + flags).astype(np.int8), meant.astype(np.int32)


class Mistake(NamedTuple):
    """One kind of them."""

    kind: str
    """misplaced, misnamed, doubled, background, both; missed, of objects."""
    kept: int
    """Those of the boxes that the best threshold keeps; the objects that it misses."""
    all: int
    """Those of all boxes, or missed by all."""
    cost: float | None
    """By how much AP50 would rise without them; None where no object would be left."""


def costs(found: Ranked, objects: Float64[Tensor, " c"], threshold: float) -> tuple[Mistake, ...]:
    """All kinds, those of boxes first. `threshold` is the lowest score that is kept, `objects` are
    those of each class.
    """
    kind, kept = found.kind & KIND, found.score >= threshold
    first, mends = (found.kind & flag > 0 for flag in (FIRST, MENDS))
    right, counted = found.right(0), found.counted(0)
    left = [
        (objects - torch.bincount(found.meant[some], minlength=len(objects))).long()
        for some in (first & kept, first)
    ]
    after = {"missed": _ap50(found, right, counted, objects - left[1])}
    numbers = {"missed": (int(left[0].sum()), int(left[1].sum()))}
    for each in (MISPLACED, MISNAMED, DOUBLED, BACKGROUND, BOTH):
        own, name = kind == each, KINDS[each]
        mended = own & mends
        changed = found._replace(label=torch.where(mended, found.meant, found.label))
        after[name] = _ap50(changed, right | mended, counted & (mended | ~own), objects)
        numbers[name] = int((own & kept).sum()), int(own.sum())
    before = _ap50(found, right, counted, objects)
    gains = {name: max(ap - before, 0.0) if ap == ap else None for name, ap in after.items()}
    return tuple(
        Mistake(name, *numbers[name], gains[name]) for name in (*KINDS[MISPLACED:], "missed")
    )


def _ap50(
    found: Ranked,
    right: Bool[Tensor, " d"],
    counted: Bool[Tensor, " d"],
    objects: Float64[Tensor, " c"],
) -> float:
    """The mean over classes, had these been right and counted; NaN without objects."""
    once = torch.ones(1, 1, dtype=torch.float64)
    had = found._replace(
        image=torch.zeros_like(found.image), matched=right.long(), ignored=(~counted).long()
    )
    return averages(had.by_class(), objects[None], once, [0]).ap.nanmean().item()


def _closest(pairs: Pairs, d: int) -> tuple[Float64[np.ndarray, " d"], Int64[np.ndarray, " d"]]:
    """Of each box the largest IoU, and with which object; 0 and -1 without any."""
    order = np.lexsort((pairs.iou, pairs.box))
    last = order[np.flatnonzero(np.diff(pairs.box[order], append=-1))]
    most, which = np.zeros(d), np.full(d, -1)
    most[pairs.box[last]], which[pairs.box[last]] = pairs.iou[last], pairs.object[last]
    return most, which


def _first(
    values: Int64[np.ndarray, " d"], chosen: Bool[np.ndarray, " d"]
) -> Bool[np.ndarray, " d"]:
    """Which of the chosen are the first with their value."""
    found = np.zeros(len(values), bool)
    places = np.flatnonzero(chosen)
    found[places[np.unique(values[places], return_index=True)[1]]] = True
    return found
