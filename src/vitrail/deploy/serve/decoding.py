"""From a file's bytes to what the model takes of it, in processes that may die of it.

Whatever a client sends reaches a decoder in a process of its own alone: one with a limit of memory
and of time, that is replaced when it dies. What comes back is numbers; nothing is unpickled here
that such a process has made.
"""

import asyncio
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from vitrail.data.pixels.decode import read_image
from vitrail.data.pixels.workers import Workers
from vitrail.data.views.preprocess import Preprocess
from vitrail.deploy.predict import Shown
from vitrail.deploy.serve.limits import Limits

_SIZES = struct.Struct("<5I")
"""Height and width of the image; channels, height and width of what is shown of it."""


class Sight(NamedTuple):
    """A file's content, and how the model wants it."""

    image: bytes
    preprocess: Preprocess
    max_pixels: int


def see(sight: Sight) -> UInt8[np.ndarray, "1 n 1"]:
    """What a process does: five sizes, then pixels, as one array, which is what `Workers` carry.

    Raises `UnreadableImage`.
    """
    image = read_image(sight.image, max_pixels=sight.max_pixels)
    pixels = sight.preprocess.view(image)
    sizes = _SIZES.pack(image.height, image.width, *pixels.shape)
    return np.frombuffer(sizes + pixels.tobytes(), np.uint8)[None, :, None]


class Decoders:
    """`count` processes. `decoded` hears how many seconds each image took."""

    def __init__(
        self, count: int, limits: Limits, decoded: Callable[[float], None] = lambda seconds: None
    ) -> None:
        self.count = count
        self._limits, self._decoded = limits, decoded
        self._workers = Workers(
            count, seconds=limits.decode_seconds, task=see, memory=limits.decode_bytes
        )
        # As many threads as processes: no thread waits for a process.
        self._threads = ThreadPoolExecutor(count, "vitrail-decoding")

    @property
    def pids(self) -> list[int]:
        """The processes that are there now."""
        return self._workers.pids

    async def show(self, image: bytes, preprocess: Preprocess) -> Shown:
        """What the model takes of an image. Raises `UnreadableImage`.

        Cancelled while it waits for its turn, nothing is done.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._show, image, preprocess)

    def close(self) -> None:
        """End them all, with what they are at."""
        self._workers.close()
        self._threads.shutdown(cancel_futures=True)

    def _show(self, image: bytes, preprocess: Preprocess) -> Shown:
        started = time.monotonic()
        try:
            found = self._workers.run(Sight(image, preprocess, self._limits.pixels))
        finally:
            self._decoded(time.monotonic() - started)
        height, width, *shape = _SIZES.unpack_from(found.data)
        pixels = found.reshape(-1)[_SIZES.size :].reshape(shape)
        return Shown(pixels, preprocess.seen(height, width))
