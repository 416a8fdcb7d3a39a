"""Scaled views for what lies in an image: scale jitter, and a crop that may reach beyond it.

The image is scaled as it is when it is judged (so that it fits into a view that is letterboxed, and
covers any other), times a factor; a window of the view's size is cut at a random place. Where the
image is smaller than the window it lies at a random place of it, and what is around it is
background, which no target is of. The usual augmentation of dense prediction
(DeepLab, arXiv 1706.05587, section 4.1; large-scale jitter, 2012.07177).
"""

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from vitrail.data.views.preprocess import Preprocess, pixels
from vitrail.data.views.seen import Seen

TRIES = 10
"""Windows that are drawn for an image, for one that is not nearly all of one class."""
DRAWS = 2 + TRIES * 3


def window(
    image: tuple[int, int],
    view: tuple[int, int],
    scale: tuple[float, float],
    draws: Float[np.ndarray, " 3"],
    zoom: float | None = None,
) -> tuple[float, float, float, float]:
    """(left, top, right, bottom), in an image of (height, width) pixels, of what a view of
    (height, width) pixels shows; it may reach beyond the image. `zoom`: how many pixels of the view
    one of the image is at a factor of 1 (`Preprocess.zoom`); None: so many that it covers the view.

    >>> window((100, 200), (50, 50), (1.0, 1.0), np.array([0.5, 0.5, 0.0]))
    (50.0, 0.0, 150.0, 100.0)
    """
    factor = scale[0] + (scale[1] - scale[0]) * float(draws[0])
    per_pixel = factor * (zoom or max(view[0] / image[0], view[1] / image[1]))
    left, right = _span(image[1], view[1], per_pixel, float(draws[1]))
    top, bottom = _span(image[0], view[0], per_pixel, float(draws[2]))
    return left, top, right, bottom


def _span(image: int, view: int, per_pixel: float, draw: float) -> tuple[float, float]:
    """Where a window begins and ends along one axis; an image that is smaller than it has whole
    pixels of it.
    """
    if image * per_pixel < view:
        covered = max(1, round(image * per_pixel))
        pixel = image / covered
        start = -int(draw * (view - covered + 1)) * pixel
        return start, start + view * pixel
    start = draw * (image - view / per_pixel)
    return start, start + view / per_pixel


def shown(
    image: Image.Image, box: tuple[float, float, float, float], preprocess: Preprocess
) -> tuple[UInt8[np.ndarray, "c h w"], Seen]:
    """The part `box` of a decoded image at the size of `preprocess`, and how it lies in the image.

    Scaled with antialiasing. Raises as `Preprocess.convert` does.
    """
    image = preprocess.convert(image)
    height, width = preprocess.size
    seen = Seen.of_box(box, (image.height, image.width), preprocess.size)
    (x0, y0), (x1, y1) = seen.there(np.array([[0.0, 0.0], [1.0, 1.0]])).tolist()
    left, top = max(0, round(x0)), max(0, round(y0))
    right, bottom = min(width, round(x1)), min(height, round(y1))
    inside = (
        *(max(0.0, box[0]), max(0.0, box[1])),
        *(min(float(image.width), box[2]), min(float(image.height), box[3])),
    )
    part = image.resize(
        (right - left, bottom - top), preprocess.resampling, box=inside, reducing_gap=2.0
    )
    if part.size == (width, height):
        return pixels(part), seen
    canvas = Image.new(part.mode, (width, height), (preprocess.background,) * preprocess.channels)
    canvas.paste(part, (left, top))
    return pixels(canvas), seen


def dominated(mask: Int[np.ndarray, "h w"], most: float) -> bool:
    """Whether one class has more than the share `most` of the pixels of a mask that count."""
    found = mask[mask >= 0]
    return len(found) > 0 and bool(np.bincount(found).max() > most * len(found))
