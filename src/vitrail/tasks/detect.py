"""Detection: a box around each object, and its class.

The loss is that of every cell of a dense head (vitrail.tasks.dense_boxes), or of queries that are
matched with objects (vitrail.tasks.box_matching). What is judged are boxes
in the image's own pixels, whatever its size and however it was shown:

- whole: the model sees all of the image at once (`data.resize` letterbox, or squash)
- tiles: it sees windows of its own size, side by side and overlapping by a quarter, each of
  `data.tile` pixels of the image; what is found in them is merged

Letters: b batch, d boxes found, h w pixels.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from vitrail.data.batches.batch import Batch
from vitrail.data.names import shortened
from vitrail.data.sources.tiled import OVERLAP, starts
from vitrail.data.targets import Boxes
from vitrail.data.views.preprocess import Preprocess
from vitrail.data.views.seen import Seen
from vitrail.errors import UsageError, setting
from vitrail.heads.dense import MOST_COMPARED, best_of
from vitrail.heads.detector import DetectHeadConfig, Detector, QueryDetector
from vitrail.metrics.boxes import DetectMetrics, average_precision, count, detection
from vitrail.nn.boxes import Found, area, overlap
from vitrail.tasks.box_matching import Truths, box_loss
from vitrail.tasks.dense_boxes import Truth, dense_loss, objects_of
from vitrail.tasks.task import Losses, Task

_AT_ONCE = 8
"""Windows of an image that are computed together."""
_EDGE = 1.0
"""Pixels of a view: a box that ends so near to where a window does is cut by it."""
_WITHIN = 0.8
"""The share of a box that a window cuts, that lies in one that another window has whole."""
MOST, MOST_AT_ALL = 100, 3000
"""Boxes of an image that are judged, as COCO has it; more where images hold more objects, up to
what can be compared with each other."""


@dataclass(frozen=True, kw_only=True)
class DetectConfig(DetectHeadConfig):
    """The head, and how its boxes are judged; a value out of range is a `UsageError`."""

    max_detections: int | None = None
    """The most boxes that are given of an image, and judged. None: 100, or as many objects as any
    image of the data has, up to 3,000."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_detections is not None and not 1 <= self.max_detections <= MOST_AT_ALL:
            raise UsageError(
                f"{setting('detect.max_detections')} must be 1 to {MOST_AT_ALL:,}, not "
                f"{self.max_detections}"
            )

    @property
    def most(self) -> int:
        """The most boxes of an image."""
        return MOST if self.max_detections is None else self.max_detections


class Detections(NamedTuple):
    """What a model finds in one image, the best first."""

    boxes: Float64[np.ndarray, "d 4"]
    """(left, top, right, bottom) in the image's own pixels, upright."""
    labels: Int64[np.ndarray, " d"]
    """Indices into `names`."""
    scores: Float64[np.ndarray, " d"]
    """0 to 1: to sort by, no probabilities."""
    names: tuple[str, ...]

    def above(self, least: float) -> "Detections":
        """Those of at least this score."""
        kept = self.scores >= least
        return Detections(self.boxes[kept], self.labels[kept], self.scores[kept], self.names)


