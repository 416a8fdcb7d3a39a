"""Several servers behind one address, and someone who starts another when one dies.

Each is a fresh process with a model of its own; the kernel deals connections to whichever of them
is quick. The parent holds the listening socket, so no connection is refused while one is replaced.
"""

import asyncio
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait

from prometheus_client.multiprocess import mark_process_dead

from vitrail.deploy.serve.counts import PLACE
from vitrail.deploy.serve.server import Ended, Server, Settings, run
from vitrail.errors import DataError, VitrailError

_SPAWN = multiprocessing.get_context("spawn")
_SHORT_SECONDS = 10.0
"""A server that ends so soon may do so again: another does not start at once."""
_LOOK_SECONDS = 0.2
_READY = "ready"


class _Worker:
    """One server, from its parent's side."""

    def __init__(self, settings: Settings, listener: socket.socket) -> None:
        self.said, says = _SPAWN.Pipe(duplex=False)
        line, self._lifeline = _SPAWN.Pipe(duplex=False)
        self.process = _SPAWN.Process(target=_work, args=(settings, listener, says, line))
        self.process.start()
        says.close()
        line.close()
        self.started = time.monotonic()
        self.ready = False

    def hear(self) -> str | None:
        """Take what it says: why it cannot begin."""
        with suppress(EOFError):  # it died, which its process tells
            if not self.ready and self.said.poll():
                word = self.said.recv_bytes().decode()
                self.ready = word == _READY
                return None if self.ready else word
        return None

    def signal(self, number: int) -> None:
        """Send it a signal, if it is there."""
        with suppress(ProcessLookupError):
            os.kill(self.process.pid or 0, number)


def run_several(
    settings: Settings, listener: socket.socket, count: int, ready: Callable[[], None]
) -> None:
    """Serve from `count` processes until a signal ends them; `ready` is called when all answer.

    Raises `DataError` where one cannot begin, or ends at once again and again.
    """
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: asked.append(number))
    with tempfile.TemporaryDirectory(prefix="vitrail-counts-") as counts:
        os.environ[PLACE] = counts
        workers = [_Worker(settings, listener) for _ in range(count)]
        try:
            _keep(settings, listener, workers, asked, ready)
        finally:
            for worker in workers:
                worker.signal(signal.SIGKILL)
                worker.process.join()
            del os.environ[PLACE]


def _keep(
    settings: Settings,
    listener: socket.socket,
    workers: list[_Worker],
    asked: list[int],
    ready: Callable[[], None],
) -> None:
    """Until all have ended as they were asked to."""
    stopping = told = False
    while workers:
        wait([worker.process.sentinel for worker in workers], _LOOK_SECONDS)
        while asked:
            number = asked.pop(0)
            stopping = stopping or number != signal.SIGHUP
            for worker in workers:
                worker.signal(number)
        for why in filter(None, [worker.hear() for worker in workers]):
            if not told:
                raise DataError(why)
            print(f"vitrail: a server cannot begin: {why}", file=sys.stderr)
        for worker in [each for each in workers if not each.process.is_alive()]:
            workers.remove(worker)
            mark_process_dead(worker.process.pid)  # type: ignore[no-untyped-call]
            if stopping:
                continue
            how = f"with exit code {worker.process.exitcode}"
            if not told:
                raise DataError(f"a server ended {how} before it was ready")
            print(f"vitrail: a server ended {how}, another starts", file=sys.stderr)
            if time.monotonic() - worker.started < _SHORT_SECONDS:
                time.sleep(1)
            workers.append(_Worker(settings, listener))
        if not (told or stopping) and all(worker.ready for worker in workers):
            told = True
            ready()


def _work(settings: Settings, listener: socket.socket, says: Connection, line: Connection) -> None:
    """The life of one server."""
    os.setpgid(0, 0)  # Ctrl-C is for the parent, which passes it on
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to reload
    parent = os.getppid()

    def orphaned(loop: asyncio.AbstractEventLoop) -> None:
        """The parent is gone, and nobody else would end this process."""
        loop.remove_reader(line.fileno())
        os.kill(os.getpid(), signal.SIGTERM)

    def reloaded() -> None:
        if os.getppid() == parent:
            os.kill(parent, signal.SIGHUP)

    def ready(server: Server) -> None:
        server.service.reloaded = reloaded
        says.send_bytes(_READY.encode())

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(line.fileno(), orphaned, loop)
        await run(settings, listener, ready)

    try:
        asyncio.run(serve())
    except VitrailError as error:
        with suppress(OSError):
            says.send_bytes(str(error).encode())
        sys.exit(error.exit_code)
    except Ended as error:
        print(f"vitrail: {error}", file=sys.stderr)
        sys.exit(1)
