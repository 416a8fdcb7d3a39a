"""Processes that decode: the same pixels, and nothing that a decoder does ends a run."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import faulty
from vitrail.data.pixels import workers as module
from vitrail.data.pixels.decode import Slice, UnreadableImage, read_pixels
from vitrail.data.pixels.workers import Abandoned, GivenUp, Request, Workers, shared_workers
from vitrail.errors import DataError


@pytest.fixture
def image(tmp_path: Path) -> Callable[[str], Path]:
    def save(name: str) -> Path:
        noise = np.random.default_rng(len(name)).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def pool() -> Iterator[Workers]:
    pool = Workers(2, task=faulty.decode, seconds=20.0)
    yield pool
    pool.close()


def gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether this process ends within that time; a zombie has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def test_a_process_that_decodes_begins_with_little() -> None:
    program = "import sys, vitrail.data.pixels.workers; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    imported = set(done.stdout.split())
    assert "vitrail.data.pixels.decode" in imported and "torch" not in imported
    assert len([name for name in imported if name.startswith("vitrail")]) < 15


def test_the_pixels_are_those_of_this_process(image: Callable[[str], Path]) -> None:
    png, jpeg = image("a.png"), image("b.jpg")
    pool = Workers(1)
    for file in (png, jpeg, jpeg.read_bytes(), Slice(jpeg, 0, jpeg.stat().st_size)):
        for settings in ({}, {"mode": "L"}, {"shown": (4, 4)}, {"shown": (4, 4), "fast": True}):
            found = pool.run(Request(file, **settings))
            assert (found == read_pixels(file, **settings)).all()
            assert found.flags.writeable  # torch warns of others
    assert len(pool.pids) == 1
    pool.close()


def test_images_larger_than_the_shared_memory(tmp_path: Path, pool: Workers) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1300, 3), dtype=np.uint8)
    assert noise.nbytes > module._SLAB_BYTES
    Image.fromarray(noise).save(tmp_path / "large.bmp")
    for _ in range(2):
        assert (pool.run(Request(tmp_path / "large.bmp")) == noise).all()


def test_what_is_unreadable_has_the_same_reason(tmp_path: Path, pool: Workers) -> None:
    broken = tmp_path / os.fsdecode(b"caf\xe9.jpg")
    broken.write_bytes(b"no image")
    with pytest.raises(UnreadableImage) as here:
        read_pixels(broken)
    with pytest.raises(UnreadableImage) as there:
        pool.run(Request(broken))
    assert (str(there.value), there.value.reason) == (str(here.value), here.value.reason)
    assert not isinstance(there.value, GivenUp)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("signal-11.png", r"its decoder crashed \(signal 11\)"),
        ("signal-6.png", r"its decoder crashed \(signal 6\)"),
        ("signal-9.png", r"its decoder crashed \(signal 9, as sent .* out of memory\)"),
        ("exit-3.png", r"its decoder crashed \(exit code 3\)"),
    ],
)
def test_a_crash_costs_one_image(
    image: Callable[[str], Path], pool: Workers, name: str, reason: str
) -> None:
    fine = image("fine.png")
    before = pool.run(Request(fine))
    (first,) = pool.pids
    with pytest.raises(GivenUp, match=rf"cannot read the image .*{name}: {reason}"):
        pool.run(Request(image(name)))
    assert gone(first)
    assert (pool.run(Request(fine)) == before).all()
    assert len(pool.pids) == 1


def test_an_image_is_tried_twice(image: Callable[[str], Path], pool: Workers) -> None:
    file = image("once-.png")
    assert (pool.run(Request(file)) == read_pixels(file)).all()
    assert file.with_suffix(".tried").exists()


@pytest.mark.parametrize("name", ["sleep-.png", "spin-.png"])
def test_what_hangs_is_given_up(image: Callable[[str], Path], pool: Workers, name: str) -> None:
    fine = image("fine.png")
    pool.run(Request(fine))
    pool.seconds = 0.3
    (first,) = pool.pids
    with pytest.raises(GivenUp, match=r"it took longer than 0\.3 s to read"):
        pool.run(Request(image(name)))
    assert gone(first)
    pool.seconds = 20.0
    assert pool.run(Request(fine)).shape == (30, 40, 3)


def test_a_stopped_worker_is_replaced(image: Callable[[str], Path], pool: Workers) -> None:
    """As by a disk that does not answer: it is not even able to read the request."""
    fine = image("fine.png")
    pool.run(Request(fine))
    (first,) = pool.pids
    os.kill(first, signal.SIGSTOP)
    pool.seconds = 3.0
    assert (pool.run(Request(fine)) == read_pixels(fine)).all()
    assert gone(first) and pool.pids != [first]


def test_a_death_between_images_is_nobodys_fault(
    image: Callable[[str], Path], pool: Workers
) -> None:
    file = image("once-.png")
    pool.run(Request(image("fine.png")))
    (first,) = pool.pids
    os.kill(first, signal.SIGKILL)
    assert gone(first)
    assert (pool.run(Request(file)) == read_pixels(file)).all()  # this one needs both its tries


def test_a_fault_of_ours_is_no_unreadable_image(
    image: Callable[[str], Path], pool: Workers
) -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError: a fault of ours"):
        pool.run(Request(image("fault-.png")))


def test_threads_share_the_processes(image: Callable[[str], Path], pool: Workers) -> None:
    files = [image(f"{'x' * n}.png") for n in range(1, 9)] + [image("signal-11.png")]

    def read(file: Path) -> np.ndarray | None:
        try:
            return pool.run(Request(file))
        except UnreadableImage:
            return None

    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(read, files * 3))
    for file, pixels in zip(files * 3, found, strict=True):
        if file.stem == "signal-11":
            assert pixels is None
        else:
            assert (pixels == read_pixels(file)).all()
    assert len(pool.pids) <= 2


def test_nobody_waits_for_what_is_abandoned(image: Callable[[str], Path], pool: Workers) -> None:
    over = threading.Event()
    pool.run(Request(image("fine.png")))
    (first,) = pool.pids
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(pool.run, Request(image("sleep-.png")), over.is_set)
        over.set()
        with pytest.raises(Abandoned):
            waiting.result(10)
    assert gone(first)


def test_closing_leaves_nothing(image: Callable[[str], Path]) -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    pool = Workers(2, task=faulty.decode, seconds=5.0)
    with pytest.raises(GivenUp):
        pool.run(Request(image("signal-11.png")))
    pool.run(Request(image("fine.png")))
    pids = pool.pids
    pool.close()
    assert pids and all(gone(pid) for pid in pids) and not pool.pids
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(Abandoned):
        pool.run(Request(image("fine.png")))


def test_loaders_share_workers_until_the_last_is_gone(image: Callable[[str], Path]) -> None:
    one, two = shared_workers(2, 7.0), shared_workers(2, 7.0)
    assert one is two and shared_workers(3, 7.0) is not one
    one.run(Request(image("fine.png")))
    (pid,) = one.pids
    del one
    two.run(Request(image("fine.png")))
    assert two.pids == [pid]
    del two
    assert gone(pid)


def test_where_no_process_can_start_threads_are_named(
    image: Callable[[str], Path], pool: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/no/python")
    with pytest.raises(DataError, match=r"no process can be started .*data\.decoders threads"):
        pool.run(Request(image("fine.png")))
    monkeypatch.undo()
    monkeypatch.setattr(module, "_BOOT", "raise SystemExit(7)")
    with pytest.raises(DataError, match=r"it ended at once \(exit code 7\)"):
        pool.run(Request(image("fine.png")))
    monkeypatch.undo()
    assert pool.run(Request(image("fine.png"))).shape == (30, 40, 3)


PARENT = """
import signal, sys, threading
from pathlib import Path
from data import faulty
from vitrail.data.pixels.workers import Request, Workers

