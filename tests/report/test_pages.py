"""The pages of segmentation and of features: right words, and what a reader looks for."""

import html
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.cli import main
from vitrail.evaluation import Evaluation, evaluate
from vitrail.metrics import count
from vitrail.report.page import render
from vitrail.runs import Run

TINY = [
    *("--model", "vit_mini16", "--model.image-size", "32", "32", "--model.patch", "8", "8"),
    *("--model.depth", "1", "--model.width", "32", "--model.heads", "2", "--model.mlp", "64"),
    *("--data.batch-size", "8", "--epochs", "2", "--minutes", "None", "--evaluations", "2"),
    *("--threads", "1", "--device", "cpu", "--precision", "float32"),
]
MOCO = ["--task", "mocov3", "--moco.hidden", "32", "--moco.out", "8"]
OF_CLASSIFICATION = ("top-1", "accuracy</h3>", "images right", "probabilities", "Every prediction")


def trained(data: Path, out: Path, *flags: str) -> Evaluation:
    assert main(["train", str(data), *TINY, *flags, "--out", str(out)]) == 0
    return evaluate(Run(out))


@pytest.fixture(scope="module")
def segmented(tmp_path_factory) -> Evaluation:
    """A run of 33 classes, of which few are shown, and 6 held-out images."""
    root, rng = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    for part, n in (("train", 16), ("val", 6)):
        for i in range(n):
            mask = np.zeros((40, 56), np.uint8)
            mask[8:24, 8:30] = 1 + i % 3
            mask[:3] = 255
            pixels = rng.integers(0, 90, (40, 56, 3)) + 50 * mask[..., None].clip(max=3)
            for kind, array in (("images", pixels.astype(np.uint8)), ("masks", mask)):
                (root / kind / part).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(root / kind / part / f"{i:02}.png")
    (root / "classes.txt").write_text("\n".join(f"kind <{k}>" for k in range(33)))
    return trained(root, tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(32):
        file = root / "labelled" / ("red", "blue")[i % 2] / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 120, (40, 40, 3)) + np.eye(3)[2 * (i % 2)] * 120
        Image.fromarray(pixels.astype(np.uint8)).save(file)
        bare = root / "bare" / file.name
        bare.parent.mkdir(exist_ok=True)
        bare.write_bytes(file.read_bytes())
    return root


