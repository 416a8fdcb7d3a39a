"""Masks: what their values mean, and that a view shows the pixels that lie under its own."""

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from vitrail.data.pixels.decode import UnreadableImage, read_image
from vitrail.data.pixels.values import read_header, read_palette, read_values
from vitrail.data.sources.mask_files import MaskFiles
from vitrail.data.targets import IGNORE, Coding, MaskArrays, Masks, Targets
from vitrail.data.views.seen import Seen
from vitrail.errors import UsageError

SAME = Coding({k: k for k in range(100)})


def masks_of(*arrays: np.ndarray, coding: Coding = SAME) -> Masks:
    return Masks(("a", "b"), MaskArrays(arrays, "m"), coding)


def test_masks_are_targets() -> None:
    masks = masks_of(np.zeros((2, 3), np.uint8), np.ones((4, 5), np.uint8))
    assert isinstance(masks, Targets)
    assert (masks.kind, len(masks), masks.strata(), masks.text(1)) == ("masks", 2, None, "m/1")
    assert masks.blank((2, 2))["mask"].tolist() == [[IGNORE, IGNORE]] * 2
    second = masks.rows(np.array([1]))
    assert second.target(0, None)["mask"].tolist() == [[1] * 5] * 4
    assert second.rows(np.array([0, 0])).text(1) == "m/1"
    assert masks.target(0, None)["mask"].dtype == np.int16


def test_hashes_follow_the_masks_and_what_they_mean() -> None:
    first, other = np.zeros((2, 3), np.uint8), np.ones((2, 3), np.uint8)
    hashes = masks_of(first, other).hashes()
    assert hashes.dtype == np.uint64
    assert hashes[0] != hashes[1]
    assert hashes.tolist() == masks_of(first.copy(), other).hashes().tolist()
    assert hashes[1] == masks_of(first, other).rows(np.array([1])).hashes()[0]
    assert hashes[0] != masks_of(other, first).hashes()[0]
    assert hashes[0] != masks_of(first, coding=Coding({0: 1, 1: 0})).hashes()[0]


# --- views


def plain_lookup(mask: np.ndarray, seen: Seen) -> np.ndarray:
    """One pixel at a time, forwards: where each centre comes from."""
    shown = np.full(seen.size, IGNORE)
    height, width = mask.shape
    left, top, right, bottom = seen.part
    for y in range(seen.size[0]):
        for x in range(seen.size[1]):
            u, v = seen.back(np.array([[x + 0.5, y + 0.5]]))[0]
            u, v = u + 1e-6 / width, v + 1e-6 / height
            if left <= u < right and top <= v < bottom:
                shown[y, x] = mask[int(np.floor(v * height)), int(np.floor(u * width))]
    return shown


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    view=st.tuples(st.integers(1, 10), st.integers(1, 10)),
    turn=st.sampled_from([0.0, 90.0, 180.0, 270.0, 13.0, -47.0]),
    flip=st.booleans(),
    box=st.tuples(*[st.floats(-0.6, 0.6)] * 2, *[st.floats(0.2, 2.0)] * 2),
)
def test_a_view_shows_the_pixels_under_its_centres(
    size: tuple[int, int],
    view: tuple[int, int],
    turn: float,
    flip: bool,
    box: tuple[float, float, float, float],
) -> None:
    mask = np.arange(size[0] * size[1], dtype=np.uint8).reshape(size)
    left, top, wide, high = box
    image = (4 * size[0], 6 * size[1])  # of another shape than its mask
    corners = left * image[1], top * image[0], (left + wide) * image[1], (top + high) * image[0]
    seen = Seen.of_box(corners, image, view)
    angle, (x, y) = np.deg2rad(turn), (view[1] / 2, view[0] / 2)
    turned = np.array(
        [
            [np.cos(angle), -np.sin(angle), x - x * np.cos(angle) + y * np.sin(angle)],
            [np.sin(angle), np.cos(angle), y - x * np.sin(angle) - y * np.cos(angle)],
            [0, 0, 1],
        ]
    )
    seen = seen.then(turned)
    if flip:
        seen = seen.then(np.array([[-1.0, 0, view[1]], [0, 1, 0], [0, 0, 1]]))
    shown = masks_of(mask).target(0, seen)["mask"]
    assert shown.shape == view
    # Where a centre falls on an edge to within rounding, either side is right.
    inverse = np.diag([size[1], size[0], 1]) @ np.linalg.inv(seen.matrix)
    places = np.stack(np.meshgrid(np.arange(view[1]) + 0.5, np.arange(view[0]) + 0.5), axis=-1)
    exact = places @ inverse[:2, :2].T + inverse[:2, 2] + 1e-6
    edges = np.multiply(seen.part, (size[1], size[0]) * 2)
    sure = (np.abs(exact - np.rint(exact)) > 1e-9).all(axis=-1)
    sure &= (np.abs(np.tile(exact, 2) - edges) > 1e-9).all(axis=-1)
    assert np.array_equal(shown[sure], plain_lookup(mask, seen)[sure])


