"""Runs that learn boxes: from a folder to answers, stopped and gone on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import vitrail as package
from command import contents, interrupted, last_json, vitrail
from vitrail.cli.defaults import defaults
from vitrail.data.batches.loader import EvalLoader
from vitrail.runs import Run
from vitrail.runs.load import load
from vitrail.weights import open_weights

TINY = [
    *("--model", "vit_mini16", "--model.image-size", "32", "48", "--model.patch", "8", "8"),
    *("--model.depth", "4", "--model.width", "32", "--model.heads", "2", "--model.mlp", "64"),
    *("--data.batch-size", "8", "--minutes", "None", "--threads", "1", "--device", "cpu"),
    *("--precision", "float32", "--evaluations", "2", "--detect.width", "32"),
    *("--detect.convs", "1", "--detect.levels", "3", "--detect.query.width", "32"),
    *("--detect.query.queries", "8", "--detect.query.groups", "2", "--detect.query.mlp", "32"),
    *("--detect.query.heads", "2", "--detect.query.cross-heads", "2"),
]


@pytest.fixture(scope="module")
def boxed(tmp_path_factory) -> Path:
    """COCO's layout: oblong images, each with a red and a green square but for every fifth."""
    root, rng = tmp_path_factory.mktemp("boxed"), np.random.default_rng(0)
    for part, number in (("train", 24), ("val", 8)):
        images, boxes = [], []
        (root / part).mkdir()
        for i in range(number):
            pixels = rng.integers(0, 90, (40, 60, 3), np.uint8)
            for k in range(2) if i % 5 else ():
                left, top = int(rng.integers(0, 14)) + 30 * k, int(rng.integers(0, 24))
                pixels[top : top + 14, left : left + 16, k] += 150
                boxes.append((i, k, [left, top, 16, 14]))
            Image.fromarray(pixels).save(root / part / f"{i:02}.png")
            images.append({"id": i, "file_name": f"{i:02}.png", "width": 60, "height": 40})
        said = {
            "images": images,
            "categories": [{"id": 3, "name": "red"}, {"id": 7, "name": "green"}],
            "annotations": [
                {"id": n, "image_id": i, "category_id": (3, 7)[k], "bbox": box, "iscrowd": 0}
                for n, (i, k, box) in enumerate(boxes, 1)
            ],
        }
        (root / part / "_annotations.coco.json").write_text(json.dumps(said))
    return root


@pytest.mark.parametrize("row", ["vit_mini16", "vit_s14", "resnet18"])
def test_a_named_model_sees_objects_as_large_as_the_recipe_wants_them(row: str, boxed) -> None:
    usual = defaults([str(boxed)]).settings
    named = defaults([str(boxed), "--model", row]).settings
    assert (named.data.resize, named.data.tile) == (usual.data.resize, usual.data.tile)
    for ours, theirs in zip(named.model.image_size, usual.model.image_size, strict=True):
        assert theirs <= ours < theirs + 32


@pytest.mark.parametrize(
    "more",
    [
        [
            *("--augment.mosaic", "0.5", "--augment.blend", "0.3", "--detect.assign", "centre"),
            *("--data.multiscale", "0.75", "1.25"),
        ],
        ["--detect.head", "queries", "--micro-batch", "4"],
        ["--data.resize", "tiles", "--data.tile", "32", "--epochs", "0.34"],
    ],
    ids=["dense", "queries", "tiles"],
)
def test_a_folder_with_boxes_becomes_a_run_that_goes_on_and_answers(
    more, boxed, tmp_path, capfd, monkeypatch
):
    before = contents(boxed)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    code, out, said = vitrail(
        capfd, "train", boxed, *TINY, "--epochs", 2, *more, "--out", whole, "--json"
    )
    assert code == 0 and "holds boxes" in said, said
    told = last_json(out)
    assert {"ap", "ap50"} <= set(told["metrics"]) and told["metrics"]["max_detections"] == 100
    assert set(told["estimates"]["ap"]) == {"value", "low", "high"}
    assert "AP" in (whole / "report.html").read_text()
    interrupted(whole, halves, step=3)
    assert vitrail(capfd, "train", "--resume", halves)[0] == 0
    first, second = ([e["loss"] for e in Run(r).metrics() if "loss" in e] for r in (whole, halves))
    assert len(first) >= 6 and first == second
    one, two = (load_file(Run(r).checkpoint("last") / "model.safetensors") for r in (whole, halves))
    assert all(torch.equal(one[key], two[key]) for key in one)

    images, found = boxed / "val", tmp_path / "found"
    code, out, said = vitrail(
        capfd, "predict", whole, images, "--score", "0", "--out", found, "--json"
    )
    assert code == 0, said
    answers = last_json(out)
    assert answers["classes"] == ["red", "green"] and len(answers["predictions"]) == 8
    results = json.loads((found / "detections.json").read_text())
    assert len(results) == sum(len(each["boxes"]) for each in answers["predictions"])
    numbered = json.loads((found / "detections-images.json").read_text())
    named = {each["id"]: each["file_name"] for each in numbered["images"]}
    assert len(named) == 8 and {c["name"] for c in numbered["categories"]} == {"red", "green"}
    assert all(named[each["image_id"]] == each["file_name"] for each in results)
    with Image.open(found / "00-overlay.jpg") as drawn:
        assert drawn.size == (60, 40)
    answer = package.Predictor(whole)(images / "01.png")
    assert answer.boxes.shape == (len(answer.scores), 4) and answer.names == ("red", "green")
    assert (answer.boxes >= 0).all() and (answer.boxes <= [60, 40, 60, 40]).all()
    assert contents(boxed) == before

    # Tiles cover whole images, so that a batch of those might be more than a machine has room for.
    most = 1 if "tiles" in more else 8
    asked, predictor = [], package.Predictor(whole)
    ask = predictor.answers
    monkeypatch.setattr(predictor, "answers", lambda some: asked.append(len(some)) or ask(some))
    again = predictor.many(sorted(images.glob("*.png")))
    assert max(asked) == most and np.array_equal(again[1].boxes, answer.boxes)
    batches = []

    def shown(*args, batch_size, **more):
        batches.append(batch_size)
        return EvalLoader(*args, batch_size=batch_size, **more)

    monkeypatch.setattr("vitrail.evaluation.EvalLoader", shown)
    package.evaluate(Run(whole))
    assert batches == [1 if "tiles" in more else 64]