caught = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: caught.append(number))
pool = Workers(2, task=faulty.decode)
pool.run(Request(Path(sys.argv[1])))
if len(sys.argv) > 2:
    for name in sys.argv[2:]:
        threading.Thread(target=pool.run, args=(Request(Path(name)),), daemon=True).start()
    while len(pool.pids) < len(sys.argv) - 2:
        pass
print(*pool.pids, flush=True)
sys.stdin.readline()
pool.run(Request(Path(sys.argv[1])))
print(*caught, *pool.pids, flush=True)
sys.stdin.readline()
"""


def parent(*files: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PARENT, *map(str, files)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )


def test_no_orphans_even_of_a_parent_that_is_killed(image: Callable[[str], Path]) -> None:
    with parent(image("fine.png"), image("sleep-.png"), image("spin-.png")) as process:
        assert process.stdout is not None
        pids = list(map(int, process.stdout.readline().split()))
        assert len(pids) == 2 and not any(gone(pid, 0.1) for pid in pids)
        process.kill()
    assert all(gone(pid) for pid in pids)


def test_signals_to_the_group_are_the_parents(image: Callable[[str], Path]) -> None:
    with parent(image("fine.png")) as process:
        assert process.stdin is not None and process.stdout is not None
        pids = process.stdout.readline().split()
        for number in (signal.SIGINT, signal.SIGTERM):
            os.killpg(process.pid, number)
            os.kill(int(pids[0]), number)  # as what ends all processes of a container does
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline().split() == ["2", "15", *pids]
        process.stdin.close()
        assert process.wait(10) == 0
    assert all(gone(int(pid)) for pid in pids)