def test_the_whole_image_at_its_own_size_is_the_mask_itself() -> None:
    mask = np.random.default_rng(0).integers(0, 90, (37, 53)).astype(np.uint8)
    whole = Seen.of_box((0, 0, 53, 37), (37, 53), (37, 53))
    assert np.array_equal(masks_of(mask).target(0, whole)["mask"], mask)
    mirrored = whole.then(np.array([[-1.0, 0, 53], [0, 1, 0], [0, 0, 1]]))
    assert np.array_equal(masks_of(mask).target(0, mirrored)["mask"], mask[:, ::-1])
    halved = Seen.of_box((0, 0, 52, 36), (37, 53), (18, 26))
    assert np.array_equal(masks_of(mask).target(0, halved)["mask"], mask[1::2, 1::2])


def test_what_a_move_uncovers_is_of_no_class() -> None:
    # The left half was cut out and then moved 2 pixels to the right: the image goes on there, but
    # the view shows what it is filled up with.
    mask = np.tile(np.arange(8, dtype=np.uint8), (4, 1))
    right = np.array([[1.0, 0, 2], [0, 1, 0], [0, 0, 1]])
    left_half = Seen.of_box((0, 0, 4, 4), (4, 8), (4, 4)).then(right)
    assert masks_of(mask).target(0, left_half)["mask"][0].tolist() == [IGNORE, IGNORE, 0, 1]
    right_half = Seen.of_box((4, 0, 8, 4), (4, 8), (4, 4)).then(right)
    assert masks_of(mask).target(0, right_half)["mask"][0].tolist() == [IGNORE, IGNORE, 4, 5]


def test_masks_of_several_stores_are_not_taken_for_one() -> None:
    mask = np.zeros((2, 2), np.uint8)
    one, other = masks_of(mask, mask), masks_of(mask)
    parts = [one.rows(np.array([1])), one.rows(np.array([0]))]
    assert [Masks.joined(parts).text(i) for i in range(2)] == ["m/1", "m/0"]
    with pytest.raises(ValueError, match="several stores"):
        Masks.joined([one, other])


def test_a_view_beside_the_image_is_ignored() -> None:
    beside = Seen.of_box((20, 0, 30, 10), (10, 10), (4, 4))
    assert (masks_of(np.zeros((10, 10), np.uint8)).target(0, beside)["mask"] == IGNORE).all()


@pytest.mark.parametrize("size", [(10, 20), (11, 20), (10, 19)])
def test_a_mask_may_be_a_pixel_off(size: tuple[int, int]) -> None:
    store = MaskArrays([np.zeros(size, np.uint8)], "m")
    masks = Masks(("a",), store, SAME, image_size=lambda i: (10, 20))
    assert masks.target(0, None)["mask"].shape == size


def test_a_mask_of_another_size_is_refused_and_one_that_is_turned_is_told() -> None:
    store = MaskArrays([np.zeros((5, 10), np.uint8), np.zeros((20, 10), np.uint8)], "m")
    masks = Masks(("a",), store, SAME, image_size=lambda i: (10, 20))
    with pytest.raises(UnreadableImage, match="10 x 5 pixels, but its image is 20 x 10: a mask"):
        masks.target(0, None)
    with pytest.raises(UnreadableImage, match="one of them is turned"):
        masks.target(1, None)
    told = Masks(("a",), store, SAME)
    assert told.target(0, None)["mask"].shape == (5, 10)


# --- what values mean


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.integers(-3, 70_000), st.integers(0, 5), max_size=8),
    st.sets(st.integers(0, 260), max_size=3),
    st.lists(st.integers(-3, 70_000), min_size=1, max_size=20),
)
def test_values_are_looked_up(classes: dict[int, int], ignored: set[int], found: list[int]) -> None:
    coding = Coding(classes, ignored=ignored)
    values = np.array([found], np.int32)
    expected = [IGNORE if v in ignored else classes.get(v, IGNORE) for v in found]
    assert coding.indices(values).tolist() == [expected]
    strange = [v for v in found if v not in classes and v not in ignored]
    assert coding.unknown(values) == {v: strange.count(v) for v in strange}


