"""Batches of images of different sizes."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.data.augment import AugmentConfig
from vitrail.data.loader import Batch, EvalLoader, TrainLoader
from vitrail.data.preprocess import Preprocess
from vitrail.errors import UsageError

SHAPES = [(40, 40), (20, 80), (80, 20), (40, 40), (30, 60), (40, 40), (16, 128), (57, 31)]
OFF = AugmentConfig.off()
NATIVE = Preprocess(size=(32, 32), resize="native", patch=(8, 8))


class Oblong:
    """Images of SHAPES, in which red tells the column and green the row."""

    classes = ("a", "b")
    targets = np.arange(len(SHAPES)) % 2

    def __len__(self) -> int:
        return len(SHAPES)

    def key(self, i: int) -> str:
        return str(i)

    def load(self, i: int) -> Image.Image:
        height, width = SHAPES[i]
        x, y = np.meshgrid(np.linspace(10, 250, width), np.linspace(10, 250, height))
        return Image.fromarray(np.stack((x, y, 0 * x), -1).round().astype(np.uint8))


def images(batch: Batch) -> dict[int, torch.Tensor]:
    """What shows each image, by its index."""
    if batch.extent is None:
        return dict(zip(batch.indices.tolist(), batch.images, strict=True))
    sizes = (batch.extent * 8).tolist()
    return {
        i: image[:, :h, :w]
        for i, image, (h, w) in zip(batch.indices.tolist(), batch.images, sizes, strict=True)
    }


@pytest.mark.parametrize("resize", ["pad", "native"])
def test_evaluation_shows_every_image_at_the_top_left(resize: Any) -> None:
    preprocess = replace(NATIVE, resize=resize)
    loader = EvalLoader(Oblong(), preprocess, batch_size=5)
    for _ in range(2):  # from the files, then from memory
        seen: dict[int, torch.Tensor] = {}
        for batch in loader:
            assert batch.extent is not None
            seen |= images(batch)
        for i in range(len(SHAPES)):
            assert torch.equal(seen[i], preprocess(Oblong().load(i)))


def test_images_of_one_size_need_no_extent() -> None:
    (batch,) = EvalLoader(Oblong(), replace(NATIVE, resize="squash"))
    assert batch.extent is None and batch.images.shape == (8, 3, 32, 32)


def train(augment: AugmentConfig, batch_size: int, **options: Any) -> dict[int, torch.Tensor]:
    loader = TrainLoader(
        Oblong(), replace(NATIVE, **options), augment, batch_size=batch_size, seed=0
    )
    return {i: image for batch in loader.epoch(0) for i, image in images(batch).items()}


@pytest.mark.parametrize("resize", ["pad", "native"])
@pytest.mark.parametrize("policy", ["none", "randaugment", "trivial"])
def test_what_happens_to_an_image_depends_on_its_index_alone(policy: Any, resize: Any) -> None:
    augment = AugmentConfig(shift=2, vflip=0.5, policy=policy, jitter=0.3, erase=0.5)
    together, alone = train(augment, 8, resize=resize), train(augment, 1, resize=resize)
    assert together.keys() == alone.keys() == set(range(len(SHAPES)))
    for i, image in together.items():
        assert torch.equal(image, alone[i])


def test_a_mirror_image_stays_at_the_top_left() -> None:
    plain, flipped = train(OFF, 8), train(replace(OFF, hflip=1.0), 8)
    for i, image in plain.items():
        assert torch.equal(flipped[i], image.flip(-1))


@pytest.mark.parametrize("mixing", [{"mixup": 0.2}, {"cutmix": 1.0}])
@pytest.mark.parametrize("resize", ["pad", "native"])
def test_images_of_different_sizes_are_not_mixed(resize: Any, mixing: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=f"resize='{resize}' .*augment.mixup and augment.cutmix"):
        train(replace(OFF, **mixing), 8, resize=resize)
