import colorsys
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from close import close
from vitrail.data.keyed import uniform
from vitrail.data.views.augment import Augment, AugmentConfig, view_of
from vitrail.data.views.mix import mix
from vitrail.data.views.ops import GEOMETRIC, PHOTOMETRIC, rotate, shear_x, warp
from vitrail.data.views.policy import randaugment, three, trivial
from vitrail.data.views.preprocess import Preprocess, pixels
from vitrail.errors import UsageError

H, W = 40, 56
OFF = AugmentConfig.off()
ALL = AugmentConfig(
    shift=3, vflip=0.5, policy="randaugment", jitter=0.3, erase=0.5, mixup=0.8, cutmix=1.0
)


def view(*args: Any, **options: Any) -> np.ndarray:
    """The pixels alone."""
    return view_of(*args, **options)[0]


def pictures(n: int, channels: int = 3, height: int = H, width: int = W) -> torch.Tensor:
    """Smooth random pictures with a little grain, uint8 [n c h w]."""
    draw = np.random.default_rng(0)
    coarse = torch.from_numpy(draw.uniform(0, 255, (n, channels, 5, 6)))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    grain = torch.from_numpy(draw.integers(-5, 6, smooth.shape))
    return (smooth + grain).clamp(0, 255).to(torch.uint8)


def pillow(images: torch.Tensor, change: Callable[[Image.Image], Image.Image]) -> torch.Tensor:
    """What Pillow makes of each of them."""
    changed = [
        change(Image.fromarray(np.ascontiguousarray(x.permute(1, 2, 0).squeeze(-1).numpy())))
        for x in images
    ]
    return torch.from_numpy(np.stack([pixels(x) for x in changed]))


def difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.int() - b.int()).abs()


def add_to_the_dark(image: Image.Image, added: float) -> Image.Image:
    table = [v + int(added) if v < 128 else v for v in range(256)]
    return image.point(table * len(image.getbands()))


def turned_colours(image: Image.Image, turn: float) -> Image.Image:
    """By Python's own HSV, pixel by pixel: Pillow's has 256 hues only."""
    if image.mode == "L":
        return image

    def turned(pixel: np.ndarray) -> list[float]:
        hue, saturation, value = colorsys.rgb_to_hsv(*(pixel / 255))
        return [255 * x for x in colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)]

    changed = np.apply_along_axis(turned, 2, np.asarray(image))
    return Image.fromarray(changed.round().astype(np.uint8))


