"""What can happen to checkpoints: kills and failures at system calls, flipped bits, cut files.

The tests take a few of each; benchmarks/reliability.py takes all.
"""

import ctypes
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

import vitrail
from vitrail.errors import DataError
from vitrail.runs import Run
from vitrail.runs.checkpoint import check_checkpoint
from vitrail.runs.store import Checkpoints

STEPS = {1: 0.5, 2: 0.1, 3: 0.2}
"""What the run holds before it is harmed: steps and scores."""
CALLS = "%file,%desc"
"""The system calls that touch files."""


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    weights = torch.randn(100, 80, generator=generator)
    return {"model": {"w": weights, "n": torch.tensor(step)}, "optimizer": {"0.m": weights + 1}}


def save(checkpoints: Checkpoints, step: int, score: float | None) -> None:
    checkpoints.save(step, tensors(step), {"progress": {"step": step}}, score)


def made_run(path: Path) -> Run:
    """A run with three checkpoints, of which the first is the best."""
    path.mkdir(parents=True)
    (path / "config.yaml").touch()
    run = Run(path)
    with Checkpoints(run) as checkpoints:
        for step, score in STEPS.items():
            save(checkpoints, step, score)
    assert [folder.name[-1] for folder in run.checkpoints()] == ["3", "2", "1"]
    return run


class Outcome(NamedTuple):
    """What a process that was harmed left behind."""

    code: int
    """Its exit status: 0 saved, 3 a message, -9 killed."""
    said: str
    calls: Counter[str]
    """How often each system call was reached, by the thread that did so most often."""


class Victims:
    """Processes that save a checkpoint and are harmed at a system call.

    One process imports torch and forks for each of them; strace attaches to the fork.
    """

    def __init__(self) -> None:
        paths = [str(Path(__file__).parents[1]), str(Path(vitrail.__file__).parents[1])]
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from runs.harm import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        )

    def close(self) -> None:
        self._process.communicate("")

    def harm(self, run: Path, step: int, score: float, harm: str | None) -> Outcome:
        """Save a checkpoint in `run` while strace does `harm`, such as `write:signal=KILL:when=2`.

        Raises `OSError` where strace may not attach.
        """
        pid = int(self._ask({"run": str(run), "step": step, "score": score}))
        log = run.with_name(run.name + ".strace")
        command = ["strace", "-f", "-p", str(pid), "-o", str(log), "-e", f"trace={CALLS}"]
        if harm:
            command += ["-e", f"inject={harm}"]
        strace = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert strace.stderr
        first = strace.stderr.readline()
        code, said = json.loads(self._ask("go"))
        strace.communicate()
        if "not permitted" in first:
            raise OSError(first.strip())
        assert "attached" in first, first
        reached = Counter(re.findall(r"^(\d+) +(\w+)\(", log.read_text(), re.MULTILINE))
        calls: Counter[str] = Counter()
        for (_, call), times in reached.items():
            calls[call] = max(calls[call], times)
        return Outcome(code, said, calls)

    def _ask(self, what: object) -> str:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()


def serve() -> None:
    """What the forking process does, until its input ends."""
    tensors(0)  # torch reads about the processor when it computes first, and dies if it cannot
    while line := sys.stdin.readline():
        order = json.loads(line)
        ours, its = socket.socketpair()
        if not (pid := os.fork()):
            # It says what it has to say by sendto: write may be harmed.
            ours.close()
            ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1))  # any process may trace it
            its.send(b"r")
            its.recv(1)
            os._exit(_victim(order, its))
        its.close()
        ours.recv(1)  # or strace would see calls of it that come before the save
        print(pid, flush=True)
        sys.stdin.readline()
        ours.send(b"g")
        said = b"".join(iter(lambda ours=ours: ours.recv(65536), b""))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps([code, said.decode()]), flush=True)
        ours.close()


def _victim(order: dict, to: socket.socket) -> int:
    try:
        with Checkpoints(Run(order["run"])) as checkpoints:
            save(checkpoints, order["step"], order["score"])
    except DataError as error:
        to.send(str(error).encode())
        return 3
    return 0


