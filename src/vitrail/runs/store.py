"""The checkpoints of a run: written while training goes on, found again, and cleared away.

A checkpoint's folder has the number of its step. Which one is `last` and which is `best` follows
from the folders that are there: there is no pointer that could be out of date.
"""

import json
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self, TypeVar

from torch import Tensor

from vitrail.errors import DataError, UsageError, setting
from vitrail.runs.checkpoint import (
    ENDING,
    Checkpoint,
    Sum,
    cannot_write,
    copied,
    finish_folder,
    read_checkpoint,
    remove_checkpoint,
    start_folder,
    tidy_checkpoints,
    write_tensors,
    writing,
)
from vitrail.runs.folder import Run, highest, score_of, step_of

T = TypeVar("T")


class Shard(NamedTuple):
    """This process's rows of a tensor that several hold together, dealt as `torch.chunk` does.

    FSDP2 deals so: the first processes hold ceil(rows / processes) each, the last may hold none.
    """

    local: Tensor
    """`[n ...]`"""
    rows: int
    """How many the whole has."""


class Crew(Protocol):
    """The processes that write a checkpoint together."""

    rank: int
    size: int

    def gather(self, value: Any) -> list[Any]:
        """What each process says, in order: plain values. It is called from another thread."""
        ...


class _Alone:
    rank = 0
    size = 1

    def gather(self, value: Any) -> list[Any]:
        return [value]


