"""A real comparison of tiny models on tiny pictures, from the command line."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command import last_json, vitrail
from vitrail.bench import compare as module
from vitrail.bench import measure
from vitrail.bench.compare import Comparison, Row, Settings
from vitrail.bench.measure import Speed
from vitrail.errors import VitrailError
from vitrail.metrics import Estimate

QUICK = ["--minutes", "0.003", "--threads", "1", "--precision", "float32"]


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """Noise in three hues, 32 pixels a side: the recipe for small images."""
    monkeypatch.chdir(tmp_path)
    for k, name in enumerate(("red", "green", "blue")):
        for i in range(10):
            pixels = np.random.default_rng([k, i]).integers(0, 90, (32, 32, 3), dtype=np.uint8)
            pixels[..., k] += 160
            file = tmp_path / "photos" / name / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
    return tmp_path / "photos"


@pytest.fixture(autouse=True)
def few_turns(monkeypatch) -> None:
    """How precisely speed is measured is not what these tests are about."""
    for name, turns in (("_LEAST_SINGLE", 3), ("_LEAST_BATCH", 2), ("_MOST", 3)):
        monkeypatch.setattr(measure, name, turns)


@pytest.fixture
def no_memory(monkeypatch) -> None:
    """A system that does not tell; it also saves the process that would look."""
    monkeypatch.setattr(module, "peak_memory", lambda subjects, place: dict.fromkeys(subjects))


def test_a_comparison_from_photos_to_a_page_and_one_more_model_later(photos, capfd):
    compare = ["bench", "compare", "photos", *QUICK, "--out", "runs/c"]
    code, out, err = vitrail(capfd, *compare, "--models", "vit_nano8,hog,vit_s14", "--size", "32")
    assert code == 0, err
    nano, hog = (re.search(rf"^{name}\b.*$", out, re.MULTILINE)[0] for name in ("vit_nano8", "hog"))
    assert "%" in nano and "MiB" in nano and "MiB" in hog
    assert re.search(r"vit_s14 .*failed: .*patches", out)  # and is not the end of the others

    trained = Path("runs/c/vit_nano8/metrics.jsonl").stat().st_mtime_ns
    models = "hog,vit_nano8,vit_mu16,vit_s14"
    code, out, err = vitrail(capfd, *compare, "--models", models, "--size", "32", "--json")
    assert code == 0, err
    result = last_json(out)
    rows = {row["name"]: row for row in result["models"]}
    assert Path("runs/c/vit_nano8/metrics.jsonl").stat().st_mtime_ns == trained
    assert list(rows) == [row["name"] for row in result["models"]] and list(rows)[-1] == "vit_s14"
    assert result["judged"] == {
        "metric": "top1",
        "part": "val",
        "images": 6,
        "trained_on": 24,
        "classes": 3,
        "most_common": pytest.approx(1 / 3),
    }
    for name in ("vit_nano8", "vit_mu16", "hog"):
        row = rows[name]
        assert 0 <= row["accuracy"]["low"] <= row["accuracy"]["value"] <= 1
        assert row["speed"]["images_per_second"] > 0 and row["memory"] > 0 and not row["error"]
        assert row["speed"]["latency"] <= row["speed"]["latency_p95"]
    assert rows["vit_nano8"]["parameters"] == 1_430_920 - 997 * 129  # 3 classes, not 1000
    assert rows["vit_nano8"]["macs"] > rows["vit_mu16"]["macs"] > 0 == bool(rows["hog"]["macs"])
    assert 0.18 <= rows["vit_nano8"]["training_seconds"] < 10 and rows["vit_nano8"]["epochs"] > 0
    own = json.loads(Path("runs/c/vit_nano8/metrics.json").read_text())
    assert rows["vit_nano8"]["accuracy"] == own["top1"]

    with open("runs/c/compare.csv", newline="") as stream:
        table = {row["model"]: row for row in csv.DictReader(stream)}
    assert float(table["hog"]["accuracy"]) == rows["hog"]["accuracy"]["value"]
    assert table["hog"]["macs"] == "" and "patches" in table["vit_s14"]["error"]

    page = Path("runs/c/compare.html").read_text()
    assert "<script" not in page and "http" not in re.sub(r"http-equiv", "", page)
    for name in ("vit_nano8", "vit_mu16"):
        assert (
            f'href="{name}/report.html"' in page and Path("runs/c", name, "report.html").is_file()
        )
    assert "1 did not finish" in page and "--out runs/c" in page and page.startswith("<!DOCTYPE")

    # Each training is a run like any other.
    code, out, _ = vitrail(capfd, "evaluate", "runs/c/vit_mu16", "--json")
    assert code == 0 and last_json(out)["metrics"]["top1"] == rows["vit_mu16"]["accuracy"]["value"]
    assert vitrail(capfd, "predict", "runs/c/vit_nano8", "photos/red/0.png")[0] == 0

    code, _, err = vitrail(capfd, *compare, "--models", "hog", "--size", "40")
    assert code == 2 and "another comparison, of size [32, 32], not [40, 40]" in err


def test_what_was_stopped_goes_on_where_it_stopped(photos, capfd, monkeypatch, no_memory):
    from vitrail import job

    made, really = [], job.train

    def stopped_once(config, folder, **options):
        made.append(folder.name)
        if len(made) == 2:
            stop = VitrailError("stopped at step 3, all saved")
            stop.exit_code = 143
            raise stop
        return really(config, folder, **options)

    monkeypatch.setattr(job, "train", stopped_once)
    args = ["bench", "compare", "photos", *QUICK, "--models", "vit_nano8,vit_mu16"]
    code, _, err = vitrail(capfd, *args)
    again = re.search(r"go on with: vitrail (.*)", err)
    assert code == 143 and again and again[1].endswith("--out runs/compare-1")
    code, out, err = vitrail(capfd, *again[1].split(), "--json")
    assert code == 0, err
    assert made == ["vit_nano8", "vit_mu16", "vit_mu16"]
    assert [row["memory"] for row in last_json(out)["models"]] == [None, None]
    assert last_json(out)["comparison"] == "runs/compare-1"


def test_images_that_changed_meanwhile_are_told(photos, capfd, no_memory):
    args = ["bench", "compare", "photos", *QUICK, "--out", "c", "--models"]
    assert vitrail(capfd, *args, "hog")[0] == 0
    Image.new("RGB", (32, 32)).save(photos / "red" / "new.png")
    code, _, err = vitrail(capfd, *args, "hog,vit_mu16")
    assert code == 3 and "the images changed" in err


def bad_model(photos):
    return ["--models", "vit_nano8,dynamicvit_s"], 2, "did you mean 'dynamicvit_s16'?"


def bad_nothing(photos):
    return ["--models", ","], 2, "name at least one"


def bad_minutes(photos):
    return ["--minutes", "0"], 2, "--minutes must be above 0"


def bad_minutes_that_are_no_number(photos):
    return ["--minutes", "nan"], 2, "--minutes must be above 0"


def bad_size(photos):
    return ["--models", "vit_s14,vit_s16", "--size", "33"], 2, "cannot be cut into patches"


def bad_threads(photos):
    return ["--threads", "0"], 2, "--threads"


def bad_device(photos):
    return ["--device", "cuda:9"], 3, "no device 'cuda:9'"


def bad_weights(photos):
    return ["--weights", "augreg_vit_s16"], 2, "can only be none"


def bad_folder(photos):
    return ["--out", "photos"], 2, "not empty and no comparison"


def bad_damaged(photos):
    Path("c").mkdir()
    Path("c/compare.json").write_text("{")
    return ["--out", "c"], 3, "is damaged"


BAD = [value for name, value in sorted(globals().items()) if name.startswith("bad_")]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.__name__[4:])
def test_bad_input_gets_one_message_before_anything_is_trained(photos, capfd, case):
    options, expected, message = case(photos)
    options = options if "--models" in options else [*options, "--models", "vit_mu16"]
    before = sorted(Path().rglob("*"))
    code, out, err = vitrail(capfd, "bench", "compare", "photos", *options)
    assert code == expected, err
    assert message in err and "Traceback" not in err + out
    assert sorted(Path().rglob("*")) == before


def test_data_that_is_not_there(photos, capfd):
    code, _, err = vitrail(capfd, "bench", "compare", "photo", "--models", "hog")
    assert code == 3 and "did you mean photos" in err
    assert vitrail(capfd, "bench", "compare", "--models", "hog")[0] == 2


def test_if_every_model_fails_there_is_a_table_and_an_exit_code(photos, capfd, monkeypatch):
    def diverges(name, config, folder):
        raise VitrailError("the loss is no longer a number at step 7")

    monkeypatch.setattr("vitrail.cli.bench._learner", lambda: diverges)
    code, out, _ = vitrail(
        capfd, "bench", "compare", "photos", "--models", "vit_mu16", "--out", "c"
    )
    assert code == 3 and "failed: the loss is no longer a number" in out
    assert "No model finished" in Path("c/compare.html").read_text()


def test_without_a_size_models_get_the_first_that_all_take(photos, capfd):
    from vitrail.cli.bench import CompareArgs, _base, _size

    base = _base(CompareArgs(data="photos"))
    assert base.model.image_size == (32, 32)
    assert _size(["vit_nano8", "hog"], base, None) == (32, 32)
    assert _size(["vit_s14", "vit_nano8"], base, None) == (56, 56)
    assert _size(["vit_s14", "vit_s32"], base, None) is None


def row(name: str, accuracy: float, speed: float, behind: float | None = None) -> Row:
    return Row(
        name=name,
        accuracy=Estimate(accuracy, accuracy - 0.05, accuracy + 0.05),
        behind=None if behind is None else Estimate(behind, behind - 0.02, behind + 0.02),
        speed=Speed(speed, 1 / speed, 1 / speed),
    )


def test_who_is_ahead_and_who_is_level():
    rows = (row("best", 0.9, 10), row("near", 0.89, 9, 0.01), row("quick", 0.7, 99, 0.2))
    settings = Settings(
        data="d",
        minutes=1,
        size=None,
        recipe="scratch",
        precision="float32",
        threads=1,
        device="cpu",
        seed=0,
    )
    comparison = Comparison(settings=settings, rows=rows, judged=None, environment={})
    assert comparison.frontier == {"best", "quick"}
    assert [each.name for each in comparison.level] == ["near"]


def test_behind_is_judged_image_by_image(tmp_path):
    """Two models that are wrong on the same half, one on seven images more: the plain intervals
    (of half the images, either way) overlap by far.
    """
    for name, wrong in (("a", 50), ("b", 57)):
        (tmp_path / name).mkdir()
        lines = [f"{i},x,{'y' if i < wrong else 'x'}" for i in range(100)]
        (tmp_path / name / "predictions.csv").write_text("\n".join(["key,label,predicted", *lines]))
        (tmp_path / name / "metrics.json").write_text('{"multi_label": false}')
    behind = module._behind(tmp_path / "a", tmp_path / "b")
    assert behind.value == pytest.approx(0.07) and 0 < behind.low < 0.07 < behind.high < 0.13
    assert module._behind(tmp_path / "a", tmp_path / "a") is None


def test_models_that_agree_on_a_few_images_are_not_known_to_be_equal(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        lines = ["key,label,predicted", "0,x,x", "1,x,x"]
        (tmp_path / name / "predictions.csv").write_text("\n".join(lines))
        (tmp_path / name / "metrics.json").write_text('{"multi_label": false}')
    value, low, high = module._behind(tmp_path / "a", tmp_path / "b")
    assert value == 0 and low < -0.3 and high > 0.3
