"""What `vitrail serve` bears: load, overload, slow clients, drains, reloads, a long time.

    python benchmarks/serve.py [--part overload ...] [--full] [--model BUNDLE] [--json]

The model takes its time asleep, as if a device beside the CPU computed (--engine milliseconds an
image), so that the numbers are the server's own; or it is a bundle or a run, by --model. Server and
clients share the machine, and each other's cores.

- load: one client at a time; as many as it can take; and batches of 16, beside the engine alone
- overload: twenty times what it can do, from 1,000 connections
- slow: 500 sockets that trickle a byte a second, or nothing; and who is served meanwhile
- mixed: images of many sizes at once, each answer compared with the one that the image gets alone
- drain: SIGTERM with 100 images inside and more on their way
- reload: a new model again and again while clients ask
- raw: damaged requests, byte by byte
- soak: 70% of what it can do, with clients that hang up, and its memory

Without --full the counts are small. It ends with 1 where anything is not as it must be.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from PIL import Image

# In place of this folder, which has a deploy.py too.
sys.path[0] = str(Path(__file__).parents[1] / "tests")
from deploy.serve.harness import Fake, Process, as_file, expected, first_heard, picture, post  # noqa: E402

COUNTS = {  # small, full
    "load": (5, 30),
    "overload": (10, 60),
    "slow": (100, 500),
    "mixed": (2_000, 100_000),
    "drain": (3, 100),
    "reload": (10, 100),
    "raw": (2_000, 100_000),
    "soak": (60, 3_600),
}
"""Seconds; seconds; sockets; requests; drains; reloads; requests; seconds."""
CONNECTIONS = 1_000
TIMES = 20
"""What is asked of an overloaded server, in what it can do."""


class Answer(NamedTuple):
    """What a request came to."""

    status: int
    """0: no answer."""
    seconds: float
    ended: float
    """By `time.perf_counter`."""
    body: bytes
    retry: bool
    """Whether it says when to come again."""


class Caller(asyncio.Protocol):
    """A client with one connection, kept: as little work for a request as Python can do."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.transport: asyncio.Transport | None = None
        self.buffer = b""
        self.answer: asyncio.Future[bytes] | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport, self.buffer = transport, b""

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        if self.answer and not self.answer.done():
            self.answer.set_result(b"")

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0 or self.answer is None or self.answer.done():
            return
        length = re.search(rb"content-length: (\d+)", self.buffer[:end])
        assert length
        size = end + 4 + int(length[1])
        if len(self.buffer) >= size:
            found, self.buffer = self.buffer[:size], self.buffer[size:]
            self.answer.set_result(found)

    async def ask(self, request: bytes) -> Answer:
        """Send it, and wait for its answer."""
        started = time.perf_counter()
        kept = self.transport is not None and not self.transport.is_closing()
        found = await self._sent(request)
        if kept and not found:  # the server hung up on an idle client just then: as browsers do
            found = await self._sent(request)
        now = time.perf_counter()
        head, _, body = found.partition(b"\r\n\r\n")
        status = int(found[9:12]) if found else 0
        return Answer(status, now - started, now, body, b"retry-after:" in head)

    async def _sent(self, request: bytes) -> bytes:
        loop = asyncio.get_running_loop()
        try:
            if self.transport is None or self.transport.is_closing():
                await loop.create_connection(lambda: self, "127.0.0.1", self.port)
            assert self.transport
            self.answer = loop.create_future()
            self.transport.write(request)
            return await asyncio.wait_for(self.answer, 60)
        except (OSError, TimeoutError):
            return b""

    def close(self) -> None:
        """Hang up."""
        if self.transport:
            self.transport.abort()


class Served:
    """What is measured: a fake model, or --model by the command."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    def start(self, **told: Any) -> Process:
        """With these settings; those of the limits are the server's own."""
        if self.args.model is None:
            told = {"limits": {}, "decoders": self.args.decoders, **told}  # a server's own limits
            return Process.of({"each": self.args.engine / 1000}, **told)
        told = {"port": 0, "decoders": self.args.decoders, **told}
        flags = [part for name, value in told.items() for part in (f"--{name}", str(value))]
        return Process("vitrail", "serve", str(self.args.model), *flags)


