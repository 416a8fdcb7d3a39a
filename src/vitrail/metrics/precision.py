"""Average precision of images that are drawn again, from the matches of each.

As COCO has it: detections of a class go in order of their scores, of equals the earlier image's
first; precision is made to fall with recall, and its mean over 101 recalls is the AP (pycocotools,
cocoeval.py, `accumulate`). Weights say how often each image was drawn.

Precision rises only where a box is right, and so only those places need looking at: what is wrong
between them is counted by one running sum for all IoUs. That makes hundreds of draws affordable.

Letters: n images, d boxes found (of all images, or of one class), c classes, r draws at a time,
t IoUs, h boxes that are right.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

RECALLS = torch.from_numpy(np.linspace(0, 1, 101))
_ROOM = 2**25
"""Boxes x draws at a time."""


class Ranked(NamedTuple):
    """The boxes that were found in all images, by class, and of each the best first."""

    image: Int64[Tensor, " d"]
    label: Int64[Tensor, " d"]
    score: Float[Tensor, " d"]
    matched: Int64[Tensor, " d"]
    """A bit a question: see `vitrail.metrics.boxes.count`."""
    ignored: Int64[Tensor, " d"]
    kind: Int64[Tensor, " d"]
    meant: Int64[Tensor, " d"]

    def at(self, chosen: Tensor | slice) -> "Ranked":
        """Some of them."""
        return Ranked(*(each[chosen] for each in self))

    def by_class(self) -> "Ranked":
        """In order, after labels or scores were changed."""
        order = self.score.argsort(descending=True, stable=True)
        return self.at(order[self.label[order].argsort(stable=True)])

    def right(self, question: int) -> Bool[Tensor, " d"]:
        """Which have an object, to a question, and count."""
        return (((self.matched & ~self.ignored) >> question) & 1).bool()

    def counted(self, question: int) -> Bool[Tensor, " d"]:
        """Which are right or wrong, to a question."""
        return (((self.ignored >> question) & 1) == 0).bool()


def ranked(rows: Mapping[str, Tensor]) -> Ranked:
    """The boxes of `count`'s rows of images, each `[n most]`."""
    image, place = (rows["labels"] >= 0).nonzero(as_tuple=True)
    names = ("labels", "scores", "matched", "ignored", "kinds", "meant")
    label, score, *others = (rows[name][image, place] for name in names)
    return Ranked(image, label.long(), score, *(each.long() for each in others)).by_class()


def objects_of(rows: Mapping[str, Tensor]) -> Float64[Tensor, "n c 4"]:
    """Of each image and class all objects, small, medium and large ones."""
    return torch.cat([rows["objects"][:, :, None], rows["sizes"]], dim=2).double()


class Curve(NamedTuple):
    """Where boxes are right, the best first, of drawn images: precision, no lower than anywhere
    after it, and recall, each `[h r]`.
    """

    precision: Float[Tensor, "h r"]
    recall: Float[Tensor, "h r"]

    def average(self) -> Float[Tensor, " r"]:
        """The mean of the precision at RECALLS; where they are not reached it is 0."""
        bounds = RECALLS.to(self.recall)
        reached = torch.bucketize(self.recall, bounds, right=True)  # of them, how many
        gained = reached.diff(dim=0, prepend=torch.zeros_like(reached[:1]))
        return (self.precision * gained).sum(dim=0) / len(RECALLS)

    def sampled(self) -> Float[Tensor, "101 r"]:
        """The precision at RECALLS."""
        places = torch.searchsorted(
            self.recall.T.contiguous(), RECALLS.expand(self.recall.shape[1], -1)
        )
        padded = torch.cat([self.precision, torch.zeros_like(self.precision[:1])])
        return padded.gather(0, places.T)

    def reached(self) -> Float[Tensor, " r"]:
        """The recall of all boxes."""
        return self.recall[-1]


def curves(
    own: Ranked,
    objects: Float[Tensor, " r"],
    weights: Float[Tensor, "n r"],
    questions: Sequence[int],
) -> Iterator[Curve | None]:
    """To each question the curve of one class, whose boxes are `own` and of which the drawn images
    have so many `objects`; None where no box is right.
    """
    drawn = weights[own.image]
    kept = torch.stack([own.counted(question) for question in questions])
    ever = kept.any(dim=0)
    total = (drawn * ever[:, None]).cumsum(dim=0)
    for question, counts in zip(questions, kept, strict=True):
        right = own.right(question).nonzero()[:, 0]
        if not len(right):
            yield None
            continue
        less = (ever & ~counts).nonzero()[:, 0]
        hits, all_of_them = drawn[right].cumsum(dim=0), total[right]
        if len(less):
            gone = torch.cat([torch.zeros_like(drawn[:1]), drawn[less].cumsum(dim=0)])
            all_of_them = all_of_them - gone[torch.searchsorted(less, right)]
        precision = hits / all_of_them.clamp(min=1)
        falling = precision.flip(0).cummax(dim=0).values.flip(0)
        yield Curve(falling, hits / objects.clamp(min=1))


class Averages(NamedTuple):
    """Of each class, over several IoUs, NaN where the images have no object of it."""

    by_iou: Float[Tensor, "t c r"]
    recall: Float[Tensor, "c r"]
    """Of all boxes, the mean over IoUs."""

    @property
    def ap(self) -> Float[Tensor, "c r"]:
        """The mean over IoUs."""
        return self.by_iou.mean(dim=0)


def averages(
    found: Ranked,
    objects: Float[Tensor, "n c"],
    weights: Float[Tensor, "n r"],
    questions: Sequence[int],
) -> Averages:
    """The average precision of each class to each question, and the recall."""
    drawn = objects.T.to(weights) @ weights  # [c r]
    none = torch.where(drawn > 0, 0.0, torch.nan).to(weights)
    by_iou, recall = none.expand(len(questions), *none.shape).clone(), none.clone()
    ends = [0, *torch.bincount(found.label, minlength=len(drawn)).cumsum(0).tolist()]
    for k in torch.bincount(found.label, minlength=len(drawn)).nonzero()[:, 0].tolist():
        if not objects[:, k].any():
            continue
        own = found.at(slice(ends[k], ends[k + 1]))
        step = max(1, _ROOM // len(own.image))
        for start in range(0, weights.shape[1], step):
            some = slice(start, start + step)
            each = curves(own, drawn[k, some], weights[:, some], questions)
            for t, curve in enumerate(each):
                if curve is not None:
                    by_iou[t, k, some] += curve.average()
                    recall[k, some] += curve.reached() / len(questions)
    return Averages(by_iou, recall)
