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
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

RECALLS = torch.from_numpy(np.linspace(0, 1, 101))
_ROOM = 2**23
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
    after it, and recall.
    """

    precision: Float[Tensor, "r h"]
    recall: Float[Tensor, "r h"]

    def average(self) -> Float[Tensor, " r"]:
        """The mean of the precision at RECALLS; where they are not reached it is 0."""
        near = (self.recall * 100).round_()
        reached = near + (near * 0.01 <= self.recall)  # how many of them: numpy.linspace's numbers
        reached[:, 1:] -= reached[:, :-1].clone()
        return (self.precision * reached).sum(dim=1) / len(RECALLS)

    def sampled(self) -> Float[Tensor, "r 101"]:
        """The precision at RECALLS."""
        asked = RECALLS.to(self.recall).expand(len(self.recall), -1).contiguous()
        padded = F.pad(self.precision, (0, 1))
        return padded.gather(1, torch.searchsorted(self.recall, asked))


def curves(
    own: Ranked,
    objects: Float[Tensor, " r"],
    weights: Float[Tensor, "r n"],
    questions: Sequence[int],
) -> Iterator[Curve | None]:
    """To each question the curve of one class, whose boxes are `own` and of which the drawn images
    have so many `objects`; None where no box is right.
    """
    drawn = weights.index_select(1, own.image)
    kept = torch.stack([own.counted(question) for question in questions])
    ever = kept.any(dim=0)
    total = (drawn * ever).cumsum(dim=1)
    for question, counts in zip(questions, kept, strict=True):
        right = own.right(question).nonzero()[:, 0]
        if not len(right):
            yield None
            continue
        hits = drawn.index_select(1, right).cumsum(dim=1)
        all_of_them = total.index_select(1, right)
        less = (ever & ~counts).nonzero()[:, 0]
        if len(less):
            gone = F.pad(drawn.index_select(1, less).cumsum(dim=1), (1, 0))
            all_of_them -= gone.index_select(1, torch.searchsorted(less, right))
        precision = hits / all_of_them.clamp_(min=1)
        falling = precision.flip(1).cummax(dim=1).values.flip(1)
        yield Curve(falling, hits.div_(objects.clamp(min=1)[:, None]))


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
    weights: Float[Tensor, "r n"],
    questions: Sequence[int],
) -> Averages:
    """The average precision of each class to each question, and the recall."""
    drawn = (weights @ objects.to(weights)).T.contiguous()  # [c r]
    none = torch.where(drawn > 0, 0.0, torch.nan).to(weights)
    by_iou, recall = none.expand(len(questions), *none.shape).clone(), none.clone()
    sizes = torch.bincount(found.label, minlength=len(drawn)).tolist()
    for k, own in enumerate(zip(*(each.split(sizes) for each in found), strict=True)):
        if not sizes[k] or not objects[:, k].any():
            continue
        step = max(1, _ROOM // sizes[k])
        for start in range(0, len(weights), step):
            some = slice(start, start + step)
            each = curves(Ranked(*own), drawn[k, some], weights[some], questions)
            for t, curve in enumerate(each):
                if curve is not None:
                    by_iou[t, k, some] += curve.average()
                    recall[k, some] += curve.recall[:, -1]
    return Averages(by_iou, recall / len(questions))
