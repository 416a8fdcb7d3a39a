import json
from dataclasses import replace
from itertools import product
from math import floor
from time import process_time

import numpy as np
import pytest
import torch
from PIL import Image

from close import close
from vitrail.data.views.canvas import collate, input_of, normalise
from vitrail.data.views.preprocess import Preprocess
from vitrail.errors import DataError, UsageError

BASE = Preprocess(size=(48, 64), crop=0.875)


def picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    """A smooth random picture with a little grain, as a photograph has."""
    draw = np.random.default_rng(height * width)
    coarse = Image.fromarray(draw.integers(0, 256, (6, 7, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int64)
    grain = draw.integers(-5, 6, smooth.shape)
    return Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).convert(mode)


def in_two_steps(image: Image.Image, size: tuple[int, int], crop: float) -> np.ndarray:
    """The definition: resize the short side as torchvision does, then cut out the centre."""
    height, width = size
    short = floor(height / crop)
    by = short / min(image.size)
    scaled = image.resize(
        (max(short, int(image.width * by)), max(short, int(image.height * by))),
        Image.Resampling.BICUBIC,
    )
    left, top = round((scaled.width - width) / 2), round((scaled.height - height) / 2)
    shown = scaled.crop((left, top, left + width, top + height))
    return np.asarray(shown).transpose(2, 0, 1).astype(np.int64)


@pytest.mark.parametrize("crop", [1.0, 0.9, 0.875])
@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (128, 128), (80, 70), (30, 41)])
def test_view_is_resize_then_centre_crop(shape: tuple[int, int], crop: float) -> None:
    image = picture(*shape)
    shown = Preprocess(size=(64, 64), crop=crop).view(image)
    assert np.abs(in_two_steps(image, (64, 64), crop) - shown).max() <= 1


