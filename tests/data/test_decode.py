"""What `read_image` makes of the images that people really have."""

import io
import os
import pickle
import re
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from vitrail.data import FORMATS, UnreadableImage, read_image
from vitrail.data.pixels import decode
from vitrail.data.pixels.decode import DEEP, Slice, eight_bits, read_pixels, reduction
from vitrail.data.sources.formats import HEAD_BYTES, image_format, unread
from vitrail.data.views.canvas import input_of
from vitrail.data.views.preprocess import Preprocess
from vitrail.errors import UsageError

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(data: bytes, **options: object) -> np.ndarray:
    image = read_image(data, **options)
    assert image.mode in ("RGB", *DEEP)
    return np.asarray(eight_bits(image, None).convert("RGB"))


def photo(width: int = 48, height: int = 32) -> Image.Image:
    """Noise on a gradient: every part of the file matters."""
    noise = np.random.default_rng(0).integers(0, 60, (height, width, 3))
    ramp = np.linspace(0, 190, width)[None, :, None]
    return Image.fromarray((noise + ramp).astype(np.uint8))


# Modes


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "BMP", "PPM"])
def test_lossless_formats_give_the_very_pixels(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert (pixels(encoded(photo(), kind, **options)) == np.asarray(photo())).all()


@pytest.mark.parametrize("kind", ["JPEG", "AVIF", "MPO", "WEBP"])
def test_lossy_formats_come_close(kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    flat = Image.new("RGB", (16, 8), (200, 100, 50))
    found = pixels(encoded(flat, kind, quality=95)).astype(int)
    assert np.abs(found - (200, 100, 50)).max() <= 4


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "PPM"])
def test_black_and_white(kind: str) -> None:
    image = Image.new("1", (3, 1))
    image.putpixel((1, 0), 1)
    assert pixels(encoded(image, kind)).tolist() == [[[0] * 3, [255] * 3, [0] * 3]]


def test_grey() -> None:
    assert pixels(encoded(Image.new("L", (1, 1), 77), "PNG")).tolist() == [[[77, 77, 77]]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_transparency_lies_on_white_unless_told_otherwise(kind: str) -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (10, 20, 30, 0))
    data = encoded(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    assert pixels(data).tolist() == [[list(RED), list(WHITE)]]
    assert pixels(data, background=GREEN).tolist() == [[list(RED), list(GREEN)]]


def test_half_transparent_is_half_background() -> None:
    found = pixels(encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 128)), "PNG"))
    assert found.tolist() == [[[127, 127, 127]]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_with_alpha(kind: str) -> None:
    image = Image.new("LA", (2, 1), (90, 255))
    image.putpixel((1, 0), (90, 0))
    assert pixels(encoded(image, kind)).tolist() == [[[90] * 3, [255] * 3]]


def palette(mode: str = "P") -> Image.Image:
    """Two pixels, red and green."""
    image = Image.new(mode, (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1 if mode == "P" else (1, 0))
    return image


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF"])
def test_palette(kind: str) -> None:
    assert pixels(encoded(palette(), kind)).tolist() == [[list(RED), list(GREEN)]]


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palette_with_one_transparent_colour(kind: str) -> None:
    data = encoded(palette(), kind, transparency=1)
    assert pixels(data).tolist() == [[list(RED), list(WHITE)]]


def test_palette_with_an_alpha_for_each_colour() -> None:
    data = encoded(palette(), "PNG", transparency=bytes([255, 0]))
    assert pixels(data).tolist() == [[list(RED), list(WHITE)]]


def test_palette_with_an_alpha_for_each_pixel() -> None:
    image = palette("PA")
    image.putpixel((0, 0), (0, 255))
    assert pixels(encoded(image, "TIFF")).tolist() == [[list(RED), list(WHITE)]]


@pytest.mark.parametrize("mode, colour", [("RGB", RED), ("L", 9)])
def test_colour_key_of_a_png(mode: str, colour: int | tuple[int, int, int]) -> None:
    data = encoded(Image.new(mode, (1, 1), colour), "PNG", transparency=colour)
    assert pixels(data).tolist() == [[list(WHITE)]]


def greys(data: bytes, grey_range: tuple[float, float] | None = None) -> list[int]:
    """The levels of a picture of one row, whichever way it is read."""
    (row,) = np.asarray(eight_bits(read_image(data), grey_range)).tolist()
    for mode in ("L", "RGB"):
        assert (read_pixels(data, mode=mode, grey_range=grey_range)[0, :, 0] == row).all()
    return row


@pytest.mark.parametrize("mode, kind", [("I;16", "PNG"), ("I;16", "TIFF"), ("I;16B", "TIFF")])
def test_16_bit_grey_keeps_its_range(mode: str, kind: str) -> None:
    values = np.array([[0, 257, 32896, 65535]], ">u2" if mode == "I;16B" else "<u2")
    image = Image.frombytes(mode, (4, 1), values.tobytes())
    assert greys(encoded(image, kind)) == [0, 1, 128, 255]


def test_16_bit_pgm() -> None:
    data = b"P5 3 1 65535\n" + np.array([0, 32896, 65535], ">u2").tobytes()
    assert greys(data) == [0, 128, 255]


def test_32_bit_grey_within_16_bits_is_scaled_alike() -> None:
    image = Image.fromarray(np.array([[0, 257, 65535]], np.int32))
    assert greys(encoded(image, "TIFF")) == [0, 1, 255]


def test_32_bit_grey_beyond_16_bits_is_scaled_from_least_to_greatest() -> None:
    image = Image.fromarray(np.array([[-100_000, 0, 100_000]], np.int32))
    assert greys(encoded(image, "TIFF")) == [0, 128, 255]


@pytest.mark.parametrize(
    "values, expected",
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([-3e38, 0.0, 3e38], [0, 128, 255]),
        ([np.nan, 2.0, 4.0], [0, 0, 255]),
        ([np.inf, 2.0, 4.0], [0, 0, 255]),
        ([np.nan, np.nan, np.nan], [0, 0, 0]),
        ([7.0, 7.0, 7.0], [0, 0, 0]),
    ],
)
def test_float_tiff(values: list[float], expected: list[int]) -> None:
    image = Image.fromarray(np.array([values], np.float32))
    assert greys(encoded(image, "TIFF")) == expected


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk(kind: str) -> None:
    found = pixels(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), kind))
    assert np.abs(found.astype(int) - RED).max() <= 3


