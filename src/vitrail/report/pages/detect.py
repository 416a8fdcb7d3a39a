"""What the report says of detection."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, Int64
from PIL import Image

from vitrail.data import UnreadableImage
from vitrail.data.batches.batch import Batch
from vitrail.data.pixels.decode import eight_bits
from vitrail.data.views.canvas import canvas_of
from vitrail.deploy.answers import MOST_NAMED, Mark, outlined
from vitrail.evaluation import Evaluation
from vitrail.found import Found
from vitrail.metrics import DetectMetrics, Estimate, judge_boxes
from vitrail.metrics.precision import ranked
from vitrail.report import charts, words
from vitrail.report.numbers import numbers
from vitrail.report.pictures import Picture, embed
from vitrail.tasks import Detections

_SHOWN = 6
_SIDE = 640
"""Pixels of an exhibit's longer side."""
_TINY = 20.0
"""Pixels of an exhibit: smaller objects are also shown in a part of the image."""
_LARGE_ENOUGH = 28.0
"""Pixels that the middle one of the objects has there."""
_COLOURS = {
    "there": (47, 160, 106),
    "missed": (250, 190, 20),
    "right": (58, 134, 214),
    "wrong": (226, 74, 51),
    "ignored": (150, 150, 150),
}

_MEANINGS = {
    "ap": ("AP", "average precision, the mean of IoUs from 0.5 to 0.95; by class"),
    "ap50": ("AP50", "the same where an IoU of 0.5 is enough"),
    "ap75": ("AP75", "the same where it must be 0.75: boxes have to fit"),
    "ap_small": ("AP, small", "AP of objects of up to 32 by 32 pixels"),
    "ap_medium": ("AP, medium", "of those of up to 96 by 96"),
    "ap_large": ("AP, large", "of larger ones"),
    "ar": ("AR", "the share of the objects that are found, whatever the score; IoU 0.5 to 0.95"),
    "f1": ("Best F1", "of one threshold for all classes: found and right in one, IoU 0.5"),
}
_MISTAKES = {
    "misplaced": "the right name on an object, but the box does not fit: an IoU of 0.1 to 0.5",
    "misnamed": "a box that fits an object, and another name",
    "doubled": "one more box on an object that has one",
    "background": "a box where there is nothing of the kind",
    "both": "a box that does not fit, and another name",
    "missed": "objects of which no box tells, not even a wrong one",
}


class Wrong(NamedTuple):
    """A kind of mistake."""

    name: str
    meaning: str
    kept: int
    all: int
    cost: str


class Size(NamedTuple):
    """Objects of one size."""

    name: str
    objects: int
    ap: Estimate | None


class Exhibit(NamedTuple):
    """An image with its boxes, and with what was found in it."""

    key: str
    pictures: tuple[Picture, ...]
    """What is there, and what was found; and of both a part, enlarged, where objects are too small
    to see."""
    objects: int
    missed: int
    found: int
    wrong: int
    ignored: bool


class _Tally(NamedTuple):
    """Of each image, from the best threshold on."""

    objects: Int64[np.ndarray, " n"]
    found: Int64[np.ndarray, " n"]
    right: Int64[np.ndarray, " n"]

    @property
    def mistakes(self) -> Int64[np.ndarray, " n"]:
        """Boxes that are wrong, and objects that have none."""
        return self.objects + self.found - 2 * self.right


