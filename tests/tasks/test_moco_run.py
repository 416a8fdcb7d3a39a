"""MoCo v3 from the command line: images without labels, a run that goes on exactly, a start."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from command import interrupted, last_json, vitrail
from vitrail.runs import Run

TINY = [
    *("--task", "mocov3", "--model", "vit_mini16", "--model.image-size", "32", "32"),
    *("--model.patch", "8", "8", "--model.depth", "2", "--model.width", "32"),
    *("--model.heads", "2", "--model.mlp", "64", "--moco.hidden", "64", "--moco.out", "16"),
    *("--data.batch-size", "8", "--minutes", "None", "--threads", "1", "--device", "cpu"),
    *("--evaluations", "2"),
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Pictures in no class folders, of two colours."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(32):
        place = folder
        pixels = rng.integers(0, 120, (40, 40, 3)) + np.array([100, 0, 0] if i % 2 else [0, 0, 100])
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i:02}.png")
    return folder


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_without_labels_goes_on_exactly_teacher_and_all(precision, photos, tmp_path, capfd):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    flags = [*TINY, "--precision", precision, "--moco.momentum", "0.9"]
    code, out, said = vitrail(
        capfd, "train", photos, *flags, "--epochs", 2, "--out", whole, "--json"
    )
    assert code == 0, said
    assert "rankme" in last_json(out)["metrics"] and "knn" not in last_json(out)["metrics"]
    interrupted(whole, halves, step=3)
    assert vitrail(capfd, "train", "--resume", halves)[0] == 0
    first, second = ([e["loss"] for e in Run(r).metrics() if "loss" in e] for r in (whole, halves))
    assert first == second and len(first) == 6
    for name in ("model", "beside", "optimizer"):
        one, two = (
            load_file(run.checkpoint("last") / f"{name}.safetensors")
            for run in (Run(whole), Run(halves))
        )
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one), name
    run = Run(whole).checkpoint("last")
    model, beside = (load_file(run / f"{name}.safetensors") for name in ("model", "beside"))
    moved = [key for key, x in model.items() if not torch.equal(x, beside[f"teacher.model.{key}"])]
    assert len(moved) > 10  # the teacher is another than the student, and than it was
    assert {key.split(".")[0] for key in beside} == {"projector", "predictor", "teacher"}
    assert "alike" in (whole / "report.html").read_text()


def sorted_by_colour(photos: Path, folder: Path, parts: tuple[str, ...] = (".",)) -> Path:
    """The same pictures in a folder a class."""
    for i, file in enumerate(sorted(photos.rglob("*.png"))):
        colour = "red" if np.asarray(Image.open(file)).mean((0, 1))[0] > 100 else "blue"
        place = folder / parts[i // 2 % len(parts)] / colour
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.png").write_bytes(file.read_bytes())
    return folder


def test_features_are_measured_by_any_labels(photos, tmp_path, capfd):
    """A run that knew none, by those of other data, whose training images vote if there are any."""
    run = tmp_path / "run"
    assert vitrail(capfd, "train", photos, *TINY, "--epochs", 1, "--out", run)[0] == 0
    parted = sorted_by_colour(photos, tmp_path / "parted", ("train", "test"))
    for data, told in ((parted, "16 training images"), (parted / "train", "the others")):
        code, out, said = vitrail(capfd, "evaluate", run, "--data", data, "--json")
        assert code == 0, said
        assert last_json(out)["metrics"]["knn"] > 0.8 and f"told by {told}" in out + said
    # A training image is no witness for itself.
    args = ("train", parted, *TINY, "--epochs", 1, "--out", tmp_path / "own")
    assert vitrail(capfd, *args)[0] == 0
    for part, told in (("test", "12 training images"), ("train", "the others")):
        _, out, said = vitrail(capfd, "evaluate", tmp_path / "own", "--split", part)
        assert f"told by {told}" in out + said


def test_it_is_a_start_for_a_classifier_and_labels_only_measure(photos, tmp_path, capfd):
    labelled = sorted_by_colour(photos, tmp_path / "labelled")
    run = tmp_path / "run"
    code, out, said = vitrail(
        capfd, "train", labelled, *TINY, "--epochs", 1, "--out", run, "--json"
    )
    assert code == 0, said
    assert {"knn", "probe"} <= set(last_json(out)["metrics"])
    assert "2 classes, only to measure by: blue, red" in said
    again = tmp_path / "again"
    args = ("train", labelled, "--weights", run, "--epochs", 1, "--minutes", "None")
    code, _, said = vitrail(capfd, *args, "--out", again)
    assert code == 0, said
    assert json.loads((again / "weights.json").read_text())["source"] == str(run)
    code, out, _ = vitrail(capfd, "predict", run, photos / "00.png", "--json")
    assert code == 0 and len(last_json(out)["predictions"][0]["features"]) == 32


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--micro-batch", "4"], "its loss looks across the images of a batch"),
        (["--ema", "0.9"], "cannot follow --ema"),
        (["--augment.cutmix", "1"], "--augment.mixup and cutmix"),
        (["--moco.temperature", "0"], "--moco.temperature must be above 0"),
    ],
)
def test_what_cannot_be_is_one_message(flags, words, photos, tmp_path, capfd):
    code, out, said = vitrail(
        capfd, "train", photos, *TINY, *flags, "--epochs", 1, "--out", tmp_path / "run"
    )
    assert code == 2 and words in " ".join((out + said).split()), said
    assert not (tmp_path / "run").exists()