def test_ycck_as_photoshop_writes_it() -> None:
    # Inverted red, as Y Cb Cr K; Pillow's encoder inverts too, and knows only of CMYK.
    y_cb_cr = Image.new("RGB", (16, 16), (0, 255, 255)).convert("YCbCr").split()
    planes = [plane.point(lambda value: 255 - value) for plane in y_cb_cr]
    image = Image.merge("CMYK", [*planes, Image.new("L", (16, 16), 0)])
    data = bytearray(encoded(image, "JPEG", quality=100, subsampling=0))
    data[data.index(b"Adobe") + 11] = 2
    assert Image.open(io.BytesIO(data)).info["adobe_transform"] == 2
    assert np.abs(pixels(bytes(data)).astype(int) - RED).max() <= 3


def test_icc_profiles_are_ignored() -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    data = encoded(photo(), "PNG", icc_profile=profile)
    assert (pixels(data) == np.asarray(photo())).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_the_first_of_many_frames_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, GREEN)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert np.abs(pixels(data).astype(int) - RED).max() <= 2


def test_progressive_jpeg() -> None:
    plain, progressive = (pixels(encoded(photo(), "JPEG", progressive=p)) for p in (False, True))
    assert (plain == progressive).all()


# Orientation

UPRIGHT = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 14
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.swapaxes(0, 1),
    6: np.rot90(UPRIGHT, 1),
    7: UPRIGHT[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90(UPRIGHT, -1),
}


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_undone(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation]))
    assert (pixels(encoded(stored, kind, exif=exif, **options)) == UPRIGHT).all()


def test_orientation_of_a_jpeg() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_image(encoded(photo(48, 32), "JPEG", exif=exif)).size == (32, 48)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b""])
def test_damaged_exif_data_spoils_nothing(exif: bytes) -> None:
    assert read_image(encoded(photo(), "JPEG", exif=exif)).size == photo().size


