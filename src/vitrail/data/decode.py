"""One image file in, the right RGB pixels out, or one error that says why not.

- Only the formats in FORMATS ever reach a decoder, and only regular files are opened.
- Size is judged from the header, before any pixel is decoded.
- The EXIF orientation is applied; of animations and multi-page files the first frame is taken.
- Transparency is composited on a background colour.
- Deep greys are scaled to 8 bits, never clipped (`_eight_bits` gives the rule).
- ICC profiles are ignored: pixels are taken as sRGB, as the published checkpoints' were.

`read_image` gives a Pillow image. `read_pixels` gives an array, no larger than training needs it.
Plain JPEGs it decodes by simplejpeg where that is installed, whose pixels are Pillow's, bit by bit,
for both wrap libjpeg-turbo: an array takes it two thirds of the time. Whatever simplejpeg does not
decode without a complaint is Pillow's to judge.
"""

import io
import os
import stat
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Num, UInt8
from PIL import Image, ImageFile, UnidentifiedImageError

from vitrail.data.formats import FORMATS, HEAD_BYTES, image_format, unread
from vitrail.errors import DataError

try:
    import simplejpeg
except ImportError:  # of the extra `data`; without it, the same pixels
    simplejpeg = None

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

_MOST_JPEG_BYTES = 256 * 2**20
"""Larger files are decoded as they are read."""

# What Pillow only warns of is an error here (a huge image) or harmless (a damaged EXIF tag). The
# filter is set once: to set it around each call would not be safe in threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


class UnreadableImage(DataError):
    """An image that cannot be turned into pixels; `reason` says why, without the file's name."""

    def __init__(self, reason: str, name: str | None = None) -> None:
        super().__init__(f"cannot read the image {name}: {reason}" if name else reason)
        self.reason = reason
        self.name = name


class Slice(NamedTuple):
    """An encoded image inside of a larger file, such as a member of a tar archive."""

    file: Path
    start: int
    """Its first byte."""
    size: int
    """Its length in bytes."""


Encoded = Path | bytes | Slice
"""An encoded image: a file, its content, or a part of a file."""


def read_image(
    file: Encoded | BinaryIO,
    *,
    max_pixels: int = 64_000_000,
    background: tuple[int, int, int] = (255, 255, 255),
) -> Image.Image:
    """Decode the first frame of `file` to an upright image of mode RGB.

    `file` is an encoded image, or a binary stream with one (left open). `max_pixels` bounds width
    times height; Pillow itself goes no higher than 178,956,970. `background` is the RGB colour
    under transparent pixels.

    Raises UnreadableImage, with the reason, for whatever does not give all of its pixels.
    """
    try:
        with _stream(file) as stream:
            return _decode(stream, max_pixels, background)
    except Exception as error:  # whatever a decoder throws, the file is at fault
        raise UnreadableImage(_reason(error), file_name(file)) from error


def read_pixels(
    file: Encoded,
    *,
    mode: str = "RGB",
    shown: tuple[int, int] | None = None,
    fast: bool = False,
    max_pixels: int = 64_000_000,
) -> UInt8[np.ndarray, "h w c"]:
    """The pixels of `read_image`, in mode RGB or L; at the size that `shown` asks for.

    `shown` (height, width) is what a model takes: an image of more than twice that is reduced, by
    the whole factor that `reduction` gives. Each pixel is then the average of a block of pixels;
    with `fast`, a JPEG is reduced by 2, 4 or 8 of that factor while it is decoded, which takes a
    fraction of the time and gives nearly the same (benchmarks/decode.py).

    Raises UnreadableImage as `read_image` does.
    """
    try:
        with _stream(file) as stream, _opened(stream) as image:
            _check_size(image, max_pixels)
            if image.format in ("JPEG", "MPO"):
                return _read_jpeg(image, stream, mode, shown, fast)
            whole = _upright_rgb(image, _WHITE)
            return _array(reduced(whole if mode == "RGB" else whole.convert(mode), shown))
    except Exception as error:  # whatever a decoder throws, the file is at fault
        raise UnreadableImage(_reason(error), file_name(file)) from error


