"""The page of detection: right words, and boxes that a reader can see."""

import csv
import html
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.cli import main
from vitrail.deploy.answers import MOST_NAMED, drawn
from vitrail.evaluation import Evaluation, evaluate
from vitrail.found import Found
from vitrail.metrics import count_boxes
from vitrail.report.page import render
from vitrail.report.pages import detect
from vitrail.runs import Run
from vitrail.tasks import Detections

TINY = [
    *("--model", "vit_mini16", "--model.image-size", "32", "32", "--model.patch", "8", "8"),
    *("--model.depth", "1", "--model.width", "32", "--model.heads", "2", "--model.mlp", "64"),
    *("--data.batch-size", "8", "--epochs", "1", "--minutes", "None", "--evaluations", "1"),
    *("--detect.width", "64", "--detect.convs", "1", "--threads", "1", "--device", "cpu"),
    *("--precision", "float32"),
]
KINDS = ("cat <a>", "dog", "owl")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Evaluation:
    """A run on squares of three classes, the last of which no held-out image shows."""
    root, rng = tmp_path_factory.mktemp("squares"), np.random.default_rng(0)
    rows = []
    for i in range(22):
        file = f"{'val' if i >= 16 else 'train'}/{i:02}.png"
        pixels = rng.integers(0, 90, (60, 90, 3))
        for k in range(2):
            left, top = 45 * k + int(rng.integers(0, 20)), int(rng.integers(0, 35))
            pixels[top : top + 20, left : left + 20] += 50 * (k + 1)
            corners = (left, top, left + 20, top + 20)
            rows.append((file, *corners, KINDS[2 if i < 2 else (i + k) % 2]))
        (root / file).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(root / file)
    with (root / "boxes.csv").open("w", newline="") as stream:
        columns = ("image_path", "xmin", "ymin", "xmax", "ymax", "label")
        csv.writer(stream).writerows([columns, *rows])
    out = tmp_path_factory.mktemp("run") / "run"
    assert main(["train", str(root), *TINY, "--out", str(out)]) == 0
    return evaluate(Run(out))


