import csv
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from vitrail.errors import DataError, UsageError
from vitrail.evaluation import evaluate
from vitrail.report.page import render
from vitrail.runs import Run, read_checkpoint, write_checkpoint
from vitrail.runs.load import load, load_model
from vitrail.tasks.classify import right


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    tiny.train(tiny.photos(folder / "photos"), folder / "run")
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Run:
    """A copy of the run, to do with as a test likes."""
    shutil.copytree(trained / "run", tmp_path / "run")
    return Run(tmp_path / "run")


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def rewrite(run: Run, tensors=lambda t: t, state=lambda s: s) -> None:
    there = read_checkpoint(run.checkpoint("last"))
    write_checkpoint(run.checkpoint("last"), tensors(there.tensors), state(there.state))


def test_the_held_out_images_are_measured_and_written_down(run):
    found = evaluate(run)
    held_out = [row for row in rows(run.split_file) if row["split"] == "val"]
    assert list(found.keys) == [row["key"] for row in held_out]
    assert found.part == "val" and found.held_out and found.noun == "held-out images"
    assert found.rows["probabilities"].shape == (6, 3) and found.rows["targets"].tolist() == [
        0,
        0,
        1,
        1,
        2,
        2,
    ]
    assert found.images_per_second > 0
    assert found.model_images_per_second >= found.images_per_second

    written = json.loads((run.path / "metrics.json").read_text())
    assert written["top1"]["value"] == found.metrics.values()["top1"] == right(found.metrics) / 6
    assert written["classes"] == ["apple", "brick", "cloud"] and written["part"] == "val"

    predictions = rows(run.path / "predictions.csv")
    assert [row["label"] for row in predictions] == [row["label"] for row in held_out]
    for row in predictions:
        share = {name: float(row[f"p:{name}"]) for name in ("apple", "brick", "cloud")}
        assert sum(share.values()) == pytest.approx(1, abs=1e-5)
        assert row["predicted"] == max(share, key=share.__getitem__)
        assert float(row["probability"]) == max(share.values())
    top, baseline = found.summary()
    assert written["top1"]["low"] < written["top1"]["value"] <= written["top1"]["high"]
    assert "95% interval" in top and f"{right(found.metrics)} of 6" in top and "33.3%" in baseline


def test_the_model_is_loaded_as_it_was_trained(run):
    loaded = load(run.path)
    assert loaded.names == ("apple", "brick", "cloud") and not loaded.task.multi_label
    assert not loaded.model.training and loaded.preprocess.size == (32, 32)
    stored = read_checkpoint(run.checkpoint("last")).tensors["model"]
    for name, tensor in load_model(run).state_dict().items():
        assert torch.equal(tensor, stored[name])


def test_other_parts_get_files_of_their_own(run):
    evaluate(run)
    before = (run.path / "metrics.json").read_bytes()
    assert evaluate(run, split="all").metrics.images == 24
    assert evaluate(run, split="train").noun == "training images"
    assert (run.path / "metrics.json").read_bytes() == before
    assert len(rows(run.path / "predictions-all.csv")) == 24
    with pytest.raises(UsageError, match="no part 'test': train, val"):
        evaluate(run, split="test")


def test_test_time_augmentation_has_files_of_its_own_and_replaces_none(run):
    once = evaluate(run)
    before = {file: file.read_bytes() for file in run.path.iterdir() if file.is_file()}
    twice = evaluate(run, tta="flip")
    assert all(file.read_bytes() == content for file, content in before.items())
    written = json.loads((run.path / "metrics-tta-flip.json").read_text())
    assert written["tta"] == "flip" and written["top1"]["value"] == right(twice.metrics) / 6
    assert len(rows(run.path / "predictions-tta-flip.csv")) == 6
    assert not torch.equal(once.rows["probabilities"], twice.rows["probabilities"])
    assert evaluate(run, split="all", tta="scales").suffix == "-all-tta-scales"
    assert (run.path / "metrics-all-tta-scales.json").is_file()
    with pytest.raises(UsageError, match="did you mean 'flip'"):
        evaluate(run, tta="flop")


