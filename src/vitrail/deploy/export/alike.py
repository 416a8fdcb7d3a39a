"""When two models give the same answer to an image:

- classify: the likeliest class is the same; of several labels, each is on its side of a half
- segment: 99.9% of the pixels have the same class
- detect: each box of a score of at least 0.1 has its twin, of its class and with an IoU of 0.9
- features: the product of the two vectors is at least 0.999
"""

from typing import Any

import numpy as np

from vitrail.tasks.answers import Detections, Embedding, Prediction, Segmentation

PIXELS, SCORE, IOU, LIKE = 0.999, 0.1, 0.9, 0.999


def same_answer(one: Any, other: Any, several: bool = False) -> bool:
    """Whether two answers to an image are; `several`: its classes do not exclude each other."""
    if isinstance(one, Prediction) and several:
        labels = [
            {name for name, p in each.probabilities.items() if p > 0.5} for each in (one, other)
        ]
        return labels[0] == labels[1]
    if isinstance(one, Prediction):
        return bool(one.label == other.label)
    if isinstance(one, Segmentation):
        return float((one.mask == other.mask).mean()) >= PIXELS
    if isinstance(one, Embedding):
        return float(one.features @ other.features) >= LIKE
    return _twins(one, other) and _twins(other, one)


def _twins(some: Detections, others: Detections) -> bool:
    """Whether each of some boxes is among the others."""
    some = some.above(SCORE)
    least = np.maximum(some.boxes[:, None, :2], others.boxes[None, :, :2])
    most = np.minimum(some.boxes[:, None, 2:], others.boxes[None, :, 2:])
    shared = (most - least).clip(0).prod(axis=2)
    areas = [(each.boxes[:, 2:] - each.boxes[:, :2]).prod(axis=1) for each in (some, others)]
    alike = shared >= IOU * (areas[0][:, None] + areas[1][None] - shared)
    alike &= some.labels[:, None] == others.labels[None]
    return bool(alike.any(axis=1).all())
