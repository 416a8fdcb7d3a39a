"""Several processes of one run, as a user starts them: `vitrail train --devices 2`."""

import csv
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from close import close
from vitrail import evaluate
from vitrail.models import ViTConfig, build
from vitrail.runs import Run
from vitrail.weights import save_weights

_TINY = shlex.split(
    # Said, for the recipe would choose by the machine: two processes may be shown larger images.
    "samples:emoji --model.image-size 64 64 --model.depth 1 --model.width 32 --model.heads 2 "
    "--model.mlp 64 --model.drop-path 0 --data.batch-size 32 --data.train-size None "
    "--precision float32 --evaluations 1 --ema 0.9 --device cpu --data.val-fraction 0.06"
)


def squares(folder, number):
    """YOLO's layout: a bright square an image, but for every fourth."""
    rng = np.random.default_rng(0)
    for i in range(number):
        part = "val" if i % 6 == 0 else "train"
        for kind in ("images", "labels"):
            (folder / kind / part).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 120, (48, 64, 3), dtype=np.uint8)
        left, top = rng.integers(0, 40), rng.integers(0, 28)
        text = ""
        if i % 4:
            pixels[top : top + 20, left : left + 24] += 100
            text = f"0 {(left + 12) / 64} {(top + 10) / 48} {24 / 64} {20 / 48}"
        Image.fromarray(pixels).save(folder / "images" / part / f"{i}.png")
        (folder / "labels" / part / f"{i}.txt").write_text(text)


