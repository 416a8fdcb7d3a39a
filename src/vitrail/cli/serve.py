"""`vitrail serve BUNDLE_OR_RUN`: a model behind HTTP."""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from vitrail.cli.parse import parse
from vitrail.errors import DataError, UsageError, setting

_LEAST_TOKEN = 16
"""Characters of a token: shorter ones can be guessed."""


@dataclass(frozen=True)
class ServeArgs:
    """What `vitrail serve` takes."""

    model: Annotated[Path, tyro.conf.Positional]
    """What vitrail export wrote, or the folder that vitrail train wrote."""
    host: str = "127.0.0.1"
    """Where to listen. 127.0.0.1 is for programs of this machine alone, 0.0.0.0 for the network,
    which needs a token."""
    port: int = 8000
    """0: any that is free."""
    token: Path | None = None
    """A file with the token, on its first line, that clients send: Authorization: Bearer TOKEN."""
    admin_token: Path | None = None
    """The same for reloading by HTTP, which is off without it; it does for everything else too."""
    open: bool = False
    """Listen beyond this machine without a token: whoever reaches it may use it."""
    name: str | None = None
    """What clients call the model. Default: its own name."""
    workers: int = 1
    """Processes with a model each. More help where the engine leaves cores idle."""
    decoders: int | None = None
    """Processes for decoding in each of them. Default: half the cores, at least 2."""
    batch: int = 16
    """The most images in a call of the engine."""
    delay: float = 0.0
    """Seconds that an image waits for others to make a batch. Zero: whoever is there goes."""
    room: int | None = None
    """How many images may be inside at once; others get 429. Default: by what is measured, as many
    as are answered in about twice the time of one, and six times as many in a burst."""
    body: int = 20
    """The most MiB of a request."""
    pixels: float = 40.0
    """The most megapixels of an image."""
    images: int = 16
    """The most images of a request."""
    seconds: float = 30.0
    """The longest that an answer is waited for."""
    grace: float = 3.0
    """Seconds from SIGTERM, when /health/ready turns false, until the port is closed."""


_ABOUT = """Answer about images over HTTP: POST /predict, the KServe v2 protocol under /v2, a page
for people at /, /health/live, /health/ready and /metrics. SIGTERM drains it, SIGHUP reloads the
model."""


def serve(args: Sequence[str]) -> dict[str, Any]:
    """Serve until a signal ends it."""
    given = parse(ServeArgs, args, "serve", _ABOUT, flags=True)
    _check(given)
    try:
        from vitrail.deploy.serve import fleet, server
        from vitrail.deploy.serve.gate import Tokens
        from vitrail.deploy.serve.limits import MIB, Limits
    except ModuleNotFoundError as error:
        raise UsageError(
            f"vitrail serve needs {error.name}, of the extra `serve`: pip install 'vitrail[serve]'"
        ) from error
    tokens = Tokens(_token(given.token), _token(given.admin_token))
    if not server.is_loopback(given.host) and tokens.user is None and not given.open:
        raise UsageError(
            f"{setting('host', given.host)} lets other machines in: give {setting('token')} FILE, "
            f"or {setting('open', True)} if whoever reaches it may use it"
        )
    settings = server.Settings(
        model=given.model,
        name=given.name,
        host=given.host,
        tokens=tokens,
        decoders=given.decoders or max(2, (os.cpu_count() or 2) // 2),
        batch=given.batch,
        delay=given.delay,
        room=given.room,
        grace=given.grace,
        limits=Limits(
            body=given.body * MIB,
            pixels=int(given.pixels * 1e6),
            images=given.images,
            answer_seconds=given.seconds,
        ),
    )
    with server.listen(given.host, given.port) as listener:
        where = server.address(listener)

        def ready(_: object = None) -> None:
            print(f"serving {given.model} at {where}", flush=True)

        if given.workers > 1:
            fleet.run_several(settings, listener, given.workers, ready)
            return {"address": where}
        try:
            service = asyncio.run(server.run(settings, listener, ready))
        except server.Ended as error:
            raise DataError(str(error)) from error
    return {"address": where, "images": int(service.counts.value("vitrail_images_total"))}


def _check(given: ServeArgs) -> None:
    """Raises `UsageError` for a number out of range."""
    for name in ("workers", "batch", "body", "images", "decoders", "room"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise UsageError(f"{setting(name)} must be at least 1, not {value}")
    for name in ("pixels", "seconds"):
        if not 0 < getattr(given, name) < float("inf"):
            raise UsageError(f"{setting(name)} must be above 0, not {getattr(given, name)}")
    for name in ("delay", "grace"):
        if not 0 <= getattr(given, name) < float("inf"):
            raise UsageError(f"{setting(name)} must be 0 or more, not {getattr(given, name)}")
    if not 0 <= given.port < 65536:
        raise UsageError(f"{setting('port')} must be 0 to 65535, not {given.port}")


def _token(file: Path | None) -> bytes | None:
    """The first line of a file. Raises `DataError`, and `UsageError` for one that is too short."""
    if file is None:
        return None
    try:
        with file.open("rb") as stream:
            token = stream.readline(4096).strip()
    except OSError as error:
        raise DataError(f"cannot read the token in {file}: {error.strerror}") from error
    if len(token) < _LEAST_TOKEN or b" " in token:
        raise UsageError(
            f"the first line of {file} is no token: give at least {_LEAST_TOKEN} characters "
            f"without spaces, as from: openssl rand -hex 24"
        )
    return token
