"""Queries against objects: which query is to say which box, and how wrong it is then.

The loss of LW-DETR (Chen et al., arXiv 2406.03459, section 3.3) and RF-DETR: in each group of
queries every object gets the one that is nearest to it by class, distance and overlap, all in all
(DETR, 2005.12872, eq. 1). What that query says of the object's class is to be how well its box
lies, `score^0.25 * IoU^0.75` (IA-BCE there); all else that
queries say of classes is to be nothing, the more so the surer they are of it. Boxes are learned by
their distance (L1) and GIoU. So for the first stage and every layer alike.

What is ignored is nobody's object, and no query is wrong to be sure of a class where its box lies
mostly in what is ignored of that class.

Letters: b batch, q queries of all groups, c classes, m objects of an image, padded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from vitrail.data.targets.boxes import ANY
from vitrail.errors import UsageError, setting
from vitrail.heads.deformable import BoxPrediction, corners
from vitrail.nn.boxes import area, giou, iou, overlap
from vitrail.tasks.matching import assign

_FOCUS, _BALANCE = 2.0, 0.25
"""Of the focal loss (1708.02002) that classes are matched by."""
_LEAST = 1e-8
"""Of a share whose logarithm is taken."""
_QUALITY = 0.25
"""The power of the score in what a query is to say of its object's class."""
_LEAST_QUALITY = 0.01
_MOSTLY = 0.5
"""Of a query's box: the share in an ignored region from which on it is no mistake."""


@dataclass(frozen=True, kw_only=True)
class BoxLossConfig:
    """How much each part counts in the loss, and in the matching."""

    class_weight: float = 1.0
    l1_weight: float = 5.0
    giou_weight: float = 2.0
    class_cost: float = 2.0
    l1_cost: float = 5.0
    giou_cost: float = 2.0

    def __post_init__(self) -> None:
        """Raise `UsageError` for what makes no sense."""
        for field in fields(self):
            if getattr(self, field.name) < 0:
                raise UsageError(f"{setting(field.name)} cannot be negative")


class BoxLosses(NamedTuple):
    """The parts, each with its weight and summed over all predictions, and their sum."""

    total: Float[Tensor, ""]
    classes: Float[Tensor, ""]
    l1: Float[Tensor, ""]
    giou: Float[Tensor, ""]


class Truths(NamedTuple):
    """What is said of a batch of views."""

    boxes: Float[Tensor, "b m 4"]
    """(left, top, right, bottom) as shares of what the maps cover."""
    labels: Int64[Tensor, "b m"]
    """-1 fills up; ANY only of what is ignored."""
    ignored: Bool[Tensor, "b m"]

    @classmethod
    def of(cls, targets: Mapping[str, Tensor], size: tuple[int, int]) -> "Truths":
        """Of the `boxes`, `labels` and `ignored` of a batch's targets, in pixels of views whose
        maps cover `size` (height, width).
        """
        boxes = targets["boxes"].float()
        edge = boxes.new_tensor([size[1], size[0]]).repeat(2)
        return cls(boxes / edge, targets["labels"].long(), targets["ignored"] > 0)

    @property
    def objects(self) -> Bool[Tensor, "b m"]:
        """Which of them are to be found."""
        return (self.labels >= 0) & ~self.ignored


class Pairs(NamedTuple):
    """Which query answers for which object, of all images and groups one after another."""

    image: Int64[Tensor, " n"]
    query: Int64[Tensor, " n"]
    object: Int64[Tensor, " n"]


def box_loss(
    predictions: Sequence[BoxPrediction],
    truths: Truths,
    groups: int = 1,
    config: BoxLossConfig | None = None,
    count: float | None = None,
) -> BoxLosses:
    """The loss of what queries say after the first stage and each layer, as
    `QueryBoxes.predictions` gives it, of views of which `truths` is true.

    `groups`: of how many groups the queries are. `count`: how many objects the losses are divided
    by, times the groups; None: those of these views. Images without objects are learned from too.
    """
    config = config or BoxLossConfig()
    if count is None:
        count = float(truths.objects.sum())
    divided = max(count * groups, 1.0)
    with torch.autocast(predictions[0].logits.device.type, enabled=False):
        parts = [_losses(one, truths, groups, config) for one in predictions]
    classes, l1, overlaps = (torch.stack(part).sum() / divided for part in zip(*parts, strict=True))
    return BoxLosses(classes + l1 + overlaps, classes, l1, overlaps)


