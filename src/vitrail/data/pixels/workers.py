"""Decoding in processes of their own, for a decoder may crash, or never come back.

Each worker has one image at a time, so that it is always known which one is at fault. A worker that
dies, or takes too long, is killed and another takes its place; the image is tried once more, and
then counts as unreadable. What an image becomes does not depend on any of this.

A worker is a fresh interpreter that imports what decoding needs and no more (no torch: 43 MB and a
quarter of a second; a fork of a process with threads could hang, and multiprocessing's spawn would
run the user's script again). Pixels come back through memory without a name, of which nothing can
be left behind. That makes a picture of 500 x 375 take 0.13 ms longer than in this process, of 0.8;
through the socket, which carries the rest, it would be 0.33.

Nothing of a worker outlives its parent, however that ends: the kernel ends it when the parent's end
of a pipe closes. Ctrl-C and other requests to stop are for the parent alone.
"""

import fcntl
import importlib
import json
import math
import mmap
import os
import pickle
import queue
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from vitrail.data.pixels.decode import Encoded, UnreadableImage, file_name, read_pixels
from vitrail.errors import DataError, setting

_TRIES = 2
"""How often an image is tried: what killed a worker may have been something else."""
_START_SECONDS = 120.0
_STARTS = 3
_LOOK_SECONDS = 0.2
"""How long a wait goes on before it is asked whether anyone still waits for its end."""
_REAP_SECONDS = 1.0

_LENGTH = struct.Struct("<Q")
_REPLY = struct.Struct("<BQIIB")
"""Kind, bytes that follow; for pixels, their height, width and channels."""
_READY, _PIXELS, _SHARED, _UNREADABLE, _FAULT = range(5)
_SLAB_BYTES = 4 * 2**20
"""Of memory that a worker shares with its parent; larger images, which are few, are sent."""

Pixels = UInt8[np.ndarray, "h w c"]


class Request(NamedTuple):
    """What `read_pixels` is to be called with."""

    image: Encoded
    mode: str = "RGB"
    shown: tuple[int, int] | None = None
    fast: bool = False
    grey_range: tuple[float, float] | None = None


def decode(request: Request) -> Pixels:
    """What a worker does."""
    image, mode, shown, fast, grey_range = request
    return read_pixels(image, mode=mode, shown=shown, fast=fast, grey_range=grey_range)


class GivenUp(UnreadableImage):
    """An image that no worker came back from."""


class Abandoned(Exception):
    """Nobody waits for this image any more."""


class Workers:
    """Up to `count` processes, started as they are needed, for any number of threads.

    An image that takes longer than `seconds` is given up. `task` is what a worker does with a
    request, an importable function. `memory`: the bytes that it may take for that, beyond what it
    has when it begins (Linux alone counts so); None: all that there are.

    >>> workers = Workers(2)
    >>> try:
    ...     workers.run(Request(b"no image"))
    ... except UnreadableImage as error:
    ...     print(error.reason.partition(',')[0])
    its content is none of the formats JPEG
    >>> workers.close()
    """

    def __init__(
        self,
        count: int,
        *,
        seconds: float = 60.0,
        task: Callable[[Any], Pixels] = decode,
        memory: int | None = None,
    ) -> None:
        self.count = count
        self.seconds = seconds
        self._memory = memory
        self._task = f"{task.__module__}:{task.__qualname__}"
        # The one that was used last comes first: one thread keeps one process busy, not all.
        self._free: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(count):
            self._free.put(None)
        self._living: set[_Worker] = set()
        self._finalizer = weakref.finalize(self, _end, self._living, os.getpid())

    @property
    def pids(self) -> list[int]:
        """The processes that are there now."""
        return [worker.process.pid for worker in list(self._living)]

    def run(self, request: Any, abandoned: Callable[[], bool] = lambda: False) -> Pixels:
        """What the task makes of `request`; waits while all workers are busy.

        Raises `UnreadableImage` with the reason, which is a `GivenUp` where the worker did not come
        back from it; `DataError` where no worker can be started, and `Abandoned` soon after
        `abandoned()` has become true.
        """
        worker = self._take(abandoned)
        try:
            if worker and worker.process.poll() is not None:  # it died while it had nothing to do
                self._discard(worker)
                worker = None
            for _ in range(_TRIES):
                worker = worker or self._start(abandoned)
                try:
                    return worker.ask(request, self.seconds, abandoned)
                except _Lost as lost:
                    reason = lost.reason
                    self._discard(worker)
                    worker = None
                except Abandoned:
                    self._discard(worker)
                    worker = None
                    raise
        finally:
            self._free.put(worker)
        raise GivenUp(reason, file_name(getattr(request, "image", None)))

    def close(self) -> None:
        """End all workers."""
        self._finalizer()

    def _take(self, abandoned: Callable[[], bool]) -> "_Worker | None":
        while True:
            try:
                return self._free.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                if abandoned():
                    raise Abandoned from None

    def _start(self, abandoned: Callable[[], bool]) -> "_Worker":
        for _ in range(_STARTS):
            if not self._finalizer.alive:
                raise Abandoned
            try:
                worker = _Worker(self._task, self._memory)
            except OSError as error:
                reason = f"{error.strerror}"
                break
            self._living.add(worker)
            try:
                worker.greet(abandoned)
                return worker
            except _Lost as lost:
                reason = lost.reason
                self._discard(worker)
            except Abandoned:
                self._discard(worker)
                raise
        raise DataError(
            f"no process can be started to decode images: {reason}. To decode in threads of this "
            f"process instead: {setting('data.decoders')} threads"
        )

    def _discard(self, worker: "_Worker") -> None:
        self._living.discard(worker)
        worker.kill()


