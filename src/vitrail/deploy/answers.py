"""What a model says of images, as files: a mask with a palette, and what it looks like."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int16, UInt8
from PIL import Image

from vitrail.data.pixels.decode import AnyPicture, eight_bits, read_image
from vitrail.errors import DataError, UsageError
from vitrail.tasks import Segmentation

_OPACITY = 0.5
MOST_IN_A_PALETTE = 256


def write_answer(answer: Any, picture: Path, out: Path, name: str) -> dict[str, str]:
    """Write `out/NAME.png`, the mask at the image's own size, and `out/NAME-overlay.jpg`; where
    they are, by what they are.

    The mask's values are class indices: 8 bits and a palette, 16 bits for more than 256 classes.
    Raises `UsageError` for an answer that is no mask and for a place that would replace the image,
    `DataError` where nothing can be written.
    """
    if not isinstance(answer, Segmentation):
        raise UsageError("--out is for masks, and this run gives none: leave it out")
    mask_file, overlay_file = out / f"{name}.png", out / f"{name}-overlay.jpg"
    if picture.resolve() in (mask_file.resolve(), overlay_file.resolve()):
        raise UsageError(f"{mask_file} would replace the image itself: choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        mask_image(answer).save(mask_file)
        overlay(read_image(picture), answer).save(overlay_file, quality=90)
    except OSError as error:
        raise DataError(f"cannot write to {out}: {error.strerror or error}") from error
    return {"mask": str(mask_file), "overlay": str(overlay_file)}


def mask_image(answer: Segmentation) -> Image.Image:
    """The mask as an image of class indices."""
    if len(answer.names) > MOST_IN_A_PALETTE:
        return Image.fromarray(answer.mask.astype(np.uint16))
    image = Image.fromarray(answer.mask.astype(np.uint8), "P")
    image.putpalette(palette(len(answer.names)).tobytes())
    return image


def overlay(picture: AnyPicture, answer: Segmentation) -> Image.Image:
    """The picture, in colour, with half of each pixel's colour its class's; the first class, which
    is mostly the background, stays as it is where it is called so.
    """
    image = eight_bits(read_image(picture), None).convert("RGB")
    return Image.fromarray(coloured(np.asarray(image), answer.mask, answer.names))


def coloured(
    pixels: UInt8[np.ndarray, "h w 3"], mask: Int16[np.ndarray, "h w"], names: tuple[str, ...]
) -> UInt8[np.ndarray, "h w 3"]:
    """Pixels mixed with the colours of their classes; without one, and of background, as before."""
    colours = palette(len(names))
    shown = pixels.copy()
    plain = mask < 0
    if names and names[0].lower() in ("background", "other", "unlabeled", "void"):
        plain = plain | (mask == 0)
    mixed = (1 - _OPACITY) * pixels + _OPACITY * colours[mask.clip(min=0)]
    shown[~plain] = mixed.astype(np.uint8)[~plain]
    return shown


def palette(classes: int) -> UInt8[np.ndarray, "c 3"]:
    """A colour for each class: Pascal VOC's, whose first one is black.

    >>> palette(3).tolist()
    [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
    """
    index = np.arange(classes)
    colours = np.zeros((classes, 3), np.int64)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
    return colours.astype(np.uint8)