def test_an_orientation_that_does_not_exist_means_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 77
    assert (pixels(encoded(photo(), "PNG", exif=exif)) == np.asarray(photo())).all()


# Sizes


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1)])
def test_odd_sizes(size: tuple[int, int]) -> None:
    assert read_image(encoded(Image.new("RGB", size), "PNG")).size == size


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(bytes(100_000)))
    return b"\x89PNG\r\n\x1a\n" + header + data + png_chunk(b"IEND", b"")


def jpeg_header(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("RGB", (8, 8)), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize(
    "bomb",
    [
        png_header(60_000, 60_000),
        png_header(10_000, 10_000),
        png_header(8_001, 8_000),
        png_header(70_000, 2),
        png_header(2, 70_000),
        png_header(2**31 - 1, 2**31 - 1),
        jpeg_header(65_535, 65_535),
    ],
)
def test_bombs_are_refused_by_their_header(bomb: bytes) -> None:
    start = time.process_time()
    with pytest.raises(UnreadableImage, match=r"pixels"):
        read_image(bomb)
    assert time.process_time() - start < 0.2


def test_the_limit_is_the_callers() -> None:
    data = encoded(photo(48, 32), "PNG")
    assert read_image(data, max_pixels=48 * 32).size == (48, 32)
    with pytest.raises(UnreadableImage, match="48 x 32 pixels, more than the limit of 1535"):
        read_image(data, max_pixels=48 * 32 - 1)


def test_pillows_own_warning_does_not_reach_the_user(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png_header(10_000, 10_000))
    program = (
        "import sys; from pathlib import Path; from vitrail.data import *\n"
        "try: read_image(Path(sys.argv[1]))\n"
        "except UnreadableImage as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(bomb)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stderr == ""
    assert "claims 10000 x 10000 pixels" in done.stdout


def test_whoever_uses_pillow_besides_is_warned_as_before(tmp_path: Path) -> None:
    damaged = encoded(photo(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    read_image(damaged)  # where warnings are errors
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        Image.open(io.BytesIO(damaged)).getexif()
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        read_image(damaged)
        Image.open(io.BytesIO(damaged)).getexif()


def test_the_filters_of_warnings_can_be_copied_to_another_process() -> None:
    """As scikit-learn does whenever it computes in several."""
    read_image(encoded(photo(), "PNG"))
    first = warnings.filters[0][3]
    assert isinstance(re.compile(first.pattern), re.Pattern)  # type: ignore[union-attr]
    assert not pickle.loads(pickle.dumps(first)).match("PIL.Image")


def test_a_bomb_in_a_pngs_text_is_refused() -> None:
    whole = encoded(photo(), "PNG")
    text = png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(20_000_000)))
    with pytest.raises(UnreadableImage, match="too large"):
        read_image(whole[:33] + text + whole[33:])


# Damage

ZOO = {
    "jpeg": encoded(photo(), "JPEG"),
    "progressive jpeg": encoded(photo(), "JPEG", progressive=True),
    "png": encoded(photo(), "PNG"),
    "webp": encoded(photo(), "WEBP"),
    "lossless webp": encoded(photo(), "WEBP", lossless=True),
    "gif": encoded(photo(), "GIF"),
    "bmp": encoded(photo(), "BMP"),
    "tiff": encoded(photo(), "TIFF"),
    "lzw tiff": encoded(photo(), "TIFF", compression="tiff_lzw"),
    "ppm": encoded(photo(), "PPM"),
    "16-bit png": encoded(photo().convert("I;16"), "PNG"),
    **({"avif": encoded(photo(), "AVIF")} if features.check("avif") else {}),
}


def cuts(size: int) -> list[int]:
    """Hundred cut points over a file, and every one of its first and last bytes."""
    spread = np.linspace(0, size - 1, 100).astype(int).tolist()
    return sorted({*range(min(24, size)), *spread, *range(max(0, size - 24), size)})


@pytest.mark.parametrize("kind", ZOO)
def test_a_truncated_image_is_refused_or_whole(kind: str) -> None:
    whole = pixels(ZOO[kind])
    refused = 0
    for cut in cuts(len(ZOO[kind])):
        try:
            found = pixels(ZOO[kind][:cut])
        except UnreadableImage:
            refused += 1
        else:
            assert (found == whole).all(), f"cut at {cut} of {len(ZOO[kind])}"
    assert refused >= 100


@settings(deadline=None)
@given(
    kind=st.sampled_from(sorted(ZOO)), at=st.floats(0, 1), junk=st.binary(min_size=1, max_size=8)
)
def test_damage_anywhere_gives_pixels_or_the_one_error(kind: str, at: float, junk: bytes) -> None:
    data = bytearray(ZOO[kind])
    start = int(at * (len(data) - len(junk)))
    data[start : start + len(junk)] = junk
    try:
        assert read_image(bytes(data)).mode in ("RGB", *DEEP)
    except UnreadableImage as error:
        assert error.reason


@pytest.mark.parametrize("kind", ZOO)
def test_junk_behind_an_image_does_no_harm(kind: str) -> None:
    assert (pixels(ZOO[kind] + b"junk" * 100) == pixels(ZOO[kind])).all()


@pytest.mark.parametrize("kind", ZOO)
def test_a_wrong_extension_does_no_harm(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "photo.tga"
    file.write_bytes(ZOO[kind])
    assert read_image(file) == read_image(ZOO[kind])


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "none of the formats JPEG, PNG"),
        (b"\x00" * 1000, "none of the formats"),
        (encoded(photo(), "TGA"), "none of the formats"),
        (encoded(photo(), "ICO"), "its content is ICO, a format that is not read"),
        pytest.param(
            b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99),
            "HEIC, .* install pillow-heif",
            marks=pytest.mark.skipif("HEIF" in FORMATS, reason="its plug-in is installed"),
        ),
        (encoded(photo(), "PDF"), "none of the formats"),
        (encoded(photo(), "EPS"), "none of the formats"),
        (encoded(photo(), "JPEG")[:400], "damaged"),
    ],
)
def test_what_is_no_image_says_so_with_its_name(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    file = tmp_path / "photo.jpg"
    file.write_bytes(content)
    with pytest.raises(UnreadableImage, match=reason) as caught:
        read_image(file)
    assert str(file) in str(caught.value)
    assert str(file) not in caught.value.reason


def test_only_the_listed_formats_have_decoders() -> None:
    usual = {"JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"}
    assert usual <= set(FORMATS) <= usual | {"AVIF", "HEIF", "JPEG2000"}


@pytest.mark.parametrize("form", FORMATS)
def test_each_format_is_known_by_its_first_bytes(form: str) -> None:
    content = encoded(photo(), form)
    assert image_format(content[:HEAD_BYTES]) == form
    assert image_format(b"x" + content[:HEAD_BYTES]) is None


@given(st.binary(max_size=HEAD_BYTES), st.text(max_size=9))
def test_any_first_bytes_have_a_format_or_none(head: bytes, name: str) -> None:
    form = image_format(head, name)
    assert form is None or form in FORMATS or unread(form).reason


@pytest.mark.skipif("JPEG2000" not in FORMATS, reason="this Pillow is built without it")
def test_a_jpeg_2000_that_is_cut_is_refused() -> None:
    content = encoded(photo(), "JPEG2000")
    for size in range(0, len(content), len(content) // 40):
        with pytest.raises(UnreadableImage):
            read_image(content[:size])


# Files that are none


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match=r"gone\.jpg: no such file or directory"):
        read_image(tmp_path / "gone.jpg")


def test_a_folder_and_a_device_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/dev/zero")):
        with pytest.raises(UnreadableImage, match="not a regular file"):
            read_image(path)


def test_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    fifo = tmp_path / "pipe.jpg"
    os.mkfifo(fifo)
    caught: list[str] = []

    def read() -> None:
        try:
            read_image(fifo)
        except UnreadableImage as error:
            caught.append(error.reason)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(5)
    assert caught == ["it is not a regular file"]


@pytest.mark.parametrize("name", ["\0.jpg", "x" * 300 + ".jpg"])
def test_impossible_names(name: str) -> None:
    with pytest.raises(UnreadableImage):
        read_image(Path(name))


def test_a_name_that_is_not_utf8_can_be_printed(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match=r"caf\\xe9\.jpg") as caught:
        read_image(tmp_path / os.fsdecode(b"caf\xe9.jpg"))
    str(caught.value).encode()


# Streams


def test_a_stream_is_read_and_left_open(tmp_path: Path) -> None:
    file = tmp_path / "photo.png"
    file.write_bytes(ZOO["png"])
    with file.open("rb") as stream:
        assert (np.asarray(read_image(stream)) == np.asarray(photo())).all()
        assert not stream.closed
    with file.open("wb+") as stream, pytest.raises(UnreadableImage, match=r"photo\.png"):
        read_image(stream)


def test_the_error_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(UnreadableImage("it is empty", "a.jpg")))
    assert (str(error), error.reason) == ("cannot read the image a.jpg: it is empty", "it is empty")


