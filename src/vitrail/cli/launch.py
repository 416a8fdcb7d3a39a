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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from vitrail.errors import DataError, VitrailError
from vitrail.runs.world import TOLD_IN


class Ended(VitrailError):
    """The processes have ended, and this is what they left to say, and their exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code


def launch(
    args: Sequence[str], processes: int, restarts: int, run: Path, save_seconds: float = 600.0
) -> None:
    """Run `vitrail train ARGS` in so many processes, and wait.

    When one dies all are started anew, at most `restarts` times, and go on from the last
    checkpoint. Raises `DataError` that names the one that died, `Ended` with what the processes say
    themselves, or after a signal, when they have saved, for which they have `save_seconds`.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        monitor_interval=0.1,
        shutdown_timeout=round(save_seconds),
    )
    with tempfile.TemporaryDirectory(prefix="vitrail-") as folder, _surroundings(folder, processes):
        left = Path(folder)
        try:
            elastic_launch(config, sys.executable)("-m", "vitrail", "train", *args)
        except ChildFailedError as error:
            raise (
                _left(left / f"told-{restarts}")
                or _killed(error.failures, processes, restarts, run)
                or _left(left / f"lost-{restarts}")
                or _broken(error.failures, processes)
            ) from error
        except SignalException as error:
            code = 128 + error.sigval
            for attempt in range(restarts + 1):
                told = _left(left / f"told-{attempt}")
                if told and told.exit_code == code:
                    raise told from error
            raise Ended(f"stopped; {_way_on(run)}", code) from error


@contextmanager
def _surroundings(folder: str, processes: int) -> Iterator[None]:
    """The variables that the processes need, and torch's loggers quiet, while this lasts."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # torch's own words on what is told here: the launcher's, and those of its C++ part.
    ours = {
        "OMP_NUM_THREADS": str(max(1, (cores or 1) // processes)),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
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


_LOGGERS = (
    "torch.distributed.elastic.agent.server.api",
    "torch.distributed.elastic.agent.server.local_elastic_agent",
    "torch.distributed.elastic.multiprocessing.api",
    "torch.distributed.elastic.rendezvous.dynamic_rendezvous",
)


def _left(place: Path) -> Ended | None:
    """What the processes left to say."""
    try:
        told = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return Ended(told["error"], told["exit_code"])


def _killed(
    failures: Mapping[int, ProcessFailure], processes: int, restarts: int, run: Path
) -> DataError | None:
    """The error for a process that was killed, if one was."""
    ended_by_launcher = {-signal.SIGTERM} if len(failures) > 1 else set()
    for rank, failure in sorted(failures.items()):
        if failure.exitcode < 0 and failure.exitcode not in ended_by_launcher:
            name = signal.Signals(-failure.exitcode).name
            often = "once" if restarts == 1 else f"{restarts} times"
            again = f" after all had been started again {often}" if restarts else ""
            hint = "" if restarts else " (--restarts N does so by itself)"
            return DataError(
                f"process {rank} of {processes} (pid {failure.pid}) was killed by {name}{again}; "
                f"{_way_on(run)}{hint}"
            )
    return None


def _broken(failures: Mapping[int, ProcessFailure], processes: int) -> Ended:
    """The error for a fault of ours, whose traceback has been shown."""
    # What another one's end has brought about comes last.
    order = [DataError.exit_code, -signal.SIGTERM]
    rank, failure = min(failures.items(), key=lambda item: (item[1].exitcode in order, item[0]))
    return Ended(
        f"process {rank} of {processes} (pid {failure.pid}) ended: see above",
        max(failure.exitcode, 1),
    )


def _way_on(run: Path) -> str:
    if not (run / "config.yaml").is_file():
        return "nothing had been written yet"
    return (
        f"the last checkpoint is kept, go on with: vitrail train --resume {shlex.quote(str(run))}"
    )
