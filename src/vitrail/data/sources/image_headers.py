"""How large images are, and how EXIF turns them, by their headers: of a whole data set at once, and
from the user's cache where it is known of these files as they are now.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from vitrail.data.pixels.decode import UnreadableImage
from vitrail.data.pixels.values import read_header
from vitrail.data.sources.kept import keep, kept_place, read_kept
from vitrail.data.sources.source import file_stamp

_VERSION = 2  # of what is cached
_FEW = 256
"""Headers that are read faster than a cache is."""


class Headers(NamedTuple):
    """Of `n` images."""

    stored: Int64[np.ndarray, "n 2"]
    """(height, width) as they lie in the file; 0 where nobody can read it."""
    orientation: Int64[np.ndarray, " n"]
    """By EXIF: 1 is upright; from 5 on, sides are exchanged."""

    @property
    def lying(self) -> Bool[np.ndarray, " n"]:
        """Whether EXIF exchanges the sides."""
        return self.orientation >= 5

    @property
    def shown(self) -> Int64[np.ndarray, "n 2"]:
        """(height, width) upright."""
        return np.where(self.lying[:, None], self.stored[:, ::-1], self.stored)


def read_headers(root: str, paths: Sequence[str]) -> Headers:
    """Of the images at `paths` in the folder `root`; what cannot be read is of size 0."""
    place = None
    if len(paths) > _FEW:
        digest = hashlib.sha256(f"{_VERSION} {root}".encode("utf-8", "surrogateescape"))
        for path in paths:
            told = f"\0{path}\0{file_stamp(f'{root}/{path}')}"
            digest.update(told.encode("utf-8", "surrogateescape"))
        place = kept_place("headers", digest.hexdigest()[:32])
        if (kept := read_kept(place)) is not None and len(kept.arrays["headers"]) == len(paths):
            return _headers(kept.arrays["headers"])
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(lambda path: _row(Path(root, path)), paths))
    found = np.array(rows, np.int64).reshape(-1, 3)
    keep(place, {"headers": found}, {})
    return _headers(found)


def _headers(found: Int64[np.ndarray, "n 3"]) -> Headers:
    return Headers(found[:, :2], found[:, 2])


def _row(file: Path) -> tuple[int, int, int]:
    try:
        header = read_header(file)
    except UnreadableImage:
        return 0, 0, 1
    return *header.size, header.orientation if header.turned else 1
