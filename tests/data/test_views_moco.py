"""Several views of an image, and what MoCo v3 does to them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.data.views.augment import Augment, AugmentConfig, view_of
from vitrail.data.views.moco import moco_views
from vitrail.data.views.ops import brightness, color, contrast
from vitrail.data.views.ops import hue as turned
from vitrail.data.views.preprocess import Preprocess

H, W = 24, 32
OFF = AugmentConfig.off()
MANY = 600


def noise(n: int, channels: int = 3) -> torch.Tensor:
    drawn = np.random.default_rng(0).integers(0, 256, (n, channels, H, W), np.uint8)
    return torch.from_numpy(drawn)


def same(n: int) -> torch.Tensor:
    return noise(1).expand(n, -1, -1, -1)


def rows_equal(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a == b).flatten(1).all(1)


def test_the_first_view_is_the_only_one_and_the_second_another() -> None:
    config = replace(moco_views()[1], policy="trivial", shift=3, vflip=0.5, erase=0.5)
    images, indices = same(8), np.arange(8)

    def seen(number: int | None) -> torch.Tensor:
        several = {} if number is None else {"view": number}
        return Augment(config, 3, (H, W), **several)(images, indices, epoch=1)

    assert torch.equal(seen(None), seen(0))
    assert not rows_equal(seen(0), seen(1)).any() and not rows_equal(seen(1), seen(2)).any()

    image = Image.fromarray(noise(1)[0].permute(1, 2, 0).numpy())

    def crop(number: int | None) -> bytes:
        several = {} if number is None else {"view": number}
        preprocess = Preprocess(size=(16, 16))
        shown, _ = view_of(image, preprocess, config, seed=3, epoch=1, index=2, **several)
        return shown.tobytes()

    assert crop(None) == crop(0) and len({crop(0), crop(1), crop(2)}) == 3


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("number", [0, 1])
def test_a_view_is_its_samples_one_at_a_time(number: int, channels: int) -> None:
    config = moco_views()[number]
    augment = Augment(config, seed=5, size=(H, W), view=number)
    images, indices = noise(7, channels), np.array([3, 70, 0, 9, 41, 8, 1000])
    before = images.clone()
    together = augment(images, indices, epoch=2)
    assert torch.equal(images, before)
    for i in range(7):
        alone = augment(images[i : i + 1], indices[i : i + 1], epoch=2)[0]
        # The convolution of a blur may choose its algorithm by the batch; a level off there, and
        # solarising makes of the one beside its threshold another.
        off = (alone.int() - together[i].int()).abs() > 1
        assert off.float().mean() < 0.01


def test_probabilities_are_those_of_the_thing_itself() -> None:
    images, indices = same(MANY), np.arange(MANY)
    for field in ("grey", "blur", "solarize"):
        out = Augment(replace(OFF, **{field: 0.2}), 0, (H, W))(images, indices, 0)
        changed = 1 - rows_equal(out, images).float().mean()
        assert 0.15 < changed < 0.25, field
        out = Augment(replace(OFF, **{field: 1.0}), 0, (H, W))(images, indices, 0)
        # A blur of a quarter of a pixel or less is none in whole levels.
        assert rows_equal(out, images).float().mean() < (0.12 if field == "blur" else 1e-9)
    jitter = replace(OFF, jitter=0.4, jitter_probability=0.8)
    out = Augment(jitter, 0, (H, W))(images, indices, 0)
    assert 0.75 < 1 - rows_equal(out, images).float().mean() < 0.85


def test_grey_and_solarised_are_what_they_say() -> None:
    images, indices = noise(4), np.arange(4)
    grey = Augment(replace(OFF, grey=1.0), 0, (H, W))(images, indices, 0)
    assert torch.equal(grey[:, 0], grey[:, 1]) and torch.equal(grey[:, 0], grey[:, 2])
    negative = Augment(replace(OFF, solarize=1.0), 0, (H, W))(images, indices, 0)
    assert torch.equal(negative, torch.where(images < 128, images, 255 - images))


def test_jitter_reaches_as_far_as_each_strength_and_no_further() -> None:
    images, indices = same(200), np.arange(200)
    for field, operation, centre in (
        ("saturation", color, 1.0),
        ("hue", turned, 0.0),
    ):
        config = replace(OFF, **{field: 0.1})  # of jitter 0: nothing else moves
        out = Augment(config, 0, (H, W))(images, indices, 0).float()
        ends = [operation(images[:1], torch.tensor([centre + x])).float() for x in (-0.1, 0.1)]
        farthest = max((end - images[:1]).abs().mean().item() for end in ends)
        reach = (out - images).abs().mean((1, 2, 3))
        assert reach.max() <= farthest * 1.02 + 0.5 and reach.max() > 0.8 * farthest, field
        assert reach.min() < 0.2 * farthest
    # Without a range of its own, saturation has the others'.
    alike = [
        Augment(replace(OFF, jitter=0.3, saturation=s), 0, (H, W))(images, indices, 0)
        for s in (None, 0.3)
    ]
    assert torch.equal(*alike)


def test_the_order_is_brightness_contrast_saturation_hue() -> None:
    from vitrail.data.keyed import uniform

    images = noise(3)
    config = replace(OFF, jitter=0.4, saturation=0.2, hue=0.1)
    found = Augment(config, 9, (H, W), view=1)(images, np.arange(3), 4)
    drawn = torch.from_numpy(uniform(9, 4, np.arange(3), "jitter 1", 4)) * 2 - 1
    expected = images
    for operation, at, strength, draw in zip(
        (brightness, contrast, color, turned),
        (1, 1, 1, 0),
        (0.4, 0.4, 0.2, 0.1),
        drawn.T,
        strict=True,
    ):
        expected = operation(expected, at + strength * draw)
    assert (found.int() - expected.int()).abs().max() <= 1


def test_a_blur_is_of_a_tenth_to_two_pixels() -> None:
    point = torch.zeros(1, 1, 33, 33, dtype=torch.uint8)
    point[..., 16, 16] = 255
    out = Augment(replace(OFF, blur=1.0), 0, (33, 33))(
        point.expand(MANY, -1, -1, -1), np.arange(MANY), 0
    )
    middle = out[:, 0, 16, 16]
    assert middle.max() == 255  # a tenth of a pixel
    assert 8 <= middle.min() <= 12  # 255 / (2 pi 2^2) is 10.1
    # As many below a sigma of 1.05 as above it, where the middle is 255 * 0.36^2 = 34.
    assert 0.42 < (middle < 36).float().mean() < 0.58


def test_mirroring_last_or_first_is_the_same() -> None:
    config = replace(moco_views()[0], hflip=0.0)
    images, indices = noise(6), np.arange(6)
    augment = Augment(config, 0, (H, W))
    first, last = augment(images.flip(3), indices, 0), augment(images, indices, 0).flip(3)
    assert (first.int() - last.int()).abs().max() <= 1  # a blur's sums come in another order


def test_what_is_drawn_for_a_view_never_changes() -> None:
    columns, rows = np.meshgrid(np.linspace(0, 255, 100), np.linspace(0, 255, 80))
    image = Image.fromarray(np.stack((columns, rows, columns), -1).round().astype(np.uint8))
    preprocess = Preprocess(size=(H, W), interpolation="bilinear")
    means = []
    for number, config in enumerate(moco_views()):
        shown, _ = view_of(image, preprocess, config, seed=0, epoch=1, index=0, view=number)
        batch = torch.from_numpy(shown)[None]
        done = Augment(config, 0, (H, W), view=number)(batch, np.array([0]), 1)
        means.append(done.float().mean((0, 2, 3)).tolist())
    np.testing.assert_allclose(means, [[38.9, 96.6, 28.2], [91.5, 100.3, 97.4]], atol=1.5)
