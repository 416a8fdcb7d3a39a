"""What `--json` gives of the tasks, and what docs/json.md says that it gives."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command import last_json, vitrail

PAGE = (Path(__file__).parent.parent / "docs" / "json.md").read_text()
TASKS = ("classify", "segment", "detect", "mocov3")
TINY = [
    *("--model", "vit_mini16", "--model.image-size", "32", "32", "--model.patch", "8", "8"),
    *("--model.depth", "1", "--model.width", "32", "--model.heads", "2", "--model.mlp", "64"),
    *("--data.batch-size", "8", "--epochs", "1", "--minutes", "None", "--evaluations", "1"),
    *("--threads", "1", "--device", "cpu", "--precision", "float32"),
]
MORE = {
    "detect": ["--detect.width", "32", "--detect.convs", "0", "--detect.levels", "2"],
    "mocov3": ["--task", "mocov3", "--moco.hidden", "32", "--moco.out", "8"],
}
PLACES = {"segment": "scenes", "detect": "boxed"}
IN_SOME_RUNS = {"top5", "map", "exact_match"}
"""Of more classes, or of several labels an image, than these runs have."""


def row(first: str) -> list[str]:
    """The cells of docs/json.md's row that begins so."""
    name = r"`[\w-]+`"
    (line,) = re.findall(rf"^\| (?:{name}, )*`{first}`(?:, {name})* \|(.*)\|$", PAGE, re.MULTILINE)
    return re.split(r"\s\|(?=\s)", line)


def keys(cell: str) -> set[str]:
    """What a cell names before it says what that is: between a `; ` and a colon."""
    plain = re.sub(r"\([^()]*\)|\{[^{}]*\}", "", cell)
    return {
        name for part in plain.split("; ") for name in re.findall(r"`(\w+)`", part.split(":")[0])
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Images of two colours, in folders by colour, with masks, and with boxes."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for i in range(24):
        pixels = rng.integers(0, 90, (40, 48, 3), np.uint8)
        mask = np.zeros((40, 48), np.uint8)
        mask[8:24, 8:30] = 1 + i % 2
        pixels[mask > 0, i % 2] += 150
        kind = "red" if i % 2 else "green"
        for place, array in (
            (root / "photos" / kind, pixels),
            (root / "scenes" / "images", pixels),
            (root / "scenes" / "masks", mask),
        ):
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(place / f"{i:02}.png")
        for place in (root / "boxed" / "images", root / "boxed" / "labels"):
            place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / "boxed" / "images" / f"{i:02}.png")
        box = f"{i % 2} {19 / 48} {16 / 40} {22 / 48} {16 / 40}"
        (root / "boxed" / "labels" / f"{i:02}.txt").write_text(box)
    return root


LIMITS = {"max_detections"}
"""Numbers that others are measured under, and that have no interval."""


@pytest.mark.parametrize("task", TASKS)
def test_the_page_names_what_the_commands_give(task, data, tmp_path, capfd):
    place, run = data / PLACES.get(task, "photos"), tmp_path / "run"
    code, out, said = vitrail(
        capfd, "train", place, *TINY, *MORE.get(task, []), "--out", run, "--json"
    )
    assert code == 0, said
    trained = last_json(out)
    code, out, said = vitrail(capfd, "evaluate", run, "--tta", "none", "--json")
    assert code == 0, said
    evaluated = last_json(out)
    (every,), (numbers, adds, answers) = row("train"), row(task)
    assert set(trained) == set(evaluated) == keys(every) | keys(adds)
    assert set(trained["metrics"]) == keys(numbers) - IN_SOME_RUNS
    assert set(trained["metrics"]) - LIMITS == set(trained["estimates"])
    for name, number in trained["metrics"].items():
        if name in LIMITS:
            assert number == evaluated["metrics"][name] > 0
            continue
        if number is None:  # of large objects, where there is none
            assert name.startswith("ap_") and trained["estimates"][name] is None
            continue
        assert trained["estimates"][name]["value"] == number == evaluated["metrics"][name]
        assert set(trained["estimates"][name]) == {"value", "low", "high"}
    assert trained["task"] == task and trained["tta"] == "none" and trained["images"] > 0
    assert Path(evaluated["report"]).is_file()

    image = next((place / "images" if task in PLACES else place).rglob("*.png"))
    where = ["--out", tmp_path / "found"] if task in PLACES else []
    code, out, said = vitrail(capfd, "predict", run, image, *where, "--json")
    assert code == 0, said
    told = last_json(out)
    assert set(told) - {"exit_code"} == keys(row("predict")[0])
    assert set(told["predictions"][0]) == keys(answers)
    if task == "segment":
        shares = told["predictions"][0]["shares"]
        assert sum(shares.values()) == pytest.approx(1) and set(shares) <= set(told["classes"])
    if task == "detect":
        assert (tmp_path / "found" / f"{image.stem}-overlay.jpg").is_file()
        results = json.loads((tmp_path / "found" / "detections.json").read_text())
        boxes = told["predictions"][0]["boxes"]
        assert len(results) == len(boxes) and all(b["score"] >= told["score"] for b in boxes)
        for result, box in zip(results, boxes, strict=True):
            left, top, right, bottom = box["box"]
            assert 0 <= left < right <= 48 and 0 <= top < bottom <= 40
            corners = [left, top, right - left, bottom - top]
            assert result["bbox"] == pytest.approx(corners, abs=0.02)
            assert told["classes"][result["category_id"] - 1] == box["label"]


def test_the_way_of_looking_is_told_with_the_number(data, tmp_path, capfd):
    slide = ["--segment.mode", "slide", "--data.resize", "short"]
    run = tmp_path / "run"
    code, out, said = vitrail(
        capfd, "train", data / "scenes", *TINY, *slide, "--out", run, "--json"
    )
    assert code == 0, said
    assert (last_json(out)["mode"], last_json(out)["tta"]) == ("slide", "none")
    code, out, said = vitrail(capfd, "evaluate", run, "--tta", "flip", "--json")
    assert code == 0 and "held-out images, slide, flip" in out, said
    assert (last_json(out)["mode"], last_json(out)["tta"]) == ("slide", "flip")
    page = " ".join((run / "report-tta-flip.html").read_text().split())
    assert "shown window by window, 2 times each (flip), and judged" in page


def test_a_comparison_of_classifiers_says_that_masks_are_not_for_it(data, tmp_path, capfd):
    code, _, said = vitrail(
        capfd, "bench", "compare", data / "scenes", "--out", tmp_path / "out", "--minutes", "0.01"
    )
    assert code == 2 and "bench compare trains classifiers" in said and "--task segment" in said
    assert not (tmp_path / "out").exists()