_shared: weakref.WeakValueDictionary[tuple[int, float], Workers] = weakref.WeakValueDictionary()
_sharing = threading.Lock()


def shared_workers(count: int, seconds: float) -> Workers:
    """The same workers for all who ask for as many, until the last of them is gone."""
    with _sharing:
        workers = _shared.get((count, seconds))
        if workers is None:
            workers = _shared[count, seconds] = Workers(count, seconds=seconds)
        return workers


class _Lost(Exception):
    """A worker that is of no more use."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


_BOOT = """
import json, sys
*numbers, path, task, memory = json.loads(sys.argv[1])
sys.path[:] = path
from vitrail.data.pixels.workers import serve
serve(*numbers, task, memory)
"""

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def _begun(numbers: tuple[int, ...], task: str, memory: int | None) -> subprocess.Popen[bytes]:
    """A process that serves, with these open files."""
    path = [str(place) or os.getcwd() for place in sys.path]
    return subprocess.Popen(
        [sys.executable, "-c", _BOOT, json.dumps((*numbers, path, task, memory))],
        pass_fds=numbers,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        # Decoders written in C complain here of what is told once, as a reason.
        stderr=subprocess.DEVNULL,
        env=os.environ | _ONE_THREAD,
        # Ctrl-C reaches the whole process group of a terminal.
        start_new_session=True,
    )


class _Worker:
    """One process, from the parent's side."""

    def __init__(self, task: str, memory: int | None) -> None:
        """Raises `OSError` where there can be no more processes or files."""
        with ExitStack() as theirs, ExitStack() as ours:
            self.socket, other = socket.socketpair()
            ours.callback(self.socket.close)
            theirs.callback(other.close)
            line, lifeline = os.pipe()
            ours.callback(os.close, lifeline)
            theirs.callback(os.close, line)
            slab = _memory()
            theirs.callback(os.close, slab)
            self._slab = mmap.mmap(slab, _SLAB_BYTES)
            self.process = _begun((other.fileno(), line, slab), task, memory)
            self._close = ours.pop_all().close

    def greet(self, abandoned: Callable[[], bool]) -> None:
        """Wait until it can work. Raises `_Lost`, or `Abandoned`."""
        try:
            self._reply(time.monotonic() + _START_SECONDS, abandoned)
        except TimeoutError:
            raise _Lost(f"it did not start within {_START_SECONDS:.0f} s") from None
        except OSError:
            raise _Lost(f"it ended at once ({self._how_it_ended()})") from None

    def ask(self, request: Any, seconds: float, abandoned: Callable[[], bool]) -> Pixels:
        """Raises `UnreadableImage`, or, if the worker is of no more use, `_Lost`; `Abandoned`."""
        message = pickle.dumps(request)
        deadline = time.monotonic() + seconds
        try:
            self.socket.settimeout(seconds)
            self.socket.sendall(_LENGTH.pack(len(message)) + message)
            return self._reply(deadline, abandoned)
        except TimeoutError:
            raise _Lost(f"it took longer than {seconds:g} s to read") from None
        except OSError:
            raise _Lost(f"its decoder crashed ({self._how_it_ended()})") from None

    def kill(self) -> None:
        """End it, whatever it does."""
        if self.process.poll() is None:
            self.process.kill()
        self._close()
        with suppress(BufferError):  # another thread is taking pixels out of it
            self._slab.close()
        try:
            self.process.wait(_REAP_SECONDS)
        except subprocess.TimeoutExpired:
            # It waits for a disk or a network that does not answer: no signal reaches it yet.
            _unreaped.append(self.process)

    def _reply(self, deadline: float, abandoned: Callable[[], bool]) -> Pixels:
        head = self._receive(_REPLY.size, deadline, abandoned)
        kind, size, height, width, channels = _REPLY.unpack(head.data)
        body = self._receive(size, deadline, abandoned)
        if kind == _UNREADABLE:
            raise UnreadableImage(*json.loads(body.tobytes()))
        if kind == _FAULT:
            raise RuntimeError(f"in a decoding process:\n{body.tobytes().decode()}")
        shape = height, width, channels
        if kind == _SHARED:  # which the next image will need
            return np.frombuffer(self._slab, np.uint8, math.prod(shape)).reshape(shape).copy()
        return body.reshape(shape)

    def _receive(
        self, size: int, deadline: float, abandoned: Callable[[], bool]
    ) -> UInt8[np.ndarray, " n"]:
        """Raises `TimeoutError`, `Abandoned`, or another `OSError` when the other end is closed."""
        received = np.empty(size, np.uint8)
        rest = received.data
        while rest:
            self._wait(deadline, abandoned)
            number = self.socket.recv_into(rest)
            if not number:
                raise ConnectionResetError
            rest = rest[number:]
        return received

    def _wait(self, deadline: float, abandoned: Callable[[], bool]) -> None:
        """Until there is something to receive."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        while True:
            left = deadline - time.monotonic()
            if poll.poll(1000 * max(0.0, min(left, _LOOK_SECONDS))):
                return
            if abandoned():
                raise Abandoned
            if left <= 0:
                raise TimeoutError

    def _how_it_ended(self) -> str:
        """How it ended."""
        try:
            code = self.process.wait(_REAP_SECONDS)
        except subprocess.TimeoutExpired:
            return "it hung up on us"
        if code == -signal.SIGKILL:
            return "signal 9, as sent by a system that is out of memory"
        return f"signal {-code}" if code < 0 else f"exit code {code}"


_unreaped: list[subprocess.Popen[bytes]] = []


def _end(workers: set[_Worker], parent: int) -> None:
    if os.getpid() != parent:  # a fork of the parent has no say in this
        return
    while workers:
        workers.pop().kill()


def _memory() -> int:
    """An open file of that size which lies in memory and has no name."""
    if hasattr(os, "memfd_create"):
        slab = os.memfd_create("vitrail")
    else:
        slab, name = tempfile.mkstemp()
        os.unlink(name)
    os.ftruncate(slab, _SLAB_BYTES)
    return slab


def serve(own: int, line: int, slab: int, task: str, memory: int | None = None) -> None:
    """The life of a worker.

    `own` is its socket, `line` the pipe that closes with its parent, `slab` the shared memory.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # From here on the kernel sends SIGIO when the parent ends. That ends this process even while
    # a decoder holds the interpreter.
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(line, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(line, fcntl.F_SETFL, fcntl.fcntl(line, fcntl.F_GETFL) | os.O_ASYNC)
    hung_up = select.poll()
    hung_up.register(line, 0)
    if hung_up.poll(0):
        return
    shared = np.frombuffer(mmap.mmap(slab, _SLAB_BYTES), np.uint8)
    with socket.socket(fileno=own) as parent:
        module, name = task.split(":")
        work = getattr(importlib.import_module(module), name)
        if memory is not None:
            _limit_memory(memory)
        parent.sendall(_REPLY.pack(_READY, 0, 0, 0, 0))
        while head := _exactly(parent, _LENGTH.size):
            request = pickle.loads(_exactly(parent, *_LENGTH.unpack(head)))
            for part in _answer(work, request, shared):
                parent.sendall(part)


def _limit_memory(more: int) -> None:
    """Let this process have so many bytes more of address space than now."""
    with suppress(OSError, ValueError):  # no /proc; or a limit that is lower already
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * mmap.PAGESIZE + more
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _answer(
    work: Callable[[Any], Pixels], request: Any, shared: UInt8[np.ndarray, " n"]
) -> tuple[bytes, bytes | memoryview]:
    try:
        pixels = np.ascontiguousarray(work(request))
    except UnreadableImage as error:
        said = json.dumps((error.reason, error.name)).encode()
        return _REPLY.pack(_UNREADABLE, len(said), 0, 0, 0), said
    except Exception:
        said = traceback.format_exc().encode()
        return _REPLY.pack(_FAULT, len(said), 0, 0, 0), said
    if pixels.nbytes <= len(shared):
        shared[: pixels.nbytes] = pixels.reshape(-1)
        return _REPLY.pack(_SHARED, 0, *pixels.shape), b""
    return _REPLY.pack(_PIXELS, pixels.nbytes, *pixels.shape), pixels.data


def _exactly(stream: socket.socket, size: int) -> bytes:
    """So many bytes; fewer where there are no more."""
    received = bytearray(size)
    rest = memoryview(received)
    while rest and (number := stream.recv_into(rest)):
        rest = rest[number:]
    return bytes(received[: size - len(rest)])
