"""How the processes of one run find each other, and how they part.

Under torchrun there are several: they find each other through its store. Of what goes wrong one of
them tells.
"""

import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from vitrail.data.batches.making import share_of
from vitrail.errors import DataError, UsageError, VitrailError, setting
from vitrail.runs.config import TrainConfig
from vitrail.runs.device import pick_device
from vitrail.runs.notes import LINGER_SECONDS, TOLD_IN, Notes
from vitrail.runs.watchdog import KEPT, Lost, Pulse
from vitrail.runs.world import ALONE, World, again, tries

_JOIN_SECONDS = 120.0
_LEAST_JOIN_SECONDS = 10.0
"""Launchers start all processes at about the same time; what differs is how long imports take."""


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
    launch, attempt, pulse = Notes(), Notes(), None
    try:
        found = _reached(rank, size, stall_seconds)
        launch = Notes(found)
        if told := launch.get("told"):  # to those that these processes have been started after
            raise SystemExit(told["exit_code"])
        store = _met(found, device, rank, size, stall_seconds)
        attempt = Notes(store)
        aside = again(store)
        beats = PrefixStore("beats", aside)
        pulse = Pulse(rank, size, beats, stall_seconds, partial(_leave, Notes(aside)))
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
            raise Lost(what, KEPT, seen=False) from error
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
        for _ in tries(patience):
            if found.check([f"called {me}"]):
                name = found.get(f"called {me}").decode()
                found.set(f"{name} {rank}", "")
                return name
        raise TimeoutError(f"the first has not answered for {patience:.0f} s")
    missing = list(range(1, size))
    for _ in tries(patience):
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


def _tells(error: VitrailError, launch: Notes, attempt: Notes) -> bool:
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


def _leave(attempt: Notes, error: Lost) -> None:
    """End this process at once: what its main thread waits for may never come."""
    if _tells(error, attempt, attempt):
        print(f"vitrail: {error}", file=sys.stderr, flush=True)
    os._exit(error.exit_code)