def test_a_size_that_is_not_square_covers_the_window_at_the_images_aspect() -> None:
    # 90 x 60 to 48 x 64: the width rules; scaled by 64/60 it is 96 high, of which 48 are shown.
    image = picture(90, 60)
    shown = Preprocess(size=(48, 64)).view(image)
    scaled = np.asarray(image.resize((64, 96), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(scaled[:, 24:72].astype(np.int64) - shown).max() <= 1


def test_squash_shows_everything() -> None:
    image = picture(90, 60)
    shown = Preprocess(size=(48, 64), resize="squash").view(image)
    whole = np.asarray(image.resize((64, 48), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    np.testing.assert_array_equal(shown, whole)


def test_pad_shows_everything_at_its_aspect_in_whole_patches() -> None:
    # timm's "border" puts it into the middle of `size`. A ViT would spend most of its tokens on the
    # background; at the top left, with none but what fills the last patches, it spends none.
    image = picture(90, 60)
    shown = Preprocess(size=(48, 64), resize="pad", background=7, patch=(16, 12)).view(image)
    whole = np.asarray(image.resize((32, 48), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert shown.shape == (3, 48, 36)
    np.testing.assert_array_equal(shown[:, :, :32], whole)
    assert (shown[:, :, 32:] == 7).all()


@pytest.mark.parametrize(
    ("shape", "patches"),
    [
        ((300, 300), (8, 8)),  # exactly its aspect, and all 64 tokens
        ((100, 400), (4, 16)),
        ((400, 100), (16, 4)),
        ((10, 40), (4, 16)),  # small ones grow, as by every other rule
        ((200, 300), (6, 9)),  # 54; 7 x 9 has 63, but is further from 2 to 3
        ((1, 20_000), (1, 32)),
        ((20_000, 1), (32, 1)),
    ],
)
def test_native_keeps_the_aspect_and_the_number_of_tokens(
    shape: tuple[int, int], patches: tuple[int, int]
) -> None:
    image = picture(*shape) if max(shape) < 1000 else Image.new("RGB", shape[::-1])
    preprocess = Preprocess(size=(64, 128), resize="native", patch=(8, 16))
    # The patches are twice as wide as high, and so the numbers of a square image's.
    wide = Preprocess(size=(64, 64), resize="native", patch=(8, 8))
    assert wide.view(image).shape == (3, patches[0] * 8, patches[1] * 8)
    shown = preprocess.view(image)
    assert shown.shape[1] % 8 == shown.shape[2] % 16 == 0
    assert shown[0].size <= 64 * 128


def test_native_shows_the_whole_image_at_the_scale_of_its_own() -> None:
    image = picture(100, 400)
    whole = np.asarray(image.resize((128, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    native = Preprocess(size=(64, 64), resize="native", patch=(8, 8))
    np.testing.assert_array_equal(native.view(image), whole)
    middle = Preprocess(size=(64, 64), resize="native", patch=(8, 8), crop=0.5).view(image)
    part = image.resize((128, 32), Image.Resampling.BICUBIC, box=(100, 25, 300, 75))
    np.testing.assert_array_equal(middle, np.asarray(part).transpose(2, 0, 1))


def test_native_never_has_more_tokens_and_wastes_few() -> None:
    draw = np.random.default_rng(0)
    native = Preprocess(size=(224, 224), resize="native", patch=(16, 16))
    tokens, stretched = [], []
    for height, width in draw.integers(50, 200, (300, 2)).tolist():
        _, h, w = native.view(Image.new("RGB", (width, height))).shape
        tokens.append(h * w // 256)
        stretched.append(abs(np.log((h / w) / (height / width))))
    assert min(tokens) >= 160 and max(tokens) <= 196 and np.mean(tokens) > 180
    assert max(stretched) < 0.12 and np.mean(stretched) < 0.03


@pytest.mark.parametrize("resize", ["crop", "squash", "pad", "native"])
@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1), (1, 1)])
def test_extreme_images_cost_no_more_than_others(shape: tuple[int, int], resize: str) -> None:
    preprocess = Preprocess.from_dict({"size": [224, 160], "resize": resize, "patch": [16, 16]})
    start = process_time()
    c, h, w = preprocess.view(Image.new("RGB", shape)).shape
    assert c == 3 and min(h, w) >= 16 and h * w <= 224 * 160
    assert not preprocess.one_size or (h, w) == (224, 160)
    assert process_time() - start < 1  # the scaled image as a whole would take gigabytes


def test_views_of_different_sizes_share_a_canvas() -> None:
    preprocess = Preprocess(size=(64, 64), resize="native", patch=(8, 8))
    images = [picture(100, 400), picture(400, 100), picture(80, 80)]
    views = [torch.from_numpy(preprocess.view(image)) for image in images]
    canvas = collate(views, preprocess.patch)
    assert canvas.images.shape == (3, 3, 128, 128) and canvas.images.dtype == torch.uint8
    assert canvas.extent is not None and canvas.extent.tolist() == [[4, 16], [16, 4], [8, 8]]
    for image, view in zip(canvas.images, views, strict=True):
        assert torch.equal(image[:, : view.shape[1], : view.shape[2]], view)
        assert image.sum() == view.sum()
    assert collate(views[:1] * 3, preprocess.patch).extent is None


def test_an_image_of_the_right_size_is_kept_as_it_is() -> None:
    grey = Preprocess(size=(28, 28), mean=(0.5,), std=(0.5,))
    assert grey.keeps(28, 28) and not grey.keeps(28, 29) and not BASE.keeps(48, 64)
    image = picture(28, 28, "L")
    np.testing.assert_array_equal(grey.view(image)[0], np.asarray(image))


@pytest.mark.parametrize("resize", ["crop", "squash", "pad", "native"])
@pytest.mark.parametrize("crop", [1.0, 0.8])
def test_what_is_said_to_be_kept_is_kept(resize: str, crop: float) -> None:
    values = {"size": [32, 48], "patch": [8, 8], "resize": resize, "crop": crop}
    preprocess = Preprocess.from_dict(values)
    kept = set()
    for height, width in product((16, 24, 30, 32, 40, 48), (24, 28, 32, 48, 64, 96)):
        image = picture(height, width)
        view, own = preprocess.view(image), np.asarray(image).transpose(2, 0, 1)
        same = view.shape == own.shape and bool((view == own).all())
        assert preprocess.keeps(height, width) == same, (height, width)
        if same:
            kept.add((height, width))
    fitting = {(32, 48)}
    if resize == "pad":
        fitting |= {(16, 48), (24, 48), (32, 24), (32, 32)}
    if resize == "native":
        fitting |= {(16, 96), (24, 64), (48, 32)}
        fitting |= {(24, 48), (40, 32), (48, 24), (32, 32)}  # fewer tokens, but the very aspect
    assert crop < 1 or kept == fitting


def test_channels_follow_the_mean() -> None:
    grey = Preprocess(size=(16, 16), mean=(0.5,), std=(0.5,))
    colour = Preprocess(size=(16, 16))
    assert (grey.channels, colour.channels) == (1, 3)
    image = picture(16, 16)
    np.testing.assert_array_equal(grey.view(image)[0], np.asarray(image.convert("L")))
    repeated = colour.view(image.convert("L"))
    assert (repeated[0] == repeated[2]).all()


@pytest.mark.parametrize("mode", ["RGBA", "P", "I;16"])
def test_what_is_not_decoded_is_refused(mode: str) -> None:
    with pytest.raises(DataError, match="read_image"):
        BASE.view(Image.new(mode, (8, 8)))


def test_normalise_and_call() -> None:
    preprocess = Preprocess(size=(20, 30), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    image = picture(50, 60)
    levels = torch.from_numpy(preprocess.view(image))
    mean, std = (torch.tensor(v)[:, None, None] for v in (preprocess.mean, preprocess.std))
    expected = (levels / 255 - mean) / std
    close(input_of(preprocess, image), expected)
    floats = levels[None].float()
    close(normalise(preprocess, floats)[0], expected)
    close(floats[0], levels.float())  # the argument is left alone


def test_json_and_back() -> None:
    preprocess = Preprocess(
        size=(20, 30),
        resize="pad",
        crop=0.9,
        mean=(0.1,),
        std=(0.2,),
        patch=(4, 5),
        grey_range=(0, 4095),
    )
    values = preprocess.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert Preprocess.from_dict(values) == preprocess


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"size": [8, 8], "crop_pct": 0.9}, "crop_pct"),
        ({"size": [8, 8], "meen": [0.5]}, "did you mean 'mean'"),
        ({"crop": 0.9}, "no size"),
        ({"size": 224}, "height, width"),
        ({"size": [0, 8]}, "height, width"),
        ({"size": [8.5, 8]}, "height, width"),
        ({"size": [8, 8, 3]}, "height, width"),
        ({"size": [8, 8], "resize": "cropp"}, "did you mean 'crop'"),
        ({"size": [8, 8], "interpolation": "cubic"}, "did you mean 'bicubic'"),
        ({"size": [8, 8], "crop": 0.0}, "fraction"),
        ({"size": [8, 8], "crop": "0.9"}, "fraction"),
        ({"size": [8, 8], "crop": float("nan")}, "fraction"),
        ({"size": [8, 8], "mean": [0.5]}, "number a channel"),
        ({"size": [8, 8], "mean": [0.5, 0.5], "std": [1.0, 1.0]}, "1 or 3"),
        ({"size": [8, 8], "mean": ["a"], "std": [1.0]}, "number a channel"),
        ({"size": [8, 8], "std": [1.0, 0.0, 1.0]}, "above 0"),
        ({"size": [8, 8], "background": 256}, "level 0 to 255"),
        ({"size": [8, 8], "patch": 4}, "patch 4: give"),
        ({"size": [8, 8], "grey_range": [5]}, r"grey_range=\(0, 4095\)"),
        ({"size": [8, 8], "grey_range": [5, 5]}, r"grey_range=\(0, 4095\)"),
        ({"size": [8, 8], "grey_range": "ab"}, r"grey_range=\(0, 4095\)"),
        ({"size": [8, 8], "grey_range": [0, float("nan")]}, r"grey_range=\(0, 4095\)"),
    ],
)
def test_a_wrong_value_is_named(values: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Preprocess.from_dict(values)


def test_every_field_has_an_effect() -> None:
    image = picture(90, 60)
    changes: dict[str, object] = {
        "size": (40, 64),
        "resize": "squash",
        "crop": 1.0,
        "interpolation": "bilinear",
        "mean": (0.4, 0.5, 0.5),
        "std": (0.4, 0.5, 0.5),
        "background": 0,
        "patch": (16, 24),
        "tile": 45,
        "grey_range": (0, 1000),
    }
    assert changes.keys() == BASE.to_dict().keys()
    for field, value in changes.items():
        base = BASE
        if field == "grey_range":
            image = image.convert("I")
        if field in ("background", "patch"):
            base = replace(BASE, resize="pad", patch=(8, 10))
        if field == "tile":
            base = replace(BASE, resize="tiles")
        before, after = (input_of(each, image) for each in (base, replace(base, **{field: value})))
        assert before.shape != after.shape or not torch.equal(before, after), field
