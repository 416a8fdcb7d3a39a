"""LeJEPA, MAE and distilled features from the command line: runs that go on exactly, bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from close import close, largest
from command import interrupted, last_json, vitrail
from vitrail.data.views.preprocess import Preprocess
from vitrail.models import ViTConfig, build
from vitrail.runs import Run
from vitrail.weights import save_weights

TINY = [
    *("--model", "vit_mini16", "--model.image-size", "32", "32", "--model.stem", "patch"),
    *("--model.patch", "8", "8", "--model.depth", "2", "--model.width", "32"),
    *("--model.heads", "2", "--model.mlp", "64", "--data.batch-size", "8"),
    *("--minutes", "None", "--threads", "1", "--device", "cpu", "--evaluations", "2"),
]
TEACHER = ViTConfig(
    depth=2, width=24, heads=2, mlp=48, patch=(6, 6), image_size=(30, 30), classes=0
)
FLAGS = {
    "lejepa": ["--lejepa.hidden", "32", "--lejepa.out", "8", "--lejepa.directions", "16"],
    "mae": ["--mae.decoder.width", "16", "--mae.decoder.depth", "1", "--mae.decoder.heads", "2"],
    "distill-features": [],
}
BESIDE = {
    "lejepa": {"projector", "steps"},
    "mae": {"decoder"},
    "distill-features": {"image", "patches", "queue", "steps"},
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    preprocess = Preprocess(size=(30, 30), patch=(6, 6))
    save_weights(file, TEACHER, build(TEACHER).state_dict(), preprocess)
    return file


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Pictures in no class folders, of two colours, some of them twice."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(28):
        pixels = rng.integers(0, 120, (40, 40, 3)) + np.array([100, 0, 0] if i % 2 else [0, 0, 100])
        image = Image.fromarray(pixels.astype(np.uint8))
        image.save(folder / f"{i:02}.png")
        if i % 7 == 0:
            image.save(folder / f"{i:02}-again.png")
    return folder


def flags_of(task: str, teacher: Path) -> list[str]:
    asked = ["--distill.teacher", str(teacher)] if task == "distill-features" else []
    return ["--task", task, *TINY, *FLAGS[task], *asked]


@pytest.mark.parametrize(
    ("task", "more"),
    [
        ("lejepa", []),
        ("lejepa", ["--precision", "bfloat16"]),
        ("mae", ["--micro-batch", "3"]),
        ("distill-features", []),
        ("distill-features", ["--precision", "bfloat16"]),
        (
            "distill-features",
            ["--tune.kept-views", "2", "--distill-features.mixup", "False"],
        ),
    ],
)
def test_a_run_without_labels_goes_on_exactly(task, more, photos, teacher, tmp_path, capfd):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    flags = [*flags_of(task, teacher), *more]
    code, out, said = vitrail(
        capfd, "train", photos, *flags, "--epochs", 3, "--out", whole, "--json"
    )
    assert code == 0, said
    assert "rankme" in last_json(out)["metrics"] and "knn" not in last_json(out)["metrics"]
    interrupted(whole, halves, step=4)
    assert vitrail(capfd, "train", "--resume", halves)[0] == 0
    first, second = ([e["loss"] for e in Run(r).metrics() if "loss" in e] for r in (whole, halves))
    assert first == second and len(first) == 9
    found = {}
    for name in ("model", "beside", "optimizer"):
        found[name], two = (
            load_file(run.checkpoint("last") / f"{name}.safetensors")
            for run in (Run(whole), Run(halves))
        )
        one = found[name]
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one), name
    assert {key.split(".")[0] for key in found["beside"]} == BESIDE[task]
    if task == "distill-features":
        assert (found["beside"]["queue"].norm(dim=1) > 0.9).sum() == 16
        assert "sees 4x4 patches of 6x6 where the student sees 4x4" in said
        assert "24x24 pixels" in said
    assert "alike" in (whole / "report.html").read_text()


@pytest.mark.parametrize("task", FLAGS)
def test_it_is_measured_by_labels_and_a_start_for_a_classifier(
    task, photos, teacher, tmp_path, capfd
):
    labelled = tmp_path / "labelled"
    for i, file in enumerate(sorted(photos.glob("*.png"))):
        colour = "red" if np.asarray(Image.open(file)).mean((0, 1))[0] > 100 else "blue"
        (labelled / colour).mkdir(parents=True, exist_ok=True)
        (labelled / colour / f"{i}.png").write_bytes(file.read_bytes())
    run, again = tmp_path / "run", tmp_path / "again"
    flags = flags_of(task, teacher)
    code, out, said = vitrail(
        capfd, "train", labelled, *flags, "--epochs", 1, "--out", run, "--json"
    )
    assert code == 0, said
    assert {"knn", "probe"} <= set(last_json(out)["metrics"])
    args = ("train", labelled, "--weights", run, "--epochs", 1, "--minutes", "None")
    code, _, said = vitrail(capfd, *args, "--out", again)
    assert code == 0, said
    assert json.loads((again / "weights.json").read_text())["source"] == str(run)


def test_mae_goes_on_with_its_decoder_from_a_run_and_from_a_file(photos, tmp_path, capfd):
    run, file = tmp_path / "run", tmp_path / "run.safetensors"
    flags = ["--task", "mae", *TINY, *FLAGS["mae"], "--model.position", "sincos_mae"]
    assert vitrail(capfd, "train", photos, *flags, "--epochs", 1, "--out", run)[0] == 0
    code, out, said = vitrail(capfd, "weights", "convert", run, file, "--to", "vitrail")
    assert code == 0 and "with that of MAE: 1 blocks, width 16, 2 heads" in out, said
    for source in (run, file):
        place = tmp_path / f"on-{source.name}"
        code, out, said = vitrail(
            capfd, "train", photos, "--task", "mae", "--weights", source, "--epochs", 1,
            "--minutes", "None", "--data.batch-size", 8, "--out", place, "--optim.lr", "1e-9",
        )  # fmt: skip
        assert code == 0 and "decoder: kept" in out + said, said
        before, after = (
            load_file(Run(each).checkpoint("last") / "beside.safetensors") for each in (run, place)
        )
        size = largest(before.values())  # each weight has moved by a few steps of 1e-9
        for name, tensor in before.items():
            close(after[name], tensor, 1e-6, size=size, msg=name)


@pytest.mark.parametrize("teacher_of", ["mae", "mocov3"])
def test_a_run_is_a_teacher(teacher_of, photos, tmp_path, capfd):
    run = tmp_path / "run"
    asked = ["--task", teacher_of, *TINY, *FLAGS.get(teacher_of, ["--moco.hidden", "32"])]
    assert vitrail(capfd, "train", photos, *asked, "--epochs", 1, "--out", run)[0] == 0
    flags = [*flags_of("distill-features", run), "--epochs", 1, "--out", tmp_path / "taught"]
    code, _, said = vitrail(capfd, "train", photos, *flags)
    assert code == 0, said


@pytest.mark.parametrize(
    ("task", "flags", "words"),
    [
        ("lejepa", ["--micro-batch", "4"], "its loss looks across the images of a batch"),
        ("lejepa", ["--data.batch-size", "1"], "cannot follow --data.batch-size 1"),
        ("lejepa", ["--lejepa.weight", "0"], "--lejepa.weight must be in (0, 1)"),
        ("mae", ["--mae.mask", "1.5"], "--mae.mask must be in (0, 1)"),
        ("mae", ["--model.stem", "conv"], "where none has seen another before"),
        ("mae", ["--distill.teacher", "focus_s14"], "cannot follow --distill.teacher"),
        ("distill-features", ["--distill.teacher", "None"], "vitrail weights fetch focus_s14"),
        ("distill-features", ["--micro-batch", "4"], "looks across the images"),
        ("distill-features", ["--distill.kind", "soft"], "alpha and temperature"),
        ("distill-features", ["--tune.kept-views", "2"], "--tune.kept-views with"),
        (
            "distill-features",
            ["--distill-features.teacher-size", "31", "30"],
            "cannot be shown images of 31x30 pixels",
        ),
    ],
)
def test_what_cannot_be_is_one_message(task, flags, words, photos, teacher, tmp_path, capfd):
    asked = [*flags_of(task, teacher), *flags, "--epochs", 1, "--out", tmp_path / "run"]
    code, out, said = vitrail(capfd, "train", photos, *asked)
    assert code in (2, 3) and words in " ".join((out + said).split()), said
    assert "Traceback" not in said
