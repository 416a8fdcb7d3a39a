"""Several processes of one run, as a user starts them: `vitrail train --devices 2`."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

_TINY = shlex.split(
    "samples:emoji --model.depth 1 --model.width 32 --model.heads 2 --model.mlp 64 "
    "--model.drop-path 0 --data.batch-size 32 --data.train-size None --precision float32 "
    "--evaluations 1 --ema 0.9 --device cpu"
)


def start(*args, prefix=("-m",), **options):
    return subprocess.Popen(
        [sys.executable, *prefix, "vitrail", "train", *args],
        env=os.environ | {"OMP_NUM_THREADS": "1", "JAXTYPING_DISABLE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def finish(process):
    said, _ = process.communicate(timeout=300)
    return process.returncode, said


def worker(launcher, rank):
    """The pid of the process of that rank."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            variables = (stat.parent / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == launcher and f"RANK={rank}".encode() in variables:
            return int(stat.parent.name)
    raise AssertionError(f"process {rank} is not there")


def under_way(run, process, steps=3):
    file = run / "metrics.jsonl"
    while not file.exists() or file.read_text().count("\n") < steps:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def losses(run):
    events = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {event["step"]: event["loss"] for event in events if "loss" in event}


def answers(run):
    with open(run / "predictions.csv", newline="") as file:
        return list(csv.reader(file))[1:]


def check_same(run, other):
    mine, theirs = losses(run), losses(other)
    assert list(mine) == list(theirs)
    assert max(abs(theirs[step] / mine[step] - 1) for step in mine) < 1e-6
    ours, others = answers(run), answers(other)
    assert [row[0] for row in ours] == [row[0] for row in others]
    assert len({row[0] for row in ours}) == len(ours)


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--devices", "3"], 2, "set data.batch_size to 30 or 36"),
        (["--devices", "2", "--device", "cuda:7"], 2, "is one device"),
        (["--devices", "0"], 2, "devices must be at least 1"),
    ],
)
@pytest.mark.slow
def test_an_impossible_layout_is_told_once_and_nothing_is_made(args, code, said, tmp_path):
    run = tmp_path / "run"
    ended, words = finish(start(*_TINY, "--epochs", "1", *args, "--out", str(run)))
    assert ended == code
    assert words.count(said) == 1 and words.count("\n") == 1
    assert not run.exists()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_killed_process_is_named_and_a_stop_and_another_number_go_on_the_same(tmp_path):
    run, args = tmp_path / "run", [*_TINY, "--epochs", "30"]
    process = start(*args, "--devices", "2", "--out", str(run))
    under_way(run, process)
    victim = worker(process.pid, 1)
    os.kill(victim, signal.SIGKILL)
    code, words = finish(process)
    assert code == 3
    assert f"process 1 of 2 (pid {victim}) was killed by SIGKILL" in words
    assert f"vitrail train --resume {run}" in words
    assert words.count("vitrail: ") == 1 and "Traceback" not in words


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_stopped_and_gone_on_with_by_another_number_of_processes(signum, tmp_path):
    one, run = tmp_path / "one", tmp_path / "run"
    short = ["--epochs", "1"]
    assert finish(start(*_TINY, *short, "--out", str(one)))[0] == 0
    process = start(*_TINY, *short, "--devices", "2", "--out", str(run))
    under_way(run, process)
    process.send_signal(signum)
    code, words = finish(process)
    assert code == 128 + signum and words.count("all saved") == 1
    process = start("--resume", str(run), "--devices", "1")
    under_way(run, process, steps=len(losses(run)) + 3)
    process.send_signal(signum)
    assert finish(process)[0] == 128 + signum
    assert finish(start("--resume", str(run), "--devices", "2"))[0] == 0
    check_same(one, run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "more"),
    [
        ("ddp", []),
        ("fsdp", []),
        ("ddp", ["--tune.head-warmup", "0.4"]),
        ("ddp", ["--tune.lora-rank", "2"]),
        ("fsdp", ["--tune.head-warmup", "0.4", "--tune.last-blocks", "1"]),
        ("fsdp", ["--tune.lora-rank", "2"]),
    ],
)
def test_one_and_two_processes_do_the_same(parallel, more, tmp_path):
    args = [*_TINY, "--epochs", "0.3", *more]
    one, two = tmp_path / "one", tmp_path / "two"
    assert finish(start(*args, "--out", str(one)))[0] == 0
    code, words = finish(start(*args, "--devices", "2", "--parallel", parallel, "--out", str(two)))
    assert code == 0, words
    check_same(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_bfloat16(parallel, tmp_path):
    args = [*_TINY, "--precision", "bfloat16", "--epochs", "0.2", "--devices", "2"]
    code, words = finish(start(*args, "--parallel", parallel, "--out", str(tmp_path / "run")))
    assert code == 0, words


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_restarts_go_on_by_themselves(tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    args = [*_TINY, "--epochs", "0.5", "--devices", "2"]
    assert finish(start(*args, "--out", str(whole)))[0] == 0
    process = start(*args, "--restarts", "1", "--out", str(run))
    under_way(run, process)
    os.kill(worker(process.pid, 1), signal.SIGKILL)
    code, words = finish(process)
    assert code == 0, words
    last = sorted((run / "checkpoints").iterdir())[-1].name
    for file in ("model.safetensors", "optimizer.safetensors"):
        here, there = (each / "checkpoints" / last / file for each in (run, whole))
        assert here.read_bytes() == there.read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_stopped_process_is_named(tmp_path):
    run = tmp_path / "run"
    args = [*_TINY, "--epochs", "30", "--devices", "2", "--stall-seconds", "5"]
    process = start(*args, "--out", str(run))
    under_way(run, process)
    victim = worker(process.pid, 1)
    os.kill(victim, signal.SIGSTOP)
    code, words = finish(process)
    assert code == 3
    assert f"process 1 (pid {victim} on " in words and "is stopped" in words
    assert not Path(f"/proc/{victim}").exists()