PILLOW: dict[str, tuple[list[float], Callable[[Image.Image, float], Image.Image]]] = {
    "autocontrast": ([0], lambda image, _: ImageOps.autocontrast(image)),
    "equalize": ([0], lambda image, _: ImageOps.equalize(image)),
    "invert": ([0], lambda image, _: ImageOps.invert(image)),
    "posterize": ([1, 3, 8], lambda image, bits: ImageOps.posterize(image, int(bits))),
    "solarize": ([0, 100, 256], lambda image, level: ImageOps.solarize(image, int(level))),
    "solarize_add": ([0, 50, 110], add_to_the_dark),
    "color": ([0, 0.4, 1, 1.9], lambda image, x: ImageEnhance.Color(image).enhance(x)),
    "contrast": ([0.1, 0.4, 1, 1.9], lambda image, x: ImageEnhance.Contrast(image).enhance(x)),
    "brightness": ([0.1, 0.4, 1, 1.9], lambda image, x: ImageEnhance.Brightness(image).enhance(x)),
    "sharpness": ([0.1, 0.4, 1, 1.9], lambda image, x: ImageEnhance.Sharpness(image).enhance(x)),
    "grayscale": ([0], lambda image, _: image.convert("L").convert(image.mode)),
    "hue": ([0, 0.1, -0.45], turned_colours),
    "blur": ([0.1, 1, 2], lambda image, x: image.filter(ImageFilter.GaussianBlur(x))),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", PHOTOMETRIC)
def test_operations_on_values_are_pillows(name: str, channels: int) -> None:
    images = pictures(3, channels)
    levels, change = PILLOW[name]
    for level in levels:
        ours = PHOTOMETRIC[name](images, torch.full((3,), float(level)))
        theirs = pillow(images, lambda image, level=level: change(image, level))
        # Pillow's Gaussian is made of box blurs.
        assert difference(ours, theirs).max() <= (3 if name == "blur" else 1), level


def test_flat_and_tiny_images_survive_every_operation() -> None:
    for shape in ((2, 3, 1, 1), (1, 1, 2, 3)):
        flat = torch.full(shape, 90, dtype=torch.uint8)
        for name, (levels, change) in PILLOW.items():
            ours = PHOTOMETRIC[name](flat, torch.full((shape[0],), float(levels[-1])))
            theirs = pillow(flat, lambda image, c=change, x=levels[-1]: c(image, x))
            assert difference(ours, theirs).max() <= 1, name


def affine(*coefficients: float) -> Callable[[Image.Image], Image.Image]:
    def change(image: Image.Image) -> Image.Image:
        fill = (77,) * 3 if image.mode == "RGB" else 77
        bilinear = Image.Resampling.BILINEAR
        return image.transform(
            image.size, Image.Transform.AFFINE, coefficients, bilinear, fillcolor=fill
        )

    return change


def turned(degrees: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.rotate(
        degrees, Image.Resampling.BILINEAR, fillcolor=(77,) * len(image.getbands())
    )


@pytest.mark.parametrize(
    ("name", "level", "change"),
    [
        ("rotate", 30.0, turned(30)),
        ("rotate", -135.0, turned(-135)),
        ("shear_x", 0.3, affine(1, 0.3, 0, 0, 1, 0)),
        ("shear_y", -0.99, affine(1, 0, 0, -0.99, 1, 0)),
        ("translate_x", 0.45, affine(1, 0, 0.45 * W, 0, 1, 0)),
        ("translate_y", -0.3, affine(1, 0, 0, 0, 1, -0.3 * H)),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_operations_on_places_are_pillows(
    name: str, level: float, change: Callable[[Image.Image], Image.Image], channels: int
) -> None:
    images = pictures(3, channels)
    ours = warp(images, GEOMETRIC[name](np.full(3, level), (H, W)), 77)
    off = difference(ours, pillow(images, change)) > 1
    # On the very edge of the picture rounding decides whether a pixel is inside.
    assert off.float().mean() < 0.002


def test_maps_in_a_row_are_one_map() -> None:
    images = pictures(2)
    first, second = rotate(np.full(2, 20.0), (H, W)), shear_x(np.full(2, 0.2), (H, W))
    at_once = warp(images, first @ second, 77)
    one_by_one = pillow(pillow(images, turned(20)), affine(1, 0.2, 0, 0, 1, 0))
    middle = (..., slice(12, 28), slice(16, 40))
    assert difference(at_once[middle], one_by_one[middle]).float().mean() < 3


def test_whole_pixels_moved_by_whole_pixels_keep_their_levels() -> None:
    images = pictures(2)
    moved = warp(images, GEOMETRIC["translate_x"](np.full(2, 7 / W), (H, W)), 77)
    assert torch.equal(moved[..., :-7], images[..., 7:]) and (moved[..., -7:] == 77).all()


# The key property: an image's fate depends on its own index.


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", ["none", "randaugment", "trivial", "three"])
def test_a_batch_is_its_samples_one_at_a_time(policy: Any, channels: int) -> None:
    augment = Augment(replace(ALL, policy=policy), seed=5, size=(H, W))
    images, indices = pictures(7, channels), np.array([3, 70, 0, 9, 41, 8, 1000])
    before = images.clone()
    together = augment(images, indices, epoch=2)
    assert torch.equal(images, before)
    assert together.dtype == torch.uint8 and together.shape == images.shape
    for i in range(7):
        alone = augment(images[i : i + 1], indices[i : i + 1], epoch=2)[0]
        # The convolution of a blur may choose its algorithm by the batch.
        assert difference(alone, together[i]).max() <= (1 if policy == "three" else 0)
    order = np.array([4, 0, 6])
    assert torch.equal(augment(images[order], indices[order], epoch=2), together[order])


def test_epoch_seed_and_index_each_make_another_image() -> None:
    images = pictures(1).expand(8, -1, -1, -1)
    base = Augment(ALL, 0, (H, W))(images, np.arange(8), epoch=0)
    assert len({x.numpy().tobytes() for x in base}) == 8
    for seed, epoch in ((1, 0), (0, 1)):
        other = Augment(ALL, seed, (H, W))(images, np.arange(8), epoch=epoch)
        assert all(not torch.equal(x, y) for x, y in zip(base, other, strict=True))


def test_nothing_asked_for_is_nothing_done() -> None:
    images = pictures(3)
    assert torch.equal(Augment(OFF, 0, (H, W))(images, np.arange(3), 0), images)


def test_flips_come_at_their_rate() -> None:
    images = pictures(1).expand(400, -1, -1, -1)
    out = Augment(replace(OFF, hflip=0.3, vflip=0.8), 0, (H, W))(images, np.arange(400), 0)
    versions = [images[0].flip(axes) for axes in ([], [2], [1], [1, 2])]
    rates = [(out == x).flatten(1).all(1).float().mean().item() for x in versions]
    np.testing.assert_allclose(rates, [0.14, 0.06, 0.56, 0.24], atol=0.08)


def test_shift_shows_every_place_with_the_fill_behind() -> None:
    images = pictures(1, 1).expand(300, -1, -1, -1)
    out = Augment(replace(OFF, shift=1, fill=7), 0, (H, W))(images, np.arange(300), 0)
    padded = torch.nn.functional.pad(images[0], (1, 1, 1, 1), value=7)
    places = [padded[:, y : y + H, x : x + W] for y in range(3) for x in range(3)]
    seen = torch.stack([(out == place).flatten(1).all(1) for place in places])
    assert seen.any(0).all() and (seen.sum(1) > 10).all()


def test_erased_boxes_have_the_papers_sizes_and_are_noise() -> None:
    black = torch.zeros(300, 3, 100, 100, dtype=torch.uint8)
    out = Augment(replace(OFF, erase=0.5), 0, (100, 100))(black, np.arange(300), 0)
    changed = (out > 0).any(1)
    erased = changed.flatten(1).any(1)
    assert 0.4 < erased.float().mean() < 0.6
    ratios = []
    for box in changed[erased]:
        tall, wide = int(box.any(1).sum()), int(box.any(0).sum())
        assert 0.018 < tall * wide / 10_000 < 0.35
        ratios.append(tall / wide)
    assert min(ratios) > 0.27 and max(ratios) < 3.7 and min(ratios) < 0.5 < 2 < max(ratios)
    noise = out[changed[:, None].expand_as(out)].float()
    assert abs(noise.mean() - 127.5) < 1 and abs(noise.std() - 73.9) < 1


# Policies


def draws(b: int) -> Callable[[str, int], np.ndarray]:
    return lambda _purpose, n: np.random.default_rng(1).random((b, n), dtype=np.float32)


def test_randaugment_draws_timms_operations_at_their_levels() -> None:
    plan = randaugment(draws(6000), ops=2, magnitude=9.0)
    names, counts = np.unique(plan.names, return_counts=True)
    assert set(names) == {"identity"} | (PHOTOMETRIC.keys() | GEOMETRIC.keys()) - {
        "grayscale",
        "blur",
        "hue",
    }
    rates = dict(zip(names, counts / plan.names.size, strict=True))
    assert abs(rates.pop("identity") - 0.5) < 0.02
    np.testing.assert_allclose(list(rates.values()), 1 / 30, atol=0.008)
    for name, centre, spread in (("rotate", 27, 1.5), ("solarize_add", 99, 5.5)):
        level = np.abs(plan.levels[plan.names == name])
        assert abs(level.mean() - centre) < spread and level.max() <= centre / 0.9 + 1e-6
    sides = plan.levels[plan.names == "color"] > 1
    assert 0.4 < sides.mean() < 0.6


def test_trivial_reaches_the_papers_extremes_and_three_is_one_of_three() -> None:
    plan = trivial(draws(6000), size=(64, 32))
    assert plan.names.shape == (6000, 1) and len(np.unique(plan.names)) == 14
    reach = {"rotate": 135, "shear_y": 0.99, "translate_x": 1.0, "translate_y": 0.5}
    for name, most in reach.items():
        level = plan.levels[plan.names == name]
        assert abs(level.max() - most) < 1e-6 and abs(level.min() + most) < 1e-6
    bits = plan.levels[plan.names == "posterize"]
    assert (bits.min(), bits.max()) == (2, 8)
    assert set(np.unique(three(draws(300)).names)) == {"grayscale", "solarize", "blur"}


def test_what_is_drawn_for_a_seed_never_changes() -> None:
    """Runs are reproduced by any later version: these values stay, whatever else is improved."""
    draw = partial(uniform, 0, 0, np.arange(4))
    plan = randaugment(draw, ops=2, magnitude=9.0)
    assert plan.names[:3].tolist() == [
        ["identity", "contrast"],
        ["identity", "identity"],
        ["autocontrast", "identity"],
    ]
    assert plan.levels[0, 1] == pytest.approx(1.7536, abs=1e-4)
    plan = trivial(draw, size=(64, 64))
    assert plan.names[:, 0].tolist() == ["brightness", "rotate", "equalize", "solarize"]
    np.testing.assert_allclose(plan.levels[:, 0], [0.769, 13.5, 0, 93.8667], atol=1e-4)
    assert three(draw).names[:, 0].tolist() == ["grayscale"] * 2 + ["solarize"] * 2

    _, shares = mix(*halves(4), np.arange(4), ALL, seed=0, epoch=0)
    np.testing.assert_allclose(shares[::2, 0], [0.3750, 0.3515], atol=1e-4)
    shown = view(
        gradient(80, 100), Preprocess(size=(16, 16)), AugmentConfig(), seed=0, epoch=0, index=0
    )
    # The middle of the box (37.0, 22.1, 79.4, 64.1) of 100 x 80, in grey levels.
    np.testing.assert_allclose(shown[:2].mean((1, 2)), [148.6, 137.5], atol=0.6)


# The view


def gradient(height: int, width: int) -> Image.Image:
    """Red tells the column, green the row, each from 0 to 255."""
    columns, rows = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack((columns, rows, columns), -1).round().astype(np.uint8))


def seen_box(shown: np.ndarray) -> tuple[float, float]:
    """The parts of the gradient's height and width that a view of 16 x 16 pixels shows."""
    width, height = (float(np.ptp(shown[i].astype(int))) / 255 * 16 / 15 for i in (0, 1))
    return height, width


def test_views_are_inceptions_crops() -> None:
    image, preprocess = gradient(256, 256), Preprocess(size=(16, 16), interpolation="bilinear")
    boxes = np.array(
        [
            seen_box(view(image, preprocess, AugmentConfig(), seed=0, epoch=0, index=i))
            for i in range(400)
        ]
    )
    area, ratio = boxes.prod(1), boxes[:, 1] / boxes[:, 0]
    assert 0.06 < area.min() < 0.15 and 0.85 < area.max() < 1.1
    assert 0.45 < area.mean() < 0.58
    assert 0.68 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.45
    assert abs(np.log(ratio).mean()) < 0.05


def test_a_view_depends_on_its_key_alone() -> None:
    image, preprocess = gradient(90, 120), Preprocess(size=(32, 24))

    def at(seed: int, epoch: int, index: int) -> np.ndarray:
        return view(image, preprocess, AugmentConfig(), seed=seed, epoch=epoch, index=index)

    assert at(0, 0, 0).shape == (3, 32, 24) and at(0, 0, 0).dtype == np.uint8
    np.testing.assert_array_equal(at(1, 2, 3), at(1, 2, 3))
    assert len({at(*key).tobytes() for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))}) == 4


def test_without_a_crop_the_view_is_the_evaluation_view() -> None:
    image, preprocess = gradient(90, 120), Preprocess(size=(32, 24), crop=0.875)
    shown = view(image, preprocess, OFF, seed=0, epoch=0, index=0)
    np.testing.assert_array_equal(shown, preprocess.view(image))


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (1, 1), (3000, 2000)])
def test_every_shape_of_image_has_a_view(shape: tuple[int, int]) -> None:
    preprocess = Preprocess(size=(32, 24), mean=(0.5,), std=(0.5,))
    for i in range(3):
        shown = view(Image.new("L", shape), preprocess, AugmentConfig(), seed=0, epoch=0, index=i)
        assert shown.shape == (1, 32, 24)


