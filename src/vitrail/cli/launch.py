"""`--devices N`: the same command in N processes, one a device, by torch's elastic launcher.

What goes wrong in them is said here, once: the processes leave it in a folder (`TOLD_IN`), and the
launcher of torch, whose own account is long, is kept quiet.
"""

import json
import logging
import os
import shlex
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from vitrail.errors import DataError, VitrailError
from vitrail.runs.notes import TOLD_IN


class Ended(VitrailError):
    """The processes have ended, and this is what they left to say, and their exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code


class _End(NamedTuple):
    """Why processes have ended that were not done."""

    what: str
    way_on: str
    """What to do, as the sentence goes on."""
    code: int
    final: bool = False
    """Whether they would end so again."""


def launch(
    args: Sequence[str],
    processes: int,
    restarts: int,
    run: Path,
    save_seconds: float = 600.0,
    *,
    notify: Callable[[str], None] = lambda sentence: None,
) -> None:
    """Run `vitrail train ARGS` in so many processes, and wait.

    When one dies, or they stand still, all are started anew, at most `restarts` times, and go on
    from the last checkpoint; not after an error of the user's, which would only come again.

    Raises `Ended` with what the processes say, or which of them died; or after a signal, when they
    have saved, for which they have `save_seconds`.
    """
    with tempfile.TemporaryDirectory(prefix="vitrail-") as folder, _surroundings(folder, processes):
        left = Path(folder)
        try:
            for again in range(1, restarts + 2):
                end = _attempt(args, processes, left, run, save_seconds)
                if end is None:
                    return
                if end.final or again > restarts:
                    raise Ended(end.what + end.way_on, end.code)
                notify(f"{end.what}: all start again ({again} of {restarts})")
                for name in ("missing", "lost"):
                    (left / name).unlink(missing_ok=True)
        except SignalException as error:
            code, told = 128 + error.sigval, _left(left / "told")
            if told and told["exit_code"] == code:
                raise Ended(told["error"], code) from error
            raise Ended(f"stopped; {_way_on(run)}", code) from error


def _attempt(
    args: Sequence[str], processes: int, left: Path, run: Path, save_seconds: float
) -> _End | None:
    """Start all processes and wait; None: they are done."""
    # torch's own restarts would come after any end, an error of the user's as well.
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        shutdown_timeout=round(save_seconds),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "vitrail", "train", *args)
    except ChildFailedError as error:
        return _why(error.failures, processes, left, run)
    return None


def _why(failures: Mapping[int, ProcessFailure], processes: int, left: Path, run: Path) -> _End:
    """Of all that has been left and seen, what comes first: the rest follows from it."""
    if told := _left(left / "told"):
        return _End(told["error"], "", told["exit_code"], final=True)
    if missing := _left(left / "missing"):
        return _End(missing["what"], missing["way_on"], missing["exit_code"])
    ended_by_launcher = {-signal.SIGTERM} if len(failures) > 1 else set()
    for rank, failure in sorted(failures.items()):
        if failure.exitcode < 0 and failure.exitcode not in ended_by_launcher:
            name = signal.Signals(-failure.exitcode).name
            what = f"process {rank} of {processes} (pid {failure.pid}) was killed by {name}"
            return _End(what, f"; {_way_on(run)}", DataError.exit_code)
    if lost := _left(left / "lost"):
        return _End(lost["what"], lost["way_on"], lost["exit_code"])
    # A fault of ours, whose traceback has been shown. What another's end has brought comes last.
    rank, failure = min(failures.items(), key=lambda each: (each[1].exitcode < 0, each[0]))
    what = f"process {rank} of {processes} (pid {failure.pid}) ended, as is shown above"
    return _End(what, f"; {_way_on(run)}", max(failure.exitcode, 1))


@contextmanager
def _surroundings(folder: str, processes: int) -> Iterator[None]:
    """The variables that the processes need, and torch's loggers quiet, while this lasts."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ours = {
        "OMP_NUM_THREADS": str(max(1, (cores or 1) // processes)),
        **os.environ,
        TOLD_IN: folder,
    }
    before = dict(os.environ)
    loggers = {logging.getLogger(name) for name in _LOGGERS}
    levels = {logger: logger.level for logger in loggers}
    os.environ.update(ours)
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        for logger, level in levels.items():
            logger.setLevel(level)


_LOGGERS = (  # of torch, with its own words on what is told here
    "torch.distributed.elastic.agent.server.api",
    "torch.distributed.elastic.agent.server.local_elastic_agent",
    "torch.distributed.elastic.multiprocessing.api",
    "torch.distributed.elastic.rendezvous.dynamic_rendezvous",
)


def _left(place: Path) -> dict[str, Any] | None:
    """What the processes left to say."""
    try:
        note: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    except OSError:
        return None
    return note


def _way_on(run: Path) -> str:
    if not (run / "config.yaml").is_file():
        return "nothing had been written yet"
    return (
        f"the last checkpoint is kept, go on with: vitrail train --resume {shlex.quote(str(run))} "
        f"(--restarts N does so by itself)"
    )
