"""Semantic segmentation: a class for each pixel.

The loss is the mean cross-entropy of the pixels that have a class, at the view's own size; with
queries it is that of sets (vitrail.tasks.matching). What is judged is each mask at its own size:
the model's logits are read, bilinearly, at the place in the view of each of the mask's pixels.

- whole: the model sees all of the image at once
- slide: it sees windows of its own size, side by side and overlapping by a third, of the image
  scaled so that it covers one; where they overlap, what they say is averaged

Numbers of the two do not compare, so both the metrics and the report say which it was.

Letters: b batch, c classes, h w pixels.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from vitrail.data.batches.batch import Batch
from vitrail.data.names import shortened
from vitrail.data.targets import IGNORE, Masks
from vitrail.data.views.preprocess import Preprocess
from vitrail.data.views.seen import Seen
from vitrail.errors import UsageError, setting
from vitrail.heads.queries import Prediction
from vitrail.heads.segmenter import Segmenter, SegmentHeadConfig
from vitrail.metrics.masks import SegmentMetrics, count, hits, mean_iou, segmentation
from vitrail.tasks.answers import Reading, Segmentation, starts
from vitrail.tasks.kept import KeptMaps
from vitrail.tasks.matching import SetLossConfig, keyed_draw, objects_of, set_loss
from vitrail.tasks.task import Losses, Task
from vitrail.tasks.tta import looks

_ROOM = 2**24
"""Numbers that are read at once from a map of logits."""


@dataclass(frozen=True, kw_only=True)
class SegmentConfig(SegmentHeadConfig):
    """The head, and how its masks are judged; a value out of range is a `UsageError`."""

    mode: Literal["whole", "slide"] = "whole"
    """Whether the model sees all of an image at once, or windows of it."""


class Segment(Task):
    """A backbone with a head for pixels, its loss and what it predicts."""

    score_name = "miou"
    model: Segmenter

    def __init__(
        self,
        model: Segmenter,
        config: SegmentConfig,
        targets: Masks,
        preprocess: Preprocess,
        seed: int = 0,
        tta: str = "none",
        kept: KeptMaps | None = None,
    ) -> None:
        """`preprocess`: how images are shown when masks are judged; `seed`: of the points at which
        the loss of queries compares masks; `tta`: how often it looks at what it judges; `kept`: of
        a frozen backbone, what it said of the views.

        Raises `UsageError` for images that are not shown whole.
        """
        super().__init__()
        fitted = ("short",) if config.mode == "slide" else ("squash",)
        if preprocess.resize not in fitted:
            raise UsageError(
                f"{setting('segment.mode', config.mode)} needs "
                f"{setting('data.resize', fitted[0])}, not {preprocess.resize}: masks are judged "
                f"whole, at their own size"
            )
        self.model = model
        self.config = config
        self.targets = targets.rows(np.arange(0))
        self.preprocess = preprocess
        self.seed = seed
        self.tta = tta
        self.kept = kept
        if config.head == "queries":
            self.apart = "the number of objects that the masks' losses are divided by"

    def loss(self, batch: Batch) -> Losses:
        """The mean over the pixels that have a class; of queries, their sets' loss, which is
        divided by the objects of what is computed at once, here and on each of several processes.
        """
        truth = batch.targets["mask"].long()
        if self.config.head == "queries":
            return self._set_loss(batch, truth)
        if self.kept is None:
            logits = self.model(batch.images)
        else:
            logits = self.model.of_maps(self.kept.of(self.fixed, batch), batch.images)
        logits = self.model.pixels(logits.float(), (truth.shape[1], truth.shape[2]))
        total = F.cross_entropy(logits, truth, ignore_index=IGNORE, reduction="sum")
        return Losses(total / (truth != IGNORE).sum().clamp(min=1), {})

    def fixed(self, batch: Batch) -> tuple[Tensor, ...]:
        """The backbone's maps."""
        maps: tuple[Tensor, ...] = self.model.maps(batch.images)
        return maps

    def _set_loss(self, batch: Batch, truth: Int64[Tensor, "b h w"]) -> Losses:
        found = [
            Prediction(one.classes.float(), one.masks.float())
            for one in self.model.predictions(batch.images)
        ]
        height, width = (
            int(n * s) for n, s in zip(found[-1].masks.shape[2:], self.model.stride, strict=True)
        )
        if truth.is_meta:  # a plan counts the passes; what is matched with what depends on values
            every = [each.float().mean() for one in found for each in one]
            return Losses(torch.stack(every).sum(), {})
        below, right = height - truth.shape[1], width - truth.shape[2]
        truth = F.pad(truth, (0, right, 0, below), value=IGNORE)
        objects = [objects_of(mask, IGNORE) for mask in truth]
        draw = keyed_draw(self.seed, batch.epoch, batch.indices)
        losses = set_loss(found, objects, SetLossConfig(), draw)
        parts = {"classes": losses.classes, "masks": losses.masks, "dice": losses.dice}
        return Losses(losses.total, {name: part.detach() for name, part in parts.items()})

    def weight(self, batch: Batch) -> float:
        """The pixels that have a class; of queries, the images."""
        if self.config.head == "queries":
            return float(len(batch.indices))
        return float((batch.targets["mask"] != IGNORE).sum())

    def enter(self, done: float) -> None:
        """Queries look through their masks ever less."""
        self.model.enter(done)

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """What `vitrail.metrics.masks.count` keeps of each image."""
        classes = len(self.targets.names)
        if not len(batch.indices):
            nothing = torch.zeros(1, 1, dtype=torch.int64, device=batch.images.device)
            found = [count(nothing, nothing, classes)]
            return {name: torch.stack([row[name] for row in found])[:0] for name in found[0]}
        truths, sizes = batch.targets["mask"], batch.targets["size"].tolist()
        seen = [self.preprocess.seen(height, width) for height, width in sizes]
        rows = [
            count(self._classes(scores, one), truth[: one.image[0], : one.image[1]], classes)
            for scores, truth, one in zip(self._scores(batch), truths, seen, strict=True)
        ]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def score(self, rows: Mapping[str, Tensor]) -> float:
        """The mean IoU; 0 where no pixel counts."""
        found = mean_iou({name: values.cpu() for name, values in rows.items()})
        return found if found == found else 0.0

    def judge(self, rows: Mapping[str, Tensor]) -> SegmentMetrics:
        """See `vitrail.metrics.masks`."""
        return segmentation(rows, self.targets.names, self.config.mode)

    def summary(self, metrics: SegmentMetrics, noun: str) -> list[str]:
        """The mean IoU, the share of pixels that are right, and how good borders are."""
        lines = []
        for name, label in _NAMES.items():
            if (value := metrics.summary[name]) is not None:
                interval = f"(95% interval {value.low:.1%} to {value.high:.1%})"
                lines.append(f"{label:<10}{value.value:.1%} {interval}")
        if lines:
            shown = metrics.mode if self.tta == "none" else f"{metrics.mode}, {self.tta}"
            lines[0] += f", {metrics.images} {noun}, {shown}"
        return lines

    def notes(self, metrics: SegmentMetrics, noun: str) -> list[str]:
        """The classes that no mask shows."""
        if not metrics.absent:
            return []
        if len(metrics.absent) == len(metrics.per_class):
            return [
                f"nothing was measured: the masks of all {metrics.images} {noun} are to be ignored "
                f"in every pixel. Look at them with `vitrail data check`"
            ]
        names = shortened(self.targets.names[k] for k in metrics.absent)
        many = len(metrics.absent) > 1
        return [
            f"{len(metrics.absent)} of {len(metrics.per_class)} classes {'are' if many else 'is'} "
            f"in none of these masks: {names}"
        ]

    def table(self, rows: Mapping[str, Tensor]) -> Iterable[Sequence[str]]:
        """pixels, pixel_accuracy, miou, of the pixels that have a class."""
        yield ("pixels", "pixel_accuracy", "miou")
        for i, (right, truth) in enumerate(zip(*map(Tensor.tolist, hits(rows)), strict=True)):
            own = {name: values[i : i + 1] for name, values in rows.items()}
            accuracy = f"{right / truth:.6f}" if truth else ""
            iou = mean_iou(own)
            yield (str(truth), accuracy, f"{iou:.6f}" if iou == iou else "")

    def answer(self, batch: Batch, seen: Sequence[Seen]) -> list[Segmentation]:
        """A mask of each image, at its own size."""
        masks = (
            self._classes(scores, one)
            for scores, one in zip(self._scores(batch), seen, strict=True)
        )
        return [
            Segmentation(mask.cpu().numpy().astype(np.int16), self.targets.names) for mask in masks
        ]

    def outputs(
        self, images: Float[Tensor, "b c h w"], extent: Int64[Tensor, "b 2"] | None = None
    ) -> dict[str, Tensor]:
        """`scores [b c rows columns]`, at the head's stride."""
        return {"scores": self.model(images).float()}

    @property
    def reading(self) -> Reading:
        """How these become masks of images."""
        return Reading(
            kind="segment",
            names=self.targets.names,
            window=self.preprocess.size if self.config.mode == "slide" else None,
            stride=self.model.stride,
            summed=self.config.head == "queries",
        )

    def state(self) -> dict[str, Any]:
        """The names of the classes."""
        return {"classes": list(self.targets.names)}

    def _scores(self, batch: Batch) -> "list[_Scores]":
        """What speaks for each class in the views, of each image."""
        images, extent = batch.views[0]
        if self.config.mode == "whole":
            return self._looked(images)
        patch = self.preprocess.patch
        sizes = (
            [(images.shape[2], images.shape[3])] * len(images)
            if extent is None
            else [(r * patch[0], c * patch[1]) for r, c in extent.tolist()]
        )
        return [
            self._looked(image[None, :, :h, :w])[0]
            for image, (h, w) in zip(images, sizes, strict=True)
        ]

    def _looked(self, images: Float[Tensor, "b _c h w"]) -> "list[_Scores]":
        """The mean of all looks at images of one size (`self.tta`)."""
        size = height, width = images.shape[2], images.shape[3]
        total: Tensor | None = None
        for look in looks(self.tta):
            shown = images.flip(-1) if look.mirrored else images
            if look.scale != 1:
                sides = zip(size, self.preprocess.patch, strict=True)
                scaled = [max(1, round(look.scale * n / p)) * p for n, p in sides]
                shown = F.interpolate(shown, scaled, mode="bicubic", antialias=True)
            if self.config.mode == "slide":
                found = self._slid(shown)
            else:
                found = self._spoken(shown)
                if len(looks(self.tta)) == 1:
                    return [_Scores(each, self.model.stride) for each in found]
                found = self.model.pixels(found, (shown.shape[2], shown.shape[3]))
            if look.scale != 1:
                found = F.interpolate(found, (height, width), mode="bilinear")
            found = found.flip(-1) if look.mirrored else found
            total = found if total is None else total + found
        assert total is not None
        return [_Scores(each, (1, 1)) for each in total]

    def _spoken(self, images: Float[Tensor, "b _c h w"]) -> Float[Tensor, "b c _h _w"]:
        """What may be averaged: probabilities, or what speaks for a class among queries."""
        found = self.model(images).float()
        alone = len(looks(self.tta)) == 1 and self.config.mode == "whole"
        return found if alone or self.config.head == "queries" else found.softmax(dim=1)

    def _slid(self, image: Float[Tensor, "1 _c h w"]) -> Float[Tensor, "1 c h w"]:
        """What windows of an image say, averaged where they overlap."""
        sides, window = (image.shape[2], image.shape[3]), self.preprocess.size
        total = image.new_zeros(1, len(self.targets.names), *sides)
        times = image.new_zeros(sides)
        for top in starts(sides[0], window[0]):
            for left in starts(sides[1], window[1]):
                rows = slice(top, top + min(window[0], sides[0]))
                columns = slice(left, left + min(window[1], sides[1]))
                part = image[:, :, rows, columns]
                found = self._spoken(part)
                size = part.shape[2], part.shape[3]
                total[:, :, rows, columns] += self.model.pixels(found, size)
                times[rows, columns] += 1
        return total / times

    def _classes(self, scores: "_Scores", seen: Seen) -> Int64[Tensor, "h w"]:
        """The class of each of the image's own pixels: the one that most speaks for."""
        values, stride = scores
        height, width = seen.image
        device = values.device
        x = (torch.arange(width, device=device) + 0.5) / width
        y = (torch.arange(height, device=device) + 0.5) / height
        # From the image's unit square to torch's units of the map, which go from -1 to 1.
        sides = np.array([values.shape[2] * stride[1], values.shape[1] * stride[0]])
        matrix = seen.matrix[:2] / sides[:, None] * 2
        matrix[:, 2] -= 1
        (a, b, c), (d, e, f) = matrix.tolist()
        at_once = max(1, _ROOM // (len(values) * width))
        masks = []
        for rows in y.split(at_once):
            grid = torch.stack(
                [a * x + (b * rows[:, None] + c), d * x + (e * rows[:, None] + f)], dim=-1
            )
            read = F.grid_sample(
                values[None],
                grid[None].to(values.dtype),
                padding_mode="border",
                align_corners=False,
            )
            masks.append(read[0].argmax(dim=0))
        return torch.cat(masks)


class _Scores(NamedTuple):
    """What speaks for each class in cells of so many pixels of a view."""

    values: Float[Tensor, "c _h _w"]
    stride: tuple[float, float]


_NAMES = {"miou": "mIoU", "pixel_accuracy": "pixels", "boundary_iou": "borders"}