def words(page: str) -> str:
    body = re.sub(r"<style.*?</style>|<svg.*?</svg>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def answering(evaluation: Evaluation, answers: list[Detections], monkeypatch) -> Evaluation:
    """The same run, had it found these."""
    task, rows = evaluation.loaded.task, []
    names, asked = evaluation.loaded.names, {}
    for i, answer in zip(evaluation.indices.tolist(), answers, strict=True):
        truth = evaluation.source.targets.target(i, None)
        found = Found(answer.boxes, answer.scores, answer.labels)
        tensors = {name: torch.from_numpy(value) for name, value in truth.items()}
        rows.append(count_boxes(found, tensors, len(names), task.config.most))
        asked[np.asarray(evaluation.source.load(i).convert("RGB")).tobytes()] = answer
    monkeypatch.setattr(detect, "_asked", lambda _, image: asked[np.asarray(image).tobytes()])
    kept = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return replace(evaluation, rows=kept, metrics=task.judge(kept))


def truths(evaluation: Evaluation) -> list[Detections]:
    """Answers that are right, the surer the further left."""
    found = []
    for i in evaluation.indices.tolist():
        real = evaluation.source.targets.target(i, None)
        scores = np.linspace(0.9, 0.5, len(real["labels"]))
        boxes = real["boxes"].astype(np.float64)
        found.append(Detections(boxes, real["labels"].copy(), scores, evaluation.loaded.names))
    return found


def test_what_was_trained_has_a_page_of_boxes(trained):
    page = render(trained.loaded.run, trained)
    said = words(page)
    assert [word for word in ("top-1", "probabilities", "IoU of each class") if word in page] == []
    for part in ("Held-out AP", "from files to boxes", "IoU 0.5 to 0.95", "AP50", "By size"):
        assert part in said, part
    assert "head dense" in said and "read out by" not in said
    assert "Places side by side have a similarity of" in said  # of the backbone's positions
    assert f"the best {trained.metrics.max_detections} boxes count" in said
    assert re.search(r"<title>.*: AP [\d.]+%</title>", page)


def test_all_right_is_said_to_be_right(trained, monkeypatch):
    page = render(trained.loaded.run, answering(trained, truths(trained), monkeypatch))
    said = words(page)
    assert "AP 100% on 6 held" in said and "the mean over 2 classes and" in said
    assert "of 12 boxes 12 are right, and 0 of 12 objects are not found" in said
    assert "What is wrong" not in said and "most wrong" not in said
    assert "2 objects, 0 not found 2 boxes found, 0 wrong" in said
    assert page.count("<svg viewBox") >= 4  # precision over recall, thresholds; of training


def test_mistakes_are_named_counted_and_shown(trained, monkeypatch):
    answers = truths(trained)
    beside = answers[0].boxes.copy()
    beside[0] += [12, 0, 12, 0]  # IoU 0.25
    answers[0] = answers[0]._replace(boxes=beside)
    answers[1] = answers[1]._replace(labels=1 - answers[1].labels)
    answers[2] = Detections(*(part[:0] for part in answers[2][:3]), answers[2].names)
    owl = answers[3]
    answers[3] = Detections(
        np.concatenate([owl.boxes, [[40.0, 45, 44, 59]]]),
        np.append(owl.labels, 2),
        np.append(owl.scores, 0.5),
        owl.names,
    )
    found = answering(trained, answers, monkeypatch)
    said = words(render(trained.loaded.run, found))
    table = said[said.index("What is wrong") : said.index("Where it is most wrong")]
    for name, count in (("misplaced", 1), ("misnamed", 2), ("background", 1), ("missed", 2)):
        assert re.search(rf"{name} [^\d]*(?:an IoU of 0.1 to 0.5 )?{count} {count} ", table), name
    assert "doubled" not in table
    worst, best = said[said.index("most wrong") :].split("Where it is best")
    shown = [re.findall(r"\d\d\.png", part) for part in (worst, best)]
    keys = [Path(key).name for key in found.keys]
    # The misnamed pair: two wrong boxes and two objects without one; those that are right: none.
    assert shown[0][0] == keys[1] and set(shown[0]) == set(keys[:4])
    assert set(shown[1][:2]) == set(keys[4:])
    assert "2 objects, 2 not found 2 boxes found, 2 wrong" in worst
    assert "2 objects, 2 not found 0 boxes found, 0 wrong" in worst
    assert "and in no mean: owl (1)" in said
    assert "cat <a>" in said and "<a>" not in render(trained.loaded.run, found)


def test_where_nothing_is_right_there_is_no_threshold(trained, monkeypatch):
    nothing = [answer.above(2.0) for answer in truths(trained)]
    said = words(render(trained.loaded.run, answering(trained, nothing, monkeypatch)))
    assert "AP 0% on 6 held" in said and "No box is right." in said
    assert "Which boxes to keep" not in said and "2 objects, 2 not found" in said


def test_of_small_objects_a_part_is_shown_larger():
    image = Image.new("RGB", (2000, 1000))
    small = np.array([[10.0, 10, 30, 30], [1900, 900, 1920, 920], [1930, 900, 1950, 920]])
    spot = detect._spot(image, small, small[1:])
    assert spot is not None
    left, top, right, bottom = spot
    assert left < 1900 and 1950 < right <= 2000 and top < 900 and bottom <= 1000
    assert 20 * 640 / (right - left) >= 28
    assert detect._spot(image, small, np.zeros((0, 4))) is not None
    assert detect._spot(image, small * 10, small) is None
    assert detect._spot(image, np.zeros((0, 4)), small) is None


def colours(image: Image.Image) -> set[tuple[int, ...]]:
    return set(map(tuple, np.asarray(image).reshape(-1, 3).tolist()))


def test_boxes_are_drawn_in_the_image_with_names_that_can_be_read():
    grey = Image.new("L", (300, 200), 128)
    boxes = np.array([[20.0, 40, 120, 140], [150, 0, 299, 199], [0.2, 0.2, 2.5, 2.9]])
    found = Detections(boxes, np.array([0, 1, 1]), np.array([0.9, 0.5, 0.2]), ("cat", "dog"))
    picture = drawn(grey, found, 0.4)
    assert picture.size == grey.size and picture.mode == "RGB"
    pixels = np.asarray(picture)
    assert pixels[139, 70].tolist() != [128] * 3 != pixels[100, 150].tolist()
    assert pixels[90, 70].tolist() == [128] * 3  # thin
    assert pixels[139, 70].tolist() != pixels[100, 150].tolist()  # a colour a class
    assert pixels[1, 1].tolist() == [128] * 3  # below the threshold
    assert min(max(colours(picture), key=min)) > 200  # letters
    assert np.asarray(grey).std() == 0  # the picture itself is as it was
    many = Detections(
        np.tile(boxes[:1], (MOST_NAMED + 1, 1)),
        np.zeros(MOST_NAMED + 1, np.int64),
        np.linspace(0.9, 0.5, MOST_NAMED + 1),
        ("cat",),
    )
    assert len(colours(drawn(grey, many, 0.0))) == 2  # boxes alone
    beyond = found._replace(boxes=boxes * 3 - 50)
    assert drawn(grey, beyond, 0.0).size == grey.size
    assert colours(drawn(grey, found, 1.0)) == {(128, 128, 128)}
