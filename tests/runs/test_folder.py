import json
import os

import pytest

from vitrail.errors import DataError, UsageError
from vitrail.models import model_config
from vitrail.runs import DataConfig, Run, RunLock, TrainConfig

CONFIG = TrainConfig(data=DataConfig(path="photos"), model=model_config("vit_s16"), minutes=4)


def test_a_run_folder_says_how_to_run_it_again(tmp_path):
    run = Run.create(tmp_path / "runs" / "a", CONFIG)
    assert Run(tmp_path / "runs" / "a").config() == CONFIG
    assert json.loads((run.path / "environment.json").read_text())["versions"]["torch"]


def test_a_run_is_never_written_over(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"not empty.*--resume"):
        Run.create(tmp_path, CONFIG)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(("name", "message"), [("no", "no run at"), (".", "has no config.yaml")])
def test_what_is_no_run_is_said(tmp_path, name, message):
    with pytest.raises(DataError, match=message):
        Run(tmp_path / name)


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    run = Run.create(tmp_path / "a", CONFIG)
    with RunLock(run), pytest.raises(DataError, match="another process"), RunLock(run):
        pass
    with RunLock(run):
        pass


def test_the_log_survives_a_cut_last_line_and_forgets_steps_taken_again(tmp_path):
    run = Run.create(tmp_path / "a", CONFIG)
    for step in range(1, 5):
        run.append_metrics({"step": step, "loss": 1.0})
    with open(run.metrics_file, "a") as file:
        file.write('{"step": 5, "lo')
    assert [event["step"] for event in run.metrics()] == [1, 2, 3, 4]
    run.forget_after(2)
    run.append_metrics({"step": 3, "loss": 0.5})
    assert [event["step"] for event in run.metrics()] == [1, 2, 3]


@pytest.mark.parametrize("damage", [b"\xff\xfe\n", b"[1]\n", b"3\n", b"\0\0\n"])
def test_a_damaged_log_is_read_up_to_the_damage(tmp_path, damage):
    run = Run.create(tmp_path / "a", CONFIG)
    run.append_metrics({"step": 1})
    with open(run.metrics_file, "ab") as file:
        file.write(damage + b'{"step": 2}\n')
    assert list(run.metrics()) == [{"step": 1}]


def test_a_name_that_is_no_text_can_be_written(tmp_path):
    run = Run.create(tmp_path / "a", CONFIG)
    run.write("report.html", os.fsdecode(b"r\xe9d"))
    assert (run.path / "report.html").read_text() == "r\\udce9d"


def test_unreadable_images_are_listed(tmp_path):
    run = Run.create(tmp_path / "a", CONFIG)
    run.write_skipped({})
    assert not (run.path / "skipped.csv").exists()
    run.write_skipped({"b,c.png": 'cut "short"'})
    assert (run.path / "skipped.csv").read_text() == 'key,reason\n"b,c.png","cut ""short"""\n'
