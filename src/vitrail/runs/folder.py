"""The run folder: what a run leaves behind, and the one place that knows its file names.

config.yaml        enough to run it again
environment.json   machine, versions, command
identity.json      data, code and libraries that it was made with
split.csv          which image was held out
weights.json       which published weights it started from, and what became of them
teacher.json       which teacher it learns from
metrics.jsonl      one JSON object a line, as training goes
checkpoints/       one folder each, step-00001200; the newest is also called last, and the one with
                   the highest score best
fault/             the step at which the loss was no longer a number, and its batch
profile/           where a step's time went
skipped.csv        images that could not be read, and why
metrics.json, predictions.csv, report.html    what evaluation writes
"""

import csv
import fcntl
import io
import json
import math
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from vitrail import proc
from vitrail.disk import meant, write_text
from vitrail.errors import DataError, UsageError, setting
from vitrail.runs.checkpoint import read_state
from vitrail.runs.config import TrainConfig, from_dict, read_tree, write_yaml


class Run:
    """A run folder that exists. `create` makes one, `Run(path)` opens one."""

    def __init__(self, path: Path | str) -> None:
        """Raises `DataError` when there is no run at `path`."""
        self.path = Path(path)
        if not self.path.is_dir():
            raise DataError(f"no run at {self.path}: give the folder that vitrail train wrote")
        if not self.config_file.is_file():
            raise DataError(
                f"{self.path} is not a run: it has no config.yaml. "
                f"Give the folder that vitrail train wrote (it prints it as 'run')"
            )

    @classmethod
    def create(cls, path: Path, config: TrainConfig) -> Self:
        """A new run folder. Raises `UsageError` if there is one already, so that none is lost."""
        if path.is_dir() and any(meant(entry.name) == entry.name for entry in path.iterdir()):
            raise UsageError(
                f"{path} is not empty: choose another folder with {setting('out')}, or go on with "
                f"that run: vitrail train --resume {shlex.quote(str(path))}"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot write the run folder {path}: {error.strerror}") from error
        write_text(path / "config.yaml", write_yaml(config))
        run = cls(path)
        run.write_environment()
        return run

    def fresh(self) -> bool:
        """Whether it was stopped before anything that it learned was kept: it has what a run has
        before its first checkpoint, and can start again from its config.
        """
        names = {meant(entry.name) for entry in self.path.iterdir()}
        return names <= _EARLY and not self.checkpoints()

    @property
    def config_file(self) -> Path:
        """The run's config."""
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        """What training logged."""
        return self.path / "metrics.jsonl"

    @property
    def split_file(self) -> Path:
        """Which image belongs to training, which is held out."""
        return self.path / "split.csv"

    @property
    def checkpoints_folder(self) -> Path:
        """Where the run's checkpoints are."""
        return self.path / "checkpoints"

    def checkpoints(self) -> list[Path]:
        """The folders of its checkpoints, the newest first; they may be damaged."""
        try:
            entries = os.listdir(self.checkpoints_folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise DataError(f"cannot read {self.checkpoints_folder}: {error.strerror}") from error
        # A kill while a checkpoint was replaced left the earlier one beside its place.
        names = {re.sub(r"\.(.+)\.old", r"\1", entry) for entry in entries}
        names = {name for name in names if _STEP.fullmatch(name) or name in _FIXED}
        folders = [self.checkpoints_folder / name for name in names]
        return sorted(folders, key=lambda folder: (step_of(folder), folder.name), reverse=True)

    def checkpoint(self, name: str) -> Path:
        """The folder of checkpoint `last` (the newest), `best` (the highest score) or `step-1200`.

        Raises `UsageError` for any other name; whether the folder is there is not asked.
        """
        if step := _STEP.fullmatch(name):
            return self.step_folder(int(step[1]))
        if name not in _FIXED:
            raise UsageError(f"no checkpoint is called '{name}': say last, best or step-NUMBER")
        folders = self.checkpoints()
        found = best_of(folders) if name == "best" else next(iter(folders), None)
        return found or self.checkpoints_folder / name

    def step_folder(self, step: int) -> Path:
        """Where the checkpoint of a step belongs."""
        return self.checkpoints_folder / f"step-{step:08d}"

    def config(self) -> TrainConfig:
        """The config that the run was made with."""
        return from_dict(read_tree(self.config_file), str(self.config_file))

    def write_environment(self) -> None:
        """Note what the run is made on, unless that is there."""
        if not (self.path / "environment.json").is_file():
            self.write("environment.json", json.dumps(environment(), indent=1))

    def environment(self) -> dict[str, Any]:
        """What the run was made on."""
        file = self.path / "environment.json"
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise DataError(
                f"{file} is missing or damaged ({reason}): put it back from a copy of the run"
            ) from error

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The logged events, in order, up to a line cut by a crash."""
        if self.metrics_file.is_file():
            for line in self.metrics_file.read_bytes().splitlines():
                try:
                    event = json.loads(line)
                except ValueError:
                    return
                if not isinstance(event, dict):
                    return
                yield event

    def write(self, name: str, text: str) -> Path:
        """Write a text file of the run, whole or not at all."""
        write_text(self.path / name, text)
        return self.path / name

    def write_skipped(self, skipped: Mapping[str, str]) -> None:
        """Note the images that could not be read, and why."""
        if skipped:
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(("key", "reason"))
            writer.writerows(sorted(skipped.items()))
            self.write("skipped.csv", text.getvalue())

    def append_metrics(self, event: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
        try:
            with open(self.metrics_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")
        except OSError as error:
            raise DataError(f"cannot write {self.metrics_file}: {error.strerror}") from error

    def forget_after(self, step: int) -> None:
        """Drop the log lines of steps that a resumed run will take again."""
        kept = [json.dumps(event) for event in self.metrics() if event.get("step", 0) <= step]
        self.write("metrics.jsonl", "".join(line + "\n" for line in kept))


_EARLY = {"config.yaml", "environment.json", "identity.json", "split.csv", "weights.json"}
_EARLY |= {"teacher.json", ".lock", "metrics.jsonl", "checkpoints", "tensorboard"}
"""What a run may hold before its first checkpoint."""
_STEP = re.compile(r"step-([0-9]+)")
_FIXED = ("last", "best")
"""The names of the only two folders that runs had before their folders had steps in their names."""


def step_of(folder: Path) -> int:
    """The step of a checkpoint by its name; -1 if that has none, for then it is an older run's."""
    step = _STEP.fullmatch(folder.name)
    return int(step[1]) if step else -1


def best_of(folders: Iterable[Path]) -> Path | None:
    """Of some checkpoints the one with the highest score, the earliest of equal ones."""
    scores = {}
    for folder in folders:
        with suppress(DataError):
            scores[folder] = score_of(folder)
    return highest(scores)


def highest(scores: Mapping[Path, float | None]) -> Path | None:
    """The checkpoint with the highest score, the earliest of equal ones."""
    known = {folder: score for folder, score in scores.items() if score is not None}
    return max(known, key=lambda folder: (known[folder], -step_of(folder)), default=None)


def score_of(folder: Path) -> float | None:
    """What a checkpoint's model reached, if it was measured then. Raises `DataError` if damaged."""
    state = read_state(folder)
    score = state.get("score")
    if folder.name == "best":  # an older run's
        score = state.get("progress", {}).get("best")
    return score if isinstance(score, (int, float)) and math.isfinite(score) else None


class RunLock:
    """Only one process trains in a run folder; the lock goes with the process that holds it."""

    def __init__(self, run: Run) -> None:
        self.run = run
        try:
            self._file = open(run.path / ".lock", "w")  # noqa: SIM115  # held until __exit__
        except OSError as error:
            raise DataError(
                f"cannot write in {run.path}: {error.strerror}. Make it writable, or copy the run"
            ) from error

    def __enter__(self) -> Self:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise DataError(
                f"another process is training in {self.run.path}: wait for it, or choose another "
                f"folder with {setting('out')}"
            ) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def environment() -> dict[str, Any]:
    """The machine, the versions and the command, for the record."""
    packages = ("vitrail", "torch", "numpy", "pillow")
    return {
        "command": shlex.join(["vitrail", *sys.argv[1:]]),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: version(name) for name in packages},
    }


def _processor() -> str:
    try:
        return proc.processor().get("model name", "")
    except OSError:
        return platform.processor()