# Arrays: the same pixels, whatever decodes them


@pytest.fixture(params=["simplejpeg", "Pillow"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What decodes plain JPEGs."""
    if request.param == "simplejpeg":
        pytest.importorskip("simplejpeg")
    else:
        monkeypatch.setattr(decode, "simplejpeg", None)
    return request.param


def jpegs() -> dict[str, bytes]:
    exif = {n: Image.Exif() for n in range(1, 9)}
    for n, data in exif.items():
        data[0x0112] = n
    return {
        **{f"4:{s}": encoded(photo(61, 43), "JPEG", subsampling=s) for s in range(3)},
        **{f"quality {q}": encoded(photo(40, 40), "JPEG", quality=q) for q in (1, 60, 100)},
        **{f"turned {n}": encoded(photo(50, 33), "JPEG", exif=data) for n, data in exif.items()},
        "progressive": encoded(photo(61, 43), "JPEG", progressive=True),
        "restarts": encoded(photo(61, 43), "JPEG", restart_marker_rows=1),
        "grey": encoded(photo(61, 43).convert("L"), "JPEG"),
        "CMYK": encoded(photo(61, 43).convert("CMYK"), "JPEG"),
        "one pixel": encoded(photo(1, 1), "JPEG"),
        "long": encoded(photo(900, 2), "JPEG"),
        "many": encoded(photo(61, 43), "MPO", save_all=True, append_images=[photo(61, 43)]),
        "junk behind": encoded(photo(61, 43), "JPEG") + b"junk" * 100,
        "ICC": encoded(photo(61, 43), "JPEG", icc_profile=bytes(10_000)),
        "keeps RGB": encoded(photo(61, 43), "JPEG", keep_rgb=True),
    }


@pytest.mark.parametrize("name", jpegs())
def test_arrays_of_jpegs_are_what_pillow_decodes(name: str, by: str) -> None:
    data = jpegs()[name]
    whole = read_image(data)
    found = read_pixels(data)
    assert found.shape[2] == 3 and (found == np.asarray(whole)).all()
    assert found.flags.c_contiguous and found.flags.writeable
    assert (read_pixels(data, mode="L")[..., 0] == np.asarray(whole.convert("L"))).all()


@settings(deadline=None, max_examples=50)
@given(
    width=st.integers(1, 80),
    height=st.integers(1, 80),
    subsampling=st.integers(0, 2),
    quality=st.integers(1, 100),
    progressive=st.booleans(),
)
def test_simplejpeg_decodes_as_pillow_does(**made: int) -> None:
    pytest.importorskip("simplejpeg")
    options = {name: made.pop(name) for name in ("subsampling", "quality", "progressive")}
    data = encoded(photo(**made), "JPEG", **options)
    assert (read_pixels(data) == np.asarray(read_image(data))).all()


@pytest.mark.parametrize("kind", ZOO)
def test_arrays_of_other_images(kind: str, by: str) -> None:
    assert (read_pixels(ZOO[kind]) == pixels(ZOO[kind])).all()
    grey = np.asarray(eight_bits(read_image(ZOO[kind]), None).convert("L"))
    assert (read_pixels(ZOO[kind], mode="L")[..., 0] == grey).all()


@pytest.mark.parametrize("kind", ["jpeg", "progressive jpeg"])
def test_a_truncated_jpeg_is_refused_as_an_array_too(kind: str, by: str) -> None:
    for fast in (False, True):
        for cut in cuts(len(ZOO[kind]))[::3]:
            try:
                whole = read_image(ZOO[kind][:cut])
            except UnreadableImage as error:
                with pytest.raises(UnreadableImage) as caught:
                    read_pixels(ZOO[kind][:cut], shown=(4, 4), fast=fast)
                assert fast or caught.value.reason == error.reason
            else:
                assert fast or (read_pixels(ZOO[kind][:cut]) == np.asarray(whole)).all()


@settings(deadline=None)
@given(at=st.floats(0, 1), junk=st.binary(min_size=1, max_size=8), fast=st.booleans())
def test_damage_gives_the_same_array_or_the_same_error(at: float, junk: bytes, fast: bool) -> None:
    data = bytearray(ZOO["jpeg"])
    start = int(at * (len(data) - len(junk)))
    data[start : start + len(junk)] = junk
    try:
        whole = read_image(bytes(data))
    except UnreadableImage:
        with pytest.raises(UnreadableImage):
            read_pixels(bytes(data))
    else:
        assert (read_pixels(bytes(data)) == np.asarray(whole)).all()
    try:
        assert read_pixels(bytes(data), shown=(5, 5), fast=fast).shape[2] == 3
    except UnreadableImage as error:
        assert error.reason


@pytest.mark.parametrize(
    "bomb", [jpeg_header(65_535, 65_535), jpeg_header(10_000, 10_000), png_header(70_000, 2)]
)
def test_bombs_are_refused_before_they_are_an_array(bomb: bytes, by: str) -> None:
    for fast in (False, True):
        with pytest.raises(UnreadableImage, match=r"claims .*pixels"):
            read_pixels(bomb, shown=(8, 8), fast=fast)
    with pytest.raises(UnreadableImage, match="48 x 32 pixels, more than the limit of 1535"):
        read_pixels(encoded(photo(48, 32), "JPEG"), max_pixels=48 * 32 - 1)


@pytest.mark.parametrize("size", [(400, 300), (300, 401), (97, 1500)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_reduced_arrays_are_exact_averages(
    size: tuple[int, int], orientation: int, by: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("JPEG", "PNG"):
        data = encoded(photo(*size), kind, exif=exif)
        whole = read_image(data)
        for shown in ((10, 10), (16, 40), (300, 300)):
            factor = reduction(whole.height, whole.width, shown)
            assert factor == max(
                1, min(whole.height // (2 * shown[0]), whole.width // (2 * shown[1]))
            )
            expected = np.asarray(whole.reduce(factor) if factor > 1 else whole)
            assert (read_pixels(data, shown=shown) == expected).all()


def smooth(width: int, height: int) -> Image.Image:
    """Coarse colours, as photographs have, and fine grain."""
    coarse = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    grain = np.random.default_rng(1).integers(-6, 7, (height, width, 3))
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("orientation", [1, 7, 8])
@pytest.mark.parametrize("stored", ["RGB", "L", "CMYK"])
def test_jpegs_reduced_while_they_are_decoded(stored: str, orientation: int, by: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(smooth(520, 400).convert(stored), "JPEG", quality=90, exif=exif)
    for shown, scale in (((110, 110), 1), ((90, 70), 2), ((50, 48), 4), ((20, 20), 8)):
        exact, fast = (read_pixels(data, shown=shown, fast=fast) for fast in (False, True))
        whole = read_image(data)
        assert fast.shape[:2] == (-(-whole.height // scale), -(-whole.width // scale))
        assert fast.shape[0] >= 2 * shown[0] and fast.shape[1] >= 2 * shown[1]
        if fast.shape == exact.shape:
            difference = np.abs(fast.astype(int) - exact)
            assert difference.mean() < 1.5 and difference.max() < (1 if scale == 1 else 40)
    others = encoded(smooth(520, 400), "PNG")
    exact, fast = (read_pixels(others, shown=(50, 48), fast=fast) for fast in (False, True))
    assert (exact == fast).all()


def test_scaled_jpegs_are_the_same_by_both_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("simplejpeg")
    for subsampling in range(3):
        data = encoded(smooth(333, 250), "JPEG", subsampling=subsampling)
        for shown in ((60, 60), (30, 30), (15, 15), (4, 4)):
            ours = read_pixels(data, shown=shown, fast=True)
            with monkeypatch.context() as patch:
                patch.setattr(decode, "simplejpeg", None)
                assert (read_pixels(data, shown=shown, fast=True) == ours).all()


# Parts of files


def test_a_part_of_a_file(tmp_path: Path) -> None:
    shard = tmp_path / "shard.tar"
    data = encoded(photo(), "JPEG")
    shard.write_bytes(b"x" * 512 + data + b"y" * 100)
    part = Slice(shard, 512, len(data))
    assert (np.asarray(read_image(part)) == pixels(data)).all()
    assert (read_pixels(part) == pixels(data)).all()
    for wrong, reason in (
        (Slice(shard, 512, 10**6), r"shard\.tar, bytes 512 to 1000512: .* ends before it does"),
        (Slice(shard, 0, 512), "none of the formats"),
        (Slice(tmp_path, 0, 512), "not a regular file"),
        (Slice(tmp_path / "gone.tar", 0, 5), "no such file"),
    ):
        with pytest.raises(UnreadableImage, match=reason):
            read_pixels(wrong)


# Whatever a picture comes as

KINDS = {
    **{mode: ("PNG", photo().convert(mode)) for mode in ("1", "L", "P", "RGB", "I;16")},
    **{mode: ("TIFF", photo().convert(mode)) for mode in ("CMYK", "YCbCr", "F", "I", "LAB")},
    "RGBA": ("PNG", Image.merge("RGBA", [*photo().split(), photo().getchannel(1)])),
    "LA": ("PNG", Image.merge("LA", photo().split()[:2])),
    "PA": ("TIFF", Image.merge("RGBA", [*photo().split(), photo().getchannel(1)]).convert("PA")),
    "I;16B": ("TIFF", Image.frombytes("I;16B", (48, 32), bytes(range(256)) * 12)),
    "colour key": ("PNG", photo().convert("P")),
    "animated": ("GIF", photo().convert("P")),
    "jpeg": ("JPEG", photo()),
    "grey jpeg": ("JPEG", photo().convert("L")),
    "cmyk jpeg": ("JPEG", photo().convert("CMYK")),
    "mpo": ("MPO", photo()),
    "webp": ("WEBP", Image.merge("RGBA", [*photo().split(), photo().getchannel(1)])),
}
OPTIONS = {
    "colour key": {"transparency": 3},
    "animated": {"save_all": True, "append_images": [Image.new("RGB", (48, 32), RED)]},
    "mpo": {"save_all": True, "append_images": [Image.new("RGB", (48, 32))]},
    "webp": {"lossless": True},
}


def stored(kind: str, orientation: int) -> bytes:
    (format_, image), options = KINDS[kind], OPTIONS.get(kind, {})
    if orientation > 1 and format_ != "GIF":
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {**options, "exif": exif}
    return encoded(image, format_, **options)


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_the_same_however_it_is_given(
    tmp_path: Path, kind: str, orientation: int
) -> None:
    data = stored(kind, orientation)
    file = tmp_path / "picture"
    file.write_bytes(data)
    loaded = Image.open(io.BytesIO(data))
    loaded.load()
    given = {
        "path": file,
        "text": str(file),
        "bytes": data,
        "bytearray": bytearray(data),
        "buffer": memoryview(data),
        "stream": io.BytesIO(data),
        "loaded": loaded,
        "copy": loaded.copy(),
        "part": Slice(file, 0, len(data)),
    }
    with (
        file.open("rb") as stream,
        tempfile.SpooledTemporaryFile() as spooled,
        Image.open(file) as opened,
    ):
        spooled.write(data)
        given |= {"file": stream, "file again": stream, "spooled": spooled}
        given |= {"opened": opened, "opened again": opened}
        found = {name: read_image(picture) for name, picture in given.items()}
        assert not stream.closed
    first = found["path"]
    assert first.mode in ("RGB", *DEEP) and first.size in ((48, 32), (32, 48))
    found |= {"twice": read_image(first), "array": read_image(np.asarray(first))}
    assert not [name for name, image in found.items() if image != first]
    if orientation == 1 and kind in ("1", "L", "RGB", "RGBA", "I;16", "I", "F", "I;16B"):
        assert read_image(np.asarray(loaded)) == first
    for channels in (1, 3):
        # What a model is shown of it, and what a run's loaders decode.
        views = Preprocess(size=(20, 24), mean=(0.5,) * channels, std=(0.5,) * channels)
        shown = [input_of(views, picture) for picture in (file, data, loaded, first)]
        pixels = read_pixels(file, mode="L" if channels == 1 else "RGB")
        shown.append(input_of(views, Image.fromarray(pixels.squeeze())))
        assert all(torch.equal(one, shown[0]) for one in shown)


def test_an_image_of_the_callers_is_not_changed() -> None:
    for kind, orientation in (("RGBA", 6), ("I;16", 1), ("colour key", 3)):
        image = Image.open(io.BytesIO(stored(kind, orientation)))
        image.load()
        before = image.mode, image.size, image.tobytes(), dict(image.info)
        read_image(image).putpixel((0, 0), 0)
        assert (image.mode, image.size, image.tobytes(), dict(image.info)) == before


def test_of_an_opened_animation_the_current_frame_is_taken() -> None:
    image = Image.open(io.BytesIO(stored("animated", 1)))
    first = read_image(image)
    image.seek(1)
    assert read_image(image) != first == read_image(stored("animated", 1))


@pytest.mark.parametrize("mode", ["La", "RGBa", "RGBX", "HSV", "I;16L", "I;16N"])
def test_modes_that_no_file_has(mode: str) -> None:
    assert read_image(Image.new(mode, (3, 2))).size == (3, 2)


def test_what_makes_a_file_unreadable_makes_an_opened_image_too(tmp_path: Path) -> None:
    whole = encoded(photo(), "PNG")
    (tmp_path / "cut.png").write_bytes(whole[:300])
    with (
        Image.open(tmp_path / "cut.png") as opened,
        pytest.raises(UnreadableImage, match="cut"),
    ):
        read_image(opened)
    with pytest.raises(UnreadableImage, match="more than the limit of 1535"):
        read_image(photo(), max_pixels=48 * 32 - 1)


@given(
    st.sampled_from([bool, "u1", "u2", ">u2", "i2", "i4", "f2", "f4", "f8"]),
    st.integers(1, 9),
    st.integers(1, 9),
    st.booleans(),
)
def test_arrays_of_greys(kind: str, height: int, width: int, channel: bool) -> None:
    levels = np.arange(height * width).reshape(height, width)
    values = (levels % 2 if kind is bool else levels).astype(kind)
    found = read_image(values[..., None] if channel else values)
    assert found.size == (width, height)
    expected = {"RGB": 255 * levels % 510 if kind is bool else levels}.get(found.mode, levels)
    array = np.asarray(found)
    assert ((array[..., 0] if found.mode == "RGB" else array) == expected).all()
    assert found.mode == ("RGB" if values.dtype.itemsize == 1 else "FI"[values.dtype.kind != "f"])


def test_arrays_of_colours_are_rgb_and_may_lie_anywhere() -> None:
    colours = np.asarray(photo())
    assert (np.asarray(read_image(colours)) == colours).all()
    assert (np.asarray(read_image(colours[:, ::-1])) == colours[:, ::-1]).all()
    clear = np.zeros((2, 3, 4), np.uint8)
    assert (np.asarray(read_image(clear)) == 255).all()


@pytest.mark.parametrize(
    "picture, says",
    [
        (np.zeros((3, 8, 9), np.uint8), r"\[3 8 9\] is no picture.*Channels come last"),
        (np.zeros((8, 9, 3), np.float32), "as bytes"),
        (np.zeros((2, 8, 9, 3), np.uint8), "one by one"),
        (np.zeros((8, 9), np.int64), r"x\.astype\('uint8'\)"),
        (np.zeros((8, 9, 2), np.uint8), "no picture"),
        (np.zeros((0, 9), np.uint8), "no picture"),
        (np.zeros((8, 9), complex), "no picture"),
        (torch.zeros(3, 8, 9, dtype=torch.uint8), r"torch\.Tensor is no picture.*permute"),
        (io.StringIO("x"), "open it with 'rb'"),
        (None, "NoneType is no picture"),
        ([1, 2], "list is no picture"),
    ],
)
def test_what_is_no_picture_is_refused_with_what_to_give(picture: object, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        read_image(picture)
