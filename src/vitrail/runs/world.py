"""The processes of one run: who is who, and what they tell each other.

One process is the usual case, and costs nothing. Several exchange gradients through gloo (CPU) or
NCCL (GPU), and small facts, as JSON, through the store in which they met (`join.py`).
"""

import json
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from vitrail.errors import DataError, setting
from vitrail.runs.device import pick_device
from vitrail.runs.notes import Notes
from vitrail.runs.watchdog import Pulse


class World:
    """The run as one of its processes sees it. `ALONE` is the world of a single process."""

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        local_rank: int = 0,
        store: Store | None = None,
        pulse: Pulse | None = None,
        launch: Notes | None = None,
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
        return World(self.rank, self.size, self.local_rank, PrefixStore(name, again(self._store)))

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


def _awaited(store: Store, key: str) -> bytes:
    """The value of `key`, when it is there; where a process is lost, the pulse ends the wait."""
    for _ in tries():
        if store.check([key]):
            break
    return store.get(key)


def tries(seconds: float = math.inf) -> Iterator[None]:
    """Moments to look at something, further and further apart, until so many seconds are over."""
    until, pause = time.monotonic() + seconds, 0.001
    while time.monotonic() < until:
        yield
        time.sleep(pause)
        pause = min(2 * pause, 0.1)


def again(store: Store) -> Store:
    """Another connection to the same store: one connection serves one thread at a time."""
    return store.clone()  # type: ignore[attr-defined]  # its type file does not know it
