"""Runs that were really trained, in a second: for the tests of what comes after training."""

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.data import open_splits, write_split
from vitrail.data.batches.loader import EvalLoader, TrainLoader
from vitrail.data.views.augment import AugmentConfig
from vitrail.models import ViTConfig, build
from vitrail.runs import DataConfig, Run, TrainConfig
from vitrail.tasks import Classify
from vitrail.training import fit

MODEL = ViTConfig(depth=1, width=32, heads=2, mlp=64, patch=(8, 8), image_size=(32, 32), classes=3)


def paint(file: Path, k: int, i: int) -> None:
    """Image `i` of class `k`: noise of a hue that no other class has."""
    rng = np.random.default_rng([k, i])
    hue = np.array([(k * 67) % 255, (k * 131 + 80) % 255, (k * 29 + 160) % 255])
    pixels = np.clip(hue + rng.normal(0, 30, (32, 32, 3)), 0, 255)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(file)


def photos(root: Path, names: Sequence[str] = ("apple", "brick", "cloud"), n: int = 8) -> Path:
    """A folder of class folders."""
    for k, name in enumerate(names):
        for i in range(n):
            paint(root / name / f"{i}.png", k, i)
    return root


def table(root: Path, labels: Sequence[str], n: int = 8, names: Sequence[str] = ()) -> Path:
    """A CSV file: `n` images of each label; the first images may be given names."""
    rows = []
    for k, label in enumerate(labels):
        for i in range(n):
            file = names[i] if k == 0 and i < len(names) else f"{k}-{i}.png"
            paint(root / file, k, i)
            rows.append((file, label))
    with (root / "images.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("file", "label"), *rows])
    return root / "images.csv"


def train(data: Path, out: Path, model: ViTConfig = MODEL, **changes: Any) -> Run:
    """Two or so steps on `data`."""
    config = TrainConfig(
        data=DataConfig(path=str(data), batch_size=8, workers=1),
        model=model,
        row="vit_tiny",
        augment=AugmentConfig.off(),
        epochs=1,
        evaluations=1,
        **changes,
    )
    splits = open_splits(data, seed=0, val_fraction=0.25)
    assert splits.val is not None
    targets = splits.train.targets
    config = replace(config, model=replace(model, classes=len(targets.names)))
    run = Run.create(out, config)
    write_split(splits, run.split_file)
    torch.manual_seed(0)
    task = Classify(build(config.model), config.classify, targets)
    preprocess = config.preprocess()
    train_loader = TrainLoader(
        splits.train, preprocess, config.augment, batch_size=8, seed=0, workers=1
    )
    fit(task, train_loader, EvalLoader(splits.val, preprocess, workers=1), config, run)
    return run


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """What makes pictures and runs of them."""
    return SimpleNamespace(model=MODEL, paint=paint, photos=photos, table=table, train=train)
