"""How a bundle's runtime uses this machine best: found by a short measurement, and kept.

A bundle is sealed; what was found lies in vitrail's cache, by the bundle's checksums, the machine's
processor and cores, and the runtime's version.

It is measured in a process of its own, which may take so much memory and no more: a graph can ask
for any amount with a few bytes, and a server that is handed one must go on with its old model.
"""

import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from vitrail import proc
from vitrail.data import cache_folder
from vitrail.deploy.bundle import SUMS, Bundle
from vitrail.deploy.engines import Engine, Setting, engine_of, runtime_of
from vitrail.disk import write_whole
from vitrail.errors import DataError
from vitrail.units import bytes_text

BATCH = 16
_SECONDS = 1.0
"""That each setting is measured, about, of single images and of batches."""
_MEMORY, _MEMORY_OF_MODEL = 4 * 2**30, 8
"""Bytes that measuring may take: so many, and so many times the bundle's."""
_LONGEST = 900.0
"""Seconds that measuring may take."""


class Tuned(NamedTuple):
    """The settings that are best for one image at a time, and for many."""

    alone: Setting
    many: Setting


def tuned(bundle: Bundle) -> Tuned:
    """What is known of a bundle on this machine; measured, for some seconds, where nothing is.

    Raises `DataError` for a bundle whose runtime is not there or does not take its model, and for
    one that takes a process down.
    """
    file = cache_folder() / "engines" / f"{_key(bundle)}.json"
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        return Tuned(Setting(*said["alone"]), Setting(*said["many"]))
    except (OSError, ValueError, TypeError, KeyError):
        found = _measured_apart(bundle)
    with suppress(OSError):  # it is measured again next time
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(found._asdict()).encode())
    return found


def _measured_apart(bundle: Bundle) -> Tuned:
    """`measure`, in a process of its own."""
    most = _MEMORY + _MEMORY_OF_MODEL * bundle.bytes
    code = f"from vitrail.deploy.tuning import answer; answer({str(bundle.folder)!r}, {most})"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=_LONGEST
        )
    except subprocess.TimeoutExpired:
        raise DataError(f"{bundle.folder}: trying it out took over {_LONGEST:.0f} s") from None
    try:
        said = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = done.stderr.strip().rpartition("\n")[2][:300] or f"exit status {done.returncode}"
        raise DataError(
            f"{bundle.folder} is not used: trying it out ended a process that may take "
            f"{bytes_text(most)} of memory: {last}"
        ) from None
    if "refused" in said:
        raise DataError(said["refused"])
    return Tuned(Setting(*said["alone"]), Setting(*said["many"]))


def answer(folder: str, most: int) -> None:
    """What that process does: print, as JSON, what was found, or why nothing was."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    try:
        said: dict[str, Any] = measure(Bundle.open(Path(folder)))._asdict()
    except (DataError, MemoryError) as error:
        said = {"refused": str(error) or f"{folder}: it takes over {bytes_text(most)} of memory"}
    print(json.dumps(said))


def measure(bundle: Bundle) -> Tuned:
    """Try the settings in turns; the medians count."""
    shape = BATCH, bundle.preprocess.channels, *bundle.preprocess.size
    views = [*np.random.default_rng(0).integers(0, 256, shape, np.uint8)]
    engines = {setting: engine_of(bundle, setting) for setting in _settings(bundle)}
    if len(engines) == 1:
        ((only, engine),) = engines.items()
        engine.run(views[:1])
        return Tuned(only, only)
    alone, many = (_fastest(engines, views[:n]) for n in (1, BATCH))
    return Tuned(alone, many)


def _settings(bundle: Bundle) -> Iterator[Setting]:
    """What is worth trying."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Setting()
    if cores and cores > 1 and runtime_of(bundle).streams:
        yield Setting(streams=cores)
        if cores > 2:
            yield Setting(streams=2)


def _fastest(engines: dict[Setting, Engine], views: list[UInt8[np.ndarray, "c h w"]]) -> Setting:
    times: dict[Setting, list[float]] = {setting: [] for setting in engines}
    for engine in engines.values():
        engine.run(views)
    started = time.perf_counter()
    for turn in count():
        if turn > 2 and time.perf_counter() - started > _SECONDS * len(engines):
            break
        for setting, engine in engines.items():
            asked = time.perf_counter()
            engine.run(views)
            times[setting].append(time.perf_counter() - asked)
    return min(times, key=lambda setting: float(np.median(times[setting])))


def _key(bundle: Bundle) -> str:
    try:
        chip = proc.processor().get("model name", "")
        sums = (bundle.folder / SUMS).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {bundle.folder}: {error.strerror}") from error
    package = runtime_of(bundle).packages[0]
    try:
        installed = version(package)
    except PackageNotFoundError:  # told when the engine is made
        installed = ""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine: list[Any] = [platform.machine(), chip, cores, package, installed]
    return hashlib.sha256(sums + json.dumps(machine).encode()).hexdigest()[:32]
