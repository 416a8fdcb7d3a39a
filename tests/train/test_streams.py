"""Training on a stream, by the main job: from the command line, killed, gone on with, refused."""

import io
import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from vitrail import job
from vitrail.cli import main
from vitrail.data.sources.stream import StreamSettings
from vitrail.data.views.augment import AugmentConfig
from vitrail.errors import UsageError
from vitrail.models import ViTConfig
from vitrail.runs import DataConfig, OptimConfig, Run, TrainConfig, TuneConfig, read_checkpoint
from vitrail.tasks import ClassifyConfig
from vitrail.training import Interrupted

datasets = pytest.importorskip("datasets", reason="needs the extra `data`")

NAMES = ["red", "green", "blue"]
SIZES = (14, 9, 12, 17)


def picture(seed):
    pixels = np.random.default_rng(seed).integers(0, 90, (18, 20, 3), np.uint8)
    pixels[..., seed % 3] += 140
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_shard(file, start, size):
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
    )
    seeds = range(start, start + size)
    rows = {
        "image": [{"bytes": picture(seed), "path": None} for seed in seeds],
        "label": [seed % 3 for seed in seeds],
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(file)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """52 images in four parquet files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))  # of other processes
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    (tmp_path / "set").mkdir()
    for shard, size in enumerate(SIZES):
        file = tmp_path / "set" / f"train-{shard:05}-of-{len(SIZES):05}.parquet"
        write_shard(file, 100 * shard, size)
    return tmp_path / "set"


CONFIG = TrainConfig(
    data=DataConfig(
        path="hf-stream:set",
        batch_size=8,
        stream=StreamSettings(held_out=6, epoch=40, buffer=12),
    ),
    model=ViTConfig(
        depth=1, width=32, heads=2, mlp=64, patch=(8, 8), image_size=(16, 16), channels=3,
        classes=3, drop_path=0.2,
    ),
    augment=AugmentConfig(policy="randaugment", erase=0.2, mixup=0.2, cutmix=0.5),
    optim=OptimConfig(lr=1e-3),
    epochs=4,
    accumulate=2,  # of five batches an epoch one is left over
    ema=0.9,
    evaluations=3,
    device="cpu",
    threads=1,
)  # fmt: skip


def losses(run):
    return {event["step"]: event["loss"] for event in run.metrics() if "loss" in event}


def tensors(run):
    parts = read_checkpoint(run.checkpoint("last")).tensors
    return {f"{part}.{name}": t for part, named in parts.items() for name, t in named.items()}


def check_same(run, other):
    assert losses(run) == losses(other)
    states = [read_checkpoint(each.checkpoint("last")).state["stream"] for each in (run, other)]
    assert states[0] == states[1]
    for name, tensor in tensors(run).items():
        assert torch.equal(tensor, tensors(other)[name]), name


class Crash(Exception):
    """As a kill that comes when nothing is being saved."""


def crash():
    raise Crash


def at(step, act):
    """A listener that does something after that step."""

    def listen(event):
        if "loss" in event and event["step"] == step:
            act()

    return listen


def test_a_run_on_a_stream_that_was_stopped_goes_on_as_if_nothing_had_happened(
    folder, tmp_path, monkeypatch
):
    whole = job.train(CONFIG, tmp_path / "runs/whole").run
    assert list(losses(whole)) == list(range(1, 9))
    held = [line.split(",")[1] for line in whole.split_file.read_text().splitlines()[1:]]
    predicted = (whole.path / "predictions.csv").read_text().splitlines()[1:]
    assert len(held) == 6 and {line.split(",")[0] for line in predicted} == set(held)

    told = []
    with pytest.raises(Crash):
        job.train(CONFIG, tmp_path / "runs/parts", listen=at(4, crash), notify=told.append)
    assert any("6 images from the beginning of the stream" in sentence for sentence in told)
    monkeypatch.chdir("/")  # a run knows where its data is
    run = Run(tmp_path / "runs/parts")
    with pytest.raises(Crash):
        job.resume(run, listen=at(5, crash))
    with pytest.raises(Interrupted):
        job.resume(run, listen=at(7, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    outcome = job.resume(run)
    check_same(run, whole)
    assert not outcome.skipped
    # As many more: what was fetched ahead of the end was not lost.
    longer = replace(run.config(), epochs=5.0)
    job.resume(run, longer)
    again = job.train(replace(longer, epochs=5), tmp_path / "runs/again").run
    assert list(losses(run)) == list(losses(again)) == list(range(1, 11))
    drawn = [read_checkpoint(each.checkpoint("last")).state["stream"] for each in (run, again)]
    assert drawn[0] == drawn[1]


def test_a_changed_stream_is_refused_or_gone_on_with(folder):
    run = job.train(replace(CONFIG, epochs=2), "runs/x").run
    longer = replace(run.config(), epochs=4.0)
    write_shard(folder / "train-00001-of-00004.parquet", 500, 11)
    with pytest.raises(
        UsageError, match=r"the training stream is another(.*\n)*.*accept_changes=True"
    ):
        job.resume(run, longer)
    told = []
    job.resume(run, longer, accept_changes=True, notify=told.append)
    assert "the stream is not what it was: a new pass of it begins" in told
    assert list(losses(run)) == list(range(1, 9))


def refused(**changes):
    with pytest.raises(UsageError) as error:
        replace(CONFIG, **changes)
    return str(error.value)


def test_what_a_stream_cannot_do_is_refused():
    assert "method probe" in refused(method="probe")
    assert "tune.head_init probe" in refused(tune=TuneConfig(head_init="probe"))
    assert "class_weights" in refused(classify=ClassifyConfig(class_weights="balanced"))
    said = refused(data=replace(CONFIG.data, cache="disk"))
    assert "data.cache disk" in said and said.endswith("as hf:set")
    assert "set is none" in refused(data=replace(CONFIG.data, path="set"))


def test_a_length_in_epochs_needs_to_know_what_one_is(folder):
    data = replace(CONFIG.data, stream=StreamSettings(held_out=6))
    with pytest.raises(UsageError, match=r"data.stream.epoch 100000"):
        job.train(replace(CONFIG, data=data), "runs/x")
    run = job.train(replace(CONFIG, data=data, epochs=None, minutes=0.005), "runs/y").run
    assert run.config().data.stream.epoch == 10_000


MODEL = shlex.split(
    "--model vit_nano8 --model.depth 1 --model.width 32 --model.heads 2 --model.mlp 64 "
    "--model.image-size 16 16"
)
SHORT = shlex.split(
    "--data.batch-size 8 --data.stream.held-out 6 --data.stream.epoch 40 --data.stream.buffer 12 "
    "--epochs 1 --minutes None --evaluations 1 --precision float32 --ema 0 --device cpu --threads 1"
)
TINY = MODEL + SHORT


def vitrail(capfd, *args):
    """Exit code, and all that was said; on stdout last."""
    code = main([str(arg) for arg in args])
    captured = capfd.readouterr()
    return code, captured.err + captured.out


def test_every_verb_on_a_stream(folder, capfd):
    code, said = vitrail(capfd, "train", "hf-stream:set", *TINY, "--out", "runs/x", "--json")
    assert code == 0, said
    assert json.loads(said.splitlines()[-1])["run"] == "runs/x"
    assert "6 images from the beginning of the stream, which training passes over" in said
    stored = yaml.safe_load(Path("runs/x/config.yaml").read_text())["data"]
    assert stored["path"] == f"hf-stream:{folder}"
    assert stored["stream"]["epoch"] == 40 and stored["stream"]["held_out"] == 6
    assert vitrail(capfd, "evaluate", "runs/x")[0] == 0
    code, said = vitrail(capfd, "evaluate", "runs/x", "--split", "train")
    assert code == 2 and "no part 'train'" in said
    for args in (["data", "check"], ["data", "shard", "--out", "out"], ["evaluate", "runs/x"]):
        verb, *rest = args
        name = ["--data", "hf-stream:set"] if verb == "evaluate" else ["hf-stream:set"]
        code, said = vitrail(capfd, verb, *rest[:1], *name, *(["out"] if "shard" in rest else []))
        assert code == 2 and "here it takes data that is read in any order, as hf:set" in said
    code, said = vitrail(capfd, "doctor", "hf-stream:set")
    assert "a stream of" in said and "in 3 classes (train)" in said and "images/s decoded" in said
    code, said = vitrail(capfd, "doctor", "hf-stream:parquet:gone")
    assert code == 3 and "no such file or folder: gone" in said
    code, said = vitrail(capfd, "doctor", "runs/x")
    assert "data, code and libraries are as they were" in said


def test_a_plan_and_a_learning_rate_for_a_stream(folder):
    planned = job.plan(CONFIG, "runs/x")
    assert planned.time is not None
    assert (planned.time.steps_per_epoch, planned.time.steps) == (2, 8)
    assert planned.memory.cache > 0 and not Path("runs").exists()
    assert not any("training image" in problem.text for problem in planned.problems)
    assert len(job.find_lr(CONFIG).rates) > 5


def test_fine_tuning_on_a_stream_starts_without_a_probe(folder, capfd):
    assert vitrail(capfd, "train", "hf-stream:set", *TINY, "--out", "runs/x")[0] == 0
    args = ["train", "hf-stream:set", "--weights", "runs/x", "--out", "runs/y", *SHORT]
    code, said = vitrail(capfd, *args)
    assert code == 0, said
    assert Run(Path("runs/y")).config().tune.head_init == "zeros"


@pytest.mark.slow
def test_two_processes_train_on_the_same_stream(folder, tmp_path):
    def trained(out, *args):
        command = [sys.executable, "-m", "vitrail", "train", "hf-stream:set", *TINY, "--out", out]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, "--model.drop-path", "0", "--augment.mixup", "0.2", *args],
            capture_output=True, text=True, env=environment, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return Run(tmp_path / out)

    one, two = trained("one"), trained("two", "--devices", "2")
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    states = [read_checkpoint(run.checkpoint("last")).state["stream"] for run in (one, two)]
    assert states[0] == states[1]
    # And one goes on with what two have begun.
    job.resume(two, replace(two.config(), epochs=2.0, devices=1))
    assert len(losses(two)) == 10
