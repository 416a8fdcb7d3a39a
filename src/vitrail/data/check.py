"""Look at every image of a data set before hours are spent on it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int, UInt64
from PIL import Image

from vitrail.data.pixels.decode import DEEP, UnreadableImage
from vitrail.data.pixels.greys import depth_of, look_at_depths, range_text
from vitrail.data.sources.source import Source
from vitrail.data.targets import Classes, Targets

_BLOCK = 32  # images a thread: what is under way bounds the memory that is taken


class Spread(NamedTuple):
    """The least, the middle and the greatest of some lengths in pixels."""

    least: int
    median: int
    greatest: int


class DeepGreys(NamedTuple):
    """What `check` found of greys of more than 8 bits."""

    images: int
    least: float
    greatest: float
    range: tuple[float, float] | None
    """The values that training would make black and white."""
    clipped: int
    """Images with values outside of it."""

    def sentence(self) -> str:
        """One line for the user."""
        values = range_text((self.least, self.greatest), " to ")
        text = f"{self.images} images of more than 8 bits: values {values}"
        if self.range is not None:
            text += f"; scaled from {range_text(self.range)}, unless training is told another range"
        return text + (f"; in {self.clipped} images some are outside" if self.clipped else "")


@dataclass(frozen=True)
class CheckReport:
    """What `check` found.

    `unreadable` are (key, reason); `counts` the images of each class, readable or not; `width` and
    `height` are None where nothing is readable. `duplicates` are the keys of images with the same
    pixels, group by group; `conflicts` those groups whose labels differ. `greys` is None where no
    image has greys of more than 8 bits, `deep_colours` the number of images whose colours have.
    """

    images: int
    unreadable: tuple[tuple[str, str], ...]
    counts: dict[str, int]
    width: Spread | None
    height: Spread | None
    duplicates: tuple[tuple[str, ...], ...]
    conflicts: tuple[tuple[str, ...], ...]
    greys: DeepGreys | None = None
    deep_colours: int = 0


def check(
    source: Source, threads: int, on_done: Callable[[int], None] | None = None
) -> CheckReport:
    """Decode every image of `source` in `threads` threads and report what a user should know.

    `on_done` is called with the number of images done, after each.
    """
    n = len(source)
    sizes = np.zeros((n, 2), np.int64)
    digests = np.zeros(n, np.uint64)
    ends = np.full((n, 2), np.nan)
    deep = np.zeros(n, bool)
    unreadable = []
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, n, _BLOCK * threads):
            block = range(start, min(start + _BLOCK * threads, n))
            for i, image in zip(block, pool.map(lambda i: _look(source, i), block), strict=True):
                if isinstance(image, str):
                    unreadable.append((source.key(i), image))
                else:
                    sizes[i], digests[i], ends[i], deep[i] = image
                if on_done:
                    on_done(i + 1)
    readable = np.flatnonzero(sizes[:, 0])
    groups = _equal(digests, readable)
    return CheckReport(
        images=n,
        unreadable=tuple(unreadable),
        counts=_counts(source.targets),
        width=_spread(sizes[readable, 0]),
        height=_spread(sizes[readable, 1]),
        duplicates=tuple(_keys(source, group) for group in groups),
        conflicts=tuple(_keys(source, group) for group in groups if _conflict(source, group)),
        greys=_greys(source, ends[~np.isnan(ends[:, 0])]),
        deep_colours=int(deep.sum()),
    )


class _Seen(NamedTuple):
    size: tuple[int, int]
    digest: int
    ends: tuple[float, float]
    """The least and the greatest value, if its greys are deep."""
    deep_colours: bool


def _look(source: Source, i: int) -> _Seen | str:
    """Width and height of image `i` and a hash of its pixels, or why it cannot be read."""
    try:
        image = source.load(i)
    except UnreadableImage as error:
        return error.reason
    return _Seen(image.size, _digest(image), _ends(image), depth_of(source, i) == "colour")


def _ends(image: Image.Image) -> tuple[float, float]:
    """The least and the greatest finite value of deep greys; NaN where there are none."""
    if image.mode not in DEEP:
        return np.nan, np.nan
    values = np.asarray(image)
    values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if len(values) else (np.nan, np.nan)


def _greys(source: Source, ends: Float64[np.ndarray, "n 2"]) -> DeepGreys | None:
    if not len(ends):
        return None
    least, greatest = float(ends[:, 0].min()), float(ends[:, 1].max())
    found = look_at_depths(source).greys
    chosen = found and found.range
    clipped = int(((ends[:, 0] < chosen[0]) | (ends[:, 1] > chosen[1])).sum()) if chosen else 0
    return DeepGreys(len(ends), least, greatest, chosen, clipped)


def _digest(image: Image.Image) -> int:
    """Of 64 bits: among a million images, a false pair has a chance of 3 in 100 million."""
    pixels = f"{image.mode} {image.size}".encode() + image.tobytes()
    return int.from_bytes(blake2b(pixels, digest_size=8).digest(), "big")


def _equal(digests: UInt64[np.ndarray, " n"], readable: Int[np.ndarray, " r"]) -> list[list[int]]:
    """Groups of two or more images with one digest, in the source's order."""
    _, group, count = np.unique(digests[readable], return_inverse=True, return_counts=True)
    groups: dict[int, list[int]] = {}
    for at in np.flatnonzero(count[group] > 1):
        groups.setdefault(int(group[at]), []).append(int(readable[at]))
    return list(groups.values())


def _keys(source: Source, group: list[int]) -> tuple[str, ...]:
    return tuple(source.key(i) for i in group)


def _counts(targets: Targets) -> dict[str, int]:
    if not isinstance(targets, Classes):
        return {}
    return dict(zip(targets.names, targets.counts().tolist(), strict=True))


def _conflict(source: Source, group: list[int]) -> bool:
    return len({source.targets.text(i) for i in group}) > 1


def _spread(lengths: Int[np.ndarray, " r"]) -> Spread | None:
    if not len(lengths):
        return None
    return Spread(int(lengths.min()), int(np.median(lengths)), int(lengths.max()))
