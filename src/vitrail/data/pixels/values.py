"""The values in a mask's file as they are stored: no pixel of them is a colour.

`read_image` shows a picture; here a palette's numbers stay numbers, and nothing is composited,
turned or converted. As there, only known formats reach a decoder, and size is judged by the header.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

from vitrail.data.pixels.decode import MAX_SIDE, UnreadableImage, file_name, reason_of
from vitrail.data.sources.formats import FORMATS
from vitrail.errors import DataError

Values = Int32[np.ndarray, "h w"] | UInt8[np.ndarray, "h w"] | UInt8[np.ndarray, "h w 3"]
"""One number a pixel, or a colour (red, green, blue)."""

_MOST_PIXELS = 64_000_000
_ORIENTATION_TAG = 0x0112
_LYING = (5, 6, 7, 8)
"""Orientations with exchanged sides."""


class Header(NamedTuple):
    """What a file says of its picture before a pixel of it is decoded."""

    size: tuple[int, int]
    """(height, width), as stored."""
    mode: str
    """Pillow's: "L", "P", "I;16", "RGB"."""
    format: str
    """One of FORMATS."""
    orientation: int = 1
    """By EXIF: 1 is upright."""

    @property
    def turned(self) -> bool:
        """Whether it is shown otherwise than it is stored."""
        return self.orientation in range(2, 9)

    @property
    def shown(self) -> tuple[int, int]:
        """(height, width) of what `read_image` gives."""
        return (self.size[1], self.size[0]) if self.orientation in _LYING else self.size


def read_header(file: Path) -> Header:
    """Raises `UnreadableImage` where there is none."""
    try:
        with _opened(file) as image:
            # Of a PNG, Pillow would decode the pixels to look for EXIF data behind them.
            has_exif = image.format != "PNG" or "exif" in image.info
            orientation = image.getexif().get(_ORIENTATION_TAG, 1) if has_exif else 1
            return Header((image.height, image.width), image.mode, image.format or "", orientation)
    except Exception as error:  # whatever a decoder throws, the file is at fault
        raise UnreadableImage(reason_of(error), file_name(file)) from error


def read_values(file: Path, *, colours: bool = False) -> Values:
    """The values of a mask's file; with `colours`, those of a palette are its colours.

    Raises `UnreadableImage`, with the reason, for whatever does not give all of its pixels, and for
    values that are no whole numbers.
    """
    try:
        with _opened(file) as image:
            image.load()
            return _values(image, colours)
    except Exception as error:  # whatever a decoder throws, the file is at fault
        raise UnreadableImage(reason_of(error), file_name(file)) from error


def read_palette(file: Path) -> UInt8[np.ndarray, "k 3"] | None:
    """The colours of a file's palette; None where it has none. Raises as `read_values` does."""
    try:
        with _opened(file) as image:
            found = image.getpalette("RGB") if image.mode == "P" else None
            return None if found is None else np.array(found, np.uint8).reshape(-1, 3)
    except Exception as error:  # whatever a decoder throws, the file is at fault
        raise UnreadableImage(reason_of(error), file_name(file)) from error


def _opened(file: Path) -> Image.Image:
    if not file.is_file():
        raise UnreadableImage("it is not a regular file" if file.exists() else "it is not there")
    image = Image.open(file, formats=FORMATS)
    width, height = image.size
    if width * height > _MOST_PIXELS or max(width, height) > MAX_SIDE:
        image.close()
        raise UnreadableImage(
            f"its header claims {width} x {height} pixels, more than the limit of {_MOST_PIXELS} "
            f"in all and {MAX_SIDE} a side"
        )
    return image


def _values(image: Image.Image, colours: bool) -> Values:
    if image.mode == "P" and colours:
        return np.asarray(image.convert("RGB"))
    if image.mode in ("L", "P"):
        return np.asarray(image)
    if image.mode == "1":
        return np.asarray(image.convert("L")) // np.uint8(255)
    if image.mode in ("LA", "PA", "La"):
        return np.asarray(image)[..., 0]
    if image.mode.startswith("I"):
        return np.asarray(image).astype(np.int32)
    if image.mode == "F":
        values = np.asarray(image)
        if not (np.isfinite(values).all() and (values == np.rint(values)).all()):
            raise DataError("its values are fractions, and a class is a whole number")
        return values.clip(-(2**31), 2**31 - 1).astype(np.int32)
    return np.asarray(image if image.mode in ("RGB", "RGBA") else image.convert("RGB"))[..., :3]
