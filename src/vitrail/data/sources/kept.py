"""Arrays that were computed once and are kept in the user's cache, with what is to be said of them.

A file of safetensors: the arrays, and in its header what is said, as JSON, and the SHA-256 of all
that. Whoever keeps something names the file by what it follows from, or says that with it, so that
nothing stale is taken for good. What is damaged, or cannot be written, is not there: it is computed
anew, and the folder may be emptied at any time.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from vitrail.data.sources.samples import cache_folder
from vitrail.disk import whole
from vitrail.errors import DataError


class Kept(NamedTuple):
    """What a file holds."""

    arrays: dict[str, np.ndarray]
    about: Any
    """Plain values, of JSON."""


def kept_place(kind: str, name: str) -> Path | None:
    """The file in the cache for what is called so; None where there is no place for a cache."""
    try:
        return cache_folder() / kind / f"{name}.safetensors"
    except DataError:
        return None


def read_kept(file: Path | None) -> Kept | None:
    """What a file holds; None if there is none, or not every bit is as it was written."""
    if file is None:
        return None
    try:
        with safe_open(file, "np") as stored:
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            header = stored.metadata()
        if header["sha256"] != _checksum(arrays, header["about"]):
            return None
        return Kept(arrays, json.loads(header["about"]))
    except Exception:  # there is none, or whatever the reader throws at damage
        return None


def keep(file: Path | None, arrays: Mapping[str, np.ndarray], about: object) -> None:
    """Write `arrays`, and `about`, plain values; without a place or room for them, do nothing."""
    if file is None:
        return
    said = json.dumps(about)
    header = {"about": said, "sha256": _checksum(arrays, said)}
    with suppress(Exception):  # of the disk, through the writer
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole(file, flush=False) as beside:
            save_file(dict(arrays), beside, header)


def _checksum(arrays: Mapping[str, np.ndarray], about: str) -> str:
    digest = hashlib.sha256(about.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data if array.size else b"")
    return digest.hexdigest()
