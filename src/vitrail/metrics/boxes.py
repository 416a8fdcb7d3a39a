"""How good predicted boxes are, every number with the interval that chance could explain.

`count` makes of each image what is kept of it; `detection` judges all images. Boxes are matched as
COCO does it, so its AP is this one. Three things to know of it:

- What is ignored (crowds, difficult ones, regions) takes any number of boxes, by the share of the
  box that lies in it, and none of those is right or wrong.
- An object's size is its box's, width times height, in pixels of its image. A file may have areas
  of its own (COCO's are those of masks), by which other tools call other objects small.
- Of an image count its best boxes, so many of all classes together. COCO's limit is by class, which
  is the same for a model that gives no more. Of an image with more objects some are always missed.

All this is written out because the intervals come from drawing the images again, which takes the
matches of each, and no library tells those. tests/metrics/test_boxes.py holds AP and AR to
faster-coco-eval.

Letters: n images, m objects, d boxes found, c classes, r draws at a time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from vitrail.errors import DataError
from vitrail.found import Found
from vitrail.metrics.draws import weights
from vitrail.metrics.estimate import Estimate
from vitrail.metrics.intervals import estimates, mean_of_classes
from vitrail.metrics.matching import (
    ANY,
    AREAS,
    IOUS,
    LOOSE_ONE,
    Objects,
    Said,
    match,
    outside_of,
    overlaps,
)  # fmt: skip
from vitrail.metrics.mistakes import KIND, KINDS, Mistake, costs, mistakes
from vitrail.metrics.precision import RECALLS, Ranked, averages, curves, objects_of, ranked
from vitrail.metrics.thresholds import Kept, Point, best_threshold, kept_from

PADDING = -1
"""The label of no object, and of no box."""
_MOST_DRAWS, _LEAST_DRAWS = 1000, 200
_ROOM = 10**8
"""Boxes x draws that take about ten seconds on one core."""


def count(found: Found, truth: Mapping[str, Tensor], classes: int, most: int) -> dict[str, Tensor]:
    """What is kept of one image.

    `truth` has `boxes [m 4]` in the same pixels, `labels [m]`, class indices, and `ignored [m]`, 0
    or 1. The label PADDING is no object, ANY is ignored whatever a box in it is said to be.

    Of its `most` best boxes, the best first:

    scores [most]            float32
    labels [most]            int32; PADDING where there are fewer boxes
    matched, ignored [most]  int64, a bit for each of 41 questions: at 10 IoUs (0.5 to 0.95) of all
                             objects, of small, medium and large ones; at the IoU 0.4 of all
    kinds, meant [most]      int8, int32: see `vitrail.metrics.mistakes`

    And of its objects, without what is ignored, in int32:

    objects, missed [c]      all, and those that no box has at an IoU of 0.5
    sizes [c 3]              small, medium and large ones

    Raises `DataError` where a box or a score is not a number, `ValueError` for a label that is no
    class.
    """
    said, real = _best(found, classes, most), _real(truth, classes)
    pairs = overlaps(said.boxes, real)
    matched, ignored, holds = match(said, real, pairs)
    kinds, meant = mistakes(pairs, said.labels, real, holds, (ignored & 1) > 0)
    outside = outside_of(real)
    objects, *sizes = (
        np.bincount(real.labels[(outside >> k * len(IOUS)) & 1 == 0], minlength=classes)
        for k in range(len(AREAS))
    )
    right = np.bincount(said.labels[(matched & ~ignored & 1) > 0], minlength=classes)
    rows = {
        "scores": _padded(said.scores.astype(np.float32), most, 0),
        "labels": _padded(said.labels.astype(np.int32), most, PADDING),
        "matched": _padded(matched, most, 0),
        "ignored": _padded(ignored, most, 0),
        "kinds": _padded(kinds, most, 0),
        "meant": _padded(meant, most, PADDING),
        "objects": objects.astype(np.int32),
        "missed": (objects - right).astype(np.int32),
        "sizes": np.stack(sizes, axis=1).astype(np.int32),
    }
    return {name: torch.from_numpy(row) for name, row in rows.items()}


class Judged(NamedTuple):
    """Of each box of an image, the best first: its kind of KINDS, and the object that it has at an
    IoU of 0.5, as a place in the truth, or -1.
    """

    kinds: tuple[str, ...]
    holds: tuple[int, ...]


def judge_boxes(found: Found, truth: Mapping[str, Tensor], classes: int) -> Judged:
    """What `count` thinks of each box of one image; arguments and errors are its own."""
    said, real = _best(found, classes, len(found.scores)), _real(truth, classes)
    pairs = overlaps(said.boxes, real)
    _, ignored, holds = match(said, real, pairs)
    kinds, _ = mistakes(pairs, said.labels, real, holds, (ignored & 1) > 0)
    places = np.append((truth["labels"] != PADDING).nonzero()[:, 0].cpu().numpy(), -1)
    return Judged(
        tuple(KINDS[kind & KIND] for kind in kinds.tolist()), tuple(places[holds].tolist())
    )


def _best(found: Found, classes: int, most: int) -> Said:
    boxes, scores, labels = (each.astype(np.float64) for each in found)
    broken = ~(np.isfinite(boxes).all(axis=1) & np.isfinite(scores))
    if broken.any():
        raise DataError(
            f"{broken.sum()} of {len(broken)} boxes of an image, or their scores, are not numbers: "
            f"the model's weights are damaged, or training went astray. Use an earlier checkpoint"
        )
    # As they are kept: what is equal there must be in one order here too.
    order = np.argsort(-scores.astype(np.float32), kind="stable")[:most]
    return Said(boxes[order], scores[order], _classes(labels[order], 0, classes))


def _real(truth: Mapping[str, Tensor], classes: int) -> Objects:
    """The objects, without padding."""
    boxes, labels, ignored = (truth[name].cpu().numpy() for name in ("boxes", "labels", "ignored"))
    there = labels != PADDING
    labels = _classes(labels[there], ANY, classes)
    region = (ignored[there] > 0) | (labels == ANY)
    return Objects(boxes[there].astype(np.float64), labels, region)


def _classes(labels: np.ndarray, least: int, classes: int) -> Int64[np.ndarray, " k"]:
    if ((labels < least) | (labels >= classes)).any():
        raise ValueError(f"labels of boxes must be below {classes}, and none of {labels.min()}")
    return labels.astype(np.int64)


def _padded(values: np.ndarray, most: int, rest: int) -> np.ndarray:
    """As many as `most`."""
    return np.pad(values, (0, most - len(values)), constant_values=rest)


class ClassAP(NamedTuple):
    """One class. A score that no object defines is None."""

    name: str
    images: int
    """Those that show it."""
    objects: int
    said: int
    """Boxes that are said to be of it, from the best threshold on."""
    found: int
    """Objects that one of them has, at an IoU of 0.5."""
    ap: Estimate | None
    ap50: Estimate | None


@dataclass(frozen=True)
class DetectMetrics:
    """What predicted boxes are worth."""

    images: int
    draws: int
    """How many bootstrap draws the intervals are made of."""
    max_detections: int
    """The most boxes of an image that count."""
    crowded: int
    """The images that have more objects than that."""
    summary: dict[str, Estimate | None]
    """ap, ap50, ap75, ap_small, ap_medium, ap_large, ar, f1.

    Means are over the classes that have an object (of the size): a class that is only predicted
    does not count, as COCO has it. ap and ar are means over the IoUs 0.5 to 0.95 as well. f1 is
    that of `best`, over all classes together; 0 where no threshold gives any.
    """
    sizes: tuple[int, int, int]
    """Small, medium and large objects."""
    per_class: tuple[ClassAP, ...]
    best: Point | None
    """At an IoU of 0.5; None where no box is right."""
    best_loose: Point | None
    """At an IoU of 0.4, as DeepForest's benchmark has it."""
    mistakes: tuple[Mistake, ...]
    precision_recall: tuple[tuple[float, float, float], ...]
    """At each of 101 recalls: it, and the precision at an IoU of 0.5, and over all; empty where
    there is no object."""
    thresholds: tuple[Kept, ...]
    """For each of 101 scores from 0 to 1, at an IoU of 0.5; empty where there is no object."""

    @property
    def absent(self) -> tuple[int, ...]:
        """The classes that no image shows."""
        return tuple(k for k, each in enumerate(self.per_class) if not each.objects)

    @property
    def headline(self) -> str:
        """The name of the one number that stands for all."""
        return "ap"

    def values(self) -> dict[str, float | None]:
        """The summary without its intervals."""
        return {name: None if each is None else each.value for name, each in self.summary.items()}

    def to_dict(self) -> dict[str, Any]:
        """What metrics.json holds: the summary's numbers on top, then the parts."""
        small, medium, large = self.sizes
        return _plain(self.summary) | {
            "images": self.images,
            "draws": self.draws,
            "max_detections": self.max_detections,
            "iou": f"{IOUS[0]:.2f}:{IOUS[-1]:.2f}",
            "crowded": self.crowded,
            "objects": {"small": small, "medium": medium, "large": large},
            "best": _plain(self.best),
            "best_loose": _plain(self.best_loose),
            "mistakes": _plain(self.mistakes),
            "per_class": _plain(self.per_class),
            "precision_recall": self.precision_recall,
            "thresholds": _plain(self.thresholds),
        }


