"""A server's life: bound, loaded, ready, reloaded, drained, gone.

On SIGTERM, which a service manager sends, it says at once that it is not ready, and takes no new
images; what is inside is answered. It listens on for `grace` seconds, so that whoever deals out
requests has time to notice, and then hangs up. (uvicorn itself would refuse connections at once.)
On Ctrl-C there is no grace; a second signal ends it where it stands. On SIGHUP it reloads.
"""

import asyncio
import gc
import logging
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

import uvicorn

from vitrail.deploy.predict import Predictor
from vitrail.deploy.serve.app import make_app
from vitrail.deploy.serve.gate import Tokens
from vitrail.deploy.serve.limits import Limits
from vitrail.deploy.serve.protocol import guarded
from vitrail.deploy.serve.service import Model, Served, Service
from vitrail.errors import DataError, UsageError, setting


def for_many(place: Path) -> Predictor:
    """A bundle or a run, asked about many images at once."""
    return Predictor(place, many=True)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is served, where, and to whom."""

    model: Path
    """A bundle, or a run."""
    name: str | None = None
    host: str = "127.0.0.1"
    tokens: Tokens = field(default=Tokens(), repr=False)
    decoders: int = 2
    batch: int = 16
    delay: float = 0.0
    room: int | None = None
    grace: float = 3.0
    limits: Limits = field(default_factory=Limits)
    open: Callable[[Path], Model] = for_many
    """From its place to the model; an importable function."""

    @property
    def local(self) -> bool:
        """Whether no other machine can call."""
        return is_loopback(self.host)

    def served(self) -> Served:
        """The model, tried. Raises `DataError` and `UsageError`."""
        return Served.tried(self.open(self.model), self.name)


def is_loopback(host: str) -> bool:
    """Whether what is bound to `host` can be called from this machine alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A bound socket that listens; port 0 is any that is free. Raises `UsageError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=4096)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"cannot listen on {host}, port {port}: {why}. Choose another {setting('port')}, or "
            f"end what listens there"
        ) from error


def address(listener: socket.socket) -> str:
    """Where to call."""
    host, port, *_ = listener.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


_SAME_SECONDS = 0.3
"""A signal that comes so soon after another is the same request: of several processes each may get
it from the system, and again from its parent."""


class Ended(Exception):
    """A server ended with images inside that were not answered."""


class Server(uvicorn.Server):
    """uvicorn's, with our own end."""

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        grace: float,
        ready: "Callable[[Server], None]",
    ) -> None:
        super().__init__(config)
        self.service, self._grace, self._ready = service, grace, ready
        self._tasks: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready(self)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.stop, self._grace)
        loop.add_signal_handler(signal.SIGINT, self.stop, 0.0)
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)

    def stop(self, grace: float) -> None:
        """Drain, and end; asked again, end at once."""
        now = time.monotonic()
        if not self.service.draining:
            self.service.draining, self._asked = True, now
            asyncio.get_running_loop().call_later(grace, self._hang_up)
        elif now - self._asked > _SAME_SECONDS:
            self.should_exit = self.force_exit = True

    def reload(self) -> None:
        """As `Service.reload`, which tells what fails."""
        task = asyncio.get_running_loop().create_task(self._reload())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _reload(self) -> None:
        try:
            await self.service.reload()
        except DataError:
            return  # it is said, and counted

    def _hang_up(self) -> None:
        self.should_exit = True


async def run(
    settings: Settings, listener: socket.socket, ready: Callable[[Server], None]
) -> Service:
    """Serve until a signal ends it; `ready` is called when it answers.

    Raises `UsageError` and `DataError` where there is no model, `Ended` where some were left.
    """
    limits = settings.limits
    _many_files()
    # It warns of each hostile form, which is for its sender to know.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    service = Service(
        settings.served,
        limits,
        decoders=settings.decoders,
        batch=settings.batch,
        delay=settings.delay,
        room=settings.room,
    )
    try:
        await service.warm()
        config = uvicorn.Config(
            make_app(service, settings.tokens, local=settings.local),
            http=guarded(limits, lambda status: service.counts.requests.labels(str(status)).inc()),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            backlog=4096,
            timeout_keep_alive=limits.idle_seconds,  # type: ignore[arg-type]  # any number will do
            timeout_graceful_shutdown=int(limits.answer_seconds) + 1,
        )
        gc.collect()
        gc.freeze()  # what is there now stays: it need not be searched for garbage all the time
        await Server(config, service, settings.grace, ready).serve([listener])
        if left := service.admission.inside:
            raise Ended(f"stopped with {left} images inside that were not answered")
    finally:
        service.close()
    return service


def _many_files() -> None:
    """Let this process have as many open files, and so connections, as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
