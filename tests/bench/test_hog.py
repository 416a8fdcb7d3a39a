"""The traditional baseline, on pictures whose classes differ in the direction of their edges."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrail.bench.hog import HOG, check_installed, hog_features, hog_labeller, train_hog
from vitrail.data.views.augment import AugmentConfig
from vitrail.errors import DataError, UsageError
from vitrail.models import ViTConfig
from vitrail.runs import DataConfig, TrainConfig

CONFIG = TrainConfig(
    data=DataConfig(path="photos", workers=1),
    model=ViTConfig(depth=1, width=32, heads=2, patch=(8, 8), image_size=(32, 32)),
    augment=AugmentConfig.off(),
    epochs=1,
    threads=1,
)


def stripes(angle: float, seed: int, side: int = 40) -> np.ndarray:
    """Stripes across `angle`, of random width, place and colour, in noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    wave = np.sin(
        (x * np.cos(angle) + y * np.sin(angle)) / rng.uniform(1.5, 2.5) + rng.uniform(0, 6)
    )
    colour = rng.uniform(40, 120, 3)
    pixels = 128 + wave[..., None] * colour + rng.normal(0, 10, (side, side, 3))
    return pixels.clip(0, 255).astype(np.uint8)


def photos(root: Path, angles: dict[str, float], n: int = 12) -> Path:
    for k, (name, angle) in enumerate(angles.items()):
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(stripes(angle, 100 * k + i)).save(root / name / f"{i}.png")
    return root


THREE = {"flat": np.pi / 2, "slanted": np.pi / 4, "upright": 0.0}


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    data = photos(tmp_path / "photos", THREE)
    return replace(CONFIG, data=replace(CONFIG.data, path=str(data)))


def test_it_tells_directions_apart_and_leaves_a_folder_like_a_runs(config, tmp_path):
    train_hog(config, tmp_path / HOG)
    metrics = json.loads((tmp_path / HOG / "metrics.json").read_text())
    assert metrics["top1"]["value"] == 1.0 and metrics["images"] == 6
    assert metrics["classes"] == ["flat", "slanted", "upright"]
    about = json.loads((tmp_path / HOG / "hog.json").read_text())
    # Cells of 4 pixels: 8 x 8 of them, 7 x 7 blocks, 36 numbers each; 3 classes.
    assert about["cell"] == 4 and about["parameters"] == 3 * (7 * 7 * 36 + 1)
    lines = (tmp_path / HOG / "predictions.csv").read_text().splitlines()
    assert lines[0] == "key,label,predicted,probability,p:flat,p:slanted,p:upright"
    split = (tmp_path / HOG / "split.csv").read_text()
    assert {line.split(",")[0] for line in lines[1:]} == {
        row.split(",")[1] for row in split.splitlines() if row.startswith("val,")
    }


def test_two_classes_of_grey_images_with_a_test_part(tmp_path):
    arrays = {}
    for part, n in (("train", 20), ("val", 4), ("test", 8)):
        labels = np.arange(n) % 2
        angles = labels * np.pi / 2
        images = [stripes(angle, i, 28).mean(2) for i, angle in enumerate(angles)]
        arrays[f"{part}_images"] = np.stack(images).astype(np.uint8)
        arrays[f"{part}_labels"] = labels[:, None]
    np.savez(tmp_path / "grey.npz", **arrays)
    model = replace(CONFIG.model, channels=1)
    data = replace(CONFIG.data, path=str(tmp_path / "grey.npz"))
    train_hog(replace(CONFIG, data=data, model=model), tmp_path / HOG)
    metrics = json.loads((tmp_path / HOG / "metrics.json").read_text())
    assert metrics["images"] == 8 and metrics["top1"]["value"] == 1.0
    hog_labeller(tmp_path / HOG)(3)


def test_features_are_of_one_length_and_do_not_see_brightness():
    view = stripes(0.7, 0, 32).transpose(2, 0, 1)
    features = hog_features(view, 4)
    assert features.shape == (7 * 7 * 36,) and features.dtype == np.float32
    dark = view // 2
    np.testing.assert_allclose(hog_features(dark + 40, 4), hog_features(dark, 4), atol=1e-6)
    # Nor contrast, but for the rounding to whole grey levels.
    assert np.abs(hog_features(dark, 4) - features).mean() < 0.01 < features.mean()


def test_a_class_with_one_training_image_needs_no_folds(tmp_path):
    data = photos(tmp_path / "few", THREE, n=2)
    train_hog(replace(CONFIG, data=replace(CONFIG.data, path=str(data))), tmp_path / HOG)
    assert json.loads((tmp_path / HOG / "hog.json").read_text())["strength"] == 1.0


def test_damaged_images(config, tmp_path):
    (Path(config.data.path) / "flat" / "3.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"flat/3\.png"):
        train_hog(config, tmp_path / HOG)
    allowed = replace(config, data=replace(config.data, max_unreadable=0.2))
    train_hog(allowed, tmp_path / "again")
    assert "flat/3.png" in (tmp_path / "again" / "skipped.csv").read_text()


def test_several_labels_are_not_for_it(config, tmp_path):
    rows = [f"photos/{c}/{i}.png,{c}{'|x' * (i % 2)}" for c in THREE for i in range(6)]
    (tmp_path / "labels.csv").write_text("file,label\n" + "\n".join(rows))
    several = replace(config, data=replace(config.data, path=str(tmp_path / "labels.csv")))
    with pytest.raises(UsageError, match="one label"):
        train_hog(several, tmp_path / HOG)


def test_without_the_extra_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "skimage", None)
    with pytest.raises(UsageError, match=r"pip install 'vitrail\[baselines\]'"):
        check_installed()