def photograph() -> bytes:
    """A JPEG of 480 x 640 as smooth as photographs are: 40 kB."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    return as_file(Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC), "JPEG")


REQUEST = post("/predict", photograph())


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds."""
    if not seconds:
        return {}
    return {f"p{cut}": round(1000 * float(np.percentile(seconds, cut)), 1) for cut in (50, 95, 99)}


def memory(pid: int) -> float:
    """MB in memory of a process and of its children, without what they share with files."""
    try:
        own = re.findall(r"^RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.M)
        tasks = Path(f"/proc/{pid}/task").iterdir()
        below = [child for task in tasks for child in (task / "children").read_text().split()]
    except OSError:  # it has just ended
        return 0.0
    return sum(int(each) / 1024 for each in own) + sum(memory(int(child)) for child in below)


def files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def numbers(server: Process) -> dict[str, float]:
    """The metrics without labels."""
    text = httpx.get(f"{server.address}/metrics").text
    return {name: float(value) for name, value in re.findall(r"^(\w+) (\S+)$", text, re.M)}


async def closed(port: int, clients: int, seconds: float, request: bytes) -> list[Answer]:
    """So many clients, each of which asks again as soon as it is answered."""
    until, answers = time.perf_counter() + seconds, []

    async def one() -> None:
        caller = Caller(port)
        while time.perf_counter() < until:
            answers.append(await caller.ask(request))
        caller.close()

    await asyncio.gather(*(one() for _ in range(clients)))
    return answers


async def steady(
    port: int, rate: float, seconds: float, connections: int, request: bytes
) -> list[Answer]:
    """So many requests a second, at random times, over so many connections."""
    until, answers = time.perf_counter() + seconds, []

    async def one(seed: int) -> None:
        rng, caller = random.Random(seed), Caller(port)
        await asyncio.sleep(rng.uniform(0, connections / rate))
        while time.perf_counter() < until:
            started = time.perf_counter()
            answers.append(await caller.ask(request))
            pause = rng.expovariate(rate / connections) - (time.perf_counter() - started)
            await asyncio.sleep(max(0.0, min(pause, until - time.perf_counter())))
        caller.close()

    await asyncio.gather(*(one(i) for i in range(connections)))
    return answers


def goodput(answers: Sequence[Answer], seconds: float) -> float:
    """Images answered in a second, of the time in which they were asked for."""
    until = min(answer.ended - answer.seconds for answer in answers) + seconds
    good = sum(answer.status == 200 and answer.ended <= until for answer in answers)
    return round(good / seconds, 2)


def peak(served: Served, seconds: float) -> tuple[list[Answer], float]:
    """One client's answers; and the most that are answered in a second, of a few numbers of
    clients that all have room.
    """
    with served.start(room=1000, grace=0.0) as server:
        asyncio.run(closed(server.port, 2, 1, REQUEST))
        alone = asyncio.run(closed(server.port, 1, seconds, REQUEST))
        most = max(
            goodput(asyncio.run(closed(server.port, clients, seconds, REQUEST)), seconds)
            for clients in (2, 4, 8)
        )
    return alone, most


def load(count: int, served: Served) -> dict[str, Any]:
    """Unloaded, at its most, and at batch 16."""
    alone, most = peak(served, count)
    with served.start(room=1000, batch=16, grace=0.0) as server:
        asyncio.run(closed(server.port, 32, 2, REQUEST))
        before, started = numbers(server), time.perf_counter()
        asyncio.run(closed(server.port, 48, count, REQUEST))
        wall, after = time.perf_counter() - started, numbers(server)
    images, calls, engine = (
        after[f"vitrail_{name}"] - before[f"vitrail_{name}"]
        for name in ("images_total", "batch_images_count", "engine_seconds_total")
    )
    overhead = wall / engine - 1
    return {
        "unloaded_ms": spread([a.seconds for a in alone]),
        "peak_images_per_second": most,
        "images_in_a_call": round(images / calls, 1),
        "images_per_second_at_16": round(images / wall, 2),
        "overhead_at_16": round(overhead, 3),
        "problems": [f"overhead {overhead:.1%} of the engine's"] * (overhead > 0.10),
    }


def overload(count: int, served: Served) -> dict[str, Any]:
    """Many times the peak."""
    alone, most = peak(served, max(5, count // 6))
    unloaded = spread([a.seconds for a in alone])
    with served.start(grace=0.0) as server:
        asyncio.run(closed(server.port, 2, 2, REQUEST))
        before = memory(server.process.pid)
        answers = asyncio.run(steady(server.port, TIMES * most, count, CONNECTIONS, REQUEST))
        after = memory(server.process.pid)
    statuses = Counter(a.status for a in answers)
    good = goodput(answers, count)
    accepted = spread([a.seconds for a in answers if a.status == 200])
    refused = spread([a.seconds for a in answers if a.status in (429, 503)])
    problems = []
    if set(statuses) - {200, 429, 503}:
        problems.append(f"statuses {dict(statuses)}")
    if any(a.status in (429, 503) and not a.retry for a in answers):
        problems.append("a refusal without Retry-After")
    if good < 0.95 * most:
        problems.append(f"goodput {good} of {most}")
    if refused["p99"] > 50:
        problems.append(f"refusals take {refused['p99']} ms")
    if accepted["p99"] > 3 * unloaded["p99"]:
        problems.append(f"accepted ones take {accepted['p99']} ms, unloaded {unloaded['p99']}")
    if after - before > 50:
        problems.append(f"memory grows by {after - before:.0f} MB")
    return {
        "seconds": count,
        "peak_images_per_second": most,
        "offered_per_second": round(len(answers) / count, 1),
        "statuses": dict(statuses),
        "goodput": good,
        "goodput_of_peak": round(good / most, 3),
        "unloaded_ms": unloaded,
        "accepted_ms": accepted,
        "accepted_p99_of_unloaded": round(accepted["p99"] / unloaded["p99"], 2),
        "refused_ms": refused,
        "mb_grown": round(after - before, 1),
        "problems": problems,
    }


def slow(count: int, served: Served) -> dict[str, Any]:
    """So many sockets that trickle, and others that ask as usual."""
    kinds = [b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ", REQUEST[: REQUEST.index(b"\r\n\r\n") + 5]]
    kinds += [b"\r\n", b""]

    async def trickle(port: int, kind: bytes) -> float:
        started = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(kind)
        heard = asyncio.ensure_future(reader.read())
        while not heard.done():
            await asyncio.wait([heard], timeout=1.0)
            if kind and not heard.done():
                with contextlib.suppress(OSError):
                    writer.write(b"\r\n" if kind == b"\r\n" else b"a")
        writer.close()
        with contextlib.suppress(OSError):
            heard.exception()
        return time.perf_counter() - started

    async def attacked(port: int) -> tuple[list[float], list[Answer]]:
        usual = asyncio.ensure_future(steady(port, 10.0, 12.0, 4, REQUEST))
        ends = await asyncio.gather(*(trickle(port, kinds[i % 4]) for i in range(count)))
        return list(ends), await usual

    with served.start(grace=0.0) as server:
        asyncio.run(closed(server.port, 2, 2, REQUEST))
        calm = asyncio.run(steady(server.port, 10.0, 12.0, 4, REQUEST))
        ends, others = asyncio.run(attacked(server.port))
    before, during = (spread([a.seconds for a in some]) for some in (calm, others))
    problems = []
    if max(ends) > 10:
        problems.append(f"one was open for {max(ends):.1f} s")
    if during["p99"] > 1.5 * before["p99"]:
        problems.append(f"others take {during['p99']} ms, for {before['p99']}")
    if {a.status for a in others} != {200}:
        problems.append(f"others got {Counter(a.status for a in others)}")
    return {
        "sockets": count,
        "longest_open_seconds": round(max(ends), 2),
        "others_before_ms": before,
        "others_during_ms": during,
        "problems": problems,
    }


def mixed(count: int, served: Served) -> dict[str, Any]:
    """Each answer beside the one that the image gets alone."""
    rng = random.Random(0)
    images = [picture(i, (rng.randint(1, 300), rng.randint(1, 300)), "PNG") for i in range(200)]
    requests = [post("/predict", image) for image in images]

    async def asked(port: int) -> tuple[int, list[Any]]:
        single = Caller(port)
        right = [(await single.ask(request)).body for request in requests]
        left, wrong = iter(range(count)), []

        async def one(seed: int) -> None:
            rng, caller = random.Random(seed), Caller(port)
            for _ in left:
                k = rng.randrange(len(requests))
                answer = await caller.ask(requests[k])
                if answer.status != 200 or not same(answer.body, right[k]):
                    wrong.append((k, answer))
            caller.close()

        await asyncio.gather(*(one(i) for i in range(24)))
        single.close()
        if served.args.model is None:
            for image, body in zip(images, right, strict=True):
                wrong += [body] * (json.loads(body) != expected(Fake(), image))
        return count, wrong

    with served.start(room=1000, grace=0.0) as server:
        done, wrong = asyncio.run(asked(server.port))
        stats = httpx.get(f"{server.address}/v2/models/stats").json()["model_stats"][0]
    return {
        "requests": done,
        "wrong": len(wrong),
        "images_in_a_call": round(stats["inference_count"] / stats["execution_count"], 2),
        "problems": [f"{len(wrong)} wrong: {wrong[:3]}"] if wrong else [],
    }


def same(one: bytes, other: bytes) -> bool:
    """Whether two answers are equal; numbers within 1e-5."""
    if one == other:
        return True
    pair = [_numbers(json.loads(body)) for body in (one, other)]
    return pair[0].keys() == pair[1].keys() and all(
        abs(value - pair[1][key]) <= 1e-5 for key, value in pair[0].items()
    )


def _numbers(value: Any, path: str = "") -> dict[str, float]:
    if isinstance(value, dict | list):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, one in parts for k, v in _numbers(one, f"{path}/{key}").items()}
    return {path: float(value)} if isinstance(value, int | float) else {f"{path}={value}": 0.0}


def drain(count: int, served: Served) -> dict[str, Any]:
    """SIGTERM with many inside."""
    lost, late, codes, longest = 0, Counter[int](), Counter[int](), 0.0

    async def once(server: Process) -> list[Answer]:
        callers = [Caller(server.port) for _ in range(200)]
        small = post("/predict", picture(1, (64, 64)))
        asked = [asyncio.ensure_future(caller.ask(small)) for caller in callers]
        while numbers(server)["vitrail_images_inside"] < 100:
            await asyncio.sleep(0.01)
        server.signal(signal.SIGTERM)
        await asyncio.sleep(0.1)
        assert httpx.get(f"{server.address}/health/ready").status_code == 503
        late[(await Caller(server.port).ask(small)).status] += 1
        return await asyncio.gather(*asked)

    for _ in range(count):
        with served.start(room=200, batch=8, grace=1.0) as server:
            answers = asyncio.run(once(server))
            started = time.perf_counter()
            codes[server.end()[0]] += 1
            longest = max(longest, time.perf_counter() - started)
            lost += sum(answer.status != 200 for answer in answers)
    problems = [f"{lost} lost"] if lost else []
    problems += [f"exit codes {codes}"] if set(codes) != {0} else []
    problems += [f"who came late got {late}"] if set(late) != {503} else []
    return {
        "drains": count,
        "inside": 200,
        "lost": lost,
        "who_came_late": dict(late),
        "exit_codes": dict(codes),
        "longest_end_seconds": round(longest, 2),
        "problems": problems,
    }


def reload(count: int, served: Served) -> dict[str, Any]:
    """SIGHUP again and again."""

    async def asked(server: Process) -> list[Answer]:
        asking = asyncio.ensure_future(steady(server.port, 20.0, 0.35 * count, 8, REQUEST))
        loaded = 0.0
        for _ in range(count):
            server.signal(signal.SIGHUP)
            while (now := await asyncio.to_thread(_reloads, server.address)) == loaded:
                await asyncio.sleep(0.02)
            loaded = now
            await asyncio.sleep(0.2)
        return await asking

    with served.start(room=100, grace=0.0) as server:
        answers = asyncio.run(asked(server))
        loaded = _reloads(server.address)
    statuses = Counter(answer.status for answer in answers)
    return {
        "reloads": int(loaded),
        "statuses": dict(statuses),
        "problems": [f"statuses {statuses}"] if set(statuses) != {200} else [],
    }


def _reloads(address: str) -> float:
    text = httpx.get(f"{address}/metrics").text
    found = re.findall(r'^vitrail_reloads_total\{result="loaded"\} (\S+)', text, re.M)
    return float(found[0]) if found else 0.0


def raw(count: int, served: Served) -> dict[str, Any]:
    """Damaged requests; none may be answered with 500, and the server must be there afterwards."""
    rng, statuses = random.Random(0), Counter[str]()
    small = picture(0, (8, 8))
    seeds = [
        b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n",
        post("/predict?top=2", small, "Content-Type: image/png"),
        post("/predict", b'{"image": "aGVsbG8="}', "Content-Type: application/json"),
        post("/v2/models/a-fake/infer", b'{"inputs": []}'),
    ]
    problems = []
    with served.start(room=1000, grace=0.0) as server:
        for _ in range(count):
            data = bytearray(rng.choice(seeds))
            for _ in range(rng.randint(0, 3)):
                place = rng.randrange(len(data))
                if rng.random() < 0.5:
                    data[place] = rng.randrange(256)
                else:
                    data[place : place + rng.randint(0, 9)] = rng.randbytes(rng.randint(0, 9))
            said = first_heard(server.port, bytes(data))
            statuses[said[9:12].decode() if said else "none"] += 1
            if said[9:12] in (b"500", b"501", b"502"):
                problems.append(repr((bytes(data), said))[:500])
        alive = httpx.post(f"{server.address}/predict", content=small).status_code
    problems += [f"afterwards: {alive}"] if alive != 200 else []
    return {"requests": count, "statuses": dict(statuses), "problems": problems[:5]}


def soak(count: int, served: Served) -> dict[str, Any]:
    """A long time, with clients that hang up."""
    _, most = peak(served, 5)
    samples = []

    async def asked(server: Process) -> list[Answer]:
        usual = asyncio.ensure_future(steady(server.port, 0.7 * most, count, 16, REQUEST))
        rng, until = random.Random(0), time.perf_counter() + count
        while time.perf_counter() < until:
            samples.append((memory(server.process.pid), files(server.process.pid)))
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", server.port)
                writer.write(REQUEST[: rng.randrange(len(REQUEST))])
                await asyncio.sleep(rng.uniform(0, 1))
                writer.transport.abort()
        return await usual

    with served.start(grace=0.0) as server:
        answers = asyncio.run(asked(server))
    warm = samples[len(samples) // 6 :]
    part = max(1, len(warm) // 10)
    ends = [float(np.median([s[0] for s in some])) for some in (warm[:part], warm[-part:])]
    fds = [float(np.median([s[1] for s in some])) for some in (warm[:part], warm[-part:])]
    statuses = Counter(answer.status for answer in answers)
    problems = []
    if ends[1] - ends[0] > 20:
        problems.append(f"memory grows from {ends[0]:.0f} to {ends[1]:.0f} MB")
    if fds[1] - fds[0] > 5:
        problems.append(f"open files grow from {fds[0]:g} to {fds[1]:g}")
    if set(statuses) - {200, 429}:
        problems.append(f"statuses {statuses}")
    return {
        "seconds": count,
        "requests": len(answers),
        "statuses": dict(statuses),
        "mb": [round(end, 1) for end in ends],
        "open_files": fds,
        "problems": problems,
    }


PARTS: dict[str, Callable[[int, Served], dict[str, Any]]] = {
    "load": load,
    "overload": overload,
    "slow": slow,
    "mixed": mixed,
    "drain": drain,
    "reload": reload,
    "raw": raw,
    "soak": soak,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--count", type=int, help="another count than the part's own")
    parser.add_argument("--engine", type=float, default=25.0, help="milliseconds an image")
    parser.add_argument("--model", type=Path, help="a bundle or a run instead")
    parser.add_argument("--decoders", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    for name in args.part:
        started = time.perf_counter()
        result = PARTS[name](args.count or COUNTS[name][args.full], Served(args))
        result["wall_seconds"] = round(time.perf_counter() - started)
        results[name] = result
        print(f"{name}: {'NOT as it must be' if result['problems'] else 'as it must be'}")
        for key, value in result.items():
            if key != "problems":
                print(f"  {key:<28}{value}")
        for problem in result["problems"]:
            print(f"  PROBLEM {problem}")
        sys.stdout.flush()
    if args.json:
        machine = {
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": " ".join(["python", *sys.argv]),
            "python": platform.python_version(),
            "cores": len(os.sched_getaffinity(0)),
            "load_average": os.getloadavg(),
        }
        print(json.dumps({**machine, **results}))
    sys.exit(any(result["problems"] for result in results.values()))


if __name__ == "__main__":
    main()
