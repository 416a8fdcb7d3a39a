"""What a run survives: kills at any time, damaged checkpoints, dead workers, 20,000 steps.

    python benchmarks/reliability.py [--full] [--part kills] [--task frozen] [--count N] [--json]

- kills: a run with decoder processes, augmentation, an average of the weights and accumulation is
  killed at random times and resumed, one to three times; its last checkpoint, tensor by tensor, and
  its log must be those of a run that nobody disturbed
- syscalls: a process is killed at every system call of a save; a whole checkpoint must be left
- damage: single bits of a checkpoint are flipped, its files cut; each must be noticed
- processes: of two processes that train together one is killed at a random step, or while they
  start, and both are started anew (--restarts); the last checkpoint must be that of an undisturbed
  run
- memory: resident memory, open files, threads and children over many steps of a tiny model

Without --full the counts are small. It ends with 1 where anything is not as it must be.
"""
# ruff: noqa: E402

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"  # before torch: what is forked below must not have had threads

import argparse
import ctypes
import hashlib
import json
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
import torch._dynamo  # the first model does so, for a second; each fork would again
from PIL import Image

import vitrail
from vitrail import job
from vitrail.data.views.augment import AugmentConfig
from vitrail.errors import DataError
from vitrail.heads.deformable import QueryBoxesConfig
from vitrail.models import ViTConfig
from vitrail.runs import DataConfig, OptimConfig, Run, TrainConfig, TuneConfig
from vitrail.runs.checkpoint import check_checkpoint
from vitrail.runs.config import write_yaml
from vitrail.runs.folder import step_of
from vitrail.tasks import DetectConfig, DinoConfig, MocoConfig, SegmentConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from runs import harm

COUNTS = {  # small, full
    "kills": (20, 200),
    "syscalls": (20, 0),
    "damage": (120, 1200),
    "processes": (2, 20),
    "memory": (2000, 20_000),
}
"""Kills; system calls (0: all); five flips to one cut; kills of a worker; steps."""
STEPS = 30
"""Of the run that is killed; an epoch has 4."""
TOGETHER = 160
"""Of the run of two processes; an epoch has 4."""
MOST_MB = 1.0
"""By which resident memory may grow in 1,000 steps."""
TIMES = {"seconds", "images_per_second"}
"""What two runs of the same need not have in common."""
CHECKPOINT_MINUTES = (1e-6, 0.1 / 60, 10.0)
"""A checkpoint after each step, every tenth of a second, and only with each evaluation."""


def make_images(
    folder: Path, number: int = 40, *, masks: bool = False, boxes: bool = False
) -> Path:
    """Small noisy PNG files in two classes, which differ in their colour; or with `masks`, or with
    `boxes` around what has them.
    """
    random = np.random.default_rng(0)
    if boxes:
        for i in range(number):
            pixels = random.integers(0, 120, (20, 24, 3), dtype=np.uint8)
            left, top = random.integers(0, 12), random.integers(0, 10)
            pixels[top : top + 8, left : left + 10, i % 2] += 100
            part = "val" if i % 5 == 0 else "train"
            for kind in ("images", "labels"):
                (folder / kind / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / "images" / part / f"{i}.png")
            box = f"{i % 2} {(left + 5) / 24} {(top + 4) / 20} {10 / 24} {8 / 20}"
            (folder / "labels" / part / f"{i}.txt").write_text(box)
        return folder
    if masks:
        for i in range(number):
            mask = np.repeat(np.repeat(random.integers(0, 2, (4, 4), dtype=np.uint8), 5, 0), 6, 1)
            pixels = random.integers(0, 120, (20, 24, 3), dtype=np.uint8)
            pixels[..., 0] += 100 * mask
            for kind, values in (("images", pixels), ("masks", mask)):
                file = folder / kind / ("val" if i % 5 == 0 else "train") / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(file)
        return folder
    for i in range(number):
        pixels = random.integers(0, 120, (20, 24, 3), dtype=np.uint8)
        pixels[..., i % 2] += 100
        place = folder / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{i}.png")
    return folder


