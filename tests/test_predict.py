"""What a segmenter and learned features say of images: files, lines, and the same from Python."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vitrail as toolkit
from command import last_json, vitrail
from vitrail.deploy.answers import palette

TINY = [
    *("--model", "vit_mini16", "--model.image-size", "32", "32", "--model.patch", "8", "8"),
    *("--model.depth", "1", "--model.width", "32", "--model.heads", "2", "--model.mlp", "64"),
    *("--data.batch-size", "8", "--epochs", "1", "--minutes", "None", "--evaluations", "1"),
    *("--threads", "1", "--device", "cpu", "--precision", "float32"),
]
LOW, HIGH = 1000, 3000
"""Of the greys of the images."""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Deep greys, and masks of three classes."""
    root, rng = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    for i in range(24):
        mask = np.zeros((40, 56), np.uint8)
        mask[8:24, 8:30] = 1 + i % 2
        pixels = LOW + 900 * mask.astype(int) + rng.integers(0, 200, mask.shape)
        for kind, array in (("images", pixels.astype(np.uint16)), ("masks", mask)):
            (root / kind).mkdir(exist_ok=True)
            Image.fromarray(array).save(root / kind / f"{i:02}.png")
    (root / "classes.txt").write_text("background\na long name of a class\nred")
    return root


@pytest.fixture(scope="module")
def run(scenes, tmp_path_factory) -> Path:
    from vitrail.cli import main

    folder = tmp_path_factory.mktemp("run") / "run"
    flags = [*TINY, "--data.grey-range", str(LOW), str(HIGH), "--out", str(folder)]
    assert main(["train", str(scenes), *flags]) == 0
    return folder


def test_a_mask_has_the_images_own_size_upright(run, tmp_path, capfd):
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.new("RGB", (60, 44), (30, 90, 200)).save(tmp_path / "lying.jpg", exif=exif)
    Image.new("L", (31, 77), 90).save(tmp_path / "grey.png")
    found = tmp_path / "found"
    code, _, said = vitrail(
        capfd, "predict", run, tmp_path / "lying.jpg", tmp_path / "grey.png", "--out", found
    )
    assert code == 0, said
    for name, size in (("lying", (44, 60)), ("grey", (31, 77))):
        with Image.open(found / f"{name}.png") as mask:
            assert (mask.mode, mask.size) == ("P", size)
            assert mask.getpalette()[:9] == palette(3).flatten().tolist()
        with Image.open(found / f"{name}-overlay.jpg") as shown:
            assert (shown.mode, shown.size) == ("RGB", size)


def test_deep_greys_are_shown_as_the_model_sees_them(run, scenes, tmp_path, capfd):
    ramp = np.linspace(LOW, HIGH, 64).repeat(64).reshape(64, 64).T.astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    assert vitrail(capfd, "predict", run, tmp_path / "ramp.png", "--out", tmp_path / "out")[0] == 0
    mask = np.asarray(Image.open(tmp_path / "out" / "ramp.png"))
    shown = np.asarray(Image.open(tmp_path / "out" / "ramp-overlay.jpg")).astype(float)
    share = np.where(mask > 0, 0.5, 1.0)[..., None]
    expected = share * (ramp[..., None] - LOW) / (HIGH - LOW) * 255 + (1 - share) * palette(3)[mask]
    assert np.abs(shown - expected).mean() < 6  # of a JPEG