def test_a_test_part_is_what_is_measured(tiny, tmp_path):
    for part, n in (("train", 8), ("val", 2), ("test", 3)):
        tiny.photos(tmp_path / "photos" / part, n=n)
    found = evaluate(tiny.train(tmp_path / "photos", tmp_path / "run"))
    assert found.part == "test" and found.metrics.images == 9 and found.held_out


def test_other_images_with_some_of_the_classes(tiny, run, tmp_path):
    other = tmp_path / "others"
    tiny.paint(other / "cloud" / "a.png", 2, 100)
    tiny.paint(other / "apple" / "b.png", 0, 100)
    found = evaluate(run, data=str(other))
    assert found.keys == ("apple/b.png", "cloud/a.png") and found.rows["targets"].tolist() == [0, 2]
    assert found.metrics.per_class[1].support == 0 and not found.held_out
    assert [f.name for f in run.path.glob("metrics*.json")] == [f"metrics{found.suffix}.json"]
    assert found.suffix.startswith("-others-all-")
    assert not (run.path / "metrics.json").exists()


def test_data_of_one_name_in_two_places_replaces_nothing(tiny, run, tmp_path, monkeypatch):
    places = ["siteA/test", "siteB/test", "photos.v1.0", "photos.v1.1"]
    for i, place in enumerate(places):
        for name in ("apple", "cloud"):
            tiny.paint(tmp_path / place / name / "a.png", i, 100)
    parted = tmp_path / "parted"
    for part in ("train", "val", "test"):
        tiny.photos(parted / part, n=1)
    suffixes = [evaluate(run, data=str(tmp_path / place)).suffix for place in places]
    suffixes += [evaluate(run, data=str(parted), split=part).suffix for part in ("val", "test")]
    assert len(set(suffixes)) == 6
    assert suffixes[2].startswith("-photos.v1.0-all-") and "-parted-test-" in suffixes[5]
    # The same place by another name replaces its own, and only that.
    before = {f.name: f.stat().st_mtime_ns for f in run.path.iterdir() if f.is_file()}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "siteA")
    assert evaluate(run, data="./siteA/../siteA/test").suffix == suffixes[0]
    assert evaluate(run, data="link/test").suffix == suffixes[0]
    after = {f.name: f.stat().st_mtime_ns for f in run.path.iterdir() if f.is_file()}
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {f"metrics{suffixes[0]}.json", f"predictions{suffixes[0]}.csv"}


def test_results_that_an_earlier_version_called_like_a_part_are_not_replaced(run):
    file = run.path / "metrics-train.json"
    file.write_text('{"data": "elsewhere/train"}')
    with pytest.raises(DataError, match="holds what was measured on elsewhere/train: move it away"):
        evaluate(run, split="train")
    assert json.loads(file.read_text()) == {"data": "elsewhere/train"}
    file.unlink()
    assert evaluate(run, split="train").suffix == evaluate(run, split="train").suffix == "-train"


def test_the_runs_own_data_given_by_name_is_not_its_own_parts(run):
    """All of `--data PHOTOS --split train` and the part that was trained on are two sets."""
    own = evaluate(run, split="all")
    given = evaluate(run, data=own.loaded.config.data.path)
    assert own.suffix == "-all" and given.suffix.startswith("-photos-all-")


def test_another_checkpoint_than_the_runs_own_replaces_nothing(tiny, trained, tmp_path):
    run = tiny.train(trained / "photos", tmp_path / "run")
    evaluate(run)
    last = run.checkpoint("last")
    shutil.copytree(last, run.step_folder(9))  # now the newest
    assert evaluate(run).suffix == ""
    assert evaluate(run, checkpoint=last.name).suffix == f"-{last.name}"