def config_for(data: Path) -> TrainConfig:
    """30 steps of a run in which everything that has a state, or draws numbers, takes part."""
    return TrainConfig(
        data=DataConfig(path=str(data), batch_size=4, cache="none", decoders="threads"),
        model=ViTConfig(
            depth=2, width=32, heads=2, mlp=64, patch=(4, 4), image_size=(16, 16), channels=3,
            classes=2, drop_path=0.2,
        ),
        augment=AugmentConfig(policy="randaugment", mixup=0.2),
        optim=OptimConfig(lr=1e-3),
        epochs=STEPS / 4,
        accumulate=2,
        ema=0.9,
        evaluations=5,
        keep_checkpoints=2,
        checkpoint_minutes=CHECKPOINT_MINUTES[0],
        device="cpu",
        threads=1,
    )  # fmt: skip


OTHER_TASKS: dict[str, dict[str, Any]] = {
    "deeplab": {
        "task": "segment",
        "segment": SegmentConfig(head="deeplab", fine="side", width=16),
        "augment": replace(AugmentConfig.off(), scale=(0.5, 2.0), hflip=0.5, jitter=0.3),
    },
    "queries": {
        "task": "segment",
        "segment": SegmentConfig(head="queries", queries=4, joint_blocks=1),
        "augment": replace(AugmentConfig.off(), scale=(0.5, 2.0), hflip=0.5),
        "accumulate": 1,
    },
    "frozen": {
        "task": "segment",
        "segment": SegmentConfig(head="linear"),
        "augment": replace(AugmentConfig.off(), scale=(0.5, 2.0), hflip=0.5),
        "tune": TuneConfig(freeze=("backbone.*",), kept_views=3),
    },
    "detect": {
        "task": "detect",
        "detect": DetectConfig(width=16, convs=1, levels=2),
        "augment": replace(AugmentConfig.off(), scale=(0.5, 2.0), hflip=0.5, mosaic=0.5, blend=0.2),
    },
    "detect-queries": {
        "task": "detect",
        "detect": DetectConfig(
            head="queries", query=QueryBoxesConfig(queries=6, groups=2, layers=2, width=32, mlp=32)
        ),
        "augment": replace(AugmentConfig.off(), scale=(0.5, 2.0), hflip=0.5),
    },
    "mocov3": {
        "task": "mocov3",
        "moco": MocoConfig(hidden=64, out=16, momentum=0.9),
        "augment": AugmentConfig(grey=0.2, solarize=0.2, jitter=0.4),
        "ema": 0.0,
        "accumulate": 1,
    },
    "dino": {
        "task": "dino",
        "dino": DinoConfig(
            prototypes=32,
            hidden=32,
            out=16,
            small_views=2,
            momentum=0.9,
            freeze_last=0.3,
            ibot=1.0,
            koleo=0.1,
        ),
        "augment": AugmentConfig(grey=0.2, solarize=0.2, jitter=0.4),
        "optim": OptimConfig(lr=1e-3, final_weight_decay=0.4, clip=3.0, clip_by="tensor"),
        "ema": 0.0,
        "accumulate": 1,
    },
}
"""What of `config_for` is another in a run of another task."""


def kind_of(task: str, place: Path) -> TrainConfig:
    """30 steps of a run of the `task`, and its images."""
    if task == "classify":
        return config_for(make_images(place / "images"))
    changes = OTHER_TASKS[task]
    masks, boxes = (changes["task"] == name for name in ("segment", "detect"))
    images = make_images(place / "images", 20 if masks or boxes else 40, masks=masks, boxes=boxes)
    config = config_for(images)
    data = replace(config.data, resize="squash") if masks or boxes else config.data
    return replace(config, data=data, model=replace(config.model, classes=0), **changes)