def words(page: str) -> str:
    body = re.sub(r"<style.*?</style>|<svg.*?</svg>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def with_masks(evaluation: Evaluation, predicted: list[torch.Tensor]) -> Evaluation:
    """The same run, had it said these masks."""
    truths = [
        torch.from_numpy(evaluation.source.targets.target(int(i), None)["mask"])
        for i in evaluation.indices
    ]
    each = [
        count(said, truth, len(evaluation.loaded.names))
        for said, truth in zip(predicted, truths, strict=True)
    ]
    rows = {name: torch.stack([row[name] for row in each]) for name in each[0]}
    return replace(evaluation, rows=rows, metrics=evaluation.loaded.task.judge(rows))


def truths(evaluation: Evaluation) -> list[torch.Tensor]:
    return [
        torch.from_numpy(evaluation.source.targets.target(int(i), None)["mask"]).clamp(min=0)
        for i in evaluation.indices
    ]


def test_no_word_is_about_classification(segmented):
    page = render(segmented.loaded.run, segmented)
    assert [word for word in OF_CLASSIFICATION if word in page] == []
    said = words(page)
    for part in ("Held-out mean IoU", "from files to masks", "Each image's own scores are in"):
        assert part in said, part
    head = segmented.loaded.config.segment.head
    assert "read out by" not in said and f"head {head} " in said and "grey: no class" in said


def test_of_many_classes_the_most_confused_are_listed(segmented):
    said = truths(segmented)
    said[0][10:20, 10:20] = 7
    said[1][12, 12:15] = 9
    page = words(render(segmented.loaded.run, with_masks(segmented, said)))
    assert "Of 33 classes, the 2 pairs of which most pixels are mixed up" in page
    first, second = (page.index(f"kind <{k}> {n}") for k, n in ((7, 100), (9, 3)))
    assert first < second and "Confusion matrix" not in page
    # Two classes that are only said have an IoU, those that are nowhere have none.
    assert "as a mean of 6 of 33 classes, those that the masks show or the model says" in page


def test_it_says_whether_borders_or_regions_are_wrong(segmented):
    eroded, moved = truths(segmented), truths(segmented)
    for mask in eroded:
        mask[8] = 0  # the first row of each square
    for mask in moved:
        mask[14:18, 14:22] = 5
    run = segmented.loaded.run
    assert "it is the borders that are wrong" in render(run, with_masks(segmented, eroded))
    assert "what is wrong are whole regions" in render(run, with_masks(segmented, moved))


def test_no_image_is_both_worst_and_best_and_none_is_worst_that_is_right(segmented):
    said = truths(segmented)
    said[4][10:20, 10:20] = 7
    page = render(segmented.loaded.run, with_masks(segmented, said))
    worst, best = page[page.index("most wrong") :].split("Where it is best")
    shown = [re.findall(r'alt="([^"]*\d\d\.png)"', part) for part in (worst, best)]
    keys = segmented.keys
    assert shown[0] == [keys[4]] and keys[4] not in shown[1] and len(shown[1]) >= 3
    page = render(segmented.loaded.run, with_masks(segmented, truths(segmented)))
    assert "most wrong" not in page and "Where it is best" in page


def test_features_with_labels_show_whose_class_neighbours_have(photos, tmp_path):
    found = trained(photos / "labelled", tmp_path / "run", *MOCO)
    page = render(found.loaded.run, found)
    assert [word for word in OF_CLASSIFICATION[:1] + OF_CLASSIFICATION[2:] if word in page] == []
    said = words(page)
    for part in ("k-NN accuracy", "Linear probe", "Spread", "RankMe", "Held-out k-NN accuracy"):
        assert part in said, part
    assert "view 1 crops" in said and "view 2 crops" in said and "from files to features" in said
    known = dict(zip(found.keys, found.rows["classes"].argmax(1).tolist(), strict=True))
    names, rows = found.loaded.names, re.findall(r"<ul class=\"gallery neigh.*?</ul>", page, re.S)
    assert rows
    for row in rows:
        key, *others = re.findall(r'alt="([^"]+)"', row)
        marks = re.findall(r'<b class="(right|wrong)">(\w+)</b>', row)
        assert marks == [
            ("right" if known[other] == known[key] else "wrong", names[known[other]])
            for other in others
        ]


def test_features_without_labels(photos, tmp_path):
    found = trained(photos / "bare", tmp_path / "run", *MOCO)
    page = render(found.loaded.run, found)
    said = words(page)
    assert "k-NN" not in said and "Blue is of its class" not in said and "RankMe" in said
    assert "Held-out directions in use (RankMe)" in said
    assert [word for word in OF_CLASSIFICATION if word in page] == []
    rank = found.metrics.summary["rankme"]
    assert f"use <b>{rank.value:.1f}</b> directions of 32" in page


def test_features_of_images_with_several_labels(photos, tmp_path):
    files = sorted((photos / "bare").iterdir())
    lines = [
        f"{file},{('red', 'blue')[i % 2]}{'|even' * (i % 8 > 0)}" for i, file in enumerate(files)
    ]
    (tmp_path / "labels.csv").write_text("\n".join(["file,label", *lines]))
    found = trained(tmp_path / "labels.csv", tmp_path / "run", *MOCO)
    page = words(render(found.loaded.run, found))
    assert {"knn", "probe"} <= set(found.metrics.values())
    for row in found.rows["classes"]:
        assert ", ".join(found.loaded.names[k] for k in row.nonzero().flatten()) in page