@pytest.mark.parametrize("resize", ["pad", "native"])
def test_a_crop_is_scaled_by_the_rule_of_the_evaluation_view(resize: Any) -> None:
    image = gradient(100, 400)
    preprocess = Preprocess(size=(64, 64), resize=resize, patch=(8, 8), background=0)
    expected = preprocess.view(image)
    assert expected.shape == ((3, 16, 64) if resize == "pad" else (3, 32, 128))

    def views(**changes: Any) -> list[np.ndarray]:
        config = AugmentConfig(**changes)
        return [view(image, preprocess, config, seed=0, epoch=0, index=i) for i in range(50)]

    # The ratio is a part of the image's own, so that training sees the shapes of evaluation.
    whole = views(crop_scale=(0.999, 1.0), crop_ratio=(1.0, 1.0))[0]
    assert whole.shape == expected.shape and np.abs(whole.astype(int) - expected).max() <= 2
    shapes = {shown.shape[1:] for shown in views()}
    assert expected.shape[1:] in shapes and (len(shapes) > 5 or resize == "pad")
    assert all(h % 8 == w % 8 == 0 and 0 < h * w <= 64 * 64 and w > 2 * h for h, w in shapes)
    # And no rounding error costs one of exactly its aspect a row.
    assert {shown.shape for shown in views(crop_ratio=(1.0, 1.0))} == {expected.shape}


