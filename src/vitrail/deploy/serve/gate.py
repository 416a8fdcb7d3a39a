"""What every request passes before anything else is done for it: may it, and is there room?

Plain ASGI, for most of what an overloaded server does is to say no. Who is asked for a token is
decided here, for every path that there is or is not.
"""

import hmac
import json
import re
from collections.abc import Mapping
from typing import NamedTuple

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vitrail.deploy.serve.service import Service

OPEN = ("/", "/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready")
"""What needs no token: they say nothing of the model."""
ADMIN = "/v2/repository/models/"
"""What begins so changes the server."""
_LOOPBACK = (b"localhost", b"127.0.0.1", b"[::1]")
"""What this machine is called by its own programs. A page may lend itself another name for it."""
_PORT = re.compile(rb":\d*$")
_ALWAYS = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]


class Tokens(NamedTuple):
    """Who may do what. None: nobody has to say who they are; but then nobody is an admin."""

    user: bytes | None = None
    admin: bytes | None = None

    def allow(self, path: str, given: list[bytes]) -> bool:
        """Whether a request with these Authorization headers may go to `path`."""
        if path in OPEN:
            return True
        allowed = [self.admin] if path.startswith(ADMIN) else [self.user, self.admin]
        if self.user is None and not path.startswith(ADMIN):
            return True
        scheme, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        # No comparison is left out, so that none can be told from its time.
        same = [hmac.compare_digest(token.strip(), each) for each in allowed if each is not None]
        return scheme.lower() == b"bearer" and any(same)


class Refusal(NamedTuple):
    """An answer that is known at once."""

    status: int
    error: str
    headers: Mapping[bytes, bytes] = {}


class Gate:
    """Around the app. `local`: no other machine can call."""

    def __init__(self, app: ASGIApp, service: Service, tokens: Tokens, *, local: bool) -> None:
        self.app, self.service, self.tokens, self.local = app, service, tokens, local
        # A page cannot know the token, and whoever has it may come through a proxy, as they like.
        self.trusting = tokens.user is None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.service.counts.requests.labels(str(message["status"])).inc()
                message["headers"] = [*message["headers"], *_ALWAYS]
                if self.service.draining:
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        if refusal := self._refusal(scope):
            await _tell(refusal, counted)
        else:
            await self.app(scope, receive, counted)

    def _refusal(self, scope: Scope) -> Refusal | None:
        path: str = scope["path"]
        told: dict[bytes, list[bytes]] = {b"authorization": [], b"host": [], b"origin": []}
        for name, value in scope["headers"]:
            if name in told:
                told[name].append(value)
        host = told[b"host"][0] if told[b"host"] else b""
        if self.trusting and self.local and _PORT.sub(b"", host).lower() not in _LOOPBACK:
            return Refusal(403, "this server is for programs of its own machine: call it localhost")
        origins = told[b"origin"]
        foreign = any(origin.partition(b"://")[2] != host for origin in origins)
        if self.trusting and scope["method"] == "POST" and foreign:
            return Refusal(403, "a page of another server may not ask this one")
        if not self.tokens.allow(path, told[b"authorization"]):
            return Refusal(
                401,
                "give the header Authorization: Bearer TOKEN, with a token that may do this",
                {b"www-authenticate": b"Bearer"},
            )
        if scope["method"] == "POST" and _asks_the_model(path):
            if self.service.draining:
                return busy(503, self.service)
            if self.service.admission.crowded() and not self.service.admission.enter(1):
                return busy(429, self.service)
        return None


def busy(status: int, service: Service) -> Refusal:
    """Come again, and when: 429 for too many, 503 while the server stops."""
    seconds = service.admission.retry_after
    what = "this server is stopping" if status == 503 else "more images than can be answered now"
    again = f"try again in {seconds} s"
    return Refusal(status, f"{what}: {again}", {b"retry-after": b"%d" % seconds})


def _asks_the_model(path: str) -> bool:
    return path == "/predict" or path.endswith("/infer")


async def _tell(refusal: Refusal, send: Send) -> None:
    body = json.dumps({"error": refusal.error}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        *refusal.headers.items(),
    ]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
