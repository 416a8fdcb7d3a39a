"""How far views that a graph makes are from those that the model was measured with."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vitrail.data.views.preprocess import Preprocess
from vitrail.errors import UsageError

MakeViews = Callable[[UInt8[np.ndarray, "b h w c"]], UInt8[np.ndarray, "b c view_h view_w"]]


class PixelDifference(NamedTuple):
    """Of views from a runtime against Pillow's, in grey levels of 255."""

    images: int
    most: int
    """Levels, of any pixel."""
    beyond_one: float
    """The share of pixels, of one channel each, that are off by more than one level."""
    at_all: float
    """The share that are not the same."""


def pixel_difference(
    images: Iterable[Image.Image], preprocess: Preprocess, views: MakeViews
) -> PixelDifference:
    """Over decoded images, as `read_image` gives them, what `views` makes of each against
    `preprocess.view`. Raises `UsageError` where there is no image.
    """
    counts = np.zeros(256, np.int64)
    number = 0
    for number, image in enumerate(images, 1):  # noqa: B007
        pixels = np.array(preprocess.convert(image))
        made = views(pixels.reshape(1, *pixels.shape[:2], preprocess.channels))[0]
        off = np.abs(made.astype(np.int64) - preprocess.view(image))
        counts += np.bincount(off.ravel(), minlength=256)
    if not number:
        raise UsageError("the difference between two ways of resizing is measured on images: none")
    shares = counts / counts.sum()
    return PixelDifference(
        number, int(counts.nonzero()[0].max()), float(shares[2:].sum()), float(shares[1:].sum())
    )