def reduction(height: int, width: int, shown: tuple[int, int]) -> int:
    """By which whole factor an image may be reduced to have at least twice `shown` (height, width).

    A crop of a quarter of the area, or more, then has at least as many pixels as a model takes.
    """
    return max(1, min(height // (2 * shown[0]), width // (2 * shown[1])))


def reduced(image: Image.Image, shown: tuple[int, int] | None) -> Image.Image:
    """The image by that factor smaller: each pixel the exact average of a block of them."""
    factor = reduction(image.height, image.width, shown) if shown else 1
    return image.reduce(factor) if factor > 1 else image


def _stream(file: Encoded | BinaryIO) -> AbstractContextManager[BinaryIO]:
    if isinstance(file, bytes):
        return io.BytesIO(file)
    if isinstance(file, Slice):
        return io.BytesIO(_part(file))
    if not isinstance(file, Path):
        return nullcontext(file)
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise UnreadableImage("it is not a regular file")
    if found.st_size == 0:
        raise UnreadableImage("it is empty")
    return file.open("rb")


def _part(part: Slice) -> bytes:
    with _stream(part.file) as stream:
        if part.start + part.size > stream.seek(0, os.SEEK_END):
            raise UnreadableImage("the file that it lies in ends before it does")
        stream.seek(part.start)
        return stream.read(part.size)


def file_name(file: Encoded | BinaryIO | None) -> str | None:
    """The file's name where it is known, with bytes that are not UTF-8 made printable."""
    if isinstance(file, Slice):
        return f"{file_name(file.file)}, bytes {file.start} to {file.start + file.size}"
    if isinstance(file, Path):
        return os.fsencode(file).decode("utf-8", "backslashreplace")
    return getattr(file, "name", None)


_WHITE = (255, 255, 255)


def _decode(stream: BinaryIO, max_pixels: int, background: tuple[int, int, int]) -> Image.Image:
    with _opened(stream) as image:
        _check_size(image, max_pixels)
        return _upright_rgb(image, background)


def _opened(stream: BinaryIO) -> ImageFile.ImageFile:
    try:
        return Image.open(stream, formats=FORMATS)
    except UnidentifiedImageError:
        stream.seek(0)
        form = image_format(stream.read(HEAD_BYTES))
        if form is None or form in FORMATS:
            raise
        name, reason = unread(form)
        raise UnreadableImage(f"its content is {name}, {reason}") from None


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        raise UnreadableImage(
            f"its header claims {width} x {height} pixels, more than the limit "
            f"of {max_pixels} in all and {MAX_SIDE} a side"
        )


def _upright_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    image.load()
    return _upright(_rgb(image, background), _orientation(image))


def _read_jpeg(
    image: Image.Image,
    stream: BinaryIO,
    mode: str,
    shown: tuple[int, int] | None,
    fast: bool,
) -> UInt8[np.ndarray, "h w c"]:
    """An opened JPEG, of which nothing is decoded yet."""
    (width, height), orientation = image.size, _orientation(image)
    upright = (width, height) if orientation in _LYING else (height, width)
    factor = reduction(*upright, shown) if shown else 1
    scale = max(s for s in (8, 4, 2, 1) if s <= factor) if fast else 1
    size = -(-height // scale), -(-width // scale)
    found = _by_simplejpeg(image.mode, stream, mode, scale, size)
    if found is not None and scale == factor:
        return np.ascontiguousarray(_turned(found, orientation))
    if found is not None:
        whole = Image.fromarray(found.squeeze(2) if mode == "L" else found)
    else:
        if scale > 1:
            assert isinstance(image, ImageFile.ImageFile)
            image.draft(image.mode, (width // scale, height // scale))
        image.load()
        whole = image if image.mode == "RGB" else _rgb(image, _WHITE)
    whole = _upright(whole if whole.mode == mode else whole.convert(mode), orientation)
    return _array(whole.reduce(factor // scale) if factor >= 2 * scale else whole)


def _by_simplejpeg(
    stored: str, stream: BinaryIO, mode: str, scale: int, size: tuple[int, int]
) -> UInt8[np.ndarray, "h w c"] | None:
    """The pixels of a JPEG that is `stored` as RGB or L, at (height, width); None: ask Pillow."""
    # The luma of an RGB image is not the one that a JPEG holds: Pillow computes it anew.
    if simplejpeg is None or stored not in ("RGB", "L") or (stored, mode) == ("RGB", "L"):
        return None
    if stream.seek(0, os.SEEK_END) > _MOST_JPEG_BYTES:
        return None
    stream.seek(0)
    try:
        found = simplejpeg.decode_jpeg(
            stream.read(),
            colorspace="RGB" if mode == "RGB" else "GRAY",
            min_height=size[0],
            min_width=size[1],
            min_factor=scale,
        )
    except Exception:  # also where libjpeg only warns: what is a defect, Pillow decides
        return None
    return found if found.shape[:2] == size else None


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


_LYING = (5, 6, 7, 8)
"""Orientations in which width and height are exchanged."""


def _turned(
    stored: UInt8[np.ndarray, "_h _w c"], orientation: int
) -> UInt8[np.ndarray, "_h2 _w2 c"]:
    """What `_upright` does, of an array."""
    if orientation not in _UPRIGHT:
        return stored
    if orientation in _LYING:
        stored = stored.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return stored[::rows, ::columns]


def _array(image: Image.Image) -> UInt8[np.ndarray, "h w c"]:
    pixels = np.array(image)  # and not asarray, whose arrays cannot be written to
    return pixels[..., None] if pixels.ndim == 2 else pixels


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
