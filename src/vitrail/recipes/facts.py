"""What a recipe wants to know of the data and the machine before it chooses."""

import math
from statistics import median
from typing import NamedTuple

import numpy as np
import torch

from vitrail.data import Source, UnreadableImage
from vitrail.data.targets import Boxes
from vitrail.runs.device import pick_device
from vitrail.runs.machine import matrix_rate, native_precision
from vitrail.weights import Opened

LOOKED_AT = 16
"""Images that are opened to learn their size; they are spread over the data."""
_MEASURED = 500
"""Images whose boxes are."""
_PRODUCT = 1024
"""Rows and columns of the matrices whose product is timed."""


class Facts(NamedTuple):
    """The data and the machine, in a few numbers."""

    data: str
    """What the user named."""
    images: int
    classes: int
    channels: int
    """1 when the images are greyscale arrays or are to be seen as grey, else 3."""
    side: int
    """Median of the images' short sides in pixels."""
    gpu: bool
    bfloat16: bool
    """Whether the machine multiplies bfloat16 matrices in hardware."""
    start: Opened | None = None
    """Published weights that the user wants to start from."""
    streamed: bool = False
    """Whether the images can be read from front to back only."""
    labels: tuple[str, ...] = ()
    """The names of the classes."""
    aspect: float = 1.0
    """Height by width of the squarest image, where all are wide or all are upright; else 1: what is
    of that shape holds any of them without making it smaller."""
    object_side: float | None = None
    """Of boxes: the median of the sides of squares of their areas, in pixels of their images."""
    object_share: float | None = None
    """The median of the same as shares of their images' longer sides."""
    rate: float = math.inf
    """FLOP/s of a matrix product at this moment, in the precision that a run takes here: what else
    the machine computes counts. Endless where nobody has looked."""


def facts(
    data: str, source: Source, start: Opened | None = None, *, streamed: int | None = None
) -> Facts:
    """Look at a source and the machine. A damaged image is no reason to stop here.

    Of a stream, `source` holds a few images and `streamed` is how many count as an epoch.
    """
    device = pick_device("auto")
    precision = native_precision(device)
    step = max(1, len(source) // LOOKED_AT)
    sides, aspects, modes = [], [], set()
    for i in range(0, len(source), step):
        try:
            image = source.load(i)
        except UnreadableImage:
            continue
        sides.append(min(image.size))
        aspects.append(image.height / image.width)
        modes.add(image.mode)
    objects = _objects(source)
    return Facts(
        data=data,
        images=len(source) if streamed is None else streamed,
        classes=len(source.targets.names),
        channels=1 if modes == {"L"} else 3,
        side=int(median(sides)) if sides else 224,
        gpu=device.type == "cuda",
        bfloat16=precision == "bfloat16",
        start=start,
        streamed=streamed is not None,
        labels=source.targets.names,
        aspect=_squarest(aspects),
        object_side=median(side for side, _ in objects) if objects else None,
        object_share=median(share for _, share in objects) if objects else None,
        rate=matrix_rate(getattr(torch, precision), device, size=_PRODUCT, seconds=0.05),
    )


def _squarest(aspects: list[float]) -> float:
    """Of images that are all wide, or all upright; 1 where they are of both kinds, or there is
    none.

    >>> _squarest([0.5, 0.75]), _squarest([2.0, 1.5]), _squarest([0.5, 1.5]), _squarest([])
    (0.75, 1.5, 1.0, 1.0)
    """
    return max(min(aspects), min(1.0, max(aspects))) if aspects else 1.0


def _objects(source: Source) -> list[tuple[float, float]]:
    """Of boxes how large they are: pixels, and the share of their image's longer side."""
    boxes, found = source.targets, list[tuple[float, float]]()
    if not isinstance(boxes, Boxes):
        return found
    for i in range(0, len(source), max(1, len(source) // _MEASURED)):
        corners = boxes.of(i).corners
        try:
            size = boxes.size(i)
        except UnreadableImage:
            continue
        sides = np.sqrt((corners[:, 2:] - corners[:, :2]).prod(axis=1) * math.prod(size))
        found += [(side, side / max(size)) for side in sides.tolist()]
    return found