def test_long_images_are_augmented_like_others() -> None:
    augment = Augment(replace(ALL, shift=20, policy="trivial"), seed=0, size=(32, 32))
    for height, width in ((8, 128), (128, 8), (1, 1)):
        images = pictures(30, 3, height, width)
        out = augment(images, np.arange(30), epoch=0)
        assert out.shape == images.shape and not torch.equal(out, images)


# Mixing


def halves(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images that are 0 at even places and 1 at odd ones, so that a mean tells the share."""
    which = torch.arange(n) % 2
    return which.float()[:, None, None, None].repeat(1, 3, 20, 30), torch.eye(2)[which]


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_targets_have_the_share_of_the_pixels(kind: str) -> None:
    images, targets = halves(64)
    config = replace(OFF, **{kind: 1.0})
    mixed, shares = mix(images, targets, np.arange(64), config, seed=0, epoch=0)
    close(mixed.mean((1, 2, 3)), shares[:, 1])
    close(shares.sum(1), torch.ones(64))
    whole = ((mixed == 0) | (mixed == 1)).flatten(1).all(1)
    assert whole.all() if kind == "cutmix" else not whole.any()
    # Both of a pair have the same share.
    close(shares[::2, 0], shares[1::2, 1])
    assert shares[::2, 0].std() > 0.15


def test_mixup_and_cutmix_each_have_half_of_the_pairs() -> None:
    images, targets = halves(800)
    config = replace(OFF, mixup=0.8, cutmix=1.0)
    mixed, _ = mix(images, targets, np.arange(800), config, seed=0, epoch=0)
    cut = ((mixed == 0) | (mixed == 1)).flatten(1).all(1)
    assert 0.4 < cut.float().mean() < 0.6


@pytest.mark.parametrize("n", [1, 3])
def test_an_odd_last_image_stays_itself(n: int) -> None:
    images, targets = halves(n)
    mixed, shares = mix(images, targets, np.arange(n), ALL, seed=0, epoch=0)
    assert torch.equal(mixed[-1], images[-1]) and torch.equal(shares[-1], targets[-1])
    assert n == 1 or not torch.equal(shares[0], targets[0])


def test_a_pair_is_mixed_alike_in_any_batch() -> None:
    images, targets = halves(8)
    indices = np.arange(8) * 7
    mixed, shares = mix(images, targets, indices, ALL, seed=0, epoch=3)
    part, part_shares = mix(images[4:6], targets[4:6], indices[4:6], ALL, seed=0, epoch=3)
    close(mixed[4:6], part)
    close(shares[4:6], part_shares)


@pytest.mark.parametrize("alpha", [0.1, 0.8, 1.0, 8.0])
def test_shares_follow_the_beta_distribution(alpha: float) -> None:
    n = 8000
    _, shares = mix(
        torch.zeros(n, 1, 1, 1),
        halves(n)[1],
        np.arange(n),
        replace(OFF, mixup=alpha),
        seed=0,
        epoch=0,
    )
    ours = np.sort(shares[::2, 0].numpy())
    theirs = np.sort(np.random.default_rng(0).beta(alpha, alpha, n // 2))
    assert np.abs(ours - theirs).mean() < 0.02
    assert abs(ours.var() - 1 / (4 * (2 * alpha + 1))) < 0.01


# The config


def test_every_field_has_an_effect() -> None:
    preprocess, image = Preprocess(size=(H, W)), gradient(90, 120)
    indices = np.arange(16)

    def result(config: AugmentConfig) -> list[torch.Tensor]:
        seen = view(image, preprocess, config, seed=0, epoch=0, index=0)
        images = Augment(config, 0, (H, W))(pictures(16), indices, 0)
        targets = torch.eye(16)
        floats, shares = mix(images.float(), targets, indices, config, seed=0, epoch=0)
        return [torch.from_numpy(seen), floats, shares]

    changes: dict[str, tuple[AugmentConfig, object]] = {
        "crop_scale": (AugmentConfig(), (0.5, 1.0)),
        "crop_ratio": (AugmentConfig(), (1.0, 1.0)),
        "shift": (OFF, 2),
        "hflip": (OFF, 0.5),
        "vflip": (OFF, 0.5),
        "policy": (OFF, "trivial"),
        "ops": (replace(OFF, policy="randaugment"), 3),
        "magnitude": (replace(OFF, policy="randaugment"), 5.0),
        "jitter": (OFF, 0.3),
        "saturation": (replace(OFF, jitter=0.3), 0.0),
        "hue": (OFF, 0.1),
        "jitter_probability": (replace(OFF, jitter=0.3), 0.5),
        "grey": (OFF, 0.5),
        "blur": (OFF, 0.5),
        "solarize": (OFF, 0.5),
        "erase": (OFF, 0.5),
        "mixup": (OFF, 0.5),
        "cutmix": (OFF, 0.5),
        "fill": (replace(OFF, shift=2), 0),
    }
    # Of views with a mask or boxes: test_scaled.py and test_box_views.py.
    elsewhere = ("size", "scale", "dominance", "mosaic", "blend", "calm")
    assert [*changes, *elsewhere] == sorted(
        (field.name for field in fields(AugmentConfig)), key=lambda name: name in elsewhere
    )
    for field, (base, value) in changes.items():
        after = replace(base, **{field: value})
        same = [torch.equal(x, y) for x, y in zip(result(base), result(after), strict=True)]
        assert not all(same), field


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"crop_scale": (0.0, 1.0)}, "crop_scale"),
        ({"crop_scale": (0.5, 1.5)}, "crop_scale"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio"),
        ({"policy": "randaug"}, "did you mean 'randaugment'"),
        ({"hflip": 1.5}, "hflip must be 0 to 1"),
        ({"erase": float("nan")}, "erase must be"),
        ({"jitter": -0.1}, "jitter"),
        ({"hue": 0.6}, "hue must be 0 to 0.5"),
        ({"saturation": 2.0}, "saturation"),
        ({"blur": float("nan")}, "blur must be"),
        ({"magnitude": 11.0}, "magnitude"),
        ({"ops": 0}, "ops"),
        ({"shift": 2.5}, "whole number"),
        ({"fill": 256}, "fill"),
        ({"mixup": -1.0}, "mixup"),
    ],
)
def test_a_wrong_value_is_named(values: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        AugmentConfig(**values)


def test_a_shift_out_of_sight_is_refused() -> None:
    with pytest.raises(UsageError, match="out of sight"):
        Augment(AugmentConfig(shift=8), 0, (8, 8))