def start(*args, launcher=(), **options):
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "vitrail", "train", *args],
        env=os.environ | {"OMP_NUM_THREADS": "1", "JAXTYPING_DISABLE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def finish(process):
    said, _ = process.communicate(timeout=300)
    return process.returncode, said


def workers(launcher):
    """The pid of each process that trains, by its rank."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            variables = (stat.parent / "environ").read_bytes().split(b"\0")
            ranks = [int(v[5:]) for v in variables if v.startswith(b"RANK=")]
            if parent == launcher and ranks:
                found[ranks[0]] = int(stat.parent.name)
    return found


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
    assert max(abs(theirs[step] / mine[step] - 1) for step in mine) < 1e-5
    ours, others = answers(run), answers(other)
    assert [row[0] for row in ours] == [row[0] for row in others]
    assert len({row[0] for row in ours}) == len(ours)


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--devices", "3"], 2, "set --data.batch-size to 30 or 36"),
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
    victim = workers(process.pid)[1]
    os.kill(victim, signal.SIGKILL)
    code, words = finish(process)
    assert code == 3
    assert f"process 1 of 2 (pid {victim}) was killed by SIGKILL" in words
    assert f"vitrail train --resume {run}" in words
    assert words.count("vitrail: ") == 1 and "Traceback" not in words


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "parallel"), [(signal.SIGINT, "ddp"), (signal.SIGTERM, "fsdp")])
def test_stopped_and_gone_on_with_by_another_number_of_processes(signum, parallel, tmp_path):
    one, run = tmp_path / "one", tmp_path / "run"
    # What is rounded differently grows from step to step.
    short = ["--epochs", "0.6", "--parallel", parallel]
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
        ("ddp", ["--micro-batch", "5"]),
        ("ddp", ["--tune.head-warmup", "0.4"]),
        ("ddp", ["--tune.lora-rank", "2", "--optim.name", "adamw"]),
        ("fsdp", ["--tune.head-warmup", "0.4", "--tune.last-blocks", "1"]),
        ("fsdp", ["--tune.lora-rank", "2", "--optim.name", "adamw"]),
    ],
)
def test_one_and_two_processes_do_the_same(parallel, more, tmp_path):
    args = [*_TINY, "--epochs", "0.3", *more]
    one, two = tmp_path / "one", tmp_path / "two"
    assert finish(start(*args, "--out", str(one)))[0] == 0
    code, words = finish(start(*args, "--devices", "2", "--parallel", parallel, "--out", str(two)))
    assert code == 0, words
    check_same(one, two)
    assert words.count("held-out accuracy") == words.count("top-1") == 1  # one of them talks


@pytest.mark.slow
def test_held_out_images_that_cannot_be_shared_evenly_are_measured_once_each(tmp_path):
    run = tmp_path / "run"
    code, words = finish(start(*_TINY, "--epochs", "0.1", "--devices", "2", "--out", str(run)))
    assert code == 0, words
    together = answers(run)
    assert len(together) % 2 and len(together) % 64
    (logged,) = (event["val_accuracy"] for event in Run(run).metrics() if "val_accuracy" in event)
    alone = evaluate(run)
    assert logged == pytest.approx(alone.metrics.summary["top1"].value)
    assert [row[0] for row in together] == list(alone.keys)
    said = torch.tensor([list(map(float, row[4:])) for row in together])
    close(said, alone.rows["probabilities"])


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
    victim = workers(process.pid)[1]
    os.kill(victim, signal.SIGKILL)
    code, words = finish(process)
    assert code == 0, words
    told = f"process 1 of 2 (pid {victim}) was killed by SIGKILL: all start again (1 of 1)"
    assert words.count(told) == words.count("going on from step ") == 1
    last = sorted((run / "checkpoints").iterdir())[-1].name
    for file in ("model.safetensors", "optimizer.safetensors"):
        here, there = (each / "checkpoints" / last / file for each in (run, whole))
        assert here.read_bytes() == there.read_bytes()


@pytest.mark.slow
def test_a_run_without_a_checkpoint_starts_again_in_all_processes(tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    args = [*_TINY, "--epochs", "0.3", "--devices", "2"]
    assert finish(start(*args, "--out", str(whole)))[0] == 0
    run.mkdir()
    (run / "config.yaml").write_bytes((whole / "config.yaml").read_bytes())
    code, words = finish(start("--resume", str(run)))
    assert code == 0 and words.count("it starts again from its config") == 1, words
    last = sorted((whole / "checkpoints").iterdir())[-1].name
    here, there = (each / "checkpoints" / last / "model.safetensors" for each in (run, whole))
    assert here.read_bytes() == there.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("launched", ["by vitrail", "by torchrun"])
def test_an_error_of_the_users_is_told_once_however_many_restarts_there_are(launched, tmp_path):
    for i in range(40):
        file = tmp_path / "data" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"no image %d" % i)
    args = [str(tmp_path / "data"), *_TINY[1:], "--data.val-fraction", "0.2"]
    args += ["--epochs", "1", "--out", str(tmp_path / "run")]
    if launched == "by vitrail":
        code, words = finish(start(*args, "--devices", "2", "--restarts", "5"))
        assert code == 3
        assert "start again" not in words
    else:
        code, words = finish(start(*args, launcher=torchrun(2, "--max-restarts", "1")))
        assert code == 1  # its own
    assert words.count("vitrail: ") == words.count("images cannot be read") == 1


def torchrun(processes, *options):
    return ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), *options]


@pytest.mark.slow
def test_what_is_wrong_before_processes_meet_is_told_once(tmp_path):
    code, words = finish(start("no_such_folder", launcher=torchrun(2), cwd=tmp_path))
    assert code == 1  # torchrun's own
    assert words.count("no such file or folder: no_such_folder") == 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_restarts_over_two_nodes(tmp_path):
    run = tmp_path / "run"
    with socket.create_server(("localhost", 0)) as server:
        place = f"localhost:{server.getsockname()[1]}"
    options = ["--nnodes", "2", "--max-restarts", "1", "--rdzv-backend", "c10d"]
    launcher = torchrun(1, *options, "--rdzv-endpoint", place)
    args = [*_TINY, "--epochs", "0.5", "--stall-seconds", "60", "--out", str(run)]
    nodes = [start(*args, launcher=launcher) for _ in range(2)]
    under_way(run, nodes[0])
    (victim,) = workers(nodes[1].pid).values()
    os.kill(victim, signal.SIGKILL)
    (code, words), (other, more) = (finish(node) for node in nodes)
    assert code == other == 0, words + more
    assert (words + more).count("going on from step ") == 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_stopped_process_is_named(tmp_path):
    run = tmp_path / "run"
    args = [*_TINY, "--epochs", "30", "--devices", "2", "--stall-seconds", "5"]
    process = start(*args, "--out", str(run))
    under_way(run, process)
    victim = workers(process.pid)[1]
    os.kill(victim, signal.SIGSTOP)
    code, words = finish(process)
    assert code == 3
    assert f"process 1 (pid {victim} on " in words and "is stopped" in words
    assert not Path(f"/proc/{victim}").exists()


@pytest.mark.slow
def test_numbers_found_by_one_process_are_taken_by_all(tmp_path):
    args = [*_TINY, "--epochs", "0.1", "--devices", "2", "--data.batch-size", "auto"]
    code, words = finish(start(*args, "--out", str(tmp_path / "run")))
    assert code == 0, words
    assert words.count("batch size 128 (auto)") == 1
    assert "batch_size: 128" in (tmp_path / "run" / "config.yaml").read_text()


_UNLABELLED = shlex.split(
    "samples:emoji --model vit_mini16 --model.image-size 32 32 --model.patch 8 8 --model.depth 1 "
    "--model.width 32 --model.heads 2 --model.mlp 64 --data.batch-size 32 --minutes None "
    "--epochs 0.2 --precision float32 --evaluations 1 --device cpu"
)
_TASKS = {
    "mocov3": "--moco.hidden 64 --moco.out 16",
    "dino": "--dino.hidden 32 --dino.out 16 --dino.prototypes 64 --dino.small-views 2 "
    "--dino.ibot 1 --dino.koleo 0.1 --dino.freeze-last 0.3",
}


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("task", _TASKS)
def test_what_looks_across_images_takes_the_same_steps_on_two_processes(task, parallel, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    args = [*_UNLABELLED, "--task", task, *shlex.split(_TASKS[task])]
    assert finish(start(*args, "--out", str(one)))[0] == 0
    more = ("--devices", "2", "--parallel", parallel, "--out", str(two))
    code, words = finish(start(*args, *more))
    assert code == 0, words
    mine, theirs = losses(one), losses(two)
    assert list(mine) == list(theirs)
    assert max(abs(theirs[step] / mine[step] - 1) for step in mine) < 1e-6


_FEATURES = shlex.split(
    "samples:emoji --model vit_mini16 --model.image-size 32 32 --model.patch 8 8 "
    "--model.stem patch --model.depth 1 --model.width 32 --model.heads 2 --model.mlp 64 "
    "--data.batch-size 32 --minutes None --epochs 0.2 --precision float32 --evaluations 1 "
    "--device cpu"
)
_OF_FEATURES = {
    "lejepa": "--lejepa.hidden 32 --lejepa.locals 1",
    "mae": "--mae.decoder.depth 1 --mae.decoder.width 32 --mae.decoder.heads 2",
    "distill-features": "--distill.teacher",
}


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("task", _OF_FEATURES)
def test_features_take_the_same_steps_on_two_processes(task, parallel, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    flags = [*_FEATURES, "--task", task, *_OF_FEATURES[task].split()]
    if task == "distill-features":
        shape = ViTConfig(
            depth=1, width=24, heads=2, mlp=48, patch=(4, 4), image_size=(16, 16), classes=0
        )
        flags.append(str(tmp_path / "teacher.safetensors"))
        save_weights(Path(flags[-1]), shape, build(shape).state_dict())
    assert finish(start(*flags, "--out", str(one)))[0] == 0
    args = ("--devices", "2", "--parallel", parallel, "--out", str(two))
    code, words = finish(start(*flags, *args))
    assert code == 0, words
    mine, theirs = losses(one), losses(two)
    assert list(mine) == list(theirs)
    assert max(abs(theirs[step] / mine[step] - 1) for step in mine) < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_an_image_that_one_process_cannot_read_lets_nobody_wait(parallel, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(40):
        file = tmp_path / "data" / "ab"[i % 2] / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(file)
        if i in (3, 4, 17):
            file.write_bytes(file.read_bytes()[:100])
    args = [str(tmp_path / "data"), *_TINY[1:], "--data.val-fraction", "0.2", "--epochs", "2"]
    args += ["--data.max-unreadable", "0.5", "--data.batch-size", "16", "--micro-batch", "3"]
    args += ["--devices", "2", "--parallel", parallel, "--stall-seconds", "60"]
    code, words = finish(start(*args, "--out", str(tmp_path / "run")))
    assert code == 0, words
    assert len(losses(tmp_path / "run")) == 4


@pytest.mark.slow
@pytest.mark.parametrize("assign", ["centre", "aligned"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_detection_takes_the_same_steps_on_two_processes(parallel, assign, tmp_path):
    squares(tmp_path / "data", 24)
    args = [str(tmp_path / "data"), *_TINY[1:], "--task", "detect", "--data.batch-size", "8"]
    args += ["--minutes", "None", "--epochs", "2", "--detect.width", "16", "--detect.levels", "2"]
    args += ["--detect.convs", "1", "--detect.assign", assign, "--ema", "0"]
    args += ["--augment.mosaic", "0.5"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert finish(start(*args, "--out", str(one)))[0] == 0
    code, words = finish(start(*args, "--devices", "2", "--parallel", parallel, "--out", str(two)))
    assert code == 0, words
    mine, theirs = losses(one), losses(two)
    assert list(mine) == list(theirs) and len(mine) == 4
    assert max(abs(theirs[step] / mine[step] - 1) for step in mine) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_segmentation_takes_the_same_steps_on_two_processes(parallel, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(24):
        mask = rng.integers(0, 3, (5, 6)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        for kind, pixels in (("images", np.eye(3, dtype=np.uint8)[mask] * 200), ("masks", mask)):
            file = tmp_path / "data" / ("val" if i % 4 == 0 else "train") / kind / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
    args = [str(tmp_path / "data"), *_TINY[1:], "--task", "segment", "--data.batch-size", "8"]
    args += ["--minutes", "None", "--epochs", "2", "--segment.width", "16"]
    args += ["--segment.dropout", "0", "--ema", "0"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert finish(start(*args, "--out", str(one)))[0] == 0
    code, words = finish(start(*args, "--devices", "2", "--parallel", parallel, "--out", str(two)))
    assert code == 0, words
    mine, theirs = losses(one), losses(two)
    assert list(mine) == list(theirs) and len(mine) == 4
    assert max(abs(theirs[step] / mine[step] - 1) for step in mine) < 1e-5
