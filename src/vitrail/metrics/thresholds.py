"""From which score on boxes are worth keeping: F1, of all classes together.

Letters: n images, d boxes found, r draws.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from vitrail.metrics.estimate import Estimate
from vitrail.metrics.intervals import estimates
from vitrail.metrics.matching import IOUS, LOOSE, LOOSE_ONE
from vitrail.metrics.precision import Ranked

_STEPS = torch.from_numpy(np.linspace(0, 1, 101))


class Point(NamedTuple):
    """The score from which on boxes are kept for the best F1, of all classes together.

    The intervals are those of this threshold; that it was chosen by these images flatters all three
    a little.
    """

    iou: float
    """From which on a box is right."""
    threshold: float
    f1: Estimate
    precision: Estimate
    recall: Estimate
    found: int
    """Boxes of at least this score, without those that are ignored."""
    right: int


class Kept(NamedTuple):
    """What would be kept from a score on; `precision` is None where nothing is."""

    threshold: float
    found: int
    precision: float | None
    recall: float
    f1: float


def kept_from(found: Ranked, objects: float) -> tuple[Kept, ...]:
    """For 101 scores from 0 to 1, at an IoU of 0.5; `objects` is how many there are."""
    sums = _sums(found, 0)
    rows = []
    # Scores fall: how many of them are at least so large.
    reached = torch.searchsorted(-sums.score.double(), -_STEPS, right=True).tolist()
    for threshold, place in zip(_STEPS.tolist(), reached, strict=True):
        right, said = (
            (sums.right[place - 1].item(), sums.found[place - 1].item()) if place else (0.0, 0.0)
        )
        precision = right / said if said else None
        rows.append(
            Kept(threshold, int(said), precision, right / objects, 2 * right / (said + objects))
        )
    return tuple(rows)


class _Sums(NamedTuple):
    """Of all boxes from each score on, the best first."""

    score: Float[Tensor, " d"]
    right: Float64[Tensor, " d"]
    found: Float64[Tensor, " d"]

    def f1(self, objects: float) -> Float64[Tensor, " d"]:
        return 2 * self.right / (self.found + objects)


def _sums(found: Ranked, question: int) -> _Sums:
    """A score that several boxes have is there once, with all of them."""
    order = found.score.argsort(descending=True)
    score = found.score[order]
    last = torch.cat([score[1:] != score[:-1], score.new_ones(len(score[:1]), dtype=torch.bool)])
    counts = (found.right(question), found.counted(question))
    return _Sums(score[last], *(each[order].double().cumsum(0)[last] for each in counts))


def best_threshold(
    found: Ranked, objects: Float64[Tensor, " n"], drawn: Float64[Tensor, "r n"], question: int
) -> Point | None:
    """To a question that is of all areas; `objects` are those of each image. None where no box is
    right.
    """
    sums = _sums(found, question)
    if not sums.right.any():
        return None
    threshold = sums.score[sums.f1(objects.sum().item()).argmax()]
    above = found.at(found.score >= threshold)
    right, said = (
        torch.bincount(above.image[chosen], minlength=len(objects)).double()
        for chosen in (above.right(question), above.counted(question))
    )
    # Each as a share of what is summed over images, and the images that have any of it.
    shares = {
        "f1": (2 * right, said + objects),
        "precision": (right, said),
        "recall": (right, objects),
    }
    (f1, precision, recall) = (
        estimates(
            part.sum() / whole.sum(), (drawn @ part) / (drawn @ whole), (whole > 0).sum().double()
        )[0]
        for part, whole in shares.values()
    )
    assert f1 and precision and recall  # some box is right
    return Point(
        LOOSE if question == LOOSE_ONE else IOUS[0],
        threshold.item(),
        *(f1, precision, recall),
        int(said.sum()),
        int(right.sum()),
    )