def average_precision(rows: Mapping[str, Tensor]) -> float:
    """The number alone that `detection` calls ap, of the same rows; NaN without any object."""
    rows = {name: row.detach().cpu() for name, row in rows.items()}
    once = torch.ones(1, len(rows["labels"]), dtype=torch.float64)
    found = averages(ranked(rows), rows["objects"].double(), once, range(len(IOUS)))
    return found.ap.nanmean().item()


def detection(rows: Mapping[str, Tensor], names: tuple[str, ...], most: int) -> DetectMetrics:
    """Metrics of predicted boxes, from what `count` says of each image: each `[n ...]`.

    `most` is what `count` was given. Raises `ValueError` where shapes do not fit.

    >>> truth = {"boxes": torch.tensor([[0.0, 0, 40, 40]]), "labels": torch.tensor([0])}
    >>> truth["ignored"] = torch.tensor([0])
    >>> found = Found(np.array([[0.0, 0, 40, 30]]), np.array([0.9]), np.array([0]))
    >>> rows = {name: row[None] for name, row in count(found, truth, 1, 100).items()}
    >>> {name: value for name, value in detection(rows, ("cat",), 100).values().items() if value}
    {'ap': 0.6, 'ap50': 1.0, 'ap75': 1.0, 'ap_medium': 0.6, 'ar': 0.6, 'f1': 1.0}
    """
    rows = {name: row.detach().cpu() for name, row in rows.items()}
    (n, kept), c = rows["labels"].shape, rows["objects"].shape[1]
    if not n or c != len(names) or kept != most:
        raise ValueError(
            f"rows of {n} images, {c} classes and {kept} boxes do not fit {len(names)} names and "
            f"{most} boxes"
        )
    found, objects = ranked(rows), objects_of(rows)
    draws = min(max(_ROOM // max(1, len(found.image)), _LEAST_DRAWS), _MOST_DRAWS)
    drawn = torch.cat([each.T for each in weights(n, draws)])
    once = torch.ones(1, n, dtype=torch.float64)
    value, spread = (_scores(found, objects, each) for each in (once, drawn.float()))
    shown = objects > 0
    counted = shown[..., 0].any(1).sum().double()
    summary = {
        name: mean_of_classes(
            value[name][:, 0], spread[name].double(), shown[..., k].sum(0), counted
        )
        for name, k in _SCORES.items()
    }
    trials = shown[..., 0].sum(0).double()
    ap, ap50 = (
        estimates(value[name][:, 0], spread[name].double(), trials) for name in ("ap", "ap50")
    )
    best, loose = (
        best_threshold(found, objects[..., 0].sum(1), drawn, each) for each in (0, LOOSE_ONE)
    )
    there = bool(counted)
    summary["f1"] = best.f1 if best else _nothing(n) if there else None
    least = best.threshold if best else torch.inf
    above = found.at((found.score >= least) & found.counted(0))
    said, right = (
        torch.bincount(labels, minlength=c).tolist()
        for labels in (above.label, above.label[above.right(0)])
    )
    totals, images = objects.sum(0).long().tolist(), shown[..., 0].sum(0).tolist()
    return DetectMetrics(
        images=n,
        draws=draws,
        max_detections=most,
        crowded=int((objects[..., 0].sum(1) > most).sum()),
        summary=summary,
        sizes=tuple(objects.sum((0, 1)).long().tolist()[1:]),
        per_class=tuple(
            ClassAP(name, images[k], totals[k][0], said[k], right[k], ap[k], ap50[k])
            for k, name in enumerate(names)
        ),
        best=best,
        best_loose=loose,
        mistakes=costs(found, objects[..., 0].sum(0), least),
        precision_recall=_precision_recall(found, objects) if there else (),
        thresholds=kept_from(found, objects[..., 0].sum().item()) if there else (),
    )


_SCORES = {"ap": 0, "ap50": 0, "ap75": 0, "ap_small": 1, "ap_medium": 2, "ap_large": 3, "ar": 0}
"""The scores by class, and which of AREAS decides each."""


def _scores(
    found: Ranked, objects: Float64[Tensor, "n c 4"], drawn: Float[Tensor, "r n"]
) -> dict[str, Float[Tensor, "c r"]]:
    every, *by_size = (
        averages(found, objects[..., k], drawn, range(k * len(IOUS), (k + 1) * len(IOUS)))
        for k in range(len(AREAS))
    )
    small, medium, large = (each.ap for each in by_size)
    at_50, at_75 = every.by_iou[0], every.by_iou[IOUS.index(0.75)]
    return dict(
        zip(_SCORES, (every.ap, at_50, at_75, small, medium, large, every.recall), strict=True)
    )


def _nothing(images: int) -> Estimate | None:
    """0, of so many images."""
    zero = torch.zeros((), dtype=torch.float64)
    return estimates(zero, zero[None], torch.tensor(float(images)))[0]


def _precision_recall(
    found: Ranked, objects: Float64[Tensor, "n c 4"]
) -> tuple[tuple[float, float, float], ...]:
    """The means over the classes that have an object."""
    every = objects[..., 0].sum(0)
    once = torch.ones(1, len(objects), dtype=torch.float64)
    total = torch.zeros(len(IOUS), len(RECALLS), dtype=torch.float64)
    for k in every.nonzero()[:, 0].tolist():
        own = found.at(found.label == k)
        for t, curve in enumerate(curves(own, every[k, None], once, range(len(IOUS)))):
            if curve is not None:
                total[t] += curve.sampled()[0]
    total /= (every > 0).sum()
    rows = zip(RECALLS.tolist(), total[0].tolist(), total.mean(0).tolist(), strict=True)
    return tuple(rows)


def _plain(value: Any) -> Any:
    """Named tuples as JSON's objects."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return value
