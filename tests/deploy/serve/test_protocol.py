"""Clients that break the rules, byte by byte: slow, too long, ambiguous, gone."""

import contextlib
import random
import select
import socket
import threading
import time
from contextlib import suppress
from dataclasses import replace
from http.client import HTTPConnection

import pytest

from deploy.serve.harness import QUICK, Fake, first_heard, picture, post, raw, running, until

GET = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def live():
    with running(Fake(), room=64) as one:
        yield one


def status(said: bytes) -> int:
    assert said.startswith(b"HTTP/1.1 "), said[:100]
    return int(said[9:12])


def test_a_connection_serves_many_requests(live):
    connection, sockets = HTTPConnection("127.0.0.1", live.port, timeout=5), set()
    for _ in range(3):
        connection.request("GET", "/health/live")
        sockets.add(connection.sock.fileno())
        assert connection.getresponse().read() == b'{"live":true}'
    assert len(sockets) == 1
    connection.close()
    last = raw(live.port, GET + b"Connection: close\r\n\r\n")
    assert status(last) == 200


@pytest.mark.parametrize(
    ("count", "most"),
    [(40, 5.0), pytest.param(500, 10.0, marks=pytest.mark.slow)],
    ids=["40 sockets", "500 sockets"],
)
def test_trickling_clients_are_hung_up_on_and_disturb_nobody(live, count, most):
    """H3: a byte now and then, in headers and in bodies, and nothing at all."""
    body = post("/predict", picture(0))
    kinds = [GET + b"X-Slow: ", body[: body.index(b"\r\n\r\n") + 5], b"\r\n", b""]
    sockets = []
    for i in range(count):
        one = socket.create_connection(("127.0.0.1", live.port))
        one.sendall(kinds[i % len(kinds)])
        sockets.append(one)
    started, times, waiting = time.monotonic(), [], set(sockets)
    said: dict[socket.socket, bytes] = {}
    with live.client() as client:
        while waiting and time.monotonic() - started < most + 3:
            for one, kind in zip(sockets, kinds * count, strict=False):
                if one in waiting and kind:
                    with contextlib.suppress(OSError):
                        one.send(kind[-1:] if kind == b"\r\n" else b"a")
            for one in select.select(list(waiting), [], [], 0.3)[0]:
                with contextlib.suppress(OSError):
                    said[one] = said.get(one, b"") + (part := one.recv(4096))
                    if part:
                        continue
                waiting.discard(one)
            before = time.monotonic()
            assert client.post("/predict", content=picture(0)).status_code == 200
            times.append(time.monotonic() - before)
    assert not waiting and time.monotonic() - started < most
    for i, one in enumerate(sockets):
        assert said.get(one, b"")[:12] in (b"", b"HTTP/1.1 408"), said[one]
        assert said.get(one) or i % len(kinds) > 1
        one.close()
    assert sorted(times)[len(times) // 2] < 0.5


def test_a_large_body_over_a_slow_line_is_no_attack(live):
    """At 200 KiB/s it takes longer than a body may that does not move."""
    whole = post("/predict", bytes(500_000))
    with socket.create_connection(("127.0.0.1", live.port)) as one:
        started = time.monotonic()
        for start in range(0, len(whole), 20_000):
            one.sendall(whole[start : start + 20_000])
            time.sleep(0.1)
        assert time.monotonic() - started > QUICK.body_seconds
        assert one.recv(4096).startswith(b"HTTP/1.1 422")


def test_what_is_too_long_is_refused_before_it_is_taken(live):
    """H4: by what it says of itself, and by what comes."""
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    chunked = post("/predict", b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    cases = {
        413: [
            post("/predict", b"").replace(b"Length: 0", b"Length: 1000000000") + bytes(1000),
            post("/predict", b"").replace(b"Length: 0", b"Length: " + b"9" * 18),
            chunked + chunk * 40,
        ],
        431: [
            GET + b"X: " + bytes(90_000).replace(b"\0", b"x") + b"\r\n\r\n",
            GET + b"".join(b"X-%d: 1\r\n" % i for i in range(10_000)) + b"\r\n",
            b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        ],
    }
    for code, requests in cases.items():
        for request in requests:
            said = raw(live.port, request)
            assert status(said) == code and b'{"error": "' in said, request[:80]
            assert said.count(b"HTTP/1.1") == 1


def test_an_answer_is_read_while_a_gigabyte_is_still_sent(live):
    with socket.create_connection(("127.0.0.1", live.port), timeout=5) as one:
        one.sendall(post("/predict", b"").replace(b"Length: 0", b"Length: 1000000000"))
        with contextlib.suppress(OSError):
            for _ in range(160):
                one.sendall(bytes(2**16))
        assert one.recv(4096).startswith(b"HTTP/1.1 413")


def test_a_body_that_is_shorter_than_it_says_times_out(live):
    whole = post("/predict", picture(1))
    started = time.monotonic()
    assert status(raw(live.port, whole[:-10])) == 408
    assert time.monotonic() - started < QUICK.body_seconds + 2


def test_a_body_that_is_longer_than_it_says_is_no_second_request(live):
    """H15: what is left over is never read as a request."""
    evil = GET + b"X-Evil: yes\r\n\r\n"
    image = picture(1)
    said = raw(live.port, post("/predict", image) + evil)
    assert said.count(b"HTTP/1.1") == 1 and status(said) == 200
    assert b"connection: close" in said.lower()


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Content-Length: 5\r\nContent-Length: 5\r\n",
        b"Content-Length: +5\r\n",
        b"Content-Length: 5, 5\r\n",
        b"Content-Length: 0x5\r\n",
        b"Content-Length: -5\r\n",
        b"Content-Length:\r\n",
        b"Content-Length : 5\r\n",
        b"Content-Length: 99999999999999999999999\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
        b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked, x\r\n",
        b"Transfer-Encoding : chunked\r\n",
        b"X: a\r\n folded: b\r\nContent-Length: 5\r\n",
        b"X: a\nContent-Length: 5\r\n",
        b"X: a\x00b\r\nContent-Length: 5\r\n",
        b"X\x01: a\r\nContent-Length: 5\r\n",
        b": a\r\nContent-Length: 5\r\n",
        b"Host: other\r\nContent-Length: 5\r\n",
    ],
)
def test_requests_that_two_servers_would_read_differently_are_refused(live, head):
    """H15."""
    request = b"POST /predict HTTP/1.1\r\nHost: localhost\r\n" + head + b"\r\n"
    said = raw(live.port, request + b"5\r\nhello\r\n0\r\n\r\n" + GET + b"\r\n")
    assert status(said) == 400 and said.count(b"HTTP/1.1") == 1
    assert b'{"error": "' in said and b"connection: close" in said


