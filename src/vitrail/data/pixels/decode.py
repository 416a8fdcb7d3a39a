"""Any picture in, the right pixels out, or one error that says why not.

A picture is a file, its bytes, an open file, an image of Pillow's or an array: all go one way, and
whoever shows a model an image, in training, evaluation or use, goes it.

- Only the formats in FORMATS ever reach a decoder, and only regular files are opened.
- Size is judged from the header, before any pixel is decoded.
- The EXIF orientation is applied; of animations and multi-page files the first frame is taken.
- Transparency is composited on a background colour.
- Greys of more than 8 bits keep their values: Preprocess says which range of them 8 bits show
  (`eight_bits` is how). Of deep colours Pillow decodes the upper 8 bits only.
- ICC profiles are ignored: pixels are taken as sRGB, as the published checkpoints' were.

`read_image` gives a Pillow image. `read_pixels` gives an array of 8 bits, no larger than training
needs it.
Plain JPEGs it decodes by simplejpeg where that is installed, whose pixels are Pillow's, bit by bit,
for both wrap libjpeg-turbo: an array takes it two thirds of the time. Whatever simplejpeg does not
decode without a complaint is Pillow's to judge.
"""

import io
import os
import stat
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import numpy as np
from jaxtyping import Bool, Float64, UInt8
from PIL import Image, ImageFile, UnidentifiedImageError

from vitrail.data.pixels.quiet import pillow_is_quiet
from vitrail.data.sources.formats import FORMATS, HEAD_BYTES, image_format, unread
from vitrail.errors import DataError, UsageError

try:
    import simplejpeg
except ImportError:  # of the extra `data`; without it, the same pixels
    simplejpeg = None

MAX_SIDE = 65_535  # the longest that a JPEG can state; more is no picture that a model can use

ORIENTATION_TAG = 0x0112
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

AnyPicture = (
    Encoded | str | os.PathLike[str] | bytearray | memoryview | BinaryIO | Image.Image | np.ndarray
)
"""Whatever `read_image` takes."""


def read_image(
    picture: AnyPicture,
    *,
    max_pixels: int = 64_000_000,
    background: tuple[int, int, int] = (255, 255, 255),
) -> Image.Image:
    """A picture as an upright image: RGB, or, of greys of more than 8 bits, I (whole) or F.

    `picture` is the path of a file; its bytes; a file opened for reading in binary, which stays
    open; an image of Pillow's in any mode, opened or loaded, of which the current frame is taken
    and which is not changed; or pixels as an array, rows first, `[h w]`, `[h w 1]`, `[h w 3]` (RGB)
    or `[h w 4]` (RGBA) of uint8, or greys `[h w]` of bool, uint16, int16, int32 or floats, which
    are what a file of such greys would be. `max_pixels` bounds width times height; Pillow itself
    goes no higher than 178,956,970. `background` is the RGB colour under transparent pixels.

    What it gives it would give back: an orientation is applied once, however often it is called.

    Raises UnreadableImage, with the reason, for whatever does not give all of its pixels, and
    UsageError, with what to give, for what is no picture.
    """
    found = _opened(picture)
    try:
        if isinstance(found, Image.Image):
            with pillow_is_quiet():
                return _plain(found, max_pixels, background)
        with pillow_is_quiet(), _stream(found) as stream, _image_in(stream) as image:
            return _plain(image, max_pixels, background)
    except Exception as error:  # whatever a decoder throws, the file is at fault
        raise UnreadableImage(reason_of(error), file_name(found)) from error


def read_pixels(
    file: Encoded,
    *,
    mode: str = "RGB",
    shown: tuple[int, int] | None = None,
    fast: bool = False,
    grey_range: tuple[float, float] | None = None,
    max_pixels: int = 64_000_000,
) -> UInt8[np.ndarray, "h w c"]:
    """The pixels of `read_image`, in mode RGB or L of 8 bits; at the size that `shown` asks for.

    `shown` (height, width) is what a model takes: an image of more than twice that is reduced, by
    the whole factor that `reduction` gives. Each pixel is then the average of a block of pixels;
    with `fast`, a JPEG is reduced by 2, 4 or 8 of that factor while it is decoded, which takes a
    fraction of the time and gives nearly the same (benchmarks/decode.py). `grey_range` is that of
    `eight_bits`.

    Raises UnreadableImage as `read_image` does.
    """
    try:
        with pillow_is_quiet(), _stream(file) as stream, _image_in(stream) as image:
            if image.format in ("JPEG", "MPO"):
                _check_size(image, max_pixels)
                return _read_jpeg(image, stream, mode, shown, fast)
            whole = eight_bits(_plain(image, max_pixels, _WHITE), grey_range)
            return _array(reduced(whole if whole.mode == mode else whole.convert(mode), shown))
    except Exception as error:  # whatever a decoder throws, the file is at fault
        raise UnreadableImage(reason_of(error), file_name(file)) from error