def content(evaluation: Evaluation) -> dict[str, Any]:
    """Everything that detect.html.jinja names beside the shell's."""
    metrics: DetectMetrics = evaluation.metrics
    headline = metrics.summary["ap"]
    threshold = metrics.best.threshold if metrics.best else np.inf
    tally = _tally(evaluation, threshold)
    mistakes = tally.mistakes
    order = np.argsort(-mistakes, kind="stable")
    worst = [int(k) for k in order if mistakes[k]]
    # Of those that have the fewest mistakes, those that show most.
    good = sorted((int(k) for k in range(len(mistakes)) if tally.right[k]), key=_good(tally))
    best = [k for k in good if k not in worst[:_SHOWN]] if metrics.best else []
    return {
        "headline_words": f"AP {words.percent(headline.value)}" if headline else "no object",
        "numbers": numbers(metrics.summary, _MEANINGS),
        "bars": sorted(
            (each for each in metrics.per_class if each.ap is not None),
            key=lambda each: -(each.ap.value if each.ap else 0),
        ),
        "unmeasured": [each for each in metrics.per_class if each.ap is None and each.said],
        "sizes": _sizes(metrics),
        "wrongs": _wrongs(metrics),
        "charts": _charts(metrics),
        "score": _score(threshold),
        "objects": int(tally.objects.sum()),
        "tiled": evaluation.loaded.preprocess.resize == "tiles",
        "worst": list(_exhibits(evaluation, worst, threshold)),
        "best": list(_exhibits(evaluation, best[: _SHOWN // 2], threshold)),
        "most_named": MOST_NAMED,
        "colours": {name: "rgb({}, {}, {})".format(*rgb) for name, rgb in _COLOURS.items()},
    }


def _tally(evaluation: Evaluation, threshold: float) -> _Tally:
    rows, n = evaluation.rows, len(evaluation.indices)
    boxes = ranked(rows)
    above = boxes.at((boxes.score >= threshold) & boxes.counted(0))
    found, right = (
        np.bincount(image.numpy(), minlength=n)
        for image in (above.image, above.image[above.right(0)])
    )
    return _Tally(rows["objects"].sum(1).long().numpy(), found, right)


def _good(tally: _Tally) -> Any:
    """The sort key of a place: the best F1 first, then the most boxes."""
    return lambda k: (
        -2 * tally.right[k] / (tally.objects[k] + tally.found[k]),
        -tally.right[k],
    )


def _sizes(metrics: DetectMetrics) -> list[Size]:
    names = (
        ("small", "small, up to 32 by 32 pixels"),
        ("medium", "medium, up to 96 by 96"),
        ("large", "large"),
    )
    return [
        Size(words_, objects, metrics.summary[f"ap_{name}"])
        for (name, words_), objects in zip(names, metrics.sizes, strict=True)
    ]


def _wrongs(metrics: DetectMetrics) -> list[Wrong]:
    """The kinds that there are, those that cost most first."""
    there = [each for each in metrics.mistakes if each.all]
    return [
        Wrong(
            each.kind,
            _MISTAKES[each.kind],
            each.kept,
            each.all,
            "" if each.cost is None else f"{100 * each.cost:.1f}",
        )
        for each in sorted(there, key=lambda each: -(each.cost or 0))
    ]


def _charts(metrics: DetectMetrics) -> dict[str, Any]:
    if not metrics.best:
        return {}
    return {
        "Precision over recall": charts.precision_recall(metrics.precision_recall),
        "What a threshold gives": charts.thresholds(metrics.thresholds, metrics.best.threshold),
    }


def _score(threshold: float) -> str:
    """Rounded down, so that it keeps the same boxes, or a few more."""
    return f"{np.floor(threshold * 1000) / 1000:.3f}" if np.isfinite(threshold) else ""


def _exhibits(evaluation: Evaluation, order: Iterable[int], threshold: float) -> Iterable[Exhibit]:
    shown = 0
    for k in order:
        if shown == _SHOWN:
            return
        found = _exhibit(evaluation, k, threshold)
        if found is not None:
            shown += 1
            yield found


@torch.inference_mode()
def _exhibit(evaluation: Evaluation, k: int, threshold: float) -> Exhibit | None:
    """None for an image that cannot be read any more."""
    i, loaded = int(evaluation.indices[k]), evaluation.loaded
    try:
        image = eight_bits(evaluation.source.load(i), loaded.preprocess.grey_range).convert("RGB")
        real = evaluation.source.targets.target(i, None)
    except UnreadableImage:
        return None
    answer = _asked(evaluation, image).above(threshold)
    names, regions = loaded.names, real["ignored"] > 0
    truth = {name: torch.from_numpy(real[name]) for name in ("boxes", "labels", "ignored")}
    said = Found(answer.boxes, answer.scores, answer.labels)
    judged = judge_boxes(said, truth, len(names))
    missed = ~np.isin(np.arange(len(regions)), judged.holds) & ~regions
    wrong = np.array([kind not in _NO_MISTAKES for kind in judged.kinds], bool)
    boxes, several = real["boxes"].astype(np.float64), len(names) > 1
    there = [
        Mark(
            _COLOURS["ignored" if region else "missed" if miss else "there"],
            names[label] if several and label >= 0 and len(boxes) <= MOST_NAMED else "",
            bold=bool(miss),
        )
        for label, region, miss in zip(real["labels"], regions, missed, strict=True)
    ]
    told = [
        Mark(
            _COLOURS["wrong" if bad else kind],
            _told(names[label] if several else "", kind) if len(wrong) <= MOST_NAMED else "",
            bold=bool(bad),
        )
        for label, kind, bad in zip(answer.labels, judged.kinds, wrong, strict=True)
    ]
    on_top = np.argsort(~missed, kind="stable")
    both = ((boxes[on_top], [there[j] for j in on_top]), (answer.boxes, told))
    spot = _spot(image, boxes[~regions], np.concatenate([boxes[missed], answer.boxes[wrong]]))
    whole, *part = (
        tuple(_picture(image, place, *each) for each in both)
        for place in ((0, 0, image.width, image.height), spot)
        if place is not None
    )
    return Exhibit(
        evaluation.source.key(i),
        (*whole, *part[0]) if part else whole,
        int((~regions).sum()),
        int(missed.sum()),
        len(wrong),
        int(wrong.sum()),
        bool(regions.any()),
    )


def _asked(evaluation: Evaluation, image: Image.Image) -> Detections:
    loaded = evaluation.loaded
    device = next(loaded.task.parameters()).device
    canvas = canvas_of(loaded.preprocess, [loaded.preprocess.view(image)])
    shown = canvas._replace(images=canvas.images.to(device))
    seen = loaded.preprocess.seen(image.height, image.width)
    (answer,) = loaded.task.answer(Batch((shown,), {}, np.arange(1)), [seen])
    return answer


def _told(name: str, kind: str) -> str:
    """What stands beside a box."""
    return " ".join(part for part in (name, "" if kind in _NO_MISTAKES else kind) if part)


_NO_MISTAKES = ("right", "ignored")


Place = tuple[float, float, float, float]


def _spot(
    image: Image.Image,
    objects: Float64[np.ndarray, "m 4"],
    mistakes: Float64[np.ndarray, "k 4"],
) -> Place | None:
    """The part (left, top, right, bottom) of an image with small objects in which they can be seen,
    where most mistakes are; None where the whole does.
    """
    if not len(objects):
        return None
    sides = objects[:, 2:] - objects[:, :2]
    side = float(np.median(np.sqrt(sides.prod(axis=1))))
    longer = max(image.size)
    if side * min(1, _SIDE / longer) >= _TINY:
        return None
    of = mistakes if len(mistakes) else objects
    centres = (of[:, :2] + of[:, 2:]) / 2
    window = np.minimum(max(1.0, side) * _SIDE / _LARGE_ENOUGH, image.size).clip(min=1)
    near = np.abs(centres[:, None] - centres) <= window / 2
    corner = centres[near.all(axis=2).sum(axis=1).argmax()] - window / 2
    left, top = np.clip(corner, 0, np.array(image.size) - window).round().tolist()
    return left, top, left + round(window[0]), top + round(window[1])


def _picture(
    image: Image.Image,
    place: Place,
    boxes: Float64[np.ndarray, "m 4"],
    marks: Sequence[Mark],
) -> Picture:
    """That part of the image, at the size at which it is shown, with boxes."""
    left, top, right, bottom = place
    # What is small is enlarged, for lines of one pixel would hide it.
    scale = _SIDE / max(right - left, bottom - top)
    size = max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale))
    shown = image.resize(size, box=place)
    moved = (boxes - [left, top, left, top]) * scale
    inside = np.concatenate([moved[:, 2:] > 0, moved[:, :2] < size], axis=1).all(axis=1)
    places = np.flatnonzero(inside)
    return embed(
        outlined(shown, moved[places], [marks[j] for j in places.tolist()]), lossless=False
    )
