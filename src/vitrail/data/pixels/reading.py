"""How images are read: here or in other processes, and what becomes of those that cannot be.

Files are decoded in processes (workers.py), since a decoder may crash or hang; all else happens
in threads of this process, where the decoded images are kept.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from vitrail.data.pixels.cache import Picture, as_array, as_image
from vitrail.data.pixels.decode import UnreadableImage, reduced
from vitrail.data.pixels.workers import GivenUp, Request, Workers, decode, shared_workers
from vitrail.data.sources.source import Source, encoded
from vitrail.data.sources.stream import StreamSource
from vitrail.data.views.preprocess import Preprocess
from vitrail.errors import DataError, UsageError, setting, unknown_name

_FEW = 256
"""So many files are decoded before processes for that have paid off."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How images are read; none of it changes what an image is, but for `decode`.

    A value out of range is a `UsageError`.
    """

    decoders: Literal["auto", "threads", "processes"] = "auto"
    """What decodes. A decoder that crashes or hangs ends a run of threads, but costs processes only
    the image. auto: processes for files, unless they are few."""
    image_seconds: float = 60.0
    """A process that takes longer over one image is stopped, and the image left out."""
    cache: Literal["memory", "disk", "none"] = "memory"
    """Where decoded images are kept: in up to 2 GiB of memory, or in a file in the user's cache
    folder, which may be larger than memory and serves later runs as well."""
    decode: Literal["exact", "fast"] = "exact"
    """fast, for training alone: large JPEGs are reduced while they are decoded, and crops are cut
    at whole pixels and scaled by torch. Much faster, and not the same to the last grey level."""

    def __post_init__(self) -> None:
        for name, kinds in (
            ("decoders", ("auto", "threads", "processes")),
            ("cache", ("memory", "disk", "none")),
            ("decode", ("exact", "fast")),
        ):
            if getattr(self, name) not in kinds:
                raise unknown_name(name, str(getattr(self, name)), kinds)
        if not self.image_seconds > 0:
            raise UsageError(
                f"{setting('image_seconds')} must be above 0, not {self.image_seconds}"
            )


USUAL = Reading()


def decoders(source: Source | StreamSource, count: int, reading: Reading) -> Workers | None:
    """Up to `count` processes to decode the images of `source`; None: threads of this one do it."""
    wanted = {"threads": False, "processes": True, "auto": len(source) >= _FEW}
    if not (wanted[reading.decoders] and sys.executable and _has_files(source)):
        return None
    return shared_workers(count, reading.image_seconds)


def _has_files(source: Source | StreamSource) -> bool:
    if isinstance(source, StreamSource):
        return True
    try:
        return len(source) > 0 and encoded(source, 0) is not None
    except UnreadableImage:
        return True


class Reader:
    """Reads images, here or in `workers`, and remembers which cannot be read."""

    def __init__(self, preprocess: Preprocess, workers: Workers | None) -> None:
        self.preprocess = preprocess
        self.skipped: dict[str, str] = {}
        """Key and reason of each image that could not be read."""
        self._given_up: set[str] = set()
        self._mode = "L" if preprocess.channels == 1 else "RGB"
        self._workers = workers

    def read(
        self,
        source: Source,
        i: int,
        shown: tuple[int, int] | None,
        abandoned: Callable[[], bool],
        *,
        fast: bool = False,
    ) -> Picture | None:
        """Image `i` in the model's mode, for a model that takes `shown`; None: it is unreadable.

        `fast` gives an array. Raises `Abandoned` where other processes decode.
        """
        if self._given_up and source.key(i) in self._given_up:
            return None
        try:
            return self._decode(source, i, shown, abandoned, fast)
        except UnreadableImage as error:
            key = source.key(i)
            if isinstance(error, GivenUp):
                self._given_up.add(key)  # every try costs a process, or a minute
            self.skipped[key] = str(error)
            return None

    def _decode(
        self,
        source: Source,
        i: int,
        shown: tuple[int, int] | None,
        abandoned: Callable[[], bool],
        fast: bool,
    ) -> Picture:
        file = encoded(source, i) if self._workers or fast else None
        if file is None:
            image = reduced(self.preprocess.convert(source.load(i)), shown)
            return as_array(image) if fast else image
        request = Request(file, self._mode, shown, fast, self.preprocess.grey_range)
        pixels = self._workers.run(request, abandoned) if self._workers else decode(request)
        return pixels if fast else as_image(pixels)


def check_damage(skipped: Mapping[str, str], seen: int, most: float, look: str) -> None:
    """Raise `DataError` when of the images `seen` more than the share `most` are damaged.

    `look` says where all of them are listed.
    """
    if len(skipped) <= most * seen:
        return
    shown = "\n".join(f"  {key}: {why}" for key, why in list(skipped.items())[:5])
    raise DataError(
        f"{len(skipped)} of {seen} images cannot be read, more than the {most:.0%} "
        f"that training goes on with:\n{shown}\n"
        f"{look}mend or remove them, or allow more with {setting('data.max_unreadable')}"
    )
