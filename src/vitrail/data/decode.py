"""One image file in, the right RGB pixels out, or one error that says why not.

- Only the formats in FORMATS ever reach a decoder, and only regular files are opened.
- Size is judged from the header, before any pixel is decoded.
- The EXIF orientation is applied; of animations and multi-page files the first frame is taken.
- Transparency is composited on a background colour.
- Deep greys are scaled to 8 bits, never clipped (`_eight_bits` gives the rule).
- ICC profiles are ignored: pixels are taken as sRGB, as the published checkpoints' were.
"""

import io
import os
import stat
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Num, UInt8
from PIL import Image, UnidentifiedImageError, features

from vitrail.errors import DataError

_AVIF = features.check("avif")

# Pillow opens an MPO, a JPEG with more pictures behind the first, through its JPEG plugin.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", *(("AVIF",) if _AVIF else ()))

IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    *((".avif",) if _AVIF else ()),
)

MAX_SIDE = 65_535  # the longest that a JPEG can state; more is no picture that a model can use

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What Pillow only warns of is an error here (a huge image) or harmless (a damaged EXIF tag). The
# filter is set once: to set it around each call would not be safe in threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


class UnreadableImage(DataError):
    """An image that cannot be turned into pixels; `reason` says why, without the file's name."""

    def __init__(self, reason: str, name: str | None = None) -> None:
        super().__init__(f"cannot read the image {name}: {reason}" if name else reason)
        self.reason = reason


def read_image(
    file: Path | bytes | BinaryIO,
    *,
    max_pixels: int = 64_000_000,
    background: tuple[int, int, int] = (255, 255, 255),
) -> Image.Image:
    """Decode the first frame of `file` to an upright image of mode RGB.

    `file` is a path, an encoded image, or a binary stream (left open). `max_pixels` bounds width
    times height; Pillow itself goes no higher than 178,956,970. `background` is the RGB colour
    under transparent pixels.

    Raises UnreadableImage, with the reason, for whatever does not give all of its pixels.
    """
    try:
        with _stream(file) as stream:
            return _decode(stream, max_pixels, background)
    except Exception as error:  # whatever a decoder throws, the file is at fault
        raise UnreadableImage(_reason(error), _name(file)) from error


def _stream(file: Path | bytes | BinaryIO) -> AbstractContextManager[BinaryIO]:
    if isinstance(file, bytes):
        return io.BytesIO(file)
    if not isinstance(file, Path):
        return nullcontext(file)
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise UnreadableImage("it is not a regular file")
    if found.st_size == 0:
        raise UnreadableImage("it is empty")
    return file.open("rb")


def _name(file: Path | bytes | BinaryIO) -> str | None:
    """The file's name where it is known, with bytes that are not UTF-8 made printable."""
    if isinstance(file, Path):
        return os.fsencode(file).decode("utf-8", "backslashreplace")
    return getattr(file, "name", None)


def _decode(stream: BinaryIO, max_pixels: int, background: tuple[int, int, int]) -> Image.Image:
    with Image.open(stream, formats=FORMATS) as image:
        width, height = image.size
        if width * height > max_pixels or max(width, height) > MAX_SIDE:
            raise UnreadableImage(
                f"its header claims {width} x {height} pixels, more than the limit "
                f"of {max_pixels} in all and {MAX_SIDE} a side"
            )
        image.load()
        return _upright(_rgb(image, background), _orientation(image))


def _reason(error: Exception) -> str:
    match error:
        case UnreadableImage():
            return error.reason
        case UnidentifiedImageError():
            return f"its content is none of the formats {', '.join(FORMATS)}"
        case OSError(strerror=str(text)):
            return text.lower()
        case Image.DecompressionBombError() | Image.DecompressionBombWarning():
            return "its header claims more pixels than any image that can be read"
        case MemoryError():
            return "there is not enough memory to decode it"
    return f"it is damaged or unsupported ({str(error) or type(error).__name__})"


def _orientation(image: Image.Image) -> int:
    """EXIF's 1 to 8; damaged EXIF data spoils no pixel and counts as upright."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = _UPRIGHT.get(orientation)
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    below = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(below, image.convert("RGBA")).convert("RGB")


def _eight_bits(grey: Num[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w"]:
    """Deep grey values as uint8.

    Integers within 0..65535 are scaled by that range, so that 65535 becomes 255. Wider integers
    and floats are scaled by the least and the greatest finite value of this image; what is not
    finite becomes 0, and so does an image of one value.
    """
    values = grey.astype(np.float64)
    finite = np.isfinite(values)
    low = values.min(where=finite, initial=np.inf)
    high = values.max(where=finite, initial=-np.inf)
    if grey.dtype.kind in "iu" and low >= 0 and high <= 65535:
        low, high = 0, 65535
    if low >= high:
        return np.zeros(grey.shape, np.uint8)
    values[~finite] = low
    return np.rint((values - low) / (high - low) * 255).astype(np.uint8)
