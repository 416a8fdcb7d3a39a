"""The watchdog of a run of several processes: who has fallen silent, or stands still.

Each process says in the store that they share that it lives, and how far it is, so that a run that
stands still can name the process it waits for.
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from torch.distributed.distributed_c10d import Store

from vitrail import proc
from vitrail.errors import VitrailError, setting

KEPT = ". The last checkpoint is kept; go on with --resume"

_BEAT_SECONDS = 1.0
_SILENT_SECONDS = 5.0
"""A process that has not said for so long that it lives is taken for dead or stopped."""
_NO_STORE = "what the processes talk through is gone: their launcher, or the first of them"


class Lost(VitrailError):
    """Other processes are not there, or do not answer: starting all again may mend it."""

    def __init__(self, what: str, way_on: str, *, seen: bool = True) -> None:
        super().__init__(what + way_on)
        self.what = what
        self.way_on = way_on
        self.seen = seen
        """Whether it is known whom the run waits for. If not, whoever ends them knows better."""


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
                    self._leave(_NO_STORE, KEPT)
                return

    def _end(self, why: str) -> None:
        missing = self.missing()
        if not self._stop.is_set():
            way_on = f"{KEPT}. What needs longer is allowed with {setting('stall_seconds')}"
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
            if proc.state(beat["pid"]) in "Tt":
                return "stopped (SIGSTOP; kill -CONT lets it go on)"
        except OSError:
            if (proc.ROOT / "proc/self").exists():
                return "gone"
    return "silent"


def _where() -> str:
    """What the main thread is doing: its innermost lines."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    lines = traceback.format_stack(frame)[-6:] if frame else []
    return "This process was at:\n" + "".join(lines).rstrip()
