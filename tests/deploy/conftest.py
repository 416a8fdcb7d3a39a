"""A run that is exported again and again."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TINY = [
    *("--model", "vit_mini16", "--model.image-size", "32", "32", "--model.patch", "8", "8"),
    *("--model.depth", "1", "--model.width", "32", "--model.heads", "2", "--model.mlp", "64"),
    *("--data.batch-size", "8", "--epochs", "2", "--minutes", "None", "--evaluations", "1"),
    *("--threads", "1", "--device", "cpu", "--precision", "float32"),
]


@pytest.fixture(scope="package")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of twenty images of several sizes."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name, level in (("dark", 40), ("light", 200)):
        (root / name).mkdir()
        for i in range(20):
            pixels = rng.integers(level - 40, level + 40, (40 + i, 56, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="package")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that has seen them."""
    from vitrail.cli import main

    folder = tmp_path_factory.mktemp("run") / "run"
    assert main(["train", str(photos), *TINY, "--out", str(folder)]) == 0
    return folder