def matched(found: BoxPrediction, truths: Truths, groups: int, config: BoxLossConfig) -> Pairs:
    """The pairs of all images and groups. Of fewer queries in a group than objects,
    as many objects have one.
    """
    images, queries, objects = [], [], []
    for i, there in enumerate(truths.objects):
        columns = there.nonzero()[:, 0]
        if not len(columns):
            continue
        cost = _costs(found, truths, i, columns, config)
        each = cost.shape[0] // groups
        for group, part in enumerate(cost.cpu().split(each)):
            rows, chosen = (torch.from_numpy(x) for x in assign(part.numpy()))
            images.append(torch.full_like(rows, i))
            queries.append(rows + group * each)
            objects.append(columns.cpu()[chosen])
    none = torch.zeros(0, dtype=torch.int64)
    device = found.logits.device
    return Pairs(*(torch.cat([none, *part]).to(device) for part in (images, queries, objects)))


def _costs(
    found: BoxPrediction,
    truths: Truths,
    image: int,
    columns: Int64[Tensor, " n"],
    config: BoxLossConfig,
) -> Float[Tensor, "q n"]:
    """Of each query and each of some objects of an image."""
    with torch.no_grad():
        boxes, wanted = found.boxes[image].float(), truths.boxes[image, columns]
        chance = found.logits[image].float().sigmoid()[:, truths.labels[image, columns]]
        right = _BALANCE * (1 - chance) ** _FOCUS * -(chance + _LEAST).log()
        wrong = (1 - _BALANCE) * chance**_FOCUS * -(1 - chance + _LEAST).log()
        far = torch.cdist(boxes, _centred(wanted), p=1)
        alike = giou(corners(boxes)[:, None], wanted)
        return config.class_cost * (right - wrong) + config.l1_cost * far - config.giou_cost * alike


def _losses(
    found: BoxPrediction, truths: Truths, groups: int, config: BoxLossConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Of classes, distances and overlaps, each summed and with its weight."""
    image, query, object = matched(found, truths, groups, config)
    said, wanted = found.boxes[image, query].float(), truths.boxes[image, object]
    label = truths.labels[image, object]
    logits = found.logits.float()
    with torch.no_grad():
        quality = logits[image, query, label].sigmoid() ** _QUALITY
        quality = quality * iou(corners(said), wanted) ** (1 - _QUALITY)
        quality = quality.clamp(min=_LEAST_QUALITY)
        excused = _excused(found.boxes.float(), truths, logits.shape[2])
    at = (image, query, label)
    absent = logits.sigmoid() ** _FOCUS
    if excused is not None:
        absent = absent.masked_fill(excused, 0)
    absent = absent.index_put(at, 1 - quality)
    present = torch.zeros_like(logits).index_put(at, quality)
    classes = (present * F.softplus(-logits) + absent * F.softplus(logits)).sum()
    l1 = (said - _centred(wanted)).abs().sum()
    overlaps = (1 - giou(corners(said), wanted)).sum()
    return config.class_weight * classes, config.l1_weight * l1, config.giou_weight * overlaps


def _excused(
    boxes: Float[Tensor, "b q 4"], truths: Truths, classes: int
) -> Bool[Tensor, "b q c"] | None:
    """Where a query may be sure of a class; None: nowhere."""
    if not bool(truths.ignored.any()):
        return None
    boxes = corners(boxes)
    shared, _ = overlap(boxes[:, :, None], truths.boxes[:, None])
    inside = shared >= _MOSTLY * area(boxes)[:, :, None]
    inside = (inside & truths.ignored[:, None] & (shared > 0)).float()
    of_class = F.one_hot(truths.labels.clamp(min=0), classes) * (truths.labels >= 0)[:, :, None]
    of_class = of_class + (truths.labels == ANY)[:, :, None]
    return (inside @ of_class.float()) > 0


def _centred(boxes: Float[Tensor, "*m 4"]) -> Float[Tensor, "*m 4"]:
    """(centre x, centre y, width, height) of (left, top, right, bottom)."""
    least, most = boxes.chunk(2, dim=-1)
    return torch.cat([(least + most) / 2, most - least], dim=-1)
