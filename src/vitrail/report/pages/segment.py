"""What the report says of segmentation."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from vitrail.data import UnreadableImage
from vitrail.data.batches.batch import Batch
from vitrail.data.pixels.decode import eight_bits
from vitrail.deploy.answers import coloured, palette
from vitrail.evaluation import Evaluation
from vitrail.metrics.masks import SegmentMetrics, mean_iou
from vitrail.report import words
from vitrail.report.numbers import numbers
from vitrail.report.pictures import Picture, embed

_SHOWN = 6
_SIDE = 320
"""Pixels of an exhibit's longer side."""
CLASSES_IN_A_MATRIX = 30

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
    iou: str


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
    borders = _borders(evaluation)
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
        "worst": list(_exhibits(evaluation, order)),
        "best": list(_exhibits(evaluation, order[::-1])),
        "borders": borders,
    }


def _by_iou(evaluation: Evaluation) -> list[int]:
    """Places of the measured images, the worst first; those without a pixel that counts last."""
    rows = evaluation.rows
    scores = []
    for i in range(len(evaluation.indices)):
        iou = mean_iou({name: values[i : i + 1] for name, values in rows.items()})
        scores.append(iou if iou == iou else 2.0)
    return [int(i) for i in np.argsort(scores, kind="stable")]


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
    """None for an image that cannot be read any more, or without a pixel that counts."""
    i, loaded = int(evaluation.indices[k]), evaluation.loaded
    iou = mean_iou({name: values[k : k + 1] for name, values in evaluation.rows.items()})
    if iou != iou:
        return None
    try:
        image = eight_bits(evaluation.source.load(i), loaded.preprocess.grey_range).convert("RGB")
        truth = evaluation.source.targets.target(i, None)["mask"]
    except UnreadableImage:
        return None
    device = next(loaded.task.parameters()).device
    canvas = loaded.preprocess.collate([torch.from_numpy(loaded.preprocess.view(image))])
    pixels = loaded.preprocess.normalise(canvas.images).to(device)
    height, width = truth.shape
    seen = loaded.preprocess.seen(height, width)
    batch = Batch((canvas._replace(images=pixels),), {}, np.arange(1))
    (answer,) = loaded.task.answer(batch, [seen])
    array = np.asarray(image.resize((width, height)))
    wrong = np.where(truth < 0, 128, np.where(truth == answer.mask, 0, 255)).astype(np.uint8)
    return Exhibit(
        evaluation.source.key(i),
        _small(array),
        _small(coloured(array, truth, loaded.names)),
        _small(coloured(array, answer.mask, loaded.names)),
        _small(np.repeat(wrong[..., None], 3, axis=2)),
        words.percent(iou),
    )


def _small(pixels: np.ndarray) -> Picture:
    image = Image.fromarray(pixels)
    image.thumbnail((_SIDE, _SIDE))
    return embed(image, lossless=False)