def test_colours_and_greys_in_three_channels() -> None:
    picture = np.array([[[255, 0, 0], [7, 7, 7], [1, 2, 3]]], np.uint8)
    by_colour = Coding({0xFF0000: 0, 0x070707: 1}, colours=True)
    assert by_colour.indices(picture).tolist() == [[0, 1, IGNORE]]
    assert by_colour.unknown(picture) == {0x010203: 1}
    assert by_colour.indices(picture[..., 0] // 32 * 0 + 7).tolist() == [[1, 1, 1]]
    by_value = Coding({7: 4, 1: 0})
    assert by_value.indices(picture).tolist() == [[IGNORE, 4, IGNORE]]
    assert by_value.indices(np.full((1, 1, 3), 7, np.uint8)).tolist() == [[4]]


def test_more_classes_than_an_index_can_name() -> None:
    with pytest.raises(UsageError, match="at most 32,767 classes"):
        Coding({0: 40_000})


# --- files


def test_a_file_gives_the_values_that_it_stores(tmp_path: Path) -> None:
    values = np.array([[0, 1, 2], [200, 254, 255]], np.uint8)
    palette = Image.frombytes("P", (3, 2), values.tobytes())
    palette.putpalette([k for colour in range(256) for k in (255 - colour, colour, 9)])
    deep = values.astype(np.uint16) * 250
    pictures = {
        "grey.png": (Image.fromarray(values), values),
        "palette.png": (palette, values),
        "palette.gif": (palette, values),
        "deep.png": (Image.fromarray(deep), deep),
        "deep.tif": (Image.fromarray(deep), deep),
        "whole.tif": (Image.fromarray(deep.astype(np.int32)), deep),
        "float.tif": (Image.fromarray(deep.astype(np.float32)), deep),
        "bits.png": (Image.fromarray(values > 1), values > 1),
        "alpha.png": (Image.merge("LA", [Image.fromarray(values)] * 2), values),
        "rgb.png": (Image.fromarray(np.stack([values] * 3, 2)), np.stack([values] * 3, 2)),
    }
    for name, (picture, expected) in pictures.items():
        picture.save(tmp_path / name, **({"optimize": False} if name.endswith("gif") else {}))
        assert np.array_equal(read_values(tmp_path / name), expected), name
    colours = read_values(tmp_path / "palette.png", colours=True)
    assert colours[1, 0].tolist() == [55, 200, 9]
    assert read_palette(tmp_path / "grey.png") is None
    found = read_palette(tmp_path / "palette.png")
    assert found is not None
    assert found[200].tolist() == [55, 200, 9]


def test_a_turned_picture_says_how_large_it_is_shown(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    header = read_header(tmp_path / "a.jpg")
    assert (header.size, header.shown, header.format) == ((20, 30), (30, 20), "JPEG")


def chunk(kind: bytes, content: bytes) -> bytes:
    """Of a PNG."""
    return (
        len(content).to_bytes(4, "big")
        + kind
        + content
        + zlib.crc32(kind + content).to_bytes(4, "big")
    )


def turned_files(orientation: int) -> dict[str, bytes]:
    """A picture of 30 x 20 as it is stored, in every way of saying how it is shown."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = Image.effect_noise((30, 20), 99).convert("RGB")
    xmp = f'<x:xmpmeta tiff:Orientation="{orientation}"/>'.encode()
    ifd = ImageFileDirectory_v2()
    ifd[700], ifd.tagtype[700] = xmp, 1
    ways: dict[str, tuple[str, dict[str, object]]] = {
        "jpeg exif": ("JPEG", {"exif": exif}),
        "jpeg xmp": ("JPEG", {"xmp": xmp}),
        "png exif": ("PNG", {"exif": exif}),
        "webp exif": ("WEBP", {"exif": exif}),
        "webp xmp": ("WEBP", {"xmp": xmp}),
        "tiff exif": ("TIFF", {"exif": exif}),
        "tiff lzw": ("TIFF", {"exif": exif, "compression": "tiff_lzw"}),
        "tiff xmp": ("TIFF", {"tiffinfo": ifd}),
    }
    found = {}
    for name, (kind, options) in ways.items():
        stream = io.BytesIO()
        photo.save(stream, kind, **options)
        found[name] = stream.getvalue()
    stream = io.BytesIO()
    photo.save(stream, "PNG")
    plain = stream.getvalue()
    raw = exif.tobytes()
    texts = {
        "exif": chunk(b"eXIf", raw[6:]),
        "raw": chunk(
            b"tEXt", f"Raw profile type exif\0\nexif\n{len(raw):8}\n{raw.hex()}\n".encode()
        ),
        "xmp": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
    }
    for name, text in texts.items():
        for where, at in (("before", 33), ("behind", len(plain) - 12)):
            found[f"png {name} {where}"] = plain[:at] + text + plain[at:]
    return found


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_header_says_the_size_of_what_is_shown(orientation: int, tmp_path: Path) -> None:
    for name, content in turned_files(orientation).items():
        (tmp_path / name).write_bytes(content)
        header, shown = read_header(tmp_path / name), read_image(tmp_path / name)
        assert header.shown == (shown.height, shown.width), name
        assert (header.size, header.orientation) == ((20, 30), orientation), name
        assert shown.size == ((20, 30) if orientation > 4 else (30, 20)), name
        if name.startswith("tiff"):  # which its decoder turns
            values = read_values(tmp_path / name)
            assert np.array_equal(values, np.asarray(shown)), name


def test_files_that_give_no_values_each_say_why(tmp_path: Path) -> None:
    Image.fromarray(np.full((2, 2), 0.5, np.float32)).save(tmp_path / "half.tif")
    (tmp_path / "text.png").write_text("no picture")
    Image.effect_noise((40, 40), 99).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:600])
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    names = ["half.tif", "text.png", "cut.png", "huge.png", "none.png", "."]
    reasons = ["fractions", "none of the formats", "damaged", "9000 x 9000", "not there", "regular"]
    store = MaskFiles(str(tmp_path), names)
    for i, reason in enumerate(reasons):
        with pytest.raises(UnreadableImage, match=reason):
            store.values(i)