def digests(run: Run) -> dict[str, str]:
    """SHA-256 of each tensor of the last checkpoint, and of what the run logged."""
    folder = run.checkpoint("last")
    check_checkpoint(folder)
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        content = file.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8:start]).items():
            begin, end = (start + offset for offset in entry.pop("data_offsets"))
            said = json.dumps(entry, sort_keys=True).encode()
            digest = hashlib.sha256(said + content[begin:end]).hexdigest()
            found[f"{file.stem}.{name}"] = digest
    events = [
        {key: value for key, value in event.items() if key not in TIMES} for event in run.metrics()
    ]
    progress = json.loads((folder / "state.json").read_text())["progress"]
    facts = {
        "steps": [event for event in events if "loss" in event],
        "evaluations": [
            event for event in events if any(name.startswith("val_") for name in event)
        ],
        "progress": {key: value for key, value in progress.items() if key not in TIMES},
    }
    for name, fact in facts.items():
        found[name] = hashlib.sha256(json.dumps(fact, sort_keys=True).encode()).hexdigest()
    return found


def unequal(whole: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """The names of what is not the same in both."""
    return sorted(name for name in whole.keys() | other if whole.get(name) != other.get(name))


class Sitting(NamedTuple):
    """One process's share of a run."""

    code: int
    """Its exit status: 0 done, -9 killed."""
    seconds: float
    said: str
    outlived: float
    """By how many seconds the last of its own processes outlived it."""
    orphans: int
    """How many of them do not end."""


def sit(work: Callable[[], object], kill_after: float | None = None) -> Sitting:
    """Do `work` in a fork of this process, which is killed after so many seconds."""
    with tempfile.TemporaryFile() as said:
        started = time.perf_counter()
        if not (pid := os.fork()):
            code = 1
            try:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        while not (status := os.waitpid(pid, os.WNOHANG))[0]:
            if kill_after is not None and time.perf_counter() - started > kill_after:
                os.kill(pid, signal.SIGKILL)
                status = os.waitpid(pid, 0)
                break
            time.sleep(0.001)
        seconds = time.perf_counter() - started
        said.seek(0)
        text = said.read().decode(errors="replace")
    return Sitting(os.waitstatus_to_exitcode(status[1]), seconds, text, *_orphans())


def _orphans(patience: float = 60.0) -> tuple[float, int]:
    """How long it takes until this process has no children, and how many of them stay for good.

    On Linux, what the killed process leaves behind becomes a child of this one.
    """
    started = time.perf_counter()
    with suppress(ChildProcessError):
        while time.perf_counter() - started < patience:
            if not os.waitpid(-1, os.WNOHANG)[0]:
                time.sleep(0.005)
    return time.perf_counter() - started, len(children(os.getpid()))


def children(pid: int) -> list[int]:
    """The processes that a process has started and that are there now; none where not Linux."""
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, file.read_text().split())
    return found


def go_on(folder: Path, config: TrainConfig, report: bool) -> None:
    """Resume the run, or begin it anew where it was killed before its first checkpoint."""
    if not report:
        job.report.write_report = lambda run, evaluation: Path()
    try:
        begun = Run(folder).checkpoints() != []
    except DataError:
        begun = False
    if begun:
        job.resume(Run(folder), notify=print)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        job.train(config, folder, notify=print)