def depth(file: Encoded) -> Literal["grey", "colour"] | None:
    """What has more than 8 bits in a file, by its header: all of its greys, which `read_image`
    keeps, or its colours (or greys with transparency), of which Pillow decodes the upper 8 bits.
    """
    try:
        with pillow_is_quiet(), _stream(file) as stream, _image_in(stream) as image:
            cut = any(";16" in str(tile[3]) for tile in image.tile)
            return "grey" if _deep(image) else "colour" if cut else None
    except Exception:  # whoever decodes it is told why
        return None


def reduction(height: int, width: int, shown: tuple[int, int]) -> int:
    """By which whole factor an image may be reduced to have at least twice `shown` (height, width).

    A crop of a quarter of the area, or more, then has at least as many pixels as a model takes.
    """
    return max(1, min(height // (2 * shown[0]), width // (2 * shown[1])))


def reduced(image: Image.Image, shown: tuple[int, int] | None) -> Image.Image:
    """The image by that factor smaller: each pixel the exact average of a block of them."""
    factor = reduction(image.height, image.width, shown) if shown else 1
    return image.reduce(factor) if factor > 1 else image


_PICTURES = (
    "a picture is a file's path, its bytes, a file opened with 'rb', an image of Pillow's, or an "
    "array, rows first: uint8 [h w], [h w 3] (RGB) or [h w 4] (RGBA), or greys [h w] of bool, "
    "uint16, int16, int32 or floats"
)
_GREYS = tuple(map(np.dtype, (np.bool_, np.uint8, np.uint16, np.int16, np.int32)))


def _opened(picture: Any) -> Encoded | BinaryIO | Image.Image:
    """Whatever the caller has, as one of three things. Raises UsageError for anything else."""
    match picture:
        case ImageFile.ImageFile(format="TIFF", tile=[_], fp=stream) if not picture.tell():
            # Not loaded yet. Pillow would map an uncompressed one into memory, with its sides
            # exchanged where EXIF says that it lies.
            return cast(BinaryIO, stream) if orientation_of(picture) in LYING else picture
        case Image.Image() | bytes() | Slice() | Path():
            return picture
        case str() | os.PathLike():
            return Path(picture)
        case bytearray() | memoryview():
            return bytes(picture)
        case np.ndarray():
            return _from_array(picture)
        case io.TextIOBase():
            raise UsageError(
                "an image cannot be read from a file opened as text: open it with 'rb'"
            )
    if callable(getattr(picture, "read", None)):
        return picture
    kind = type(picture)
    of_torch = kind.__module__.partition(".")[0] == "torch"
    # Its axes and its scale are anyone's guess: bytes, 0 to 1, or normalised.
    mend = ". Of a tensor [3 h w] of bytes: x.permute(1, 2, 0).cpu().numpy()" if of_torch else ""
    raise UsageError(f"{kind.__module__}.{kind.__qualname__} is no picture: {_PICTURES}{mend}")


def _from_array(pixels: np.ndarray) -> Image.Image:
    """An array as the image that a file of these pixels would be."""
    values = pixels[..., 0] if pixels.shape[2:] == (1,) else pixels
    colours = values.ndim == 3 and values.dtype == np.uint8 and values.shape[2] in (3, 4)
    kind = values.dtype.newbyteorder("=")
    greys = values.ndim == 2 and (kind in _GREYS or kind.kind == "f")
    if 0 in values.shape or not (greys or colours):
        mend = ""
        if values.ndim == 3 and values.shape[0] in (1, 3, 4) and values.shape[2] not in (3, 4):
            mend = ". Channels come last: x.transpose(1, 2, 0)"
        elif values.ndim == 3 and values.dtype.kind == "f":
            mend = ". Colours in 0..1 as bytes: (255 * x).round().astype('uint8')"
        elif values.ndim == 2 and values.dtype.kind in "iu":
            mend = ". Levels 0 to 255: x.astype('uint8'); deeper ones: x.astype('int32')"
        elif values.ndim == 4:
            mend = ". Give the images of a batch one by one, in a list to Predictor.many"
        shape = " ".join(map(str, pixels.shape))
        raise UsageError(f"an array of {pixels.dtype} [{shape}] is no picture: {_PICTURES}{mend}")
    if values.dtype not in (np.bool_, np.uint8):
        values = values.astype(np.float32 if values.dtype.kind == "f" else np.int32)
    return Image.fromarray(np.ascontiguousarray(values))


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


def file_name(file: Encoded | BinaryIO | Image.Image | None) -> str | None:
    """The file's name where it is known, with bytes that are not UTF-8 made printable."""
    if isinstance(file, Slice):
        return f"{file_name(file.file)}, bytes {file.start} to {file.start + file.size}"
    if isinstance(file, Path):
        return os.fsencode(file).decode("utf-8", "backslashreplace")
    name = getattr(file, "filename" if isinstance(file, Image.Image) else "name", None)
    return file_name(Path(os.fsdecode(name))) if name and isinstance(name, str | bytes) else None


_WHITE = (255, 255, 255)


def _image_in(stream: BinaryIO) -> ImageFile.ImageFile:
    """The image in a file, whose pixels are not decoded yet."""
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


def _plain(image: Image.Image, max_pixels: int, background: tuple[int, int, int]) -> Image.Image:
    """The image upright, in mode RGB, I or F, with nothing else to be done about it."""
    _check_size(image, max_pixels)
    image.load()
    if _deep(image):
        flat = image.convert("F" if image.mode == "F" else "I")
    else:
        flat = _rgb(image, background)
    upright = _upright(flat, orientation_of(image))
    upright.info = {}  # an orientation or a colour key that it still named would be applied again
    return upright


def _read_jpeg(
    image: Image.Image,
    stream: BinaryIO,
    mode: str,
    shown: tuple[int, int] | None,
    fast: bool,
) -> UInt8[np.ndarray, "h w c"]:
    """An opened JPEG, of which nothing is decoded yet."""
    (width, height), orientation = image.size, orientation_of(image)
    upright = (width, height) if orientation in LYING else (height, width)
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


def reason_of(error: Exception) -> str:
    """Why a file cannot be read, in words, whatever a decoder raised."""
    match error:
        case UnreadableImage():
            return error.reason
        case DataError():
            return str(error)
        case UnidentifiedImageError():
            return f"its content is none of the formats {', '.join(FORMATS)}"
        case OSError(strerror=str(text)):
            return text.lower()
        case Image.DecompressionBombError():
            return "its header claims more pixels than any image that can be read"
        case MemoryError():
            return "there is not enough memory to decode it"
    return f"it is damaged or unsupported ({str(error) or type(error).__name__})"


def orientation_of(image: Image.Image) -> int:
    """EXIF's 1 to 8; damaged EXIF data spoils no pixel and counts as upright.

    Of a PNG, EXIF data behind the pixels are found only once these are decoded.
    """
    try:
        # And not image.getexif(), which would decode a PNG for that.
        return int(Image.Image.getexif(image).get(ORIENTATION_TAG, 1))
    except Exception:
        return 1


LYING = (5, 6, 7, 8)
"""Orientations in which width and height are exchanged."""


def _turned(
    stored: UInt8[np.ndarray, "_h _w c"], orientation: int
) -> UInt8[np.ndarray, "_h2 _w2 c"]:
    """What `_upright` does, of an array."""
    if orientation not in _UPRIGHT:
        return stored
    if orientation in LYING:
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


def _deep(image: Image.Image) -> bool:
    return image.mode == "F" or image.mode.startswith("I")


def _rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    below = Image.new("RGBA", image.size, (*background, 255))
    above = image.convert("LA") if image.mode == "La" else image  # of which Pillow knows no other
    return Image.alpha_composite(below, above.convert("RGBA")).convert("RGB")


def eight_bits(image: Image.Image, grey_range: tuple[float, float] | None) -> Image.Image:
    """An image of `read_image` with 8 bits a channel: RGB as it is, greys of modes I and F as L.

    The first value of `grey_range` becomes 0, the second 255, and what lies outside is clipped.
    Without it, integers within 0..65535 are scaled by that range, and wider integers and floats by
    the least and the greatest finite value of this image. What is not finite becomes 0, and so does
    an image of one value that has to tell its own range.
    """
    if image.mode not in DEEP:
        return image
    grey = np.asarray(image)
    values = grey.astype(np.float64)
    finite = np.isfinite(values)
    low, high = grey_range or _own_range(values, finite, whole=image.mode == "I")
    if low >= high:
        return Image.new("L", image.size)
    values[~finite] = low
    return Image.fromarray(
        np.rint((values.clip(low, high) - low) / (high - low) * 255).astype("u1")
    )


DEEP = ("I", "F")
"""The modes of greys of more than 8 bits, whole numbers and floats, as `read_image` gives them."""


def _own_range(
    values: Float64[np.ndarray, "h w"], finite: Bool[np.ndarray, "h w"], *, whole: bool
) -> tuple[float, float]:
    low = values.min(where=finite, initial=np.inf)
    high = values.max(where=finite, initial=-np.inf)
    return (0, 65535) if whole and low >= 0 and high <= 65535 else (low, high)
