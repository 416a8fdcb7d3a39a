"""A run that is killed at any time goes on as if nothing had happened; by the benchmark's code."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import vitrail
from vitrail.cli import main
from vitrail.errors import DataError
from vitrail.models import ViTConfig
from vitrail.runs import DataConfig, Run, TrainConfig
from vitrail.runs.identity import read_identity

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "reliability.py"


def measured(*args: str) -> dict:
    """What the script found, in an interpreter of its own: it forks, and must have no threads."""
    if not SCRIPT.is_file():
        pytest.skip("a source distribution has no benchmarks")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *args, "--json"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(vitrail.__file__).parents[1])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_kills_at_random_times_change_nothing():
    found = measured("--part", "kills", "--count", "3")["kills"]
    assert found["kills"] == 3 and found["mismatches"] == found["orphans"] == 0
    # They did strike while something was going on.
    assert found["killed"]["killed between them"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "task",
    ["classify", "deeplab", "queries", "frozen", "detect", "detect-queries", "mocov3", "dino"],
)
def test_more_kills_change_nothing_in_any_task(task):
    found = measured("--part", "kills", "--task", task, "--count", "4")["kills"]
    assert found["kills"] == 4 and found["mismatches"] == found["orphans"] == 0


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced():
    found = measured("--part", "processes", "--count", "3")["processes"]
    assert found["kills"] == 3 and found["mismatches"] == 0


@pytest.mark.slow
def test_memory_does_not_grow():
    found = measured("--part", "memory", "--count", "4000")["memory"]
    assert found["steps"] == 4000 and found["mb_per_1000_steps"] < 1


KILLED = """
import os, signal, sys, time
from vitrail import cli, job
from vitrail.runs import Run
from vitrail.runs.store import Checkpoints

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

def while_the_split_is_written(split=job.write_split):
    def half(splits, file):
        split(splits, file)
        os.truncate(file, file.stat().st_size // 2)
        die()
    job.write_split = half

def before_the_first_checkpoint():
    Checkpoints._write = die

def after_three_steps(log=Run.append_metrics):
    def three(run, event):
        log(run, event)
        if event["step"] == 3:
            die()
    Checkpoints._write = lambda *args: time.sleep(600)
    Run.append_metrics = three

for way in (while_the_split_is_written, before_the_first_checkpoint, after_three_steps):
    if not (child := os.fork()):
        way()
        cli.main(["train", *sys.argv[1:], "--out", way.__name__])
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    print(way.__name__)
"""


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    images, labels = np.random.default_rng(0).integers(0, 255, (48, 16, 16)), np.arange(48) % 3
    images[:, ::2] //= 1 + labels[:, None, None]
    np.savez("d.npz", train_images=images.astype(np.uint8), train_labels=labels)
    asked = ["d.npz", "--epochs", "2", "--evaluations", "1", "--model.depth", "1"]
    asked += ["--model.width", "32", "--model.heads", "2", "--model.mlp", "32"]
    asked += ["--data.batch-size", "8", "--device", "cpu"]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *asked], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.split()
    assert len(killed) == 3
    assert (Path(killed[2]) / "metrics.jsonl").read_text().count("\n") == 3
    assert main(["train", *asked, "--out", "whole"]) == 0
    whole = Run("whole")
    Path("bare").mkdir()
    shutil.copy("whole/config.yaml", "bare")
    capfd.readouterr()
    for name in (*killed, "bare"):
        assert main(["train", "--resume", name]) == 0
        assert f"{name} holds no checkpoint: it starts again from its config" in (
            capfd.readouterr().err
        )
        run = Run(name)
        for part in ("model", "optimizer"):
            mine, its = (each.checkpoint("last") / f"{part}.safetensors" for each in (whole, run))
            assert mine.read_bytes() == its.read_bytes(), name
        logs = [[(e["step"], e.get("loss")) for e in each.metrics()] for each in (whole, run)]
        assert logs[0] == logs[1]
        assert whole.split_file.read_bytes() == run.split_file.read_bytes()
        assert run.environment() and read_identity(run) == read_identity(whole)

    # What was done is never done again over it, and what has changed is said.
    shutil.rmtree("bare/checkpoints")
    assert main(["train", "--resume", "bare"]) == 3
    assert "no checkpoint any more" in capfd.readouterr().err
    for name in ("report.html", "metrics.json", "predictions.csv"):
        Path("bare", name).unlink()
    images[0] = 7
    np.savez("d.npz", train_images=images.astype(np.uint8), train_labels=labels)
    assert main(["train", "--resume", "bare"]) == 2
    assert "--accept-changes" in capfd.readouterr().err
    assert main(["train", "--resume", "bare", "--accept-changes"]) == 0


def test_a_run_killed_while_its_config_was_written_is_no_run_and_in_nobodys_way(tmp_path):
    (tmp_path / ".config.yaml.writing").write_text("epo")
    with pytest.raises(DataError, match="is not a run"):
        Run(tmp_path)
    config = TrainConfig(data=DataConfig(path="x"), model=ViTConfig(), epochs=1)
    assert Run.create(tmp_path, config).config() == config