def kills(count: int, seed: int, place: Path, task: str = "classify") -> dict[str, Any]:
    """Runs that are killed and resumed until `count` kills have happened."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphans become our children
    rng = random.Random(seed)
    config = kind_of(task, place)
    calm = place / "calm"
    started = time.time()
    first = sit(lambda: job.train(config, calm))
    assert first.code == 0, first.said
    whole = digests(Run(calm))
    # From the start to somewhat after the last checkpoint: not much goes on in the report.
    training = [event["seconds"] for event in Run(calm).metrics()][-1]
    before = Run(calm).checkpoint("last").stat().st_mtime - started - training
    tensors = sum("." in name for name in whole)
    tally: Counter[str] = Counter()
    problems: list[str] = []
    seconds, outlived = [], [0.0]
    while tally["kills"] < count:
        folder = place / f"run-{tally['runs']}"
        reading = replace(config.data, decoders=("threads", "processes")[tally["runs"] % 2])
        every = rng.choice(CHECKPOINT_MINUTES)
        disturbed = replace(config, data=reading, checkpoint_minutes=every)
        report = tally["runs"] % 5 == 0  # which takes as long as all the rest
        tally["runs"] += 1
        left = rng.randint(1, 3)
        while True:
            after = None
            if left and tally["kills"] < count:
                after = rng.uniform(0, before + 1.2 * training * (1 - _step(folder) / STEPS))
            sitting = sit(lambda f=folder, c=disturbed, r=report: go_on(f, c, r), after)
            tally["orphans"] += sitting.orphans
            seconds.append(sitting.seconds)
            outlived.append(sitting.outlived)
            if sitting.code != -signal.SIGKILL:
                break
            left -= 1
            tally["kills"] += 1
            tally[_when(folder, STEPS)] += 1
            tally["checkpoints cut short"] += _cut_short(folder)
        if sitting.code:
            problems.append(f"{folder.name} ended with {sitting.code}: {sitting.said[-2000:]}")
        elif names := unequal(whole, digests(Run(folder))):
            problems.append(f"{folder.name}: not the same: {', '.join(names)}")
        else:
            shutil.rmtree(folder)
    tally["mismatches"] = len(problems)
    return {
        **{name: tally[name] for name in ("kills", "runs", "mismatches", "orphans")},
        "killed": {name: n for name, n in sorted(tally.items()) if name.startswith("killed")},
        "checkpoints_cut_short": tally["checkpoints cut short"],
        "compared": f"{tensors} tensors, the log of {STEPS} steps, the evaluations, the progress",
        "seconds_until_the_last_decoder_ends": round(max(outlived), 2),
        "seconds_undisturbed": round(first.seconds, 2),
        "seconds_a_sitting": round(median(seconds), 2),
        "problems": problems + ["processes outlived a killed one"] * bool(tally["orphans"]),
    }


def _step(folder: Path) -> int:
    """How far the newest checkpoint is; -1 if there is none."""
    with suppress(DataError):
        return max(map(step_of, Run(folder).checkpoints()), default=-1)
    return -1


def _when(folder: Path, steps: int) -> str:
    """Where in its course a run was killed, by its newest checkpoint."""
    step = _step(folder)
    if step < 0:
        return "killed before its first checkpoint"
    return "killed after its last step" if step == steps else "killed between them"


def _cut_short(folder: Path) -> bool:
    """Whether a checkpoint was being written, or taken away, when the run was killed."""
    with suppress(FileNotFoundError):
        return any(not name.startswith("step-") for name in os.listdir(folder / "checkpoints"))
    return False


def syscalls(count: int, seed: int, place: Path) -> dict[str, Any]:
    """Kills at system calls of a save: of a new checkpoint, and of one that takes another's place.

    `count` of them, evenly over all; 0 is all.
    """
    try:
        with harm.victims() as some:
            result: dict[str, Any] = {"kills": 0, "mismatches": 0, "problems": []}
            for what, step in (("a new checkpoint", 4), ("one that is replaced", 3)):
                points = harm.points(some, place / str(step), step)
                result[f"calls of {what}"] = len(points)
                for call, n in points[:: max(1, 2 * len(points) // count) if count else 1]:
                    result["mismatches"] += 1
                    try:
                        result["kills"] += harm.kill_at(some, place / str(step), step, call, n)
                        result["mismatches"] -= 1
                    except (AssertionError, DataError) as error:
                        result["problems"].append(f"{call} {n} of {what}: {error!r:.500}")
            return result
    except OSError as error:
        return {"kills": 0, "mismatches": 0, "skipped": str(error), "problems": []}


def damage(count: int, seed: int, place: Path) -> dict[str, Any]:
    """Five of six are flips of a bit, the sixth cuts a file."""
    due = {"flips": count * 5 // 6, "cuts": count - count * 5 // 6}
    found = harm.damage(harm.made_run(place / "run"), due["flips"], due["cuts"], seed)
    missed = {kind: number - found.get(kind, 0) for kind, number in due.items()}
    return {
        **due,
        "mismatches": sum(missed.values()),
        "problems": [f"{n} {kind} went unnoticed" for kind, n in missed.items() if n],
    }


def processes(count: int, seed: int, place: Path) -> dict[str, Any]:
    """Runs of two processes, of which a random one is killed, up to three times a run."""
    rng = random.Random(seed)
    data = make_images(place / "images", 80)
    config = replace(config_for(data), epochs=TOGETHER / 4, devices=2, checkpoint_minutes=0.2 / 60)
    config = replace(config, data=replace(config.data, batch_size=8), stall_seconds=120.0)
    file = place / "config.yaml"
    file.write_text(write_yaml(config))
    seconds, _, said = _together(file, place / "calm", rng, 0)
    if seconds is None:
        return {"kills": 0, "mismatches": 1, "problems": [f"undisturbed: {said[-2000:]}"]}
    whole = digests(Run(place / "calm"))
    result: dict[str, Any] = {"kills": 0, "runs": 0, "mismatches": 0, "problems": []}
    killed: Counter[str] = Counter()
    while result["kills"] < count:
        folder = place / f"run-{result['runs']}"
        result["runs"] += 1
        planned = min(rng.randint(1, 3), count - result["kills"])
        ended, when, said = _together(file, folder, rng, planned)
        result["kills"] += len(when)
        killed.update(when)
        if ended is None:
            result["problems"].append(f"{folder.name}: {said[-2000:]}")
        elif names := unequal(whole, digests(Run(folder))):
            result["problems"].append(f"{folder.name}: not the same: {', '.join(names)}")
        print(f"processes: {result['kills']} kills", file=sys.stderr, flush=True)
    result["mismatches"] = len(result["problems"])
    return {**result, "killed": dict(killed), "seconds_undisturbed": round(seconds, 1)}


def _together(
    config: Path, folder: Path, rng: random.Random, planned: int
) -> tuple[float | None, list[str], str]:
    """Train in two processes and kill some; how long that took (None: it failed), when each was
    killed, and what was said.
    """
    log = folder.with_suffix(".log")
    command = [sys.executable, "-m", "vitrail", "train", "--config", str(config)]
    command += ["--out", str(folder), "--restarts", str(planned)]
    paths = os.pathsep.join([str(Path(vitrail.__file__).parents[1])])
    when = []
    with open(log, "wb") as said:
        started = time.perf_counter()
        launcher = subprocess.Popen(
            command, stdout=said, stderr=said, env=os.environ | {"PYTHONPATH": paths}
        )
        before: set[int] = set()
        for _ in range(planned):
            while launcher.poll() is None and len(now := _workers(launcher.pid) - before) < 2:
                time.sleep(0.01)
            # What the log holds beyond the checkpoint may still be of those that were killed: such
            # a kill comes while the others start.
            due = rng.randint(_step(folder), TOGETHER)
            while launcher.poll() is None and _logged(folder) < due:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.5))
            if launcher.poll() is not None:
                break
            with suppress(ProcessLookupError):
                os.kill(rng.choice(sorted(now)), signal.SIGKILL)
                when.append(_when(folder, TOGETHER))
            before |= now
        code = launcher.wait()
        taken = time.perf_counter() - started
    text = log.read_text(errors="replace")
    return (None if code else taken), when, f"ended with {code}: {text}"


def _logged(folder: Path) -> int:
    """The last step that a run has logged; -1 if there is none."""
    with suppress(DataError):
        return max((event["step"] for event in Run(folder).metrics()), default=-1)
    return -1


def _workers(launcher: int) -> set[int]:
    """The processes that train."""
    found = set()
    for pid in children(launcher):
        with suppress(OSError):
            if b"\0vitrail\0train\0" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.add(pid)
    return found


class Sample(NamedTuple):
    """What a process holds."""

    step: int
    megabytes: float
    files: int
    threads: int
    children: int


def memory(count: int, seed: int, place: Path, task: str = "classify") -> dict[str, Any]:
    """One run of `count` steps; the first fifth, but no more than 2,000 steps, is warm-up."""
    config = kind_of(task, place)
    reading = replace(config.data, decoders="processes", cache="memory")
    config = replace(
        config, data=reading, epochs=count / 4, evaluations=20, checkpoint_minutes=2 / 60
    )
    every, file = max(1, count // 400), place / "samples.json"

    def work() -> None:
        samples: list[Sample] = []

        def listen(event: dict[str, Any]) -> None:
            if event["step"] % every == 0 and "loss" in event:
                samples.append(_sample(event["step"]))

        job.train(config, place / "run", listen=listen)
        file.write_text(json.dumps(samples))

    sitting = sit(work)
    if sitting.code:
        return {"steps": 0, "mismatches": 1, "problems": [sitting.said[-2000:]]}
    samples = [Sample(*values) for values in json.loads(file.read_text())]
    warm = [sample for sample in samples if sample.step > min(2000, count // 5)]
    steps = np.array([sample.step for sample in warm]) / 1000
    megabytes = np.array([sample.megabytes for sample in warm])
    slope = float(np.polyfit(steps, megabytes, 1)[0])
    problems = []
    if slope > MOST_MB:
        problems.append(f"resident memory grows by {slope:.2f} MB in 1,000 steps")
    part = len(warm) // 4
    more = {}
    for name in ("files", "threads", "children"):
        ends = [median(getattr(s, name) for s in some) for some in (warm[:part], warm[-part:])]
        more[name] = ends
        if ends[1] > ends[0]:
            problems.append(f"{name} grow from {ends[0]:g} to {ends[1]:g}")
    return {
        "steps": samples[-1].step,
        "mb_per_1000_steps": round(slope, 3),
        "mb_after_warm_up": round(float(megabytes[:part].mean()), 1),
        "mb_at_the_end": round(float(megabytes[-part:].mean()), 1),
        **{f"{name}_first_and_last_quarter": ends for name, ends in more.items()},
        "seconds": round(sitting.seconds),
        "mb_by_step": {
            s.step: round(s.megabytes, 1) for s in samples[:: max(1, len(samples) // 20)]
        },
        "mismatches": len(problems),
        "problems": problems,
    }


def _sample(step: int) -> Sample:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Sample(
        step,
        pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
        len(children(os.getpid())),
    )


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "kills": kills,
    "memory": memory,
    "damage": damage,
    "syscalls": syscalls,
    "processes": processes,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--task", choices=("classify", *OTHER_TASKS), default="classify", help="of kills and memory"
    )
    parser.add_argument("--count", type=int, help="another count than the part's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    for name in args.part:
        count = args.count or COUNTS[name][args.full]
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="vitrail-reliability-") as place:
            told = {"task": args.task} if name in ("kills", "memory") else {}
            result = {**told, **PARTS[name](count, args.seed, Path(place), **told)}
        result["wall_seconds"] = round(time.perf_counter() - started)
        results[name] = result
        verdict = "NOT as it must be" if result["problems"] else "as it must be"
        print(f"{name}: {result.get('skipped', verdict)}")
        for key, value in result.items():
            if key not in ("problems", "mb_by_step"):
                print(f"  {key:<32}{value}")
        for problem in result["problems"]:
            print(f"  PROBLEM {problem}")
        sys.stdout.flush()
    if args.json:
        machine = {
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": " ".join(["python", *sys.argv]),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cores": os.cpu_count(),
        }
        print(json.dumps({**machine, **results}))
    sys.exit(any(result["mismatches"] for result in results.values()))


if __name__ == "__main__":
    main()