def test_a_request_without_host_and_what_is_no_http(live):
    for request in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"hello\r\n\r\n",
    ):
        said = raw(live.port, request)
        assert status(said) == 400 and b'{"error": "' in said, request


@pytest.mark.parametrize("cut", [None, 70], ids=["whole", "in pieces"])
def test_a_wish_for_another_protocol_is_passed_over(live, cut):
    """As curl --http2 has it in its first request."""
    wish = ("Connection: Upgrade, HTTP2-Settings, close", "Upgrade: h2c", "HTTP2-Settings: AAEA")
    request = post("/predict", picture(0), *wish)
    cut = cut and request.index(b"grade: h2c")  # where it cannot be seen
    with socket.create_connection(("127.0.0.1", live.port), timeout=5) as one:
        one.sendall(request[:cut])
        if cut:
            time.sleep(0.2)
            one.sendall(request[cut:])
        said = one.recv(65536)
    assert status(said) == (400 if cut else 200)
    assert not cut or b"HTTP/1.1 alone" in said


def test_more_connections_than_allowed_are_told_so():
    with running(limits=replace(QUICK, connections=5, head_seconds=5.0)) as live:
        some = [socket.create_connection(("127.0.0.1", live.port)) for _ in range(5)]
        time.sleep(0.2)
        said = raw(live.port, b"")
        assert status(said) == 503 and b"retry-after: 1" in said
        for one in some:
            one.close()
        time.sleep(0.2)
        assert status(raw(live.port, GET + b"Connection: close\r\n\r\n")) == 200


def test_a_client_that_does_not_read_its_answer_is_hung_up_on():
    limits = replace(QUICK, write_seconds=0.5, idle_seconds=30.0)
    with running(limits=limits) as live:
        live.model.names = ("x" * 30_000_000,)  # more than any socket holds
        with socket.create_connection(("127.0.0.1", live.port)) as one:
            one.sendall(b"GET /card HTTP/1.1\r\nHost: localhost\r\n\r\n")
            until(lambda: live.server.server_state.connections)
            until(lambda: not live.server.server_state.connections)
            came = 0
            with suppress(ConnectionResetError):
                while part := one.recv(2**20):
                    came += len(part)
            assert came < 30_000_000


@pytest.mark.parametrize(
    "count", [400, pytest.param(100_000, marks=pytest.mark.slow)], ids="{} requests".format
)
def test_no_bytes_at_all_make_the_server_fail(live, count):
    """H11: requests with random damage; the answer is one of HTTP's, never 500, or a hang-up."""
    rng, image = random.Random(0), picture(0, (8, 8))
    multipart = b'--b\r\nContent-Disposition: form-data; name="i"; filename="i"\r\n\r\n'
    multipart += image + b"\r\n--b--\r\n"
    infer = b'{"inputs":[{"name":"image","datatype":"BYTES","shape":[1],"data":["aGk="]}]}'
    length = f"Inference-Header-Content-Length: {len(infer)}"
    seeds = [
        GET + b"\r\n",
        post("/predict?top=2&mask=1", image, "Content-Type: image/png"),
        post("/predict", multipart, "Content-Type: multipart/form-data; boundary=b"),
        post("/predict", b'{"image": "aGVsbG8="}', "Content-Type: application/json"),
        post("/v2/models/a-fake/infer", infer),
        post("/v2/models/a-fake/infer", infer, length),
        post("/v2/repository/index", b""),
    ]
    parts = [
        b"\r\n",
        b"\0",
        b"%00",
        b"../",
        b"9" * 40,
        b"-1",
        b"{",
        b"[",
        b"\xff",
        b";",
        b'"',
        b":",
    ]
    statuses: list[int] = []
    for _ in range(count):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(0, 4)):
            place = rng.randrange(len(data))
            match rng.randrange(4):
                case 0:
                    data[place] = rng.randrange(256)
                case 1:
                    del data[place : place + rng.randint(1, 20)]
                case 2:
                    data[place:place] = rng.choice(parts)
                case 3:
                    data = data[:place] + data[place : place + 30] * 2 + data[place:]
            data = data or bytearray(b"x")
        said = first_heard(live.port, bytes(data))
        statuses.append(status(said) if said else 0)
        assert statuses[-1] not in (500, 501, 502), (bytes(data), said)
    assert {0, 200, 400, 422} <= set(statuses)
    with live.client() as client:
        assert client.post("/predict", content=image).status_code == 200
    assert not [t for t in threading.enumerate() if t.name == "vitrail-engine" and not t.is_alive()]
