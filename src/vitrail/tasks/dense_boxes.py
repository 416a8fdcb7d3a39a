"""Which cell answers for which object, and the loss of what cells say.

- centre: the cells within 1.5 strides of an object's centre and inside of it, on the map on which
  its size belongs; where several objects want a cell, the smallest has it (FCOS with centre
  sampling, Tian et al., 1904.01355 and 2006.09214). An object so small or so placed that it has no
  cell gets the nearest one.
- aligned: of the cells inside an object those that already say best what and where it is, by
  score * IoU^6 (task-aligned, Feng et al., 2108.07755); an object that no cell is inside of gets
  the nearest one of the finest map. The best cell of each counts for a tenth at least, so that an
  object is learned of which no box says anything yet

Both papers divide a batch's loss by the cells that answer, in it. Here it is divided by the objects
(an image without one counts as one), of which each has about so many cells: then a batch that is
computed in parts, or by several processes, has the same gradient.

What is ignored answers for nothing: cells inside of it say nothing wrong.

Letters: c classes, p points, m boxes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from vitrail.data.targets import ANY
from vitrail.heads.dense import Dense
from vitrail.nn.boxes import area, giou, iou

_RADIUS = 1.5
"""In strides."""
_LARGEST = 8.0
"""An object is of the first map of which so many strides reach from a point to all of its sides."""
_TOP = 13
_POWER = 6.0
_LEAST_IOU = 1e-3
"""Of boxes that overlap less, the one of the higher score is aligned better."""
_LEAST_WEIGHT = 0.1
"""Of an object's best cell."""
_CELLS = {"centre": 6.0, "aligned": 4.0}
"""About how many cells answer for an object, each counted by its weight."""
_FOCUS, _BALANCE = 2.0, 0.25


class Truth(NamedTuple):
    """What is said of one view."""

    boxes: Float[Tensor, "m 4"]
    """(left, top, right, bottom) in its pixels."""
    labels: Int64[Tensor, " m"]
    ignored: Bool[Tensor, " m"]

    @classmethod
    def of(
        cls,
        boxes: Float[Tensor, "m 4"],
        labels: Int64[Tensor, " m"],
        ignored: Int[Tensor, " m"],
    ) -> "Truth":
        """A row of a batch, without what fills it up."""
        there = ignored >= 0
        return cls(boxes[there], labels[there], ignored[there] > 0)

    @property
    def objects(self) -> "Truth":
        """Without what is ignored."""
        return Truth(*(part[~self.ignored] for part in self))


class Assigned(NamedTuple):
    """Which object each point answers for."""

    object: Int64[Tensor, " p"]
    """Its index, or -1."""
    weight: Float[Tensor, " p"]
    """What is to be said of its class, 0 to 1; 0 without an object."""


class DenseLoss(NamedTuple):
    """The parts of the loss, each summed over a batch and divided by its objects."""

    classes: Float[Tensor, ""]
    boxes: Float[Tensor, ""]
    centres: Float[Tensor, ""]


def by_centre(found: Dense, truth: Truth) -> Assigned:
    """See `centre` above; of objects alone."""
    boxes, (points, strides) = truth.boxes, (found.points, found.strides)
    nobody = Assigned(
        torch.full((len(points),), -1, device=points.device), points.new_zeros(len(points))
    )
    if not len(boxes):
        return nobody
    sides = _sides(points, boxes)
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    near = ((points[:, None] - middle).abs() < _RADIUS * strides[:, None]).all(dim=2)
    inside = sides.amin(dim=2) > 0
    largest = sides.amax(dim=2)
    # A point of one map answers for sizes that the map before it does not.
    of_level = strides.new_zeros(int(found.levels[-1]) + 1)
    of_level[found.levels] = _LARGEST * strides.amax(dim=1)
    low = torch.cat([of_level.new_full((1,), -1.0), of_level[:-1]])[found.levels]
    high = torch.cat([of_level[:-1], of_level.new_full((1,), torch.inf)])[found.levels]
    wanted = near & inside & (largest > low[:, None]) & (largest <= high[:, None])
    alone = ~wanted.any(dim=0)
    if alone.any():
        # By the object's own half, for no point may be inside of it.
        half = (boxes[:, 2:] - boxes[:, :2]).amax(dim=1) / 2
        fits = (half > low[:, None]) & (half <= high[:, None])
        far = (points[:, None] - middle).square().sum(dim=2).masked_fill(~fits, torch.inf)
        nearest = far.argmin(dim=0)
        wanted[nearest[alone], alone] = True
    size = area(boxes).expand(len(points), -1).masked_fill(~wanted, torch.inf)
    least, chosen = size.min(dim=1)
    positive = least < torch.inf
    return Assigned(torch.where(positive, chosen, -1), positive.float())


