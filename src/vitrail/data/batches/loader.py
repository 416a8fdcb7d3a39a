"""Images to batches, of data that can be read at any place: order, cache, evaluation.

What a batch holds is a pure function of (seed, epoch, position): the number of threads, of worker
processes and of processes that train together, the cache, and the place where a run was resumed
change nothing. An image that cannot be read is left out of its batch and remembered in `skipped`.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from vitrail.data import keyed
from vitrail.data.batches.batch import Batch
from vitrail.data.batches.making import (
    Maker,
    Strong,
    View,
    Wanted,
    always,
    check_joinable,
    checked_part,
    no_images,
    normalised,
    on_device,
    share_of,
)
from vitrail.data.pixels.cache import (
    Cache,
    DiskCache,
    MemoryCache,
    Picture,
    as_image,
    open_disk_cache,
)
from vitrail.data.pixels.decode import UnreadableImage
from vitrail.data.pixels.reading import USUAL, Reader, check_damage, decoders
from vitrail.data.pixels.reading import Reading as Reading
from vitrail.data.sources.source import Source
from vitrail.data.sources.stream import Position
from vitrail.data.views.augment import AugmentConfig
from vitrail.data.views.canvas import Canvas, collate
from vitrail.data.views.preprocess import Preprocess
from vitrail.errors import UsageError, setting

Notify = Callable[[str], None]
"""Told of what a user should know of the caches."""


def silent(sentence: str) -> None:
    """Tells nobody."""


class _Shelf:
    """Decoded images for training, kept as far as they may be."""

    def __init__(
        self,
        reader: Reader,
        cache: Cache | None,
        *,
        fast: bool,
        most: float,
        share: int,
        images: int,
    ) -> None:
        """Of all `images`, `share` are this process's; a part `most` of them may be damaged."""
        self.reader = reader
        self.cache = cache
        self._fast = fast
        self._most = most
        self._share = share
        self._seen = np.zeros(images, bool)

    def picture(self, source: Source, i: int, abandoned: Callable[[], bool]) -> Picture | None:
        """Image `i` at no more than about twice the model's size; None if it cannot be read.

        It is shrunk cache or no cache, so that the memory at hand never changes what a model sees.
        """
        self._seen[i] = True
        kept = self.cache.get(i) if self.cache else None
        if kept is not None:
            return kept if self._fast else as_image(kept)
        size = self.reader.preprocess.size
        found = self.reader.read(source, i, size, abandoned, fast=self._fast)
        if found is not None and self.cache:
            self.cache.put(i, found)
        return found

    position = None

    def seek(self, position: Position) -> None:
        """Nothing: a batch follows from its number alone."""

    def skip(self, key: str, reason: str) -> None:
        """An image that is left out for what is said of it."""
        self.reader.skipped[key] = reason

    def leave_out(self, skipped: Mapping[str, str]) -> None:
        """Images that a look at all of them has found unreadable."""
        self._seen[:] = True
        self.reader.skipped.update(skipped)
        self.check()

    def check(self) -> None:
        """Raise `DataError` when more images are damaged than the run allows."""
        if skipped := self.reader.skipped:
            # As epochs go by, a process sees other images than its first share of them.
            seen = max(self._share, int(self._seen.sum()))
            look = "see them all with: vitrail data check DATA; "
            check_damage(skipped, seen, self._most, look)


class TrainLoader:
    """Endless, keyed epochs of augmented batches; the last, partial batch of each is left out.

    Of `part` (which, of how many), each process gets its own rows of every batch: together they see
    what one process would, and where images are mixed in pairs, no pair is divided. A batch of
    which nothing can be read is there all the same, with 0 images, so that all processes take the
    same steps. Unreadable images are counted by each process, against its own share of the images,
    or as many as it has looked at, if those are more.
    """

    def __init__(
        self,
        source: Source,
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
        kept_views: int = 0,
    ) -> None:
        """`batch_size` counts the images of all processes; no batch is larger than the data.
        `kept_views`: after so many epochs the same views come again, in another order; 0: never.

        Raises `UsageError` for images that are to be mixed or joined and cannot be, and for a batch
        that the processes cannot share evenly.
        """
        self.source = source
        self.preprocess = preprocess
        self.batch_size = min(batch_size, len(source))
        augments = (augments,) if isinstance(augments, AugmentConfig) else augments
        if augments[0].joins:
            check_joinable(augments[0], source.targets)
            if kept_views:
                raise UsageError(
                    f"{setting('tune.kept_views', kept_views)} shows the same views again, and "
                    f"mosaic and blend end before the run does: leave one of them out"
                )
        self.share = share_of(self.batch_size, part, augments[0], len(source))
        self.part = part
        self.seed = seed
        self.kept_views = kept_views
        self.device = torch.device(device)
        fast = reading.decode == "fast"
        self._maker = Maker(
            preprocess, augments, seed=seed, workers=workers, device=self.device, fast=fast
        )
        decoded = (*preprocess.size, preprocess.channels, preprocess.grey_range, reading.decode)
        self._shelf = _Shelf(
            Reader(preprocess, decoders(source, workers, reading)),
            _cache(source, reading, ("train", *decoded), notify),
            fast=fast,
            most=max_unreadable,
            share=-(-len(source) // part[1]),
            images=len(source),
        )

    @property
    def skipped(self) -> dict[str, str]:
        """Key and reason of every image that could not be read so far, by this process."""
        return self._shelf.reader.skipped

    position = None

    def seek(self, position: Position) -> None:
        """Nothing: a batch follows from its number alone."""

    def leave_out(self, skipped: Mapping[str, str]) -> None:
        """Count images that a look at all of them found unreadable. `DataError` for too many."""
        self._shelf.leave_out(skipped)

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.source) // self.batch_size

    def epoch(self, epoch: int, first: int = 0, strong: Strong = always) -> Iterator[Batch]:
        """The batches of one epoch, from batch `first` on; `strong` are those that may have mosaics
        and blends.
        """
        order = keyed.permutation(self.seed, epoch, len(self.source))
        batches = order[: len(self) * self.batch_size].reshape(len(self), self.part[1], self.share)
        views = epoch % self.kept_views if self.kept_views else epoch
        wanted = (
            Wanted(self.source, i, i, views, strong(number))
            for number, i in enumerate(batches[first:, self.part[0]], first)
        )
        yield from self._maker.made(
            wanted, self._shelf.picture, self._shelf.skip, self._shelf.check
        )
        if isinstance(self._shelf.cache, DiskCache):
            self._shelf.cache.tell_growth()


