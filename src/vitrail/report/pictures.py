"""Pictures that live inside the page: small, as data URIs."""

import base64
import io
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vitrail.data import Source, UnreadableImage
from vitrail.data.pixels.decode import eight_bits
from vitrail.data.views.preprocess import Preprocess

_THUMBNAIL = 160
"""Pixels of a thumbnail's longer side."""
_SMALL = 64
"""An image up to this size is shown pixel by pixel, not blurred up."""


class Picture(NamedTuple):
    """An `<img>`, and the size in pixels that it has by itself."""

    uri: str
    width: int
    height: int

    @property
    def small(self) -> bool:
        """Whether a browser should show its pixels as squares."""
        return max(self.width, self.height) <= _SMALL


def thumbnail(source: Source, i: int, preprocess: Preprocess) -> Picture | None:
    """Image `i`, reduced, deep greys as the model sees them; None if it cannot be read any more."""
    try:
        image = eight_bits(source.load(i), preprocess.grey_range)
    except UnreadableImage:
        return None
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return embed(image, lossless=max(image.size) <= _SMALL)


def embed(image: Image.Image, lossless: bool) -> Picture:
    """The image as WebP in a data URI."""
    stream = io.BytesIO()
    image.save(stream, "WEBP", lossless=lossless, quality=82, method=4)
    text = base64.b64encode(stream.getvalue()).decode()
    return Picture(f"data:image/webp;base64,{text}", *image.size)


def seen(source: Source, i: int, preprocess: Preprocess) -> UInt8[np.ndarray, "h w 3"] | None:
    """Image `i` as the model sees it, before normalisation, in colour."""
    try:
        view = preprocess.view(source.load(i))
    except UnreadableImage:
        return None
    return np.broadcast_to(view.transpose(1, 2, 0), (*view.shape[1:], 3)).copy()


def cut(
    pixels: UInt8[np.ndarray, "h w 3"], patch: tuple[int, int], grid: tuple[int, int]
) -> Picture:
    """The image's patches, `grid` (rows, columns) of them, apart from one another.

    What the grid has beyond the image is padding, and black.
    """
    (ph, pw), (gh, gw) = patch, grid
    gap = max(1, round(gw * pw / 120))
    padded = np.zeros((gh * ph, gw * pw, 3), np.uint8)
    padded[: pixels.shape[0], : pixels.shape[1]] = pixels[: gh * ph, : gw * pw]
    canvas = np.zeros((gh * (ph + gap) - gap, gw * (pw + gap) - gap, 4), np.uint8)
    for row in range(gh):
        for column in range(gw):
            top, left = row * (ph + gap), column * (pw + gap)
            place = canvas[top : top + ph, left : left + pw]
            place[..., :3] = padded[row * ph :, column * pw :][:ph, :pw]
            place[..., 3] = 255
    return embed(Image.fromarray(canvas), lossless=True)