def by_alignment(found: Dense, row: int, truth: Truth) -> Assigned:
    """See `aligned` above; of objects alone, in image `row` of the batch."""
    boxes, labels, points = truth.boxes, truth.labels, found.points
    object_of = torch.full((len(points),), -1, device=points.device)
    weight = points.new_zeros(len(points))
    if not len(boxes):
        return Assigned(object_of, weight)
    inside = _sides(points, boxes).amin(dim=2) > 0
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    pixels = (points[:, None] - middle).square().sum(dim=2)
    far = pixels / found.strides.prod(dim=1)[:, None]
    alone = ~inside.any(dim=0)
    nearest = pixels.masked_fill(found.levels[:, None] > 0, torch.inf).argmin(dim=0)
    inside[nearest[alone], alone] = True
    alike = iou(found.boxes[row].detach()[:, None], boxes) * inside
    scores = found.logits[row].detach().float().sigmoid()[:, labels]
    aligned = scores * alike.clamp(min=_LEAST_IOU) ** _POWER
    top = min(_TOP, len(points))
    # Nothing is aligned yet in the first steps: then the nearest points are as good as any.
    order = (aligned - 1e-9 * far.clamp(max=1e6)).masked_fill(~inside, -torch.inf)
    best = order.topk(top, dim=0)
    chosen = torch.zeros_like(inside)
    chosen.scatter_(0, best.indices, best.values > -torch.inf)
    own = (alike + 1e-6).masked_fill(~chosen, -1.0)
    most, index = own.max(dim=1)
    positive = most >= 0
    object_of = torch.where(positive, index, -1)
    mine = F.one_hot(index, len(boxes)).bool() & positive[:, None]
    peak = (aligned * mine).amax(dim=0).clamp(min=torch.finfo(aligned.dtype).tiny)
    best_alike = (alike * mine).amax(dim=0).clamp(min=_LEAST_WEIGHT)
    weight = ((aligned / peak * best_alike) * mine).sum(dim=1)
    return Assigned(object_of, weight)


def dense_loss(found: Dense, truths: list[Truth], assign: str) -> DenseLoss:
    """The loss of what a head says of a batch of views, of which `truths` is true.

    Focal loss of classes (1708.02002), GIoU of boxes, weighted by centre-ness, and the binary
    cross-entropy of centre-ness; of `aligned` ones quality focal loss (2006.04388) to their
    weights, and GIoU by these, counted twice.
    """
    classes, boxes, centres = (found.points.new_zeros(()) for _ in range(3))
    for row, truth in enumerate(truths):
        logits = found.logits[row].float()
        objects = truth.objects
        given = (
            by_centre(found, objects)
            if found.centred is not None
            else by_alignment(found, row, objects)
        )
        positive = given.object >= 0
        at = given.object[positive]
        target = torch.zeros_like(logits)
        target[positive, objects.labels[at]] = given.weight[positive]
        counted = ~_ignored(found.points, truth, positive, logits.shape[1])
        said = found.boxes[row][positive]
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        chance = logits.sigmoid()
        overlap = 1 - giou(said, objects.boxes[at])
        if found.centred is None:
            classes = classes + (loss * (target - chance).abs() ** _FOCUS * counted).sum()
            boxes = boxes + 2 * (overlap * given.weight[positive]).sum()
            continue
        missed = torch.where(target > 0, 1 - chance, chance)
        balance = torch.where(target > 0, _BALANCE, 1 - _BALANCE)
        classes = classes + (balance * missed**_FOCUS * loss * counted).sum()
        middle = _centredness(found.points[positive], objects.boxes[at])
        # Of the cells of an object it is about a half: twice is what the paper's division gives.
        boxes = boxes + 2 * (overlap * middle).sum()
        centred = found.centred[row].float()[positive]
        centres = centres + F.binary_cross_entropy_with_logits(centred, middle, reduction="sum")
    divided = _CELLS[assign] * max(1.0, objects_of(truths))
    return DenseLoss(classes / divided, boxes / divided, centres / divided)


def objects_of(truths: list[Truth]) -> float:
    """How many objects the views have; one without any counts as one."""
    return float(sum(max(1, int((~truth.ignored).sum())) for truth in truths))


def _sides(points: Float[Tensor, "p 2"], boxes: Float[Tensor, "m 4"]) -> Float[Tensor, "p m 4"]:
    """From each point to the left, top, right and bottom of each box; below 0 outside of it."""
    return torch.cat([points[:, None] - boxes[:, :2], boxes[:, 2:] - points[:, None]], dim=2)


def _centredness(points: Float[Tensor, "p 2"], boxes: Float[Tensor, "p 4"]) -> Float[Tensor, " p"]:
    """1 in a box's middle, 0 at its edge: sqrt of the lesser side by the greater, of both axes."""
    far = torch.cat([points - boxes[:, :2], boxes[:, 2:] - points], dim=1).clamp(min=0)
    least, most = torch.minimum(far[:, :2], far[:, 2:]), torch.maximum(far[:, :2], far[:, 2:])
    return (least / most.clamp(min=1e-6)).prod(dim=1).sqrt()


def _ignored(
    points: Float[Tensor, "p 2"], truth: Truth, positive: Bool[Tensor, " p"], classes: int
) -> Bool[Tensor, "p c"]:
    """What is said at points inside of what is ignored: of its class, or of all."""
    found = torch.zeros(len(points), classes, dtype=torch.bool, device=points.device)
    boxes, labels = truth.boxes[truth.ignored], truth.labels[truth.ignored]
    if not len(boxes):
        return found
    inside = (_sides(points, boxes).amin(dim=2) > 0) & ~positive[:, None]
    for label in labels.unique().tolist():
        of_label = inside[:, labels == label].any(dim=1)
        if label == ANY:
            found |= of_label[:, None]
        else:
            found[:, label] |= of_label
    return found
