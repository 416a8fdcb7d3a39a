"""DINO from the command line: it goes on exactly, says what it found, and starts from weights."""

import json

import pytest
import torch
from safetensors.torch import load_file

from command import interrupted, last_json, vitrail
from tasks.test_moco_run import photos as photos
from tasks.test_moco_run import sorted_by_colour
from vitrail.recipes import RECIPES, Facts
from vitrail.runs import Run

TINY = [
    *("--task", "dino", "--model", "vit_mini16", "--model.image-size", "32", "32"),
    *("--model.patch", "8", "8", "--model.depth", "2", "--model.width", "32"),
    *(
        "--model.stem",
        "patch",
        "--model.heads",
        "2",
        "--model.mlp",
        "64",
        "--dino.hidden",
        "32",
        "--dino.out",
        "16",
    ),
    *("--dino.prototypes", "64", "--dino.small-views", "2", "--dino.momentum", "0.9"),
    *("--data.batch-size", "8", "--minutes", "None", "--threads", "1", "--device", "cpu"),
    *("--evaluations", "2"),
]
ALL = ["--dino.ibot", "1", "--dino.koleo", "0.1", "--dino.own-patch-head", "True"]


@pytest.mark.parametrize(
    ("precision", "sums"),
    [
        ("float32", ["--dino.freeze-last", "0.6", "--dino.centring", "mean"]),
        ("float32", [*ALL, "--dino.centring", "mean"]),
        ("bfloat16", [*ALL, "--dino.centring", "sinkhorn"]),
    ],
)
def test_a_run_goes_on_exactly_teacher_and_centre_and_all(precision, sums, photos, tmp_path, capfd):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    flags = [*TINY, *sums, "--precision", precision]
    code, out, said = vitrail(
        capfd, "train", photos, *flags, "--epochs", 2, "--out", whole, "--json"
    )
    assert code == 0, said
    assert {"rankme", "alpha_req"} <= last_json(out)["metrics"].keys()
    assert "26 images are few to learn features from nothing" in said
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
    beside = load_file(Run(whole).checkpoint("last") / "beside.safetensors")
    assert {"centre", "usual"} <= beside.keys()
    assert beside["centre"].any() == ("sinkhorn" not in sums)
    report = (whole / "report.html").read_text()
    assert "prototypes" in report and "alike" in report


def test_labels_measure_and_weights_are_first_seen_through_new_heads(photos, tmp_path, capfd):
    labelled, run, again = (
        sorted_by_colour(photos, tmp_path / "two"),
        tmp_path / "a",
        tmp_path / "b",
    )
    args = ("train", labelled, *TINY, "--epochs", 1, "--out", run, "--json")
    code, out, said = vitrail(capfd, *args)
    assert code == 0, said
    assert {"knn", "probe"} <= last_json(out)["metrics"].keys()
    assert last_json(out)["temperature"] == 0.07
    flags = [flag for flag in TINY[: TINY.index("--model")]] + TINY[TINY.index("--dino.hidden") :]
    args = ("train", labelled, *flags, "--weights", run, "--model.image-size", 32, 32)
    code, _, said = vitrail(capfd, *args, "--tune.head-warmup", 0.5, "--epochs", 2, "--out", again)
    assert code == 0, said
    assert "few to learn" not in said  # it does not start from nothing
    start, middle = (
        load_file(folder / "model.safetensors")
        for folder in (Run(run).checkpoint("best"), sorted((again / "checkpoints").iterdir())[-2])
    )
    assert (again / "config.yaml").read_text().count("keep: best") == 1
    assert json.loads((again / "weights.json").read_text())["source"] == str(run)
    assert start.keys() == middle.keys()
    assert [name for name in start if not torch.equal(start[name], middle[name])] == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--micro-batch", "4"], "its loss looks across the images of a batch"),
        (["--ema", "0.9"], "cannot follow --ema"),
        (["--dino.small-size", "12", "12"], "12x12"),
        (["--augment.size", "16", "16"], "--augment.size is of a task's own views"),
        (["--dino.prototypes", "1"], "--dino.prototypes 1 tells nothing apart"),
        (["--optim.final-weight-decay", "-1"], "--optim.final-weight-decay cannot be negative"),
    ],
)
def test_what_cannot_be_is_one_message(flags, words, photos, tmp_path, capfd):
    code, out, said = vitrail(
        capfd, "train", photos, *TINY, *flags, "--epochs", 1, "--out", tmp_path / "run"
    )
    assert code == 2 and words in " ".join((out + said).split()), said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("images", "gpu", "prototypes"),
    [(1_455, False, 1024), (1_455, True, 1024), (10_000, True, 8192), (1_281_167, True, 65_536)],
)
def test_the_recipe_goes_by_the_images(images, gpu, prototypes):
    found = Facts("photos", images, 0, 3, 128, gpu=gpu, bfloat16=gpu)
    config = RECIPES["dino"].config(found)
    assert config.dino.prototypes == prototypes and config.keep == "last"
    assert len(config.views()) == 2 + config.dino.small_views
    small, large = config.views()[-1].size, config.model.image_size
    assert small is not None and small[0] < large[0]
    assert RECIPES["dino"].config(found._replace(classes=3)).keep == "best"
