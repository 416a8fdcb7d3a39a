"""Views of images with masks: what is seen of one is what is seen of the other."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vitrail.data.batches.loader import TrainLoader
from vitrail.data.targets import Coding, MaskArrays, Masks
from vitrail.data.views.augment import AugmentConfig
from vitrail.data.views.preprocess import Preprocess
from vitrail.data.views.scaled import dominated, shown, window
from vitrail.data.views.seen import Seen

OFF = AugmentConfig.off()
SIDES = st.integers(8, 90)


class Blocks:
    """Images of three colours in blocks, and masks that say which."""

    def __init__(self, n: int = 6) -> None:
        rng = np.random.default_rng(0)
        self.masks = [
            rng.integers(0, 3, (h, w)).repeat(16, 0).repeat(16, 1).astype(np.uint8)
            for h, w in rng.integers(2, 5, (n, 2))
        ]
        store = MaskArrays(self.masks, "mask")
        self.targets = Masks(("red", "green", "blue"), store, Coding({k: k for k in range(3)}))

    def __len__(self) -> int:
        return len(self.masks)

    def key(self, i: int) -> str:
        return str(i)

    def load(self, i: int) -> Image.Image:
        return Image.fromarray(np.eye(3, dtype=np.uint8)[self.masks[i]] * 255)

    def stamp(self, i: int) -> str:
        return str(i)


def batches(config: AugmentConfig, size=(48, 64), epochs=3, resize="squash"):
    preprocess = Preprocess(size=size, resize=resize, mean=(0.0,) * 3, std=(1.0,) * 3)
    loader = TrainLoader(Blocks(), preprocess, config, batch_size=6, seed=1, workers=1)
    for epoch in range(epochs):
        yield from loader.epoch(epoch)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hflip": 0.5, "vflip": 0.5},
        {"shift": 9},
        {"policy": "trivial"},
        {"scale": (0.4, 2.0)},
        {"scale": (0.4, 2.0), "hflip": 0.5, "vflip": 0.5, "shift": 5},
        {"crop_scale": (0.3, 1.0)},
        {"crop_scale": (0.3, 1.0), "hflip": 0.5, "policy": "randaugment", "magnitude": 3.0},
    ],
)
def test_a_mask_moves_with_its_image(changes):
    config = AugmentConfig(**{**OFF.__dict__, **changes})
    photometric = "policy" in changes
    for batch in batches(config):
        images, masks = batch.images.numpy(), batch.targets["mask"].numpy()
        assert masks.shape == images[:, 0].shape
        said = images.argmax(axis=1)
        # Colours are exact but at borders, where two are mixed; greys are what lies around.
        sure = (images.max(axis=1) > 0.95) & (np.sort(images, axis=1)[:, 1] < 0.05)
        counted = sure & (masks >= 0)
        right = (said == masks)[counted].mean()
        assert right > (0.97 if photometric else 0.995), (changes, right)
        assert counted.mean() > 0.15
        if not photometric:
            assert not (sure & (masks < 0)).any() or (sure & (masks < 0)).mean() < 0.01


def test_background_and_mask_agree_to_the_pixel():
    config = AugmentConfig(**{**OFF.__dict__, "scale": (0.3, 0.6)})
    for batch in batches(config):
        images, masks = batch.images.numpy(), batch.targets["mask"].numpy()
        white = (images > 0.999).all(axis=1)
        assert np.array_equal(white, masks < 0) and white.any()


@given(SIDES, SIDES, SIDES, SIDES, st.floats(0.2, 3), st.tuples(*[st.floats(0, 0.999)] * 3))
def test_a_window_has_the_views_shape_and_shows_whole_pixels_of_a_small_image(
    height, width, rows, columns, factor, draws
):
    box = window((height, width), (rows, columns), (factor, factor), np.array(draws))
    seen = Seen.of_box(box, (height, width), (rows, columns))
    (x0, y0), (x1, y1) = seen.there(np.array([[0.0, 0.0], [1.0, 1.0]]))
    for low, high, side in ((x0, x1, columns), (y0, y1, rows)):
        if high - low < side - 1e-6:  # smaller than the view: inside it, pixel by pixel
            assert low > -1e-6 and high < side + 1e-6
            assert abs(low - round(low)) < 1e-6 and abs(high - round(high)) < 1e-6
        else:  # it fills the view
            assert low < 1e-6 and high > side - 1e-6
    image = Image.new("RGB", (width, height), (0, 0, 0))
    pixels, _ = shown(image, box, Preprocess(size=(rows, columns)))
    assert pixels.shape == (3, rows, columns)


def test_a_window_that_one_class_fills_is_drawn_again():
    filled = []
    for most in (1.0, 0.6):
        config = AugmentConfig(**{**OFF.__dict__, "scale": (2.0, 3.0), "dominance": most})
        masks = [m for batch in batches(config) for m in batch.targets["mask"].numpy()]
        filled.append(sum(dominated(mask, 0.6) for mask in masks))
    assert filled[1] < filled[0]
    assert dominated(np.array([[1, 1, 1, -1]]), 0.9) and not dominated(np.array([[-1, -1]]), 0.1)
