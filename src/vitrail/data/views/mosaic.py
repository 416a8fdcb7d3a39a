"""Mosaic and blend: training views that show several images, with the boxes of all of them.

- `mosaic`: 2 x 2 images around a random centre (YOLOv4, arXiv 2004.10934, section 3.4)
- `blend`: another image on top, nearly half and half (mixup as detectors have it: arXiv 1902.04103;
  YOLOX, 2107.08430). Unlike `mix`, it leaves the classes of what is shown as they are.

The others may be any images of the source, and which they are is drawn for (seed, epoch, index): a
view is the same whatever shares its batch, and whoever makes it. Of one that cannot be read, a
mosaic has background in its place, and a blend nothing.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from vitrail.data.keyed import uniform
from vitrail.data.views import scaled
from vitrail.data.views.augment import AugmentConfig
from vitrail.data.views.mix import beta
from vitrail.data.views.preprocess import Preprocess
from vitrail.data.views.seen import Seen

_CENTRE = (0.25, 0.75)
"""Between these parts of the view's sides lies the centre of a mosaic."""
_ALPHA = 32.0
"""Of the Beta distribution that a blend's shares are drawn from: 0.44 to 0.56, two times of three.
Boxes of both count in full, so neither image may vanish (YOLOv5 has the same)."""

_MOSAIC_DRAWS = 2 + 3 + 4 * 3
"""The centre, three other images, and four windows."""
_BLEND_DRAWS = 1 + 1 + 3
"""The share, another image, and its window."""

View = UInt8[np.ndarray, "c h w"]
Draws = Float[np.ndarray, " _n"]
Scale = tuple[float, float]

Other = Callable[[int], Image.Image | None]
"""Decodes another image of the source; None: it cannot be read."""


class Joined(NamedTuple):
    """A view, and what it shows."""

    pixels: View
    parts: tuple[tuple[int, Seen], ...]
    """Which images of the source, and how the view, which has a part of each, lies in them."""


def joined(
    image: Image.Image,
    place: int,
    images: int,
    other: Other,
    alone: Callable[[], tuple[View, Seen]],
    preprocess: Preprocess,
    config: AugmentConfig,
    *,
    seed: int,
    epoch: int,
    index: int,
) -> Joined:
    """A view of image `place` of a source of so many `images`, or of that and others, as `config`
    has it. `alone` makes the view that the image has by itself; `index` is what draws are keyed by.

    Raises as `Preprocess.convert` does.
    """

    def draw(purpose: str, n: int) -> Draws:
        return uniform(seed, epoch, np.array([index]), purpose, n)[0]

    scale = config.scale or (1.0, 1.0)
    chance, *draws = draw("mosaic", 1 + _MOSAIC_DRAWS)
    if chance < config.mosaic:
        view = mosaic(image, place, images, other, preprocess, scale, np.array(draws))
    else:
        pixels, seen = alone()
        view = Joined(pixels, ((place, seen),))
    chance, *draws = draw("blend", 1 + _BLEND_DRAWS)
    if chance < config.blend:
        view = blend(view, images, other, preprocess, scale, np.array(draws))
    return view


def mosaic(
    image: Image.Image,
    place: int,
    images: int,
    other: Other,
    preprocess: Preprocess,
    scale: Scale,
    draws: Draws,
) -> Joined:
    """Image `place` of a source of so many `images` at the top left, and three others.

    Each covers its quadrant, or fits into it where views are letterboxed, times a factor in the
    range `scale`, as in `scaled.window`. The view has `preprocess.size`.
    """
    height, width = preprocess.size
    x, y = (
        min(max(1, round((_CENTRE[0] + (_CENTRE[1] - _CENTRE[0]) * float(part)) * side)), side - 1)
        for part, side in zip(draws[:2], (width, height), strict=True)
    )
    grey = np.uint8(preprocess.background)
    pixels = np.full((preprocess.channels, height, width), grey)
    parts = []
    for number, (left, top, right, bottom) in enumerate(
        ((0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height))
    ):
        at = place if number == 0 else _partner(draws[1 + number], images)
        shown = image if number == 0 else other(at)
        if shown is None:
            continue
        window = draws[5 + 3 * number : 8 + 3 * number]
        quadrant, seen = _window(shown, (bottom - top, right - left), preprocess, scale, window)
        pixels[:, top:bottom, left:right] = quadrant
        there = np.array([[1, 0, left], [0, 1, top], [0, 0, 1.0]])
        parts.append((at, seen.then(there)._replace(size=preprocess.size)))
    return Joined(pixels, tuple(parts))


def blend(
    view: Joined, images: int, other: Other, preprocess: Preprocess, scale: Scale, draws: Draws
) -> Joined:
    """A view with another image of a source of so many added to it.

    That one covers the view, or fits into it, times a factor in the range `scale`, as above.
    """
    at = _partner(draws[1], images)
    shown = other(at)
    if shown is None:
        return view
    size = (view.pixels.shape[1], view.pixels.shape[2])
    added, seen = _window(shown, size, preprocess, scale, draws[2:5])
    share = np.float32(beta(_ALPHA, draws[:1].astype(np.float64))[0])
    mixed = share * view.pixels + (1 - share) * added
    return Joined((mixed + np.float32(0.5)).astype(np.uint8), (*view.parts, (at, seen)))


def _partner(draw: float, images: int) -> int:
    return min(int(float(draw) * images), images - 1)


def _window(
    image: Image.Image, size: tuple[int, int], preprocess: Preprocess, scale: Scale, draws: Draws
) -> tuple[View, Seen]:
    preprocess = replace(preprocess, size=size)
    zoom = preprocess.zoom(image.height, image.width)
    box = scaled.window((image.height, image.width), size, scale, draws, zoom)
    return scaled.shown(image, box, preprocess)
