"""A server's life: ready, overloaded, reloaded, drained, killed, and the command that starts it."""

import os
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from PIL import Image

from command import vitrail as command
from deploy.serve.harness import (
    QUICK,
    Fake,
    Process,
    as_file,
    expected,
    heard,
    picture,
    post,
    raw,
    running,
    until,
)
from vitrail.deploy.serve.service import Served
from vitrail.errors import DataError


def test_an_overloaded_server_answers_some_and_tells_the_others_when():
    """H1, for a moment; how many and how soon is measured by benchmarks/serve.py."""
    request = post("/predict", picture(0), "Connection: close")
    with running(Fake(seconds=0.05), batch=1) as live, ThreadPoolExecutor(16) as threads:
        said = list(threads.map(lambda _: raw(live.port, request), range(64)))
        assert live.service.admission.inside == 0
    statuses = [int(one[9:12]) for one in said]
    assert set(statuses) == {200, 429}
    for one, status in zip(said, statuses, strict=True):
        head = one.partition(b"\r\n\r\n")[0].lower()
        assert (b"retry-after: " in head) == (status == 429)


def test_bodies_that_would_fill_the_memory_are_told_to_come_again():
    with running(limits=replace(QUICK, bodies=100_000, body_seconds=5.0)) as live:
        held = socket.create_connection(("127.0.0.1", live.port))
        held.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 90001\r\n\r\n")
        held.sendall(bytes(90_000))
        until(lambda: live.service.held == 90_000)
        with live.client() as client:
            assert client.post("/predict", content=bytes(20_000)).status_code == 429
            held.close()
            until(lambda: live.service.held == 0)
            assert client.post("/predict", content=bytes(20_000)).status_code == 422
        assert live.service.held == 0


def test_a_decoder_that_dies_or_hangs_costs_its_image_alone():
    image = picture(0)
    limits = replace(QUICK, decode_seconds=1.0)
    with running(decoders=1, limits=limits) as live, live.client() as client:
        (first,) = live.service.decoders.pids
        os.kill(first, signal.SIGKILL)
        assert client.post("/predict", content=image).json() == expected(live.model, image)
        (second,) = live.service.decoders.pids
        os.kill(second, signal.SIGSTOP)
        started = time.monotonic()
        assert client.post("/predict", content=image).json() == expected(live.model, image)
        assert time.monotonic() - started < 2 * live.service.limits.decode_seconds
        assert live.service.decoders.pids not in ([first], [second])


def test_an_image_that_needs_more_memory_than_allowed_is_refused():
    large = as_file(Image.new("RGB", (2000, 1900)))
    limits = replace(QUICK, decode_bytes=8 * 2**20)
    with running(limits=limits) as live, live.client() as client:
        answer = client.post("/predict", content=large)
        assert answer.status_code == 422 and "memory" in answer.json()["error"]
        assert client.post("/predict", content=picture(1)).status_code == 200


class Broken(Fake):
    def answers(self, shown):
        raise ValueError("no such operator")


@pytest.mark.parametrize(
    "count", [4, pytest.param(100, marks=pytest.mark.slow)], ids="{} reloads".format
)
def test_a_reload_fails_no_request_and_a_bad_model_keeps_the_old(count, capfd):
    """H9."""
    image, names = picture(0), (("cat", "dog", "owl"), ("red", "green", "blue"))
    with running(Fake(each=0.001), room=64) as live:
        right = [expected(Fake(names=each), image) for each in names]
        opened, done, wrong = [], threading.Event(), []

        def ask(_: int) -> None:
            with live.client() as client:
                while not done.is_set():
                    answer = client.post("/predict", content=image)
                    wrong.append(answer.status_code != 200 or answer.json() not in right)

        def reload() -> None:
            opened.append(1)
            if len(opened) % 4 == 3:
                raise DataError("damaged")
            if len(opened) % 4 == 0:
                return Served.tried(Broken())
            return Served.tried(Fake(names=names[len(opened) % 2], each=0.001))

        live.model.names = names[0]
        live.service._open = reload
        with ThreadPoolExecutor(4) as threads:
            asking = [threads.submit(ask, i) for i in range(4)]
            try:
                for number in range(1, count + 1):
                    before = live.service.served
                    live.loop.call_soon_threadsafe(live.server.reload)
                    until(lambda number=number: _reloads(live) == number)
                    assert (live.service.served is before) == (number % 4 in (0, 3))
                    answered = len(wrong)
                    until(lambda answered=answered: len(wrong) > answered + 4)
            finally:
                done.set()
            for each in asking:
                each.result()
        assert len(wrong) > count and not any(wrong)
    said = capfd.readouterr().err
    assert said.count("the old model stays") == sum(n % 4 in (0, 3) for n in range(1, count + 1))


