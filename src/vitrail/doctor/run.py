"""A run folder: what is in it, what of it is whole, and what a resume would say."""

import fcntl
import math
import shlex
import time
from collections import deque
from collections.abc import Generator, Iterator
from pathlib import Path

from vitrail.data.sources.hub import place_of
from vitrail.doctor.finding import Finding
from vitrail.errors import DataError, VitrailError
from vitrail.runs import Run, TrainConfig
from vitrail.runs.checkpoint import check_checkpoint, read_state
from vitrail.runs.data import open_data_of
from vitrail.runs.identity import IDENTITY, changes, identity, read_identity
from vitrail.units import bytes_text


def run_findings(folder: Path) -> Iterator[Finding]:
    """All of this file."""
    quoted = shlex.quote(str(folder))
    try:
        run = Run(folder)
        config = run.config()
    except VitrailError as error:
        yield Finding("run", "problem", str(error), "ls -d runs/*/config.yaml")
        return
    name = config.row or config.model.family
    yield Finding("run", "ok", f"{folder}: {name} on {config.data.path}")
    training = _locked(run)
    if training:
        yield Finding("lock", "note", "a process is training in it now: wait for it, or stop it")
    else:
        yield Finding("lock", "ok", "no process is training in it")
    yield judge_metrics(run)
    whole = yield from judge_checkpoints(run)
    if whole:
        yield from judge_resume(run, config)
    elif run.fresh() and not training:
        text = (
            f"it starts again from its config, for nothing is kept: vitrail train --resume {quoted}"
        )
        yield Finding("resume", "note", text)
    elif not training:
        again = f"vitrail train --config {quoted}/config.yaml"
        text = "nothing can be gone on from: start again in another folder"
        yield Finding("resume", "problem", text, again)


def _locked(run: Run) -> bool:
    """Whether a process holds the run's lock; asked by a shared lock that is let go at once."""
    try:
        with open(run.path / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def judge_metrics(run: Run) -> Finding:
    """The last thing that training logged."""
    logged = deque(run.metrics(), maxlen=1)
    if not logged:
        return Finding("log", "note", "nothing is logged yet")
    last = logged[0]
    numbers = {k: v for k, v in last.items() if not isinstance(v, float) or math.isfinite(v)}
    age = time.time() - run.metrics_file.stat().st_mtime
    shown = [f"step {last.get('step', '?')}"]
    shown += [f"epoch {last['epoch'] + 1}"] if isinstance(last.get("epoch"), int) else []
    for key, form in (("loss", "loss {:.3f}"), ("val_accuracy", "held-out accuracy {:.1%}")):
        if isinstance(last.get(key), (int, float)):
            shown.append(form.format(last[key]))
    text = f"{', '.join(shown)}; written {_ago(age)}"
    if age < -60:
        text += ": the clock was set back since"
        return Finding("log", "note", text, "sudo timedatectl set-ntp true", numbers)
    return Finding("log", "ok", text, numbers=numbers)


def judge_checkpoints(run: Run) -> Generator[Finding, None, bool]:
    """Each checkpoint, every byte checked; whether one of them is whole is returned."""
    try:
        folders = run.checkpoints()
    except DataError as error:
        yield Finding("checkpoint", "problem", str(error), f"ls -la {shlex.quote(str(run.path))}")
        return False
    if not folders:
        yield Finding("checkpoint", "note", "none is written yet")
        return False
    damaged: list[tuple[Path, str]] = []
    newest: Path | None = None
    for folder in folders:
        try:
            check_checkpoint(folder)
        except DataError as error:
            damaged.append((folder, str(error)))
            continue
        newest = newest or folder
        yield Finding("checkpoint", "ok", _described(folder))
    for folder, why in damaged:
        if newest is None:
            mend = f"cp -a /A/COPY/OF/{folder.name} {shlex.quote(str(folder.parent))}/"
        else:
            mend = f"rm -r {shlex.quote(str(folder))}  # a resume takes {newest.name} without that"
        yield Finding("checkpoint", "problem", why, mend)
    return newest is not None


def _described(folder: Path) -> str:
    files = [file for file in folder.iterdir() if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    state = read_state(folder)
    at = state.get("progress", state)
    step = f"step {at['step']}, " if isinstance(at, dict) and "step" in at else ""
    age = time.time() - max(file.stat().st_mtime for file in files)
    return f"{folder.name} is whole: {step}{bytes_text(size)}, written {_ago(age)}"


def judge_resume(run: Run, config: TrainConfig) -> Iterator[Finding]:
    """Whether the data is there, and what has changed since the run was made."""
    command = f"vitrail train --resume {shlex.quote(str(run.path))}"
    missing = ""
    try:
        splits = open_data_of(config, run.split_file)
    except VitrailError as error:
        missing = str(error)
        try:
            splits = open_data_of(config, run.split_file, allow_missing=True)
        except VitrailError:
            yield Finding("resume", "problem", missing, _bring_back(config, run))
            return
    try:
        before = read_identity(run)
        found = changes(before, identity(config, splits))
    except DataError as error:
        yield Finding(
            "resume", "problem", str(error), f"rm {shlex.quote(str(run.path / IDENTITY))}"
        )
        return
    accept = f"{command} --accept-changes"
    if any(change.what == "classes" for change in found):
        data, weights = shlex.quote(config.data.path), shlex.quote(str(run.path))
        accept = f"vitrail train {data} --weights {weights}  # a new run"
    if missing:
        yield Finding("resume", "problem", missing, accept)
    for note in splits.notes:
        yield Finding("resume", "note", note)
    if not before:
        text = f"the run does not say what it was made with; go on with: {command}"
        yield Finding("resume", "note", text)
        return
    for change in found:
        if change.what == "rounding":
            yield Finding("resume", "note", change.sentence)
        else:
            yield Finding("resume", "problem", change.sentence, accept)
    if not missing and all(change.what == "rounding" for change in found):
        text = f"data, code and libraries are as they were; go on with: {command}"
        yield Finding("resume", "ok", text)


def _bring_back(config: TrainConfig, run: Run) -> str:
    """The data under its old name again; where that is there, what it holds is at fault."""
    path = config.data.path
    if path.startswith("samples:"):
        return f"vitrail data fetch {path.removeprefix('samples:')}"
    prefix, place = place_of(path)
    if prefix and not place.is_absolute():  # on the hub
        return f"vitrail doctor {shlex.quote(path)}"
    if not place.exists():
        return f"ln -s /WHERE/IT/IS/NOW {shlex.quote(str(place))}"
    return f"vitrail train --config {shlex.quote(str(run.config_file))}  # a new run"


def _ago(seconds: float) -> str:
    if seconds < 0:
        return "in the future"
    for size, name in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds / size)
            return f"{count} {name}{'s' * (count > 1)} ago"
    return "just now"
