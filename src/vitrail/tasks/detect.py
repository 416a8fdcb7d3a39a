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
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from vitrail.data.batches.batch import Batch
from vitrail.data.names import shortened
from vitrail.data.targets import Boxes
from vitrail.data.views.preprocess import Preprocess
from vitrail.data.views.seen import Seen
from vitrail.errors import UsageError, setting
from vitrail.found import Found
from vitrail.heads.detector import DetectHeadConfig, Detector, QueryDetector
from vitrail.metrics.boxes import DetectMetrics, average_precision, count, detection
from vitrail.tasks.answers import Detections, Reading
from vitrail.tasks.box_matching import Truths, box_loss
from vitrail.tasks.dense_boxes import Truth, dense_loss, objects_of
from vitrail.tasks.task import Losses, Task

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
            nothing = Found(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))
            found = count(nothing, empty, classes, most)
            return {name: value[None][:0] for name, value in found.items()}
        seen = [self.preprocess.seen(h, w) for h, w in batch.targets["size"].tolist()]
        rows = [
            count(found, {name: values[i] for name, values in batch.targets.items()}, classes, most)
            for i, found in enumerate(self.reading.boxes(self._look, self._views(batch), seen))
        ]
        device = batch.images.device
        return {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}

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

    def outputs(
        self, images: Float[Tensor, "b c h w"], extent: Int64[Tensor, "b 2"] | None = None
    ) -> dict[str, Tensor]:
        """`boxes [b k 4]` in pixels of the views, `scores`, `labels [b k]`, the likeliest first."""
        return self.model.candidates(images, self.config.most)._asdict()

    @property
    def reading(self) -> Reading:
        """How these become boxes of images."""
        return Reading(
            kind="detect",
            names=self.targets.names,
            window=self.preprocess.size if self.preprocess.resize == "tiles" else None,
            most=self.config.most,
            doubles=self.model.doubles,
        )

    def answer(self, batch: Batch, seen: Sequence[Seen]) -> list[Detections]:
        """The boxes of each image, in its own pixels."""
        return self.reading.answers(self._look, self._views(batch), seen)

    def state(self) -> dict[str, Any]:
        """The names of the classes."""
        return {"classes": list(self.targets.names)}

    def _look(self, views: Sequence[Tensor]) -> dict[str, np.ndarray]:
        """What the model says of views of one size, as arrays."""
        said = self.outputs(torch.stack(list(views)))
        return {name: values.float().cpu().numpy() for name, values in said.items()}

    def _views(self, batch: Batch) -> list[Tensor]:
        """Each without what lies beside it on its canvas."""
        images, extent = batch.views[0]
        if extent is None:
            return [*images]
        p, q = self.preprocess.patch
        sizes = [(rows * p, columns * q) for rows, columns in extent.tolist()]
        return [image[:, :h, :w] for image, (h, w) in zip(images, sizes, strict=True)]


def _truths(batch: Batch) -> list[Truth]:
    said = batch.targets
    return [
        Truth.of(*row) for row in zip(said["boxes"], said["labels"], said["ignored"], strict=True)
    ]