class Detect(Task):
    """A backbone with a head for boxes, its loss and what it predicts."""

    score_name = "ap"
    model: Detector

    def __init__(
        self,
        model: Detector,
        config: DetectConfig,
        targets: Boxes,
        preprocess: Preprocess,
        tta: str = "none",
    ) -> None:
        """`preprocess`: how images are shown when boxes are judged.

        Raises `UsageError` for images that are not shown whole, and for several looks at one.
        """
        super().__init__()
        if preprocess.resize not in ("letterbox", "squash", "tiles"):
            raise UsageError(
                f"{setting('data.resize', preprocess.resize)} cuts something off or has no one "
                f"size: boxes are judged whole, with {setting('data.resize', 'letterbox')}, squash "
                f"or tiles"
            )
        if tta != "none":
            raise UsageError(f"{setting('tta', tta)} averages scores of one place: not of boxes")
        self.model = model
        self.config = config
        self.targets = targets.rows(np.arange(0))
        self.preprocess = preprocess

    def loss(self, batch: Batch) -> Losses:
        """See `vitrail.tasks.dense_boxes`; of queries `vitrail.tasks.box_matching`."""
        images = batch.images
        if images.is_meta:
            return Losses(self._on_paper(images), {})
        if isinstance(self.model, QueryDetector):
            said = self.model.predictions(images)
            covered = self.model.covered((images.shape[2], images.shape[3]))
            count, groups = self.weight(batch), self.model.head.groups
            losses = box_loss(said, Truths.of(batch.targets, covered), groups, count=count)
            total, parts = losses.total, losses._asdict() | {"total": None}
        else:
            dense = dense_loss(self.model(images), _truths(batch), self.config.assign)
            total, parts = sum(dense, start=images.new_zeros(())), dense._asdict()
        return Losses(
            total, {n: p.detach() for n, p in parts.items() if p is not None and p.requires_grad}
        )

    def weight(self, batch: Batch) -> float:
        """The objects; an image without one counts as one, and so does each on paper."""
        if batch.images.is_meta:
            return float(len(batch.indices))
        return objects_of(_truths(batch))

    def _on_paper(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
        """What a plan counts, of shapes without values: the passes through the model and the
        classes' loss. Which cell or query answers for what depends on values, and costs little
        beside them but where an image has hundreds of objects.
        """
        if isinstance(self.model, QueryDetector):
            said = self.model.predictions(images)
            logits, places = [one.logits for one in said], [one.boxes for one in said]
        else:
            found = self.model(images)
            logits, places = [found.logits], [found.sides]
            places += [] if found.centred is None else [found.centred]
        losses = [F.binary_cross_entropy_with_logits(x.float(), x.float() * 0) for x in logits]
        return torch.stack([*losses, *(place.float().sum() for place in places)]).sum()

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """What `vitrail.metrics.boxes.count` keeps of each image."""
        classes, most = len(self.targets.names), self.config.most
        if not len(batch.indices):
            empty = {
                "boxes": torch.zeros(0, 4),
                "labels": torch.zeros(0, dtype=torch.int64),
                "ignored": torch.zeros(0, dtype=torch.int8),
                "size": torch.ones(2, dtype=torch.int64),
            }
            nothing = Found(empty["boxes"], torch.zeros(0), empty["labels"])
            found = count(nothing, empty, classes, most)
            return {name: value[None][:0] for name, value in found.items()}
        seen = [self.preprocess.seen(h, w) for h, w in batch.targets["size"].tolist()]
        rows = [
            count(found, {name: values[i] for name, values in batch.targets.items()}, classes, most)
            for i, found in enumerate(self._found(batch, seen))
        ]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def score(self, rows: Mapping[str, Tensor]) -> float:
        """The average precision; 0 where there is no object."""
        found = average_precision(rows)
        return found if found == found else 0.0

    def judge(self, rows: Mapping[str, Tensor]) -> DetectMetrics:
        """See `vitrail.metrics.boxes`."""
        return detection(rows, self.targets.names, self.config.most)

    def summary(self, metrics: DetectMetrics, noun: str) -> list[str]:
        """AP, AP at an IoU of 0.5, and the best F1."""
        lines = []
        for name, label in (("ap", "AP"), ("ap50", "AP50"), ("f1", "F1")):
            if (value := metrics.summary.get(name)) is not None:
                interval = f"(95% interval {value.low:.1%} to {value.high:.1%})"
                lines.append(f"{label:<10}{value.value:.1%} {interval}")
        if lines:
            shown = "tiles" if self.preprocess.resize == "tiles" else "whole"
            lines[0] += (
                f", {metrics.images} {noun}, {shown}, IoU 0.5 to 0.95, at most "
                f"{metrics.max_detections} boxes an image"
            )
        return lines

    def notes(self, metrics: DetectMetrics, noun: str) -> list[str]:
        """The images with more objects than boxes that are judged, and the classes without one."""
        absent, said = [self.targets.names[k] for k in metrics.absent], []
        if metrics.crowded:
            said.append(
                f"images with more than {metrics.max_detections} objects, {metrics.crowded}: some "
                f"of them are missed whatever is found "
                f"({setting('detect.max_detections', metrics.max_detections)})"
            )
        if absent and len(absent) == len(metrics.per_class):
            said.append(f"nothing was measured: there is no object in any of the {noun}")
        elif absent:
            are = "are" if len(absent) > 1 else "is"
            said.append(
                f"{len(absent)} of {len(metrics.per_class)} classes {are} in none of these "
                f"images: {shortened(absent)}"
            )
        return said

    def table(self, rows: Mapping[str, Tensor]) -> Iterable[Sequence[str]]:
        """objects, missed: of each image."""
        yield ("objects", "missed")
        for objects, missed in zip(rows["objects"], rows["missed"], strict=True):
            yield (str(int(objects.sum())), str(int(missed.sum())))

    def answer(self, batch: Batch, seen: Sequence[Seen]) -> list[Detections]:
        """The boxes of each image, in its own pixels."""
        return [
            Detections(
                found.boxes.double().cpu().numpy(),
                found.labels.cpu().numpy(),
                found.scores.double().cpu().numpy(),
                self.targets.names,
            )
            for found in self._found(batch, seen)
        ]

    def state(self) -> dict[str, Any]:
        """The names of the classes."""
        return {"classes": list(self.targets.names)}

    def _found(self, batch: Batch, seen: Sequence[Seen]) -> list[Found]:
        """In the images' own pixels."""
        images, extent = batch.views[0]
        if self.preprocess.resize != "tiles":
            views = self.model.found(images, self.config.most)
        else:
            p, q = self.preprocess.patch
            sizes = (
                [(images.shape[2], images.shape[3])] * len(images)
                if extent is None
                else [(rows * p, columns * q) for rows, columns in extent.tolist()]
            )
            views = [
                self._slid(image[:, :h, :w]) for image, (h, w) in zip(images, sizes, strict=True)
            ]
        return [_in_image(found, one) for found, one in zip(views, seen, strict=True)]

    def _slid(self, image: Float[Tensor, "c h w"]) -> Found:
        """What windows of a view say, merged."""
        (height, width), window = image.shape[1:], self.preprocess.size
        places = [(y, x) for y in starts(height, window[0]) for x in starts(width, window[1])]
        kept: list[Found] = []
        cuts: list[Tensor] = []
        for some in (places[i : i + _AT_ONCE] for i in range(0, len(places), _AT_ONCE)):
            parts = [image[:, y : y + window[0], x : x + window[1]] for y, x in some]
            answers = self.model.found(torch.stack(parts), self.config.most)
            for (y, x), found in zip(some, answers, strict=True):
                cut, found = _cut(found, (y, x), window, (height, width))
                kept.append(found._replace(boxes=found.boxes + image.new_tensor([x, y, x, y])))
                cuts.append(cut)
        merged = Found(*(torch.cat(part) for part in zip(*kept, strict=True)))
        return _merged(merged, torch.cat(cuts), self.config.most)


def _cut(
    found: Found, place: tuple[int, int], window: tuple[int, int], view: tuple[int, int]
) -> tuple[Bool[Tensor, " d"], Found]:
    """Which boxes a window's edge cuts, of those that no other window has whole; and these: what is
    cut and so small that it lies in where windows overlap is left to the other.
    """
    cut, whole_elsewhere = (
        torch.zeros(len(found.scores), dtype=torch.bool, device=found.boxes.device)
        for _ in range(2)
    )
    for axis in (0, 1):  # x, y; sizes and places are (y, x)
        start, side, end = place[1 - axis], window[1 - axis], view[1 - axis]
        low, high = found.boxes[:, axis], found.boxes[:, 2 + axis]
        here = (low <= _EDGE) & (start > 0) | (high >= side - _EDGE) & (start + side < end)
        cut |= here
        whole_elsewhere |= here & (high - low < OVERLAP * side - 2 * _EDGE)
    kept = ~whole_elsewhere
    return cut[kept], Found(*(part[kept] for part in found))


def _merged(found: Found, cut: Bool[Tensor, " d"], most: int) -> Found:
    """What windows found, without parts of what another window found whole."""
    best = found.scores.topk(min(len(found.scores), max(MOST_COMPARED, 2 * most))).indices
    found, cut = Found(*(part[best] for part in found)), cut[best]
    shared, _ = overlap(found.boxes[cut][:, None], found.boxes[~cut])
    of_class = found.labels[cut][:, None] == found.labels[~cut]
    within = (shared > _WITHIN * area(found.boxes[cut])[:, None]) & of_class
    kept = torch.ones_like(cut)
    kept[cut] = ~within.any(dim=1)
    return best_of(Found(*(part[kept] for part in found)), most)


def _truths(batch: Batch) -> list[Truth]:
    said = batch.targets
    return [
        Truth.of(*row) for row in zip(said["boxes"], said["labels"], said["ignored"], strict=True)
    ]


def _in_image(found: Found, seen: Seen) -> Found:
    """Boxes of a view in the image's own pixels, cut to it; what lies beside it is dropped."""
    height, width = seen.image
    corners = found.boxes.double().cpu().numpy().reshape(-1, 2)
    unit = seen.back(corners).reshape(-1, 4).clip(0, 1)
    boxes = found.boxes.new_tensor(unit * [width, height, width, height])
    there = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    return Found(boxes[there], found.scores[there], found.labels[there])
