"""What the report says of segmentation."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from vitrail.data import UnreadableImage
from vitrail.data.batches.batch import Batch
from vitrail.data.pixels.decode import eight_bits
from vitrail.data.views.canvas import canvas_of
from vitrail.deploy.answers import coloured, palette
from vitrail.evaluation import Evaluation
from vitrail.metrics.masks import MOST_CONFUSED, SegmentMetrics, mean_iou
from vitrail.report import words
from vitrail.report.numbers import numbers
from vitrail.report.pictures import Picture, embed
from vitrail.tasks.tta import LOOKS

_SHOWN = 6
_SIDE = 320
"""Pixels of an exhibit's longer side."""
CLASSES_IN_A_MATRIX = 30
"""More do not fit on a page: the most confused pairs are listed instead."""
_PAIRS = 20

_MEANINGS = {
    "miou": ("Mean IoU", "of prediction and truth, what they share over what either has; by class"),
    "pixel_accuracy": ("Pixel accuracy", "the share of pixels whose class is right"),
    "mean_accuracy": ("Mean accuracy", "of a class's pixels, the share that is found; by class"),
    "boundary_iou": ("Boundary IoU", "the same as IoU, of the pixels near borders (2103.16562)"),
}


class Exhibit(NamedTuple):
    """An image, its mask and what was said of it."""

    key: str
    image: Picture
    truth: Picture
    said: Picture
    wrong: Picture
    """White where it is wrong, grey where nothing counts."""
    ignored: bool
    """Whether there is any grey."""
    iou: str


class Confused(NamedTuple):
    """`pixels` of class `true` were taken for `said`: `share` of the class's."""

    true: str
    said: str
    pixels: int
    share: str


class Cell(NamedTuple):
    """One field of the confusion matrix."""

    share: float
    """Of the row's pixels."""
    title: str


def content(evaluation: Evaluation) -> dict[str, Any]:
    """Everything that segment.html.jinja names beside the shell's."""
    metrics: SegmentMetrics = evaluation.metrics
    headline = metrics.summary["miou"]
    order = _by_iou(evaluation)
    middle = -(-len(order) // 2)
    wrong = evaluation.rows["errors"][:, 2] > 0
    return {
        "headline_words": f"mean IoU {words.percent(headline.value)}" if headline else "no pixel",
        "numbers": numbers(metrics.summary, _MEANINGS),
        "bars": sorted(
            (each for each in metrics.per_class if each.iou is not None),
            key=lambda each: -(each.iou.value if each.iou else 0),
        ),
        "colours": {
            name: "#{:02x}{:02x}{:02x}".format(*colour)
            for name, colour in zip(
                evaluation.loaded.names, palette(len(evaluation.loaded.names)), strict=True
            )
        },
        "matrix": _matrix(metrics),
        "confused": _most_confused(metrics),
        "countless": metrics.confusion is None,
        "most_confused": MOST_CONFUSED,
        "worst": list(_exhibits(evaluation, [k for k in order[:middle] if wrong[k]])),
        "best": list(_exhibits(evaluation, order[middle:][::-1])),
        "borders": _borders(evaluation),
        "looks": len(LOOKS[evaluation.tta]),
    }


def _by_iou(evaluation: Evaluation) -> list[int]:
    """Places of the measured images, the worst first, without those of which no pixel counts."""
    scores = {k: _iou(evaluation, k) for k in range(len(evaluation.indices))}
    return sorted((k for k, iou in scores.items() if iou == iou), key=scores.__getitem__)


def _iou(evaluation: Evaluation, k: int) -> float:
    """Of one image, the mean of the classes that it has or is said to have."""
    return mean_iou({name: values[k : k + 1] for name, values in evaluation.rows.items()})


def _borders(evaluation: Evaluation) -> tuple[float, float] | None:
    """The share of the wrong pixels that lie near a border, and of all pixels that do; None where
    nothing is wrong.
    """
    near, wrong_near, wrong = evaluation.rows["errors"].sum(dim=0).tolist()
    pixels = sum(each.pixels for each in evaluation.metrics.per_class)
    return (wrong_near / wrong, near / pixels) if wrong else None


def _matrix(metrics: SegmentMetrics) -> list[tuple[str, list[Cell]]]:
    """The confusion matrix to print, in shares of each row; empty where it is too large."""
    if metrics.confusion is None or len(metrics.per_class) > CLASSES_IN_A_MATRIX:
        return []
    names = [each.name for each in metrics.per_class]
    return [
        (
            name,
            [
                Cell(
                    count / max(1, sum(row)),
                    f"{words.percent(count / max(1, sum(row)))} of the pixels of {name} were "
                    f"taken for {other}",
                )
                for count, other in zip(row, names, strict=True)
            ],
        )
        for name, row in zip(names, metrics.confusion, strict=True)
    ]


def _most_confused(metrics: SegmentMetrics) -> list[Confused]:
    """The pairs of classes between which most pixels are mixed up."""
    names = [each.name for each in metrics.per_class]
    pairs = [
        Confused(names[i], names[j], count, words.percent(count / sum(row)))
        for i, row in enumerate(metrics.confusion or ())
        for j, count in enumerate(row)
        if i != j and count
    ]
    return sorted(pairs, key=lambda pair: -pair.pixels)[:_PAIRS]


def _exhibits(evaluation: Evaluation, order: Iterable[int]) -> Iterable[Exhibit]:
    shown = 0
    for k in order:
        if shown == _SHOWN:
            return
        found = _exhibit(evaluation, k)
        if found is not None:
            shown += 1
            yield found


@torch.inference_mode()
def _exhibit(evaluation: Evaluation, k: int) -> Exhibit | None:
    """None for an image that cannot be read any more."""
    i, loaded = int(evaluation.indices[k]), evaluation.loaded
    try:
        image = eight_bits(evaluation.source.load(i), loaded.preprocess.grey_range).convert("RGB")
        truth = evaluation.source.targets.target(i, None)["mask"]
    except UnreadableImage:
        return None
    device = next(loaded.task.parameters()).device
    canvas = canvas_of(loaded.preprocess, [loaded.preprocess.view(image)])
    shown = canvas._replace(images=canvas.images.to(device))
    height, width = truth.shape
    seen = loaded.preprocess.seen(height, width)
    batch = Batch((shown,), {}, np.arange(1))
    (answer,) = loaded.task.answer(batch, [seen])
    array = np.asarray(image.resize((width, height)))
    wrong = np.where(truth < 0, 128, np.where(truth == answer.mask, 0, 255)).astype(np.uint8)
    return Exhibit(
        evaluation.source.key(i),
        _small(array),
        _small(coloured(array, truth, loaded.names)),
        _small(coloured(array, answer.mask, loaded.names)),
        _small(np.repeat(wrong[..., None], 3, axis=2)),
        bool((truth < 0).any()),
        words.percent(_iou(evaluation, k)),
    )


def _small(pixels: np.ndarray) -> Picture:
    image = Image.fromarray(pixels)
    image.thumbnail((_SIDE, _SIDE))
    return embed(image, lossless=False)