def test_nothing_is_replaced_and_scores_are_for_boxes(boxed, tmp_path, capfd):
    run, found = tmp_path / "run", tmp_path / "found"
    assert vitrail(capfd, "train", boxed, *TINY, "--epochs", 1, "--out", run)[0] == 0
    found.mkdir()
    (found / "detections.json").write_text("mine")
    image = boxed / "val" / "00.png"
    code, _, said = vitrail(capfd, "predict", run, image, "--out", found)
    assert code == 2 and "nothing is replaced" in said
    assert (found / "detections.json").read_text() == "mine"
    code, _, said = vitrail(capfd, "predict", run, image, "--score", "1.5")
    assert code == 2 and "--score must be 0 to 1" in said
    code, out, said = vitrail(capfd, "evaluate", run, "--tta", "flip")
    assert code == 2 and "tta" in said
    code, out, _ = vitrail(capfd, "predict", run, image)
    assert code == 0 and "boxes of a score of at least" in out


@pytest.mark.parametrize("head", ["dense", "queries"])
def test_a_run_is_a_start_with_its_head_or_says_that_it_is_left_out(head, boxed, tmp_path, capfd):
    first, second, file = tmp_path / "first", tmp_path / "second", tmp_path / "out.safetensors"
    asked = [*TINY, "--detect.head", head, "--epochs", 0.4, "--out", first]
    assert vitrail(capfd, "train", boxed, *asked)[0] == 0
    # The data's class map is another one; the recipe has the weights' head.
    yolo = tmp_path / "yolo"
    assert vitrail(capfd, "data", "convert", boxed, yolo, "--to", "yolo")[0] == 0
    short = [*TINY[TINY.index("--data.batch-size") : TINY.index("--detect.width")], "--epochs", 0.4]
    code, _, said = vitrail(capfd, "train", yolo, "--weights", first, *short, "--out", second)
    assert code == 0 and "head: kept, with 2 of its 2 classes" in said, said
    assert load(Run(second)).config.detect.head == head
    code, out, said = vitrail(capfd, "weights", "convert", first, "--to", "vitrail", file)
    assert code == 0 and "boxes" in out, said
    read, run = open_weights(file).boxes, load(Run(first)).model.beside()
    assert read.names == ("red", "green") and set(read.state) == set(run)
    assert all(torch.equal(read.state[key], run[key]) for key in run)
    photos = tmp_path / "photos"
    for name in ("a", "b"):
        shutil.copytree(boxed / "val", photos / name, ignore=shutil.ignore_patterns("*.json"))
    third = ["--weights", first, *short, "--out", tmp_path / "third"]
    code, _, said = vitrail(capfd, "train", photos, *third)
    assert code == 0 and "the head of detection is left out" in said, said


@pytest.mark.parametrize(
    ("more", "images"),
    [
        (["--data.resize", "tiles", "--data.tile", "32"], 24 * 6),
        (["--detect.head", "queries"], 24),
    ],
    ids=["tiles", "queries"],
)
def test_a_plan_counts_what_an_epoch_shows(more, images, boxed, tmp_path, capfd):
    args = [*TINY, *more, "--epochs", 2, "--plan", "--json"]
    code, out, said = vitrail(capfd, "train", boxed, *args)
    assert code == 0, said
    plan = last_json(out)["plan"]
    assert plan["time"]["steps"] == 2 * (images // 8)
    assert not [each for each in plan["problems"] if "more than the" in each["text"]]