class Checkpoints:
    """Writes a run's checkpoints in the background, and keeps the newest and the best.

        with Checkpoints(run) as checkpoints:
            checkpoints.save(1200, {"model": model.state_dict()}, {"epoch": 3}, score=0.91)

    Several processes that train one model each make one, with a `crew`, and call the same methods
    in the same order. The first of them writes what is the same in all; each writes its own rows of
    what is not (FSDP2's tensors, or `Shard`).

    What goes wrong in the background is raised by the next `save`, `flush` or `close`. Leaving the
    `with` block waits for the last checkpoint, except after a KeyboardInterrupt: that one is then
    lost, and the one before it stays.
    """

    def __init__(self, run: Run, keep: int = 2, crew: Crew | None = None) -> None:
        if keep < 2:
            raise UsageError(
                f"at least 2 checkpoints have to be kept, not {keep}: one may be damaged"
            )
        self.run = run
        self.keep = keep
        self.crew = crew or _Alone()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None or issubclass(kind, Exception):
            try:
                self.flush()
            except DataError as ours:
                if error is None:
                    raise
                error.add_note(str(ours))

    def close(self) -> None:
        """Wait for the last checkpoint. Raises `DataError` if it could not be written."""
        self.flush()

    def tidy(self) -> None:
        """Clear away what killed processes left; only for who holds the run's lock."""
        if self.crew.rank == 0:
            with suppress(OSError):
                tidy_checkpoints(self.run.checkpoints_folder)

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor | Shard]],
        state: Mapping[str, Any],
        score: float | None = None,
    ) -> None:
        """Copy everything and return; writing goes on in the background.

        `tensors["model"]["head.weight"]` goes to model.safetensors, `state` (plain values) to
        state.json, with the `score` by which the best checkpoint is chosen. A checkpoint of the
        same step is replaced; those of later steps, of a course that is not taken again, go.

        Raises `DataError` if the checkpoint before this one could not be written.
        """
        self.flush()
        text = json.dumps({**state, "score": score} if score is not None else state, indent=1)
        parts = self._copied(tensors)

        def work() -> None:
            try:
                self._write(self.run.step_folder(step), parts, text)
                if self.crew.rank == 0:
                    self._retain(step)
            except Exception as error:
                self._error = error

        # A daemon: a process that has to end does not wait for a slow disk.
        self._thread = threading.Thread(target=work, daemon=True, name=f"checkpoint {step}")
        self._thread.start()

    def save_aside(
        self,
        name: str,
        tensors: Mapping[str, Mapping[str, Tensor | Shard]],
        state: Mapping[str, Any],
    ) -> Path:
        """Write a checkpoint elsewhere in the run's folder, at once; it is none to go on from."""
        self.flush()
        self._write(self.run.path / name, self._copied(tensors), json.dumps(state, indent=1))
        return self.run.path / name

    def flush(self) -> None:
        """Wait until all is on the disk. Raises `DataError` if it could not be written."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error

    def newest(self) -> tuple[Checkpoint, tuple[str, ...]]:
        """The newest whole checkpoint, and a sentence for each damaged one that is newer.

        Raises `DataError` if none is whole. All processes get the same one.
        """
        self.flush()
        problems: list[str] = []
        names = [folder.name for folder in self.run.checkpoints()]
        for name in self.crew.gather(names)[0]:
            try:
                found, problem = read_checkpoint(self.run.checkpoints_folder / name), None
            except DataError as error:
                problem = str(error)
            told = [said for said in self.crew.gather(problem) if said]
            if not told:
                return found, tuple(problems)
            problems.append(told[0])
        if problems:
            raise DataError(
                f"no checkpoint of {self.run.path} is whole: {'; '.join(problems)}. Put back a "
                f"copy of one, or train again in another folder ({setting('out')})"
            )
        raise DataError(
            f"{self.run.path} has no checkpoint any more: put back a copy of one, or train again "
            f"in another folder (--out)"
        )

    def _copied(
        self, tensors: Mapping[str, Mapping[str, Tensor | Shard]]
    ) -> dict[str, dict[str, Tensor]]:
        """What this process has to write, by file name, as it is now."""
        rank, size = self.crew.rank, self.crew.size
        parts: dict[str, dict[str, Tensor]] = {}
        for part, named in tensors.items():
            values = {name: _as_shard(value, size) for name, value in named.items()}
            sharded = any(isinstance(value, Shard) for value in values.values()) and size > 1
            mine = {}
            for name, value in values.items():
                if isinstance(value, Shard):
                    _check_rows(name, value, rank, size)
                    if rank == 0 or len(value.local):
                        mine[name] = copied(value.local)
                elif rank == 0:
                    mine[name] = copied(value)
            if sharded:
                parts[f"{part}.{rank + 1}-of-{size}{ENDING}"] = mine
            elif rank == 0:
                parts[part + ENDING] = mine
        return parts

    def _write(self, folder: Path, parts: Mapping[str, Mapping[str, Tensor]], state: str) -> None:
        """Write this process's files; the first one adds the rest when all have done so."""
        need = sum(tensor.nbytes for part in parts.values() for tensor in part.values())
        beside, lead = writing(folder), self.crew.rank == 0

        def start() -> None:
            if lead:
                folder.parent.mkdir(exist_ok=True)
                start_folder(beside)

        def write() -> dict[str, Sum]:
            return {name: write_tensors(beside / name, part) for name, part in parts.items()}

        def finish() -> None:
            if lead:
                sums = {name: Sum(*one) for said in written for name, one in said.items()}
                self._check_there(beside, sums)
                finish_folder(folder, sums, state.encode())

        try:
            self._together(start, folder, need)
            written = self._together(write, folder, need)
            self._together(finish, folder, need)
        except Exception:
            if lead:
                shutil.rmtree(beside, ignore_errors=True)
            raise

    def _together(self, act: Callable[[], T], folder: Path, need: int) -> list[T]:
        """What `act` gave in each process; if it failed in any, an error in all of them."""
        done: T | None = None
        failure: Exception | None = None
        try:
            done = act()
        except OSError as error:
            failure = cannot_write(folder, need, error)
            failure.__cause__ = error
        except Exception as error:  # a fault of ours: the others must not wait for this process
            failure = error
        said = self.crew.gather([done, failure and (str(failure) or repr(failure))])
        if failure:
            raise failure
        for rank, (_, problem) in enumerate(said):
            if problem:
                raise DataError(f"process {rank} of {self.crew.size}: {problem}")
        return [done for done, _ in said]

    def _check_there(self, beside: Path, sums: Mapping[str, Sum]) -> None:
        """Raise `DataError` unless the first process sees what the others wrote."""
        for name, one in sums.items():
            file = beside / name
            if not file.is_file() or file.stat().st_size != one.size:
                raise DataError(
                    f"another process wrote {file}, but the first one cannot see it: the run's "
                    f"folder must lie on a disk that all machines share ({setting('out')})"
                )

    def _retain(self, step: int) -> None:
        """Remove what is neither among the newest nor the best, and what comes after `step`."""
        with suppress(DataError):  # what stays costs room, no more
            there = self.run.checkpoints()
            course = [folder for folder in there if step_of(folder) <= step]
            scores, doubtful = {}, set()
            for folder in course:
                try:
                    scores[folder] = score_of(folder)
                except DataError:
                    doubtful.add(folder)  # it may be the best
            kept = {*course[: self.keep], highest(scores), *doubtful}
            for folder in there:
                if folder not in kept:
                    with suppress(OSError):
                        remove_checkpoint(folder)


def _as_shard(value: Tensor | Shard, processes: int) -> Tensor | Shard:
    """FSDP2's tensors as what this process holds of them; others as they are."""
    if isinstance(value, Shard) or not hasattr(value, "device_mesh"):
        return value
    from torch.distributed.tensor import DTensor

    assert isinstance(value, DTensor)
    mesh, placement = value.device_mesh, value.placements[0]
    if mesh.ndim == 1 and mesh.size() == processes and placement.is_shard(dim=0):
        return Shard(value.to_local(), len(value))
    return value.full_tensor()  # all processes take part in it, so all call this


def _check_rows(name: str, shard: Shard, rank: int, size: int) -> None:
    each = -(-shard.rows // size)
    due = len(range(shard.rows)[rank * each : (rank + 1) * each])
    if len(shard.local) != due:
        raise ValueError(
            f"process {rank} of {size} holds {len(shard.local)} of the {shard.rows} rows of "
            f"{name}, not {due}"
        )
