"""The disks that a run needs: where its folder goes, and where fetched things are kept."""

import fcntl
import os
import shlex
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from vitrail.data import cache_folder
from vitrail.doctor.finding import Finding
from vitrail.errors import DataError
from vitrail.units import bytes_text

_GIB = 2**30
_LEAST_FREE, _LITTLE_FREE = _GIB, 10 * _GIB
_LEAST_ENTRIES = 1000
_TEST_BYTES = 8 * 2**20
_SLOW = 20 * 2**20
"""Bytes a second: a checkpoint of a ViT-B with its optimiser has 1 GiB."""


def place_findings(runs: Path) -> Iterator[Finding]:
    """All of this file; `runs` is the folder that run folders are in, there or not."""
    yield judge_runs(runs)
    try:
        cache = cache_folder()
    except DataError as error:
        yield Finding("cache", "problem", str(error), "export VITRAIL_CACHE=/var/tmp/vitrail")
        return
    yield judge_cache(cache)


def judge_runs(runs: Path) -> Finding:
    """Writes a few MB there, flushes and locks them: what a run does."""
    place = _existing(runs)
    where = str(runs) if runs.exists() else f"{runs} (to be made in {place})"
    try:
        # It has no name, so nothing stays even if the process is killed.
        with tempfile.TemporaryFile(dir=place, prefix=".vitrail-doctor-", buffering=0) as file:
            started = time.perf_counter()
            file.write(bytes(_TEST_BYTES))
            os.fsync(file.fileno())
            seconds = time.perf_counter() - started
            written = file.tell()
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        text = f"{where} cannot be written: {error.strerror}"
        return Finding("run folder", "problem", text, "vitrail train DATA --out ELSEWHERE/run")
    rate = written / max(seconds, 1e-9)
    text = f"{where}, written and flushed at {bytes_text(rate)}/s"
    return _judge_room("run folder", place, text, {"bytes_per_second": round(rate)}, rate < _SLOW)


def judge_cache(cache: Path) -> Finding:
    """Free, and open to this user; nothing is written."""
    place = _existing(cache)
    if not os.access(place, os.W_OK | os.X_OK):
        text = f"{place} cannot be written: nothing can be fetched into {cache}"
        return Finding("cache", "problem", text, "export VITRAIL_CACHE=/var/tmp/vitrail")
    return _judge_room("cache", place, str(cache), {}, slow=False)


def _judge_room(topic: str, place: Path, text: str, numbers: dict[str, int], slow: bool) -> Finding:
    disk = os.statvfs(place)
    free = disk.f_bavail * disk.f_frsize
    text += f", {bytes_text(free)} free"
    numbers |= {"free": free}
    where = shlex.quote(str(place))
    look = f"du -xh {where} | sort -h | tail"
    if free < _LEAST_FREE:
        return Finding(topic, "problem", f"{text}: too little", look, numbers)
    if disk.f_files and disk.f_favail < _LEAST_ENTRIES:
        text += f", but room for only {disk.f_favail} more files"
        return Finding(topic, "problem", text, f"find {where} -xdev | wc -l", numbers)
    if slow:
        text += ": slow, so checkpoints take long"
        return Finding(topic, "note", text, "vitrail train DATA --out ELSEWHERE/run", numbers)
    if free < _LITTLE_FREE:
        return Finding(topic, "note", f"{text}: little for large models", look, numbers)
    return Finding(topic, "ok", text, numbers=numbers)


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path