class EvalLoader:
    """Every readable image once, in order, as `preprocess` shows it.

    Of `part` (which, of how many), each process gets a run of the images, the first ones for the
    first. All have the same number of batches; where there are several processes, a batch may have
    0 images.
    """

    def __init__(
        self,
        source: Source,
        preprocess: Preprocess,
        *,
        batch_size: int = 64,
        workers: int = 2,
        device: torch.device | str = "cpu",
        part: tuple[int, int] = (0, 1),
        reading: Reading = USUAL,
        notify: Notify = silent,
    ) -> None:
        which, parts = checked_part(part)
        self.source = source
        self.preprocess = preprocess
        self.batch_size = batch_size
        self.workers = workers
        self.device = torch.device(device)
        self.part = part
        self._own = range(which * len(source) // parts, (which + 1) * len(source) // parts)
        self._reader = Reader(preprocess, decoders(source, workers, reading))
        self._cache = _cache(source, reading, ("evaluation", preprocess.to_dict()), notify)
        self._unreadable: set[int] = set()

    @property
    def skipped(self) -> dict[str, str]:
        """Key and reason of every image that could not be read so far, by this process."""
        return self._reader.skipped

    def __len__(self) -> int:
        """Batches of one pass."""
        return -(-len(self.source) // (self.part[1] * self.batch_size))

    def __iter__(self) -> Iterator[Batch]:
        over = threading.Event()
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for number in range(len(self)):
                    own = self._own[number * self.batch_size : (number + 1) * self.batch_size]
                    made = self._views(own, pool, over)
                    if made or self.part[1] > 1:
                        yield self._collate(made)
            finally:
                over.set()
                pool.shutdown(cancel_futures=True)
        if isinstance(self._cache, DiskCache):
            self._cache.tell_growth()

    def _views(
        self, own: range, pool: ThreadPoolExecutor, over: threading.Event
    ) -> dict[int, View]:
        """The views of those that can be read."""
        kept = {i: self._cache.get(i) if self._cache else None for i in own}
        missing = [i for i in own if kept[i] is None and i not in self._unreadable]
        found = pool.map(lambda i: self._view(i, over), missing)
        views = {i: pixels for i, pixels in kept.items() if isinstance(pixels, np.ndarray)}
        for i, pixels in zip(missing, found, strict=True):
            if pixels is None:
                self._unreadable.add(i)  # every pass sees the same images
            else:
                views[i] = pixels
        return {i: views[i] for i in own if i in views}

    def _view(self, i: int, over: threading.Event) -> View | None:
        picture = self._reader.read(self.source, i, None, over.is_set)
        if picture is None:
            return None
        pixels = self.preprocess.view(as_image(picture))
        if self._cache:
            self._cache.put(i, pixels)
        return pixels

    def _said(self, i: int) -> dict[str, np.ndarray] | None:
        """What is said of image `i`; None where that cannot be read."""
        try:
            return self.source.targets.target(i, None)
        except UnreadableImage as error:
            self._reader.skipped[self.source.key(i)] = error.reason
            self._unreadable.add(i)
            return None

    def _collate(self, views: Mapping[int, View]) -> Batch:
        said = {i: self._said(i) for i in views}
        views = {i: pixels for i, pixels in views.items() if said[i] is not None}
        indices = np.fromiter(views, np.int64)
        images, extent = (
            collate([torch.from_numpy(pixels) for pixels in views.values()], self.preprocess.patch)
            if views
            else no_images(self.preprocess, torch.device("cpu"))
        )
        shown = normalised(self.preprocess, images.to(self.device))
        return Batch(
            (Canvas(shown, None if extent is None else extent.to(self.device)),),
            on_device(
                [row for row in said.values() if row is not None],
                self.source.targets,
                self.preprocess.size,
                self.device,
            ),
            indices,
        )


def _cache(source: Source, reading: Reading, what: object, notify: Notify) -> Cache | None:
    match reading.cache:
        case "memory":
            return MemoryCache()
        case "disk":
            return open_disk_cache(source, what, notify)
    return None
