"""A server to be tested: with a model that is known, in a thread or in a process of its own."""

import asyncio
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from PIL import Image

import vitrail
from vitrail.data.pixels.decode import read_image
from vitrail.data.views.preprocess import Preprocess
from vitrail.deploy.predict import Shown
from vitrail.deploy.serve import fleet, server
from vitrail.deploy.serve.gate import Tokens
from vitrail.deploy.serve.limits import Limits
from vitrail.deploy.serve.server import Server, Settings
from vitrail.deploy.serve.service import Service
from vitrail.tasks.answers import Detections, Embedding, Prediction, Segmentation

TOKEN, ADMIN = b"a-token-of-a-user-1", b"a-token-of-an-admin"
QUICK = Limits(
    head_seconds=1.0,
    body_seconds=1.5,
    idle_seconds=1.0,
    linger_seconds=0.2,
    decode_seconds=2.0,
    body=2**20,
    pixels=4_000_000,
    images=8,
)


@dataclass
class Fake:
    """A model whose answer tells every pixel that it has seen, and that takes its time."""

    kind: str = "classify"
    seconds: float = 0.0
    """Of a call."""
    each: float = 0.0
    """Of each image in it."""
    coupled: bool = False
    threshold: float | None = None
    names: tuple[str, ...] = ("cat", "<b>dog</b>", "owl")
    preprocess: Preprocess = field(default_factory=lambda: Preprocess(size=(24, 32)))
    calls: list[int] = field(default_factory=list)
    """Images in each."""
    held: threading.Event | None = None
    """A call waits until it is set."""

    @property
    def card(self) -> dict[str, Any]:
        return {
            "name": "a fake",
            "task": self.kind,
            "classes": list(self.names),
            "engine": "numpy",
            "precision": "float32",
            "image_size": list(self.preprocess.size),
            "metrics": {"top1": 0.75},
        }

    def show(self, picture: Any) -> Shown:
        image = read_image(picture)
        return Shown(self.preprocess.view(image), self.preprocess.seen(image.height, image.width))

    def answers(self, shown: Sequence[Shown]) -> list[Any]:
        time.sleep(self.seconds + self.each * len(shown))
        if self.held:
            self.held.wait(20)
        self.calls.append(len(shown))
        if any((one.pixels[:, 0, 0] == POISON).all() for one in shown):
            raise RuntimeError("a pixel that this engine does not bear")
        return [self._answer(one) for one in shown]

    def _answer(self, shown: Shown) -> Any:
        share = zlib.crc32(shown.pixels.tobytes()) / 2**32
        height, width = shown.seen.image
        match self.kind:
            case "classify":
                parts = (share, (1 - share) / 3, (1 - share) * 2 / 3)
                found = sorted(zip(self.names, parts, strict=True), key=lambda one: -one[1])
                return Prediction(*found[0], dict(found))
            case "segment":
                mask = np.zeros((height, width), np.int16)
                mask[: height // 2] = 1
                return Segmentation(mask, self.names)
            case "detect":
                rows = np.array([[0.0, 0.0, width / 2, height / 2]] * (1 + height % 2))
                n = len(rows)
                return Detections(rows, np.ones(n, np.int64), np.full(n, 0.9), self.names)
            case _:
                return Embedding(np.frombuffer(shown.pixels[0, 0, :8], np.uint8) / np.float32(255))


POISON = (255, 0, 255)
"""The colour of an image at which the engine fails."""


def picture(seed: int, size: tuple[int, int] = (40, 30), form: str = "PNG") -> bytes:
    """A file of (width, height) with noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return as_file(Image.fromarray(noise), form)


def as_file(image: Image.Image, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, form)
    return stream.getvalue()


def expected(model: Fake, image: bytes) -> dict[str, Any]:
    """What the server must answer."""
    (answer,) = replace(model, seconds=0, each=0, calls=[], held=None).answers([model.show(image)])
    return json.loads(json.dumps(vitrail.deploy.answers.told(answer)))


class Live(NamedTuple):
    """A server in a thread."""

    address: str
    port: int
    server: Server
    loop: asyncio.AbstractEventLoop
    model: Fake

    @property
    def service(self) -> Service:
        return self.server.service

    def client(self, **more: Any) -> httpx.Client:
        return httpx.Client(base_url=self.address, timeout=20, trust_env=False, **more)


@contextlib.contextmanager
def running(model: Fake | None = None, **changes: Any) -> Iterator[Live]:
    """A server, until the end of the block, which drains it."""
    model = model or Fake()
    changes = {"limits": QUICK, "decoders": 1, "grace": 0.0, **changes}
    settings = Settings(model=Path("unused"), open=lambda _: model, **changes)
    listener = server.listen(settings.host, 0)
    ready, begun, failed = threading.Event(), [], []

    def tell(one: Server) -> None:
        begun.append((one, asyncio.get_running_loop()))
        ready.set()

    def work() -> None:
        try:
            asyncio.run(server.run(settings, listener, tell))
        except BaseException as error:
            failed.append(error)
            ready.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert ready.wait(60)
    if failed:
        raise failed[0]
    (one, loop), port = begun[0], listener.getsockname()[1]
    try:
        yield Live(server.address(listener), port, one, loop, model)
    finally:
        with contextlib.suppress(RuntimeError):  # it has ended
            loop.call_soon_threadsafe(one.stop, 0.0)
        thread.join(60)
        assert not thread.is_alive()
        if failed:
            raise failed[0]


def raw(port: int, data: bytes, seconds: float = 5.0) -> bytes:
    """What comes back for these bytes, until the server closes or says nothing for a while."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as one:
        with contextlib.suppress(OSError):
            one.sendall(data)
        return heard(one)


def first_heard(port: int, data: bytes, patience: float = 0.05) -> bytes:
    """The beginning of an answer; who gets none for a while says that there is no more to come."""
    with socket.create_connection(("127.0.0.1", port), timeout=patience) as one:
        with contextlib.suppress(OSError):
            one.sendall(data)
            return one.recv(65536)
        with contextlib.suppress(OSError):
            one.settimeout(15)
            one.shutdown(socket.SHUT_WR)
        return heard(one)


def heard(one: socket.socket) -> bytes:
    said = b""
    with contextlib.suppress(OSError):
        while part := one.recv(65536):
            said += part
    return said


def until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def post(path: str, body: bytes, *headers: str) -> bytes:
    """A request, byte by byte."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


class Process:
    """A server in a process of its own, by a command that ends its first line with its address."""

    def __init__(self, *command: str) -> None:
        root = Path(vitrail.__file__).parents[1]
        paths = [str(root), str(Path(__file__).parents[2])]
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode()
        if not line:
            raise RuntimeError(self.process.communicate()[1].decode())
        self.address = line.split()[-1]
        self.port = int(self.address.rpartition(":")[2])

    @classmethod
    def of(cls, model: dict[str, Any], workers: int = 1, **told: Any) -> "Process":
        """One with a `Fake` of these fields; `told` are fields of `Settings`."""
        return cls("deploy.serve.harness", json.dumps([model, workers, told]))

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self, seconds: float = 30.0) -> tuple[int, str]:
        """Wait for the exit code and what it said."""
        _, said = self.process.communicate(timeout=seconds)
        return self.process.returncode, said.decode()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        with self.process:  # which closes its pipes
            if self.process.poll() is None:
                self.signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(20)
            self.process.kill()


@dataclass(frozen=True)
class Opened:
    """An importable way to the same model."""

    model: dict[str, Any]

    def __call__(self, place: Path) -> Fake:
        return Fake(**self.model)


def main() -> None:
    model, workers, told = json.loads(sys.argv[1])
    limits = Limits(**told.pop("limits")) if "limits" in told else QUICK
    tokens = Tokens(*(one.encode() for one in told.pop("tokens", ())))
    settings = Settings(
        model=Path("unused"), open=Opened(model), limits=limits, tokens=tokens, **told
    )
    with server.listen(settings.host, 0) as listener:
        where = server.address(listener)

        def ready(_: object = None) -> None:
            print(f"ready at {where}", flush=True)

        if workers > 1:
            fleet.run_several(settings, listener, workers, ready)
        else:
            asyncio.run(server.run(settings, listener, ready))


if __name__ == "__main__":
    main()
