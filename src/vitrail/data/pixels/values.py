"""The values in a mask's file as they are stored: no pixel of them is a colour.

`read_image` shows a picture; here a palette's numbers stay numbers, and nothing is composited,
turned or converted, but for a TIFF, which its decoder turns as EXIF says. As there, only known
formats reach a decoder, and size is judged by the header.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from vitrail.data.pixels.decode import (
    LYING,
    MAX_SIDE,
    ORIENTATION_TAG,
    UnreadableImage,
    file_name,
    orientation_of,
    reason_of,
)
from vitrail.data.sources.formats import FORMATS
from vitrail.errors import DataError

Values = Int32[np.ndarray, "h w"] | UInt8[np.ndarray, "h w"] | UInt8[np.ndarray, "h w 3"]
"""One number a pixel, or a colour (red, green, blue)."""

_MOST_PIXELS = 64_000_000
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
"""Chunks of a PNG that may hold EXIF data, as such, as a "raw profile", or as XMP."""
_MOST_TEXT = 1 << 24


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
        return (self.size[1], self.size[0]) if self.orientation in LYING else self.size


def read_header(file: Path) -> Header:
    """Raises `UnreadableImage` where there is none."""
    try:
        with _opened(file) as (image, stream):
            height, width, mode = image.height, image.width, image.mode
            kind = image.format or ""
            if kind == "TIFF" and _tag(image) in LYING:
                height, width = width, height  # Pillow says what is shown
            if kind == "PNG" and not getattr(image, "is_animated", False):
                image.info.update(_behind(stream))
            return Header((height, width), mode, kind, orientation_of(image))
    except Exception as error:  # whatever a decoder throws, the file is at fault
        raise UnreadableImage(reason_of(error), file_name(file)) from error


def read_values(file: Path, *, colours: bool = False) -> Values:
    """The values of a mask's file; with `colours`, those of a palette are its colours.

    Raises `UnreadableImage`, with the reason, for whatever does not give all of its pixels, and for
    values that are no whole numbers.
    """
    try:
        with _opened(file) as (image, _):
            image.load()
            return _values(image, colours)
    except Exception as error:  # whatever a decoder throws, the file is at fault
        raise UnreadableImage(reason_of(error), file_name(file)) from error


def read_palette(file: Path) -> UInt8[np.ndarray, "k 3"] | None:
    """The colours of a file's palette; None where it has none. Raises as `read_values` does."""
    try:
        with _opened(file) as (image, _):
            found = image.getpalette("RGB") if image.mode == "P" else None
            return None if found is None else np.array(found, np.uint8).reshape(-1, 3)
    except Exception as error:  # whatever a decoder throws, the file is at fault
        raise UnreadableImage(reason_of(error), file_name(file)) from error


@contextmanager
def _opened(file: Path) -> Iterator[tuple[Image.Image, BinaryIO]]:
    """The image, whose pixels are not decoded yet, and its file."""
    if not file.is_file():
        raise UnreadableImage("it is not a regular file" if file.exists() else "it is not there")
    # Of a file that Pillow opened itself, it would map an uncompressed TIFF into memory, with its
    # sides exchanged where EXIF says that it lies.
    with file.open("rb") as stream, Image.open(stream, formats=FORMATS) as image:
        width, height = image.size
        if width * height > _MOST_PIXELS or max(width, height) > MAX_SIDE:
            raise UnreadableImage(
                f"its header claims {width} x {height} pixels, more than the limit of "
                f"{_MOST_PIXELS} in all and {MAX_SIDE} a side"
            )
        yield image, stream


def _tag(image: Image.Image) -> object:
    """The orientation in a TIFF's own tags, by which Pillow exchanges sides as it opens it; by what
    XMP says it does so later.
    """
    return image.tag_v2.get(ORIENTATION_TAG) if isinstance(image, TiffImageFile) else None


def _behind(stream: BinaryIO) -> dict[Any, Any]:
    """What the texts of a PNG say that lie behind its pixels, which are skipped: Pillow's `info` of
    a PNG that has nothing else.
    """
    at, seen = len(_SIGNATURE), False
    found: list[bytes] = []
    size = 0
    while len(head := _read_at(stream, at, 8)) == 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind == b"IEND":
            break
        seen = seen or kind == b"IDAT"
        if seen and kind in _TEXTS and size + length <= _MOST_TEXT:
            found.append(_read_at(stream, at, length + 12))
            size += length
        at += length + 12
    if not found:
        return {}
    one = _read_at(stream, 0, len(_SIGNATURE) + 25)  # with the size
    try:
        pixels = b"\0\0\0\0IDAT\x35\xaf\x06\x1e"
        with Image.open(io.BytesIO(one + b"".join(found) + pixels), formats=("PNG",)) as image:
            return image.info
    except Exception:  # as where it is decoded: what is damaged tells nothing
        return {}


def _read_at(stream: BinaryIO, at: int, size: int) -> bytes:
    # Past the buffer: a large image has thousands of chunks, and eight bytes of each are wanted.
    return os.pread(stream.fileno(), size, at)


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