@pytest.mark.parametrize(
    "count", [1, pytest.param(100, marks=pytest.mark.slow)], ids="{} drains".format
)
def test_a_drain_loses_nothing_that_was_inside(count):
    """H8: readiness turns false first, what is inside is answered, others are told to go."""
    request = post("/predict", picture(0), "Connection: close")
    for _ in range(count):
        with Process.of({"each": 0.05}, room=40, batch=4, grace=0.6) as server:
            asked = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
            for one in asked:
                one.sendall(request)
            until(lambda server=server: _inside(server) >= 15)
            server.signal(signal.SIGTERM)
            until(lambda server=server: status_of(server, "/health/ready") == 503)
            assert status_of(server, "/health/live") == 200
            late = raw(server.port, request)
            assert late.startswith(b"HTTP/1.1 503") and b"retry-after: " in late
            assert b"connection: close" in late
            assert [heard(one)[9:12] for one in asked] == [b"200"] * 20
            assert server.end()[0] == 0
            for one in asked:
                one.close()


def get(server: Process, path: str) -> bytes:
    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    return raw(server.port, head.encode())


def status_of(server: Process, path: str) -> int:
    return int(get(server, path)[9:12])


def _inside(server: Process) -> float:
    found = re.findall(rb"^vitrail_images_inside (\S+)", get(server, "/metrics"), re.MULTILINE)
    return float(found[0])


def _reloads(live) -> float:
    value = live.service.counts.value
    return sum(value("vitrail_reloads_total", result=each) for each in ("loaded", "refused"))


def test_a_second_signal_ends_it_where_it_stands():
    request = post("/predict", picture(0))
    with Process.of({"each": 0.1}, grace=30.0, room=40, batch=1) as server:
        asked = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(30)]
        for one in asked:
            one.sendall(request)
        until(lambda: _inside(server) >= 20)
        server.signal(signal.SIGTERM)
        time.sleep(0.4)
        server.signal(signal.SIGTERM)
        code, said = server.end(5)
        assert code == 1 and re.search(r"stopped with \d+ images inside", said)
        for one in asked:
            one.close()


def test_a_worker_that_is_killed_is_replaced_and_counts_are_of_all():
    with Process.of({}, workers=2, grace=0.2) as server:
        pids = _children(server.process.pid)
        assert len(pids) == 2
        image = picture(0)
        for _ in range(20):
            assert httpx.post(f"{server.address}/predict", content=image).status_code == 200
        metrics = httpx.get(f"{server.address}/metrics").text
        assert "vitrail_images_total 20.0" in metrics
        os.kill(pids[0], signal.SIGKILL)
        until(lambda: len(set(_children(server.process.pid)) - {pids[0]}) == 2)
        now = _children(server.process.pid)
        for _ in range(10):
            assert httpx.post(f"{server.address}/predict", content=image).status_code == 200
        assert "vitrail_images_total 30.0" in httpx.get(f"{server.address}/metrics").text
        server.signal(signal.SIGTERM)
        code, said = server.end()
        assert code == 0 and "a server ended with exit code -9, another starts" in said
        assert not [pid for pid in {*pids, *now} if _lives(pid)]


@pytest.mark.slow
def test_servers_end_with_their_parent():
    with Process.of({}, workers=2, grace=0.0) as server:
        pids = _children(server.process.pid)
        assert len(pids) == 2 and all(map(_lives, pids))
        server.signal(signal.SIGKILL)
        until(lambda: not any(map(_lives, pids)))


def _children(pid: int) -> list[int]:
    """Servers; not what multiprocessing has besides."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [
        int(each) for each in found if b"spawn_main" in Path(f"/proc/{each}/cmdline").read_bytes()
    ]


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_the_command_refuses(tmp_path, capfd):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = [
            (
                ["--port", port],
                2,
                f"cannot listen on 127.0.0.1, port {port}: Address already in use",
            ),
            (["--port", "70000"], 2, "--port must be 0 to 65535"),
            (["--host", "0.0.0.0", "--port", "0"], 2, "lets other machines in: give --token FILE"),
            (["--host", "256.1.1.1", "--port", "0"], 2, "--open"),
            (["--batch", "0"], 2, "--batch must be at least 1"),
            (["--seconds", "nan"], 2, "--seconds must be above 0"),
            (["--grace", "-1"], 2, "--grace must be 0 or more"),
            (["--token", str(tmp_path / "none")], 3, "cannot read the token"),
            (["--token", str(tmp_path / "short")], 2, "is no token"),
            (["--port", "0"], 3, str(tmp_path / "model")),
        ]
        (tmp_path / "short").write_text("secret\n")
        for flags, code, text in cases:
            found, _, said = command(capfd, "serve", tmp_path / "model", *flags)
            assert (found, text in said) == (code, True), said
            assert len(said.splitlines()) == 1
