"""Resizing in a graph against Pillow.

Of 8,000 random cases like those of the first test none was off by more than 2 levels. Of all their
pixels 0.27% were not the same with bilinear, 0.03% with bicubic, 0.01% with lanczos and none with
nearest (but for places between two pixels); of one view's at most 29%, 2.4% and 3.1%.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deploy.pictures import EXTREME, VIEW, as_image, in_torch, noise, off
from vitrail.data.views.preprocess import Interpolation, Preprocess
from vitrail.data.views.preprocess import Resize as Rule
from vitrail.deploy.export.pixels import PixelDifference, pixel_difference
from vitrail.deploy.export.resize import Resize
from vitrail.errors import UsageError

INTERPOLATIONS = ["nearest", "bilinear", "bicubic", "lanczos"]


def between(preprocess: Preprocess, height: int, width: int) -> np.ndarray:
    """Which pixels of a view are exactly between two of the image, to a float32's rounding."""
    box, shown = preprocess._placed(height, width)
    axes = []
    for start, stop, size in ((box[1], box[3], shown[0]), (box[0], box[2], shown[1])):
        places = start + (np.arange(size) + 0.5) * (stop - start) / size
        axes.append(np.abs(places - np.round(places)) < 1e-3)
    found = np.zeros(preprocess.size, bool)
    found[: shown[0], : shown[1]] = axes[0][:, None] | axes[1]
    return found


@st.composite
def preprocesses(draw: st.DrawFn) -> Preprocess:
    channels = draw(st.sampled_from([1, 3]))
    return Preprocess(
        size=draw(st.tuples(st.integers(1, 64), st.integers(1, 64))),
        resize=draw(st.sampled_from(["crop", "squash", "letterbox"])),
        crop=draw(st.sampled_from([1.0, 0.875])),
        interpolation=draw(st.sampled_from(INTERPOLATIONS)),
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
        background=draw(st.integers(0, 255)),
        tile=draw(st.one_of(st.none(), st.integers(1, 400))),
    )


@settings(max_examples=150, deadline=None)
@given(preprocesses(), st.integers(1, 400), st.integers(1, 400), st.sampled_from([1, 3]))
def test_a_view_is_pillows_but_for_two_levels(
    preprocess: Preprocess, height: int, width: int, batch: int
) -> None:
    images = noise(height, width, preprocess.channels, batch)
    levels = off(preprocess, images, in_torch(preprocess, images))
    if preprocess.interpolation == "nearest":
        # Where a place is exactly between two pixels, rounding errors choose for Pillow.
        assert not (levels * ~between(preprocess, height, width)).any()
    else:
        # One by a sum that is exactly between two levels; and one more by what the second pass
        # makes of such, for its weights' sizes sum to less than 1.6.
        assert levels.max() <= 2


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("resize", ["crop", "squash", "letterbox"])
def test_extreme_sizes(resize: Rule, interpolation: Interpolation) -> None:
    preprocess = Preprocess(size=VIEW, resize=resize, interpolation=interpolation, crop=0.875)
    for size in EXTREME:
        assert off(preprocess, noise(*size), in_torch(preprocess, noise(*size))).max() <= 2, size


@pytest.mark.parametrize(
    ("interpolation", "share"), [("bilinear", 0.03), ("bicubic", 0.002), ("lanczos", 0.005)]
)
def test_most_pixels_are_pillows(interpolation: Interpolation, share: float) -> None:
    # 64 to 56: where sizes are as small whole numbers, the triangle's sums are exactly between two
    # levels, and the last bit of a weight decides.
    preprocess = Preprocess(size=(56, 56), interpolation=interpolation)
    sizes = [(120, 160), (160, 120), (93, 125), (64, 64), (250, 375), (41, 30)]
    levels = [off(preprocess, noise(*size), in_torch(preprocess, noise(*size))) for size in sizes]
    assert (np.stack(levels) > 0).mean() < share


@given(preprocesses(), st.integers(1, 60_000), st.integers(1, 60_000))
def test_the_scaled_size_is_exact(preprocess: Preprocess, height: int, width: int) -> None:
    scaled = Resize(preprocess)._scaled(torch.tensor(height), torch.tensor(width))
    assert tuple(map(int, scaled)) == preprocess._scaled(height, width)


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        # By longer sides than float32 counts exactly, the middle is still the middle.
        ((1, 200_001), "columns"),
        ((200_001, 1), "rows"),
    ],
)
def test_a_long_image_is_cut_in_its_middle(size: tuple[int, int], shown: str) -> None:
    image = np.zeros((1, *size, 1), np.uint8)
    image[0, 100_000 if shown == "rows" else 0, 100_000 if shown == "columns" else 0] = 255
    preprocess = Preprocess(size=(8, 8), mean=(0.5,), std=(0.5,), interpolation="nearest")
    assert (in_torch(preprocess, image) == 255).all()


@pytest.mark.parametrize("resize", ["pad", "native", "short", "tiles"])
def test_views_that_differ_in_size_are_made_outside(resize: Rule) -> None:
    with pytest.raises(UsageError, match=f"'{resize}' differ in size.* the engine does"):
        Resize(Preprocess(size=VIEW, resize=resize))


def test_the_difference_is_counted_in_levels() -> None:
    preprocess = Preprocess(size=(2, 4), resize="squash")
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3))

    def wrong(images: np.ndarray) -> np.ndarray:
        views = images.transpose(0, 3, 1, 2).copy()
        views[0, 0, 0, :3] += np.array([1, 0, 5], np.uint8)
        return views

    found = pixel_difference([image, image], preprocess, wrong)
    assert found == PixelDifference(2, 5, 1 / 24, 2 / 24)


def test_the_difference_is_measured_as_the_model_sees_images() -> None:
    grey = Preprocess(size=VIEW, mean=(0.5,), std=(0.5,))
    images = [as_image(noise(*size)[0]) for size in [(70, 90), (20, 30)]]
    found = pixel_difference(images, grey, lambda images: in_torch(grey, images))
    assert found.images == 2 and found.most <= 1 and found.at_all < 0.01
    with pytest.raises(UsageError, match="measured on images: none"):
        pixel_difference([], grey, lambda images: images)
