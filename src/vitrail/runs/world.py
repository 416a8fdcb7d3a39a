"""The processes of one run: who is who, what they tell each other, and who has fallen silent.

One process is the usual case, and costs nothing. Under torchrun there are more: they find each
other through its store, exchange gradients through gloo (CPU) or NCCL (GPU), and small facts, as
JSON, through the store. Each also says there that it lives, so that a run that stands still can
name the process it waits for.
"""

import json
import math
import os
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from vitrail.data.batches.making import share_of
from vitrail.errors import DataError, UsageError, VitrailError, setting
from vitrail.runs.config import TrainConfig
from vitrail.runs.device import pick_device

TOLD_IN = "VITRAIL_TOLD_IN"
"""The variable with the folder in which `vitrail train --devices N` looks for what went wrong."""

LINGER_SECONDS = 5.0
"""A launcher ends all processes when one ends: this long the others leave to the one that tells."""

_BEAT_SECONDS = 1.0
_SILENT_SECONDS = 5.0
"""A process that has not said for so long that it lives is taken for dead or stopped."""
_NO_STORE = "what the processes talk through is gone: their launcher, or the first of them"
_KEPT = ". The last checkpoint is kept; go on with --resume"
_JOIN_SECONDS = 120.0
_LEAST_JOIN_SECONDS = 10.0
"""Launchers start all processes at about the same time; what differs is how long imports take."""


class Lost(VitrailError):
    """Other processes are not there, or do not answer: starting all again may mend it."""

    def __init__(self, what: str, way_on: str, *, seen: bool = True) -> None:
        super().__init__(what + way_on)
        self.what = what
        self.way_on = way_on
        self.seen = seen
        """Whether it is known whom the run waits for. If not, whoever ends them knows better."""