def test_images_of_one_name_stay_apart_and_nothing_is_replaced(run, scenes, tmp_path, capfd):
    images, out = tmp_path / "images", tmp_path / "out"
    for place in ("a/1.png", "b/1.png", "b/1.tif", "2.png"):
        (images / place).parent.mkdir(parents=True, exist_ok=True)
        with Image.open(scenes / "images" / "03.png") as image:
            image.save(images / place)
    code, _, said = vitrail(capfd, "predict", run, images, "--out", out)
    assert code == 0, said
    names = {str(file.relative_to(out)) for file in out.rglob("*.png")}
    assert names == {"2.png", "a/1.png", "b/1.png.png", "b/1.tif.png"}

    (out / "2.png").write_text("mended by hand")
    code, said_out, said = vitrail(capfd, "predict", run, images / "2.png", "--out", out)
    assert code == 2 and f"{out / '2.png'} is there already, and 1 more" in said
    assert (out / "2.png").read_text() == "mended by hand" and not said_out
    code, _, said = vitrail(capfd, "predict", run, images / "2.png", "--out", images)
    assert code == 2 and "is there already" in said
    code, _, said = vitrail(
        capfd,
        "predict",
        run,
        images / "a" / "1.png",
        images / "b" / "1.png",
        "--out",
        tmp_path / "x",
    )
    assert code == 2 and "two images are called 1.png" in said and not (tmp_path / "x").exists()


def test_a_line_fits_the_terminal(run, scenes, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    deep = tmp_path / "a folder with a long name" / "and another one" / "in it"
    shutil.copytree(scenes / "images", deep)
    code, out, said = vitrail(capfd, "predict", run, deep)
    assert code == 0, said
    lines = out.splitlines()
    assert len(lines) == 24 and max(map(len, lines)) <= 80 and all("%" in line for line in lines)
    assert lines[3].startswith("…") and "03.png  " in lines[3]
    _, out, _ = vitrail(capfd, "predict", run, deep / "03.png", "--top", 1, "--json")
    shares = last_json(out)["predictions"][0]["shares"]
    assert sum(shares.values()) == pytest.approx(1)
    if len(shares) > 1:
        assert out.splitlines()[0].endswith(f"{len(shares) - 1} more")


def test_the_same_from_python(run, scenes, tmp_path):
    predictor = toolkit.Predictor(run)
    found = predictor(scenes / "images" / "03.png")
    assert found.mask.shape == (40, 56) and found.names == predictor.names
    assert sum(found.shares.values()) == pytest.approx(1)
    config = toolkit.Run(run).config()
    outcome = toolkit.train(config, tmp_path / "again")
    assert outcome.evaluation.metrics.mode == "whole" and outcome.report.is_file()
    again = toolkit.evaluate(toolkit.Run(run)).metrics.values()
    assert set(again) == {"miou", "pixel_accuracy", "mean_accuracy", "boundary_iou"}


def test_features_from_the_command_line_and_from_python(scenes, tmp_path, capfd):
    run, image = tmp_path / "run", scenes / "images" / "03.png"
    flags = ["--task", "mocov3", "--moco.hidden", "32", "--moco.out", "8", "--out", run]
    code, _, said = vitrail(capfd, "train", scenes / "images", *TINY, *flags)
    assert code == 0, said
    assert "no labels to measure by: images lie directly in" in said
    assert "or learn from them without labels" not in said
    code, out, said = vitrail(capfd, "predict", run, image, "--json")
    assert code == 0 and "32 features" in out and "of length 1" in out, said
    code, out, said = vitrail(capfd, "predict", run, image, "--out", tmp_path / "x")
    assert code == 2 and not out and "this run gives neither" in said
    for verb in (["evaluate", run], ["predict", run, image]):
        code, _, said = vitrail(capfd, *verb, "--tta", "flip")
        assert code == 2 and "of one look at an image: leave it out" in said
    assert not list(run.glob("*tta*"))
    code, _, said = vitrail(capfd, "predict", run)
    assert code == 2 and "which images?" in said
    found = toolkit.Predictor(run)(image)
    assert np.linalg.norm(found.features) == pytest.approx(1, rel=1e-5)
    outcome = toolkit.train(toolkit.Run(run).config(), tmp_path / "again")
    assert set(outcome.evaluation.metrics.values()) == {"std", "rankme", "alpha_req"}
    assert toolkit.evaluate(toolkit.Run(run)).metrics.headline == "rankme"
