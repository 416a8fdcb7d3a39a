"""Decoded images, kept for the next epoch: in memory while they fit, or in a file.

The file lies in the user's cache folder, and is for all runs and processes that see the same images
at the same size. Its name is the SHA-256 of what its content follows from: every image by key and
stamp, the size, and how it is decoded. So what was changed is never served stale, and the folder
may be emptied at any time.

    NAME.pixels   the pixels, image after image, in the order in which they were decoded
    NAME.index    for each image its place in there, its shape, and a checksum

Several processes may write at once: each appends under a lock, and then says in the index where. A
place counts only if the checksum is right, so a torn write, by whatever end, is a missing image.
Both are read as files, whose pages the system keeps in memory as it does for a map: but a disk that
fails is then an error, where a map would end the process.
"""

import errno
import fcntl
import hashlib
import math
import os
import struct
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vitrail.data.sources.samples import cache_folder
from vitrail.data.sources.source import Source
from vitrail.units import bytes_text

Pixels = UInt8[np.ndarray, "_a _b _c"]
Picture = Image.Image | Pixels

MEMORY_BYTES = 2 * 2**30
"""What of memory a cache takes, for each loader in each process."""
LEAVE_FREE = 2 * 2**30
"""So much of the disk is left for other things, such as the checkpoints of the run."""

_FORMAT = "vitrail decoded images 1"
_PLACE = struct.Struct("<QHHHxxI")
"""Where an image starts, its three sides, and the CRC-32 of its pixels and of its number."""
_LOOK_BYTES = 64 * 2**20
"""After so much was written it is seen how much of the disk is free."""


class Cache(Protocol):
    """Keeps images by their number."""

    def get(self, i: int) -> Picture | None: ...

    def put(self, i: int, picture: Picture) -> None: ...


class MemoryCache:
    """Those that come first, up to so many bytes of pixels; the others not at all."""

    def __init__(self, limit: int = MEMORY_BYTES) -> None:
        self._kept: dict[int, Picture] = {}
        self._free = limit
        self._lock = threading.Lock()

    def get(self, i: int) -> Picture | None:
        return self._kept.get(i)

    def put(self, i: int, picture: Picture) -> None:
        size = _bytes(picture)
        with self._lock:
            if i not in self._kept and size <= self._free:
                self._free -= size
                self._kept[i] = picture


def as_array(picture: Picture) -> Pixels:
    """The pixels `[h w c]` of an image."""
    if isinstance(picture, np.ndarray):
        return picture
    pixels = np.array(picture)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def as_image(picture: Picture) -> Image.Image:
    """An image in mode RGB or L of pixels `[h w c]`."""
    if isinstance(picture, Image.Image):
        return picture
    return Image.fromarray(picture.squeeze(2) if picture.shape[2] == 1 else picture)


def _bytes(picture: Picture) -> int:
    if isinstance(picture, Image.Image):
        return picture.width * picture.height * len(picture.getbands())
    return picture.nbytes


class DiskCache:
    """A file of arrays, uint8 of three dimensions.

    Where it cannot be written, what is there is still read, and `notify` is told, once.
    """

    def __init__(self, file: Path, count: int, notify: Callable[[str], None]) -> None:
        """`file` is the path without its two endings, for `count` images. Raises `OSError`."""
        self.file = file.with_name(file.name + ".pixels")
        self._notify = notify
        self._lock = threading.Lock()
        # Places whose pixels were found whole: what the system has in memory does not change.
        self._known = np.zeros((count, _PLACE.size), np.uint8)
        self._told = 0
        self._unlooked = _LOOK_BYTES
        self._full = False
        file.parent.mkdir(parents=True, exist_ok=True)
        self._pixels = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._index = os.open(file.with_name(file.name + ".index"), os.O_RDWR | os.O_CREAT)
        except OSError:
            os.close(self._pixels)
            raise

    def __del__(self) -> None:
        for number in (getattr(self, "_pixels", None), getattr(self, "_index", None)):
            if number is not None:
                os.close(number)

    @property
    def bytes(self) -> int:
        """How large it is now, by all who write."""
        return os.fstat(self._pixels).st_size

    def get(self, i: int) -> Pixels | None:
        """The pixels of image `i`; None where they are not there, or not whole."""
        known = bool(self._known[i].any())
        try:
            place = (
                self._known[i].tobytes()
                if known
                else os.pread(self._index, _PLACE.size, i * _PLACE.size)
            )
            if len(place) < _PLACE.size:
                return None
            start, *shape, check = _PLACE.unpack(place)
            if not 0 < math.prod(shape) <= self.bytes - start:
                return None
            pixels = np.empty(shape, np.uint8)
            if os.preadv(self._pixels, [pixels.data], start) != pixels.nbytes:
                return None
        except OSError:
            return None
        if not known:
            if zlib.crc32(pixels.data, i) != check:
                return None
            self._known[i] = np.frombuffer(place, np.uint8)
        return pixels

    def put(self, i: int, picture: Picture) -> None:
        """Keep the pixels of image `i`, while there is room."""
        with self._lock:
            if self._full:
                return
            try:
                self._append(i, np.ascontiguousarray(as_array(picture)))
            except OSError as error:
                self._full = True
                self._notify(
                    f"decoded images are not kept on the disk any more ({error.strerror}): "
                    f"{self.file} has {bytes_text(self.bytes)}; the others are decoded every time"
                )

    def tell_growth(self) -> None:
        """Say how large it is, if it has grown since that was last said."""
        if self.bytes > self._told:
            self._told = self.bytes
            self._notify(f"decoded images take {bytes_text(self._told)} in {self.file}")

    def _append(self, i: int, pixels: Pixels) -> None:
        self._unlooked += pixels.nbytes
        if self._unlooked >= _LOOK_BYTES:
            found = os.fstatvfs(self._pixels)
            free = found.f_bavail * found.f_frsize
            if free < LEAVE_FREE + _LOOK_BYTES:
                raise OSError(errno.ENOSPC, f"only {bytes_text(free)} of the disk are free")
            self._unlooked = 0
        fcntl.flock(self._pixels, fcntl.LOCK_EX)
        try:
            start = os.fstat(self._pixels).st_size
            _write(self._pixels, pixels, start)
        finally:
            fcntl.flock(self._pixels, fcntl.LOCK_UN)
        place = _PLACE.pack(start, *pixels.shape, zlib.crc32(pixels.data, i))
        _write(self._index, np.frombuffer(place, np.uint8), i * _PLACE.size)


def _write(file: int, content: UInt8[np.ndarray, "..."], start: int) -> None:
    if os.pwrite(file, content.data, start) != content.nbytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def open_disk_cache(
    source: Source, what: object, notify: Callable[[str], None]
) -> "DiskCache | None":
    """The file for the images of `source`; `what` is how they are decoded, a plain value.

    None where there can be no file, which `notify` is told. Raises `DataError` where no cache
    folder is known.
    """
    name = hashlib.sha256(f"{_FORMAT} {what!r}".encode())
    for i in range(len(source)):
        name.update(f"\0{source.key(i)}\0{source.stamp(i)}".encode())
    file = cache_folder() / "decoded" / name.hexdigest()[:32]
    try:
        cache = DiskCache(file, len(source), notify)
    except OSError as error:
        notify(f"decoded images cannot be kept in {file.parent}: {error.strerror}")
        return None
    cache.tell_growth()
    return cache