class World:
    """The run as one of its processes sees it. `ALONE` is the world of a single process."""

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        local_rank: int = 0,
        store: Store | None = None,
        pulse: "Pulse | None" = None,
        launch: "_Notes | None" = None,
    ) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self.pulse = pulse
        self._store = store
        self._launch = launch
        self._talks = 0

    @property
    def lead(self) -> bool:
        """Whether this process is the one that writes files and talks."""
        return self.rank == 0

    @property
    def part(self) -> tuple[int, int]:
        """Which share of each batch is this process's: (which, of how many)."""
        return self.rank, self.size

    def device(self, name: str) -> torch.device:
        """The device that this process computes on: of several GPUs the one of its number."""
        device = pick_device(name)
        if device.type == "cuda" and device.index is None:
            if self.local_rank >= torch.cuda.device_count():
                raise DataError(
                    f"process {self.local_rank} of this machine has no GPU: there are "
                    f"{torch.cuda.device_count()}. Start as many processes as GPUs "
                    f"({setting('devices')} {torch.cuda.device_count()}), or take "
                    f"{setting('device')} cpu"
                )
            device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(device)
        return device

    def gather(self, value: Any) -> list[Any]:
        """What every process says, in their order; small plain values. All have to call it.

        It waits for as long as they live: one may have a report to write.
        """
        if self._store is None:
            return [value]
        self._talks += 1
        self._store.set(f"{self._talks}/{self.rank}", json.dumps(value))
        said = [json.loads(_awaited(self._store, f"{self._talks}/{i}")) for i in range(self.size)]
        # Everyone is past the talk before the last one, or it could not have spoken in this one.
        self._store.delete_key(f"{self._talks - 2}/{self.rank}")
        return said

    def lead_says(self, value: Any) -> Any:
        """What the lead says; the others' values do not matter."""
        return self.gather(value if self.lead else None)[0]

    def apart(self, name: str) -> "World":
        """The same processes, to talk in another thread without getting mixed up."""
        if self._store is None:
            return self
        return World(self.rank, self.size, self.local_rank, PrefixStore(name, _again(self._store)))

    @property
    def run(self) -> str | None:
        """The run folder that this launch has made: known to processes that are started anew."""
        return self._launch.get("run") if self._launch else None

    @run.setter
    def run(self, folder: str) -> None:
        if self._launch:
            self._launch.put("run", folder)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def align(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the lead's values: what each has computed may differ in a last bit."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def rest(self) -> None:
        """The last step is taken: what comes now may take as long as it wants."""
        if self.pulse:
            self.pulse.rest()

    def rows(self, mine: Tensor) -> Tensor:
        """Everyone's rows `[n ...]`, one process after another; the numbers may differ."""
        if self.size == 1:
            return mine
        lengths = self.gather(len(mine))
        padded = mine.new_zeros(max(lengths), *mine.shape[1:])
        padded[: len(mine)] = mine
        everyone = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(everyone, padded)
        return torch.cat([rows[:n] for rows, n in zip(everyone, lengths, strict=True)])


ALONE = World()


def check_layout(config: TrainConfig, processes: int) -> None:
    """Refuse what so many processes cannot do together, before anything is made.

    Raises `UsageError`; `DataError` where a machine has fewer GPUs than its processes need.
    """
    if processes == 1:
        return
    if config.method == "probe":
        raise UsageError(
            f"{setting('method')} probe solves one problem, which {processes} processes cannot "
            f"share: leave out {setting('devices')}"
        )
    if config.device not in ("auto", "cpu", "cuda"):
        raise UsageError(
            f"{setting('device')} {config.device} is one device, but there are {processes} "
            f"processes: take {setting('device')} cuda (each gets a GPU of its own) or cpu"
        )
    if pick_device(config.device).type == "cuda":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        if (there := torch.cuda.device_count()) < here:
            raise DataError(
                f"{here} processes on this machine need a GPU each, but it has {there}: take "
                f"{setting('devices')} {there}, or {setting('device')} cpu"
            )
    share_of(config.data.batch_size, (0, processes), config.augment)


@contextmanager
def join_world(device: str, stall_seconds: float) -> Iterator[World]:
    """The world that torchrun's variables describe, for as long as the run lasts.

    A step that takes longer than `stall_seconds`, and a process that is silent for so long, end the
    process, with the name of the one that did not come. Of what goes wrong one process tells, the
    first that knows; the others leave with `SystemExit`.

    Raises `Lost` where the others cannot be reached, or are no longer there.
    """
    env = os.environ
    if int(env.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
    launch, attempt, pulse = _Notes(), _Notes(), None
    try:
        found = _reached(rank, size, stall_seconds)
        launch = _Notes(found)
        if told := launch.get("told"):  # to those that these processes have been started after
            raise SystemExit(told["exit_code"])
        store = _met(found, device, rank, size, stall_seconds)
        attempt = _Notes(store)
        aside = _again(store)
        beats = PrefixStore("beats", aside)
        pulse = Pulse(rank, size, beats, stall_seconds, partial(_leave, _Notes(aside)))
        world = World(
            rank,
            size,
            int(env.get("LOCAL_RANK", "0")),
            PrefixStore("talk", store),
            pulse,
            launch,
        )
        try:
            yield world
            world.gather("done")
        except RuntimeError as error:
            if not _of_others(error):
                raise
            step, missing = pulse.step + 1, pulse.missing()
            what = f"process {rank} of {size} lost the others at step {step}: {missing}"
            raise Lost(what, _KEPT, seen=False) from error
    except VitrailError as error:
        if not _tells(error, launch, attempt):
            if not launch.folder:
                time.sleep(LINGER_SECONDS)
            raise SystemExit(error.exit_code) from error
        raise
    except KeyboardInterrupt:
        if rank or TOLD_IN in env:
            raise SystemExit(130) from None
        raise
    finally:
        if pulse:
            pulse.stop()
        if dist.is_initialized():
            dist.destroy_process_group()


def _reached(rank: int, size: int, stall_seconds: float) -> Store:
    """The store through which the processes talk."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    with _may_not_be_there(rank, size):
        socket.getaddrinfo(host, port)  # torch would try a name that does not exist for long
        patience = timedelta(seconds=_patience(stall_seconds))
        found, _, _ = next(rendezvous("env://", rank, size, timeout=patience))
    return PrefixStore("vitrail", found)


def _met(found: Store, device: str, rank: int, size: int, stall_seconds: float) -> Store:
    """Wait for the other processes; what is theirs alone of the store."""
    backend = "nccl" if pick_device(device).type == "cuda" else "gloo"
    with _may_not_be_there(rank, size):
        store = PrefixStore(_agreed_name(found, rank, size, _patience(stall_seconds)), found)
        limit = timedelta(seconds=max(60.0, 2 * stall_seconds))
        dist.init_process_group(
            backend, store=PrefixStore("torch", store), rank=rank, world_size=size, timeout=limit
        )
    return store


def _patience(stall_seconds: float) -> float:
    return max(_LEAST_JOIN_SECONDS, min(_JOIN_SECONDS, stall_seconds))


@contextmanager
def _may_not_be_there(rank: int, size: int) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise Lost(
            f"process {rank} of {size} on {socket.gethostname()} cannot reach the others at "
            f"{place}: {str(error).splitlines()[0].rstrip('.')}",
            f". Is that address right, is the port open, and do all {size} processes run?",
        ) from error


def _agreed_name(found: Store, rank: int, size: int, patience: float) -> str:
    """A name that all processes know, and none before them: a launcher's store outlives processes
    that are started anew, with all that they said in it, and nodes count restarts differently.

    The lead makes it up, and answers each process by what that one has made up.
    """
    me = uuid.uuid4().hex
    found.set(f"here {rank}", me)
    if rank:
        for _ in _tries(patience):
            if found.check([f"called {me}"]):
                name = found.get(f"called {me}").decode()
                found.set(f"{name} {rank}", "")
                return name
        raise TimeoutError(f"the first has not answered for {patience:.0f} s")
    missing = list(range(1, size))
    for _ in _tries(patience):
        for each in missing:
            if found.check([f"here {each}"]):  # which may still be a dead one's
                found.set(f"called {found.get(f'here {each}').decode()}", me)
        missing = [each for each in missing if not found.check([f"{me} {each}"])]
        if not missing:
            return me
    numbers = ", ".join(map(str, missing))
    raise TimeoutError(f"no word from process {numbers} for {patience:.0f} s")


def _of_others(error: RuntimeError) -> bool:
    """Whether it is another process, or the way to it, that `error` is about."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


class _Notes:
    """What processes leave for their launcher, and for those that it starts after them.

    In the folder that a launcher of ours gives (`TOLD_IN`), else in the store of another's.
    """

    def __init__(self, store: Store | None = None) -> None:
        self.folder = os.environ.get(TOLD_IN)
        self._store = store

    def put(self, name: str, value: Any) -> bool:
        """Leave `value`, if there is nothing of that name yet; whether there was nothing."""
        text = json.dumps(value)
        if self.folder:
            place = Path(self.folder) / name
            if place.exists():
                return False
            beside = place.with_name(f"{name}.{os.getpid()}")
            beside.write_text(text, encoding="utf-8")
            beside.replace(place)
            return True
        with suppress(RuntimeError):  # the store is gone
            if self._store and self._store.add(f"{name} count", 1) > 1:
                return False
            if self._store:
                self._store.set(name, text)
        return True

    def get(self, name: str) -> Any:
        """What was left; None if nothing was."""
        if self.folder:
            place = Path(self.folder) / name
            return json.loads(place.read_text(encoding="utf-8")) if place.exists() else None
        there = self._store is not None and self._store.check([name])
        return json.loads(self._store.get(name)) if self._store and there else None


def _tells(error: VitrailError, launch: _Notes, attempt: _Notes) -> bool:
    """Whether this process is the one that has to tell the user of `error`: the first that has it,
    unless a launcher of ours does so by what is left for it.
    """
    note: dict[str, Any] = {"exit_code": error.exit_code, "error": str(error)}
    if isinstance(error, Lost):
        note |= {"what": error.what, "way_on": error.way_on}
        name, notes = ("missing" if error.seen else "lost"), attempt
    else:  # torchrun's signal may mean that all are to be started again
        name, notes = "told", launch if isinstance(error, (UsageError, DataError)) else attempt
    return notes.put(name, note) and not notes.folder


def _leave(attempt: _Notes, error: Lost) -> None:
    """End this process at once: what its main thread waits for may never come."""
    if _tells(error, attempt, attempt):
        print(f"vitrail: {error}", file=sys.stderr, flush=True)
    os._exit(error.exit_code)


def _where() -> str:
    """What the main thread is doing: its innermost lines."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    lines = traceback.format_stack(frame)[-6:] if frame else []
    return "This process was at:\n" + "".join(lines).rstrip()


class Pulse:
    """A thread that says each second that this process lives and at which step it is, and that
    ends the process, with a message, when a step takes too long, or the next process is silent.

    A step is timed from the end of the one before it: the first, which compiles, is not.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        store: Store,
        stall_seconds: float,
        leave: Callable[[Lost], None],
    ) -> None:
        self.rank = rank
        self.size = size
        self.store = store
        self.stall_seconds = stall_seconds
        self.leave = leave
        self.step = 0
        self._since: float | None = None
        self._stop = threading.Event()
        self._said = 0
        self._say()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="pulse")
        self._thread.start()

    def at(self, step: int) -> None:
        """Note that the run has come as far as `step`."""
        self.step = step
        self._since = time.monotonic()

    def rest(self) -> None:
        """There is no step to wait for, until the next `at`."""
        self._since = None

    def stop(self) -> None:
        """Fall silent: the run is over."""
        self._stop.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def missing(self, wait: float = _SILENT_SECONDS) -> str:
        """Whom the run waits for, in words: who is silent for `wait` seconds, or else behind."""
        everyone = range(self.size)
        try:
            before = [self._heard(i) for i in everyone]
            self._stop.wait(wait)
            after = [self._heard(i) for i in everyone]
        except RuntimeError:
            return _NO_STORE
        silent = [i for i in everyone if before[i].get("said") == after[i].get("said")]
        silent = [i for i in silent if i != self.rank]
        if silent:
            return ", ".join(f"{_who(i, after[i])} is {_state(after[i])}" for i in silent)
        last = min(beat.get("step", 0) for beat in after)
        behind = [i for i in everyone if after[i].get("step", 0) == last]
        if len(behind) == self.size:
            return f"all processes live, and are still at step {last}"
        return ", ".join(f"{_who(i, after[i])} is still at step {last}" for i in behind)

    def _heard(self, rank: int) -> Mapping[str, Any]:
        """The last beat of a process."""
        known = self.store.check([str(rank)])
        heard: Mapping[str, Any] = json.loads(self.store.get(str(rank))) if known else {}
        return heard

    def _say(self) -> None:
        self._said += 1
        beat = {
            "said": self._said,
            "step": self.step,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        self.store.set(str(self.rank), json.dumps(beat))

    def _watch(self) -> None:
        neighbour, said, heard_at = (self.rank + 1) % self.size, None, time.monotonic()
        while not self._stop.wait(_BEAT_SECONDS):
            try:
                self._say()
                now, last = time.monotonic(), self._heard(neighbour).get("said")
                if last != said:
                    said, heard_at = last, now
                since = self._since
                if since is not None and now - since > self.stall_seconds:
                    self._end(f"step {self.step + 1} has taken {now - since:.0f} s")
                elif now - heard_at > self.stall_seconds:
                    self._end(f"a process has been silent for {now - heard_at:.0f} s")
            except RuntimeError:  # the store is gone, and with it the launcher, or the lead
                if not self._stop.wait(_SILENT_SECONDS):
                    self._leave(_NO_STORE, _KEPT)
                return

    def _end(self, why: str) -> None:
        missing = self.missing()
        if not self._stop.is_set():
            way_on = f"{_KEPT}. What needs longer is allowed with {setting('stall_seconds')}"
            self._leave(f"{why}: {missing}", way_on)
            self._stop.set()

    def _leave(self, why: str, way_on: str) -> None:
        what = f"process {self.rank} of {self.size}: {why}"
        self.leave(Lost(what, f"{way_on}\n{_where()}"))


def _who(rank: int, beat: Mapping[str, Any]) -> str:
    if not beat:
        return f"process {rank}, which never spoke,"
    return f"process {rank} (pid {beat['pid']} on {beat['host']})"


def _state(beat: Mapping[str, Any]) -> str:
    """What became of a process that is silent."""
    if beat.get("host") == socket.gethostname():
        try:
            stat = Path(f"/proc/{beat['pid']}/stat").read_text()
            if stat.rpartition(")")[2].split()[0] in "Tt":
                return "stopped (SIGSTOP; kill -CONT lets it go on)"
        except OSError:
            if Path("/proc/self").exists():
                return "gone"
    return "silent"


def _awaited(store: Store, key: str) -> bytes:
    """The value of `key`, when it is there; where a process is lost, the pulse ends the wait."""
    for _ in _tries():
        if store.check([key]):
            break
    return store.get(key)


def _tries(seconds: float = math.inf) -> Iterator[None]:
    """Moments to look at something, further and further apart, until so many seconds are over."""
    until, pause = time.monotonic() + seconds, 0.001
    while time.monotonic() < until:
        yield
        time.sleep(pause)
        pause = min(2 * pause, 0.1)


def _again(store: Store) -> Store:
    """Another connection to the same store: one connection serves one thread at a time."""
    return store.clone()  # type: ignore[attr-defined]  # its type file does not know it
