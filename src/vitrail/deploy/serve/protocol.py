"""HTTP as uvicorn speaks it, with deadlines and caps of which it has none.

uvicorn keeps a connection open as long as a client sends a byte now and then, and takes headers and
bodies of any length. Here

- headers have `head_seconds` to come, a body `body_seconds` and more where much of it comes
- both are counted, and a body that says at once that it is too long is not waited for
- a client that does not take its answer is hung up on
- a request that comes before the last one was answered (pipelining, or the rest of a body whose
  length was a lie) is not answered: the connection ends with the answer before it. No two readings
  of one stream can then differ in where a request begins (smuggling)

Whoever breaks a rule is told which, as JSON, before the connection ends.
"""

import asyncio
import json
import re
import socket
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from vitrail.deploy.serve.limits import Limits
from vitrail.units import bytes_text


class Guarded(HttpToolsProtocol):
    """One connection. `guarded` makes the class that uvicorn is given."""

    limits: ClassVar[Limits]
    refused: ClassVar[Any]
    """Called with the status of each refusal."""

    _timer: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None
    _deaf = False
    """What still comes is thrown away."""
    _receiving: Any = None
    """The request whose body is coming, as uvicorn holds it; None while its headers are."""
    _in_head = False
    _began = 0.0
    _head = _body = 0
    """Bytes of the request that is coming."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # asyncio does so for sockets that say they are TCP, which those of create_server do not.
        # Without it an answer's second part waits 40 ms for the client to confirm the first.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if len(self.connections) > self.limits.connections:
            self._refuse(503, "too many connections: try again in a moment")
        else:
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        if self._timer is None and (self.cycle is None or self.cycle.response_complete):
            self._watch()  # line ends alone would never begin a request
        if self._timer is None or self._receiving is None:
            data = _without_upgrade(data)
        super().data_received(data)
        if self._in_head and not self._deaf:
            self._head += len(data)
            self._check_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._writing is None:
            self._writing = self.loop.call_later(self.limits.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def on_message_begin(self) -> None:
        if self._deaf:
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
            self._hear_no_more()
            return
        super().on_message_begin()
        self._receiving, self._in_head = None, True
        self._head = self._body = 0
        self._watch()

    def on_url(self, url: bytes) -> None:
        if not self._deaf:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._deaf:
            return
        super().on_header(name, value)
        if len(self.headers) > self.limits.headers:
            self._refuse(431, f"more than {self.limits.headers} headers")

    def on_headers_complete(self) -> None:
        if self._deaf:
            return
        self._in_head = False
        length = sum(len(name) + len(value) + 4 for name, value in self.headers)
        self._head = max(self._head, len(self.url) + length)
        self._check_head()
        hosts = [value for name, value in self.headers if name == b"host"]
        if len(hosts) > 1 or (not hosts and self.parser.get_http_version() == "1.1"):
            self._refuse(400, "a request has one Host header")
        if self.parser.should_upgrade():
            self._refuse(400, "this server speaks HTTP/1.1 alone, without Upgrade")
        lengths = [value for name, value in self.headers if name == b"content-length"]
        if lengths:  # one, and digits: the parser has seen to that
            self._check_body(int(lengths[0]))
        if not self._deaf:
            super().on_headers_complete()
            self._receiving = self.cycle

    def on_body(self, body: bytes) -> None:
        if self._deaf:
            return
        self._body += len(body)
        self._check_body(self._body)
        if not self._deaf:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._deaf:
            self._unwatch()
            super().on_message_complete()

    def on_response_complete(self) -> None:
        self.cycle.body.clear()  # of a refusal: an idle connection would keep what nobody read
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn says of what is no HTTP."""
        if not self._deaf:
            self._refuse(400, "this is no HTTP request that can be read")

    def _check_head(self) -> None:
        if self._head > self.limits.head:
            most = bytes_text(self.limits.head)
            self._refuse(431, f"the address and the headers are longer than {most}")

    def _check_body(self, size: int) -> None:
        if size > self.limits.body:
            most = bytes_text(self.limits.body)
            self._refuse(413, f"the body is longer than {most}: send a smaller image, or fewer")

    def _watch(self) -> None:
        """Begin to wait for a request."""
        self._unwatch()
        self._began = self.loop.time()
        self._timer = self.loop.call_later(self.limits.head_seconds, self._look)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        """Whether it is time to give up."""
        limits = self.limits
        allowed = limits.head_seconds
        if self._receiving is not None:
            allowed = limits.body_seconds + self._body / limits.body_rate
        left = self._began + allowed - self.loop.time()
        if left > 0:
            self._timer = self.loop.call_later(left, self._look)
        elif self._in_head or self._receiving is not None:
            self._refuse(408, "the request took too long to come")
        else:
            self.transport.close()

    def _refuse(self, status: int, why: str) -> None:
        """Answer in the app's place, and end the connection."""
        if self._deaf or self.transport.is_closing():
            return
        cycle = self._receiving
        if cycle is None or not cycle.response_started:
            body = json.dumps({"error": why}).encode()
            self.transport.write(
                STATUS_LINE[status]
                + b"content-type: application/json\r\nconnection: close\r\n"
                + (b"retry-after: 1\r\n" if status == 503 else b"")
                + b"content-length: %d\r\n\r\n" % len(body)
                + body
            )
            self.refused(status)
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        self._hear_no_more()
        self.loop.call_later(self.limits.linger_seconds, self.transport.abort)

    def _hear_no_more(self) -> None:
        self._deaf = True
        self._unwatch()
        self._unset_keepalive_if_required()
        self.flow.resume_reading()


_UPGRADE = re.compile(rb"\r\nUpgrade(?=[ \t]*:)", re.IGNORECASE)


def _without_upgrade(data: bytes) -> bytes:
    r"""The beginning of a request, without its wish for another protocol, as curl --http2 has it.

    A server may pass it over, but the parser would look for no body behind it.

    >>> _without_upgrade(b"POST / HTTP/1.1\r\nUpgrade: h2c\r\n\r\nbody")
    b'POST / HTTP/1.1\r\nX-Upgrade: h2c\r\n\r\nbody'
    """
    end = data.find(b"\r\n\r\n")
    end = len(data) if end < 0 else end
    if not _UPGRADE.search(data, 0, end):
        return data
    return _UPGRADE.sub(b"\r\nX-Upgrade", data[:end]) + data[end:]


def guarded(limits: Limits, refused: Any) -> type[Guarded]:
    """The protocol with these limits; `refused` is called with the status of each refusal."""
    return type("Guarded", (Guarded,), {"limits": limits, "refused": staticmethod(refused)})
