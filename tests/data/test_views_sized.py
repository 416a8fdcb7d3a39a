"""Several views of an image, each of a size of its own."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from close import close
from vitrail.data.batches.batch import Batch
from vitrail.data.batches.loader import Reading, TrainLoader
from vitrail.data.sources.source import ArraySource
from vitrail.data.views.augment import AugmentConfig
from vitrail.data.views.preprocess import Preprocess
from vitrail.errors import UsageError
from vitrail.models import ViTConfig
from vitrail.runs import DataConfig, TrainConfig

WIDE = AugmentConfig(crop_scale=(0.4, 1.0), jitter=0.4, blur=0.5)
NARROW = replace(WIDE, crop_scale=(0.05, 0.4), size=(16, 24))
VIEWS = (WIDE, WIDE, NARROW, NARROW)


def source(n: int = 12) -> ArraySource:
    pixels = np.random.default_rng(0).integers(0, 256, (n, 40, 50, 3), dtype=np.uint8)
    return ArraySource(pixels, np.zeros(n, np.int64), ("a",), "train")


def batches(views: Sequence[AugmentConfig] = VIEWS, **how: Any) -> list[Batch]:
    options: dict[str, Any] = {"batch_size": 4, "seed": 1, **how}
    return list(TrainLoader(source(), Preprocess(size=(32, 32)), views, **options).epoch(2))


@pytest.mark.parametrize("decode", ["exact", "fast"])
def test_views_have_their_sizes_whoever_makes_them(decode: Any) -> None:
    reading = Reading(decode=decode)
    whole = batches(workers=1, reading=reading)
    for batch in whole:
        shapes = [tuple(view.images.shape) for view in batch.views]
        assert shapes == [(4, 3, 32, 32)] * 2 + [(4, 3, 16, 24)] * 2
    for workers in (2, 3):
        for one, other in zip(whole, batches(workers=workers, reading=reading), strict=True):
            for mine, its in zip(one.views, other.views, strict=True):
                assert torch.equal(mine.images, its.images)
    halves = [batches(part=(k, 2), reading=reading) for k in range(2)]
    for batch, *parts in zip(whole, *halves, strict=True):
        for k, view in enumerate(batch.views):
            joined = torch.cat([part.views[k].images for part in parts])
            assert torch.equal(joined, view.images)


def test_each_view_draws_anew_and_depends_on_its_number_alone() -> None:
    (batch, *_), (fewer, *_) = batches(), batches(VIEWS[:3])
    for k in range(3):
        assert torch.equal(batch.views[k].images, fewer.views[k].images)
    assert not torch.equal(batch.views[0].images, batch.views[1].images)
    assert not torch.equal(batch.views[2].images, batch.views[3].images)


def test_a_crop_of_all_is_the_image_at_the_views_size() -> None:
    off = AugmentConfig.off()
    nearly = replace(off, crop_ratio=(1.25, 1.25 + 1e-9), size=(8, 10))
    (batch, *_) = batches((off, nearly))
    small = batch.views[1].images
    pooled = torch.nn.functional.adaptive_avg_pool2d(batch.views[0].images, 4)
    assert small.shape == (4, 3, 8, 10)
    close(small.mean(dim=(2, 3)), pooled.mean(dim=(2, 3)), 0.2, size=1.0)


def test_only_a_task_says_a_views_size() -> None:
    with pytest.raises(UsageError, match=r"augment.size.*train_size"):
        TrainConfig(data=DataConfig(path="x"), model=ViTConfig(), epochs=1, augment=NARROW)
