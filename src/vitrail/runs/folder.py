"""The run folder: what a run leaves behind, and the one place that knows its file names.

config.yaml        enough to run it again
environment.json   machine, versions, command
split.csv          which image was held out
weights.json       which published weights it started from, and what became of them
teacher.json       which teacher it learns from
metrics.jsonl      one JSON object a line, as training goes
checkpoints/last, checkpoints/best
skipped.csv        images that could not be read, and why
metrics.json, predictions.csv, report.html    what evaluation writes
"""

import csv
import fcntl
import io
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from vitrail.errors import DataError, UsageError
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
        if path.is_dir() and any(path.iterdir()):
            raise UsageError(
                f"{path} is not empty: choose another folder with --out, or go on with that run: "
                f"vitrail train --resume {shlex.quote(str(path))}"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / "config.yaml").write_text(write_yaml(config), encoding="utf-8")
            (path / "environment.json").write_text(json.dumps(environment(), indent=1))
        except OSError as error:
            raise DataError(f"cannot write the run folder {path}: {error.strerror}") from error
        return cls(path)

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

    def checkpoint(self, name: str) -> Path:
        """The folder of checkpoint `last` or `best`."""
        return self.path / "checkpoints" / name

    def config(self) -> TrainConfig:
        """The config that the run was made with."""
        return from_dict(read_tree(self.config_file), str(self.config_file))

    def environment(self) -> dict[str, Any]:
        """What the run was made on."""
        file = self.path / "environment.json"
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{file} is missing or damaged: {error}") from error

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The logged events, in order; a last line cut by a crash is left out."""
        if self.metrics_file.is_file():
            for line in self.metrics_file.read_text().splitlines():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:
                    return

    def write(self, name: str, text: str) -> Path:
        """Write a text file of the run, whole or not at all."""
        place = self.path / name
        beside = place.with_name(f".{name}.writing")
        try:
            beside.write_text(text, encoding="utf-8")
            beside.replace(place)
        except OSError as error:
            raise DataError(f"cannot write {place}: {error.strerror}") from error
        return place

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


class RunLock:
    """Only one process trains in a run folder; the lock goes with the process that holds it."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._file = open(run.path / ".lock", "w")  # noqa: SIM115  # held until __exit__

    def __enter__(self) -> Self:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise DataError(
                f"another process is training in {self.run.path}: wait for it, or choose another "
                f"folder with --out"
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
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