def test_what_is_absent_and_what_is_few_is_said(tiny, run, tmp_path):
    tiny.photos(tmp_path / "others", ("apple", "cloud"), n=2)
    found = evaluate(run, data=str(tmp_path / "others"))
    few, absent = found.notes()
    assert "only 4 images" in few
    assert absent.startswith("1 of 3 classes has no image here: brick. Counted as 0")
    written = json.loads((run.path / f"metrics{found.suffix}.json").read_text())
    assert written["absent"] == ["brick"]
    assert set(written["over_all_classes"]["auroc"]) == {"value", "low", "high"}
    page = render(run, found)
    assert absent in page and "In brackets what counting every class would give" in page


def test_a_class_that_the_model_does_not_know_is_named(tiny, run, tmp_path):
    tiny.photos(tmp_path / "others", ("apple", "clouds"), n=1)
    with pytest.raises(DataError, match=r"'clouds' \(did you mean 'cloud'\?\)"):
        evaluate(run, data=str(tmp_path / "others"))


def test_what_cannot_be_read_is_left_out_and_told(tiny, trained, tmp_path):
    data = shutil.copytree(trained / "photos", tmp_path / "photos")
    run = tiny.train(data, tmp_path / "run")
    keys = [row["key"] for row in rows(run.split_file) if row["split"] == "val"]
    (data / keys[0]).write_bytes(b"\x89PNG")
    found = evaluate(run)
    assert list(found.keys) == keys[1:] and list(found.skipped) == keys[:1]
    for key in keys:
        (data / key).write_bytes(b"")
    with pytest.raises(DataError, match=r"no image of .* can be read"):
        evaluate(run)


def test_several_labels_an_image(tiny, tmp_path):
    data = tiny.table(tmp_path, ("red", "red|warm", "cold"))
    run = tiny.train(data, tmp_path / "run")
    found = evaluate(run)
    assert (
        found.loaded.task.multi_label
        and found.rows["targets"].shape == found.rows["probabilities"].shape
    )
    assert found.metrics.headline == "map" and found.metrics.confusion is None
    assert any("every label right" in line for line in found.summary())
    assert {row["label"] for row in rows(run.path / "predictions.csv")} <= {
        "red", "red|warm", "cold",
    }  # fmt: skip
    # Images of one label are a case of several.
    tiny.photos(tmp_path / "photos", ("red", "cold"), n=2)
    assert evaluate(run, data=str(tmp_path / "photos")).rows["targets"].sum() == 4


def test_images_of_several_labels_do_not_fit_a_run_of_one(tiny, run, tmp_path):
    data = tiny.table(tmp_path / "several", ("apple|brick", "cloud"), n=2)
    with pytest.raises(DataError, match="have several labels"):
        evaluate(run, data=str(data))


def test_a_run_in_bfloat16_is_measured_in_bfloat16(tiny, trained, tmp_path):
    run = tiny.train(trained / "photos", tmp_path / "run", precision="bfloat16")
    assert evaluate(run).metrics.images == 6


def test_weights_that_are_no_numbers_are_told(run):
    def broken(tensors):
        tensors["model"]["head.bias"].fill_(math.nan)
        return tensors

    rewrite(run, tensors=broken)
    with pytest.raises(DataError, match="not numbers for 6 of 6"):
        evaluate(run)


@pytest.mark.parametrize(
    ("tensors", "state", "message"),
    [
        (lambda t: {"optimizer": t["optimizer"]}, lambda s: s, "does not fit"),
        (lambda t: {"model": {"x": torch.ones(1)}}, lambda s: s, "does not fit"),
        (lambda t: t, lambda s: {}, "does not fit"),
        (lambda t: t, lambda s: s | {"classes": ["a"]}, "there are 1 classes"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_told(run, tensors, state, message):
    rewrite(run, tensors, state)
    with pytest.raises(DataError, match=message):
        evaluate(run)


def test_a_checkpoint_or_a_device_that_is_not_there_is_told(run):
    with pytest.raises(DataError, match="no whole checkpoint"):
        evaluate(run, checkpoint="step-999")
    with pytest.raises(DataError, match="no device 'nonsense'"):
        evaluate(run, device="nonsense")
