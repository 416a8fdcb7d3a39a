"""How a bundle's runtime uses this machine best: found by a short measurement, and kept.

A bundle is sealed; what was found lies in vitrail's cache, by the bundle's checksums, the machine's
processor and cores, and the runtime's version.
"""

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from vitrail import proc
from vitrail.data import cache_folder
from vitrail.deploy.bundle import SUMS, Bundle
from vitrail.deploy.engines import Engine, Setting, engine_of, runtime_of
from vitrail.disk import write_whole
from vitrail.errors import DataError

BATCH = 16
_SECONDS = 1.0
"""That each setting is measured, about, of single images and of batches."""


class Tuned(NamedTuple):
    """The settings that are best for one image at a time, and for many."""

    alone: Setting
    many: Setting


def tuned(bundle: Bundle) -> Tuned:
    """What is known of a bundle on this machine; measured, for some seconds, where nothing is."""
    file = cache_folder() / "engines" / f"{_key(bundle)}.json"
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        return Tuned(Setting(*said["alone"]), Setting(*said["many"]))
    except (OSError, ValueError, TypeError, KeyError):
        found = measure(bundle)
    with suppress(OSError):  # it is measured again next time
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(found._asdict()).encode())
    return found


def measure(bundle: Bundle) -> Tuned:
    """Try the settings in turns; the medians count."""
    shape = BATCH, bundle.preprocess.channels, *bundle.preprocess.size
    views = [*np.random.default_rng(0).integers(0, 256, shape, np.uint8)]
    engines = {setting: engine_of(bundle, setting) for setting in _settings(bundle)}
    if len(engines) == 1:
        (only,) = engines
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