@contextmanager
def victims() -> Iterator[Victims]:
    """Raises `OSError` where there is no strace, or it may not attach."""
    if not shutil.which("strace"):
        raise OSError("there is no strace")
    some = Victims()
    try:
        yield some
    finally:
        some.close()


def points(some: Victims, place: Path, step: int) -> list[tuple[str, int]]:
    """Every system call on files of one save: its name, and the how manieth of that name."""
    run = place / "calm"
    shutil.copytree(made_run(place / "run").path, run)
    outcome = some.harm(run, step, 0.9, None)
    assert outcome.code == 0, outcome
    return [(call, n) for call in sorted(outcome.calls) for n in range(1, outcome.calls[call] + 1)]


def harmed(
    some: Victims, place: Path, step: int, call: str, n: int, effect: str = "signal=KILL"
) -> Outcome:
    """Save `step` in a copy of `place / run`, with an `effect` on the n-th system call of a name.

    Asserts what has to be true whenever and however that ends: the newest checkpoint, and any
    other that has a name, is whole; the run can go on.
    """
    run = place / f"{call}-{n}"
    shutil.copytree(place / "run", run)
    outcome = some.harm(run, step, 0.9, f"{call}:{effect}:when={n}")
    checkpoints = Checkpoints(Run(run))
    found, problems = checkpoints.newest()
    assert problems == (), problems
    assert len(checkpoints.run.checkpoints()) >= 2
    for folder in checkpoints.run.checkpoints():
        check_checkpoint(folder)
    # Written whole, or the one before it.
    at = found.state["progress"]["step"]
    assert at == step if outcome.code == 0 else at in (step, 3), (at, outcome)
    for part, named in tensors(at).items():
        assert all(torch.equal(found.tensors[part][name], named[name]) for name in named)
    best = found.folder if found.state["score"] == 0.9 else run / "checkpoints/step-00000001"
    assert checkpoints.run.checkpoint("best") == best
    checkpoints.tidy()
    with checkpoints:
        save(checkpoints, 5, None)
    left = {entry.name for entry in (run / "checkpoints").iterdir()}
    assert left == {folder.name for folder in checkpoints.run.checkpoints()}, left
    shutil.rmtree(run)
    return outcome


def kill_at(some: Victims, place: Path, step: int, call: str, n: int) -> bool:
    """Whether the kill came to pass; what holds after it is asserted."""
    return harmed(some, place, step, call, n).code == -signal.SIGKILL


def fail_at(some: Victims, place: Path, step: int, call: str, n: int, error: str) -> bool:
    """Whether an error at that call was told to the user; what holds after it is asserted."""
    outcome = harmed(some, place, step, call, n, f"error={error}")
    assert outcome.code in (0, 3), outcome
    if outcome.code == 3:
        assert re.search(r"cannot write the checkpoint /.*iB, .* are free.*--resume", outcome.said)
    return outcome.code == 3


def damage(run: Run, flips: int, cuts: int, seed: int = 0) -> dict[str, int]:
    """Flip single bits of the newest checkpoint, and cut its files; how many of each were noticed,
    and the checkpoint before it was given instead.
    """
    rng = random.Random(seed)
    newest, before = run.checkpoints()[:2]
    files = sorted(newest.iterdir())
    noticed = Counter()
    for kind in ["flips"] * flips + ["cuts"] * cuts:
        file = rng.choice(files)
        good = file.read_bytes()
        at = rng.randrange(len(good))
        bad = bytearray(good if kind == "flips" else good[:at])
        if kind == "flips":
            bad[at] ^= 1 << rng.randrange(8)
        file.write_bytes(bad)
        found, problems = Checkpoints(run).newest()
        noticed[kind] += found.folder == before and len(problems) == 1
        file.write_bytes(good)
    assert Checkpoints(run).newest()[0].folder == newest
    return dict(noticed)
