"""Batches of a stream, as loader.py beside it makes them of data that can be read at any place.

Batch `n` of a run holds the stream's images from number `n * batch_size` on, and what happens to
one is keyed by its number. So a batch is the same whoever makes it, and wherever a run goes on;
that the stream's position is kept in checkpoints only spares reading all of it again.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice

import numpy as np
import torch

from vitrail.data.batches.batch import Batch
from vitrail.data.batches.loader import Notify, silent
from vitrail.data.batches.making import Maker, Strong, Wanted, always, check_joinable, share_of
from vitrail.data.pixels.cache import Picture
from vitrail.data.pixels.reading import USUAL, Reader, Reading, check_damage, decoders
from vitrail.data.sources.source import Source
from vitrail.data.sources.stream import HeldImages, Position, StreamSource
from vitrail.data.views.augment import AugmentConfig
from vitrail.data.views.preprocess import Preprocess
from vitrail.errors import setting

_AHEAD = 2
"""Batches whose images are fetched, encoded, while another one is made and trained on."""


class StreamLoader:
    """Endless epochs of augmented batches: an epoch is a number of images, no end of anything.

    Of `part` (which, of how many), each process gets every so many-th image of each batch: together
    they see what one process would. Two images that are mixed are half a batch apart, so that they
    are one process's, however many there are. A batch of which nothing can be read is there all the
    same, with 0 images. Unreadable images are counted as `TrainLoader` counts them.
    """

    def __init__(
        self,
        source: StreamSource,
        preprocess: Preprocess,
        augments: AugmentConfig | Sequence[AugmentConfig],
        *,
        batch_size: int,
        seed: int,
        workers: int = 2,
        max_unreadable: float = 0.01,
        device: torch.device | str = "cpu",
        part: tuple[int, int] = (0, 1),
        reading: Reading = USUAL,
        notify: Notify = silent,
    ) -> None:
        """`batch_size` counts the images of all processes; no batch is larger than an epoch.

        Raises as `TrainLoader` does.
        """
        self.source = source
        self.preprocess = preprocess
        self.batch_size = min(batch_size, len(source))
        augments = (augments,) if isinstance(augments, AugmentConfig) else augments
        check_joinable(augments[0], source.targets)
        self.share = share_of(self.batch_size, part, augments[0], len(source))
        self.device = torch.device(device)
        self._fast = reading.decode == "fast"
        self._maker = Maker(
            preprocess, augments, seed=seed, workers=workers, device=self.device, fast=self._fast
        )
        self._shown = preprocess.size
        self._most = max_unreadable
        self._part = part
        self._notify = notify
        self._stream = source.reader(part)
        self._beginning = self._position = self._stream.position()
        self._taken = 0
        self._order = _in_pairs(self.share)
        self._reader = Reader(preprocess, decoders(source, workers, reading))
        if source.lanes % part[1]:
            notify(
                f"{part[1]} processes cannot share the {source.lanes} lanes of the stream, so each "
                f"reads all of it: {setting('data.stream.lanes')} "
                f"{-(-source.lanes // part[1]) * part[1]}"
            )

    @property
    def skipped(self) -> dict[str, str]:
        """Key and reason of every image that could not be read so far, by this process."""
        return self._reader.skipped

    @property
    def position(self) -> Position:
        """Where the stream is after the last batch that was given out; of this process's lanes."""
        return self._position

    def leave_out(self, skipped: Mapping[str, str]) -> None:
        """Nothing: of a stream, nobody has looked at all images."""

    def seek(self, position: Position) -> None:
        """Let the next epoch begin from a position of all lanes (`joined`), without reading up to
        it. Where the stream has changed, a new pass of it begins there.
        """
        if position["order"] != self.source.order:
            self._notify("the stream is not what it was: a new pass of it begins")
            position = self.source.renewed(position)
        self._stream.seek(position)
        self._position = position

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.source) // self.batch_size

    def epoch(self, epoch: int, first: int = 0, strong: Strong = always) -> Iterator[Batch]:
        """The batches of one epoch, from batch `first` on; no two images of a stream are joined."""
        self._go_to((epoch * len(self) + first) * self.batch_size)
        ends: deque[Position] = deque()
        wanted = self._wanted(len(self) - first, ends)
        with (
            closing(wanted),
            closing(self._maker.made(wanted, self._look, self._skip, self._check)) as batches,
        ):
            for batch in batches:
                self._position = ends.popleft()
                yield batch

    def _go_to(self, number: int) -> None:
        """Let `number` be that of the stream's next image."""
        if self._stream.drawn == number:
            return
        known = self._position if self._position["drawn"] <= number else self._beginning
        self._stream.seek(known)
        while self._stream.drawn < number:
            next(self._stream)

    def _wanted(self, batches: int, ends: deque[Position]) -> Generator[Wanted]:
        """The images of so many batches, fetched ahead in a thread; where each ends goes to `ends`.

        Fetched ahead is nothing that would be lost: a position belongs to what was given out.
        """
        coming: deque[Future[tuple[HeldImages, np.ndarray, Position]]] = deque()
        with ThreadPoolExecutor(1, "stream") as thread:
            try:
                for number in range(batches):
                    for _ in range(min(1 + _AHEAD, batches - number) - len(coming)):
                        coming.append(thread.submit(self._fetch))
                    images, numbers, end = coming.popleft().result()
                    ends.append(end)
                    yield Wanted(images, self._order, numbers[self._order], 0)
            finally:
                thread.shutdown(cancel_futures=True)

    def _fetch(self) -> tuple[HeldImages, np.ndarray, Position]:
        """This process's share of a batch, the numbers of its images, and where it ends."""
        images = list(islice(self._stream, self.share))
        self._taken += len(images)
        held = HeldImages(
            ((image.key, image.content, image.label) for image in images),
            self.source.targets.names,
            self.source.targets.several,
        )
        return held, np.array([image.number for image in images]), self._stream.position()

    def _look(self, source: Source, i: int, abandoned: Callable[[], bool]) -> Picture | None:
        return self._reader.read(source, i, self._shown, abandoned, fast=self._fast)

    def _skip(self, key: str, reason: str) -> None:
        self._reader.skipped[key] = reason

    def _check(self) -> None:
        """Raise `DataError` when more images are damaged than the run allows."""
        if self.skipped:
            share = -(-len(self.source) // self._part[1])
            check_damage(self.skipped, max(share, self._taken), self._most, "")


def _in_pairs(share: int) -> np.ndarray:
    """The places 0 to `share` in the order in which neighbours are half of them apart.

    >>> _in_pairs(7).tolist()
    [0, 3, 1, 4, 2, 5, 6]
    """
    half = share // 2
    return np.r_[np.arange(2 * half).reshape(2, half).T.ravel(), np.arange(2 * half, share)]
