"""Images to batches: keyed order, decoding in threads, a memory of what was decoded, augmentation.

What a batch holds is a pure function of (seed, epoch, position): the number of threads, the cache
and the place where a run was resumed change nothing. An image that cannot be read is left out of
its batch and remembered in `skipped`.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from vitrail.data import keyed
from vitrail.data.augment import Augment, AugmentConfig, view
from vitrail.data.decode import UnreadableImage
from vitrail.data.mix import check_mixable, mix
from vitrail.data.preprocess import Preprocess
from vitrail.data.source import Source
from vitrail.errors import DataError

CACHE_BYTES = 2 * 2**30
"""Decoded images are kept up to this much memory, then decoded anew each epoch."""


class Batch(NamedTuple):
    """What a task learns from and is measured on."""

    images: Float[Tensor, "b c h w"]
    """Normalised, on the device."""
    targets: Float[Tensor, "b classes"]
    """Probabilities, or zeros and ones where an image may have several labels."""
    indices: Int[np.ndarray, " b"]
    """Which images of the source these are."""
    extent: Int[Tensor, "b 2"] | None = None
    """How many (rows, columns) of patches show each image, at the top left of its canvas; None:
    all of them, for the images are of one size."""


_View = UInt8[np.ndarray, "c h w"] | None
"""An image's pixels; None if it cannot be read."""


class _Shelf:
    """Decoded images, kept while they fit; and the list of those that cannot be read."""

    def __init__(self, source: Source, preprocess: Preprocess, max_unreadable: float) -> None:
        self.source = source
        self.preprocess = preprocess
        self.limit = max_unreadable * len(source)
        self.skipped: dict[str, str] = {}
        self._kept: dict[int, Image.Image] = {}
        self._free = CACHE_BYTES

    def image(self, i: int) -> Image.Image | None:
        """Image `i` at no more than about twice the model's size; None if it cannot be read.

        The shrinking (an exact average over blocks of pixels) happens cache or no cache, so that
        the memory at hand never changes what a model sees. A crop of a quarter of the area, or
        more, still has at least as many pixels as the model takes.
        """
        if i in self._kept:
            return self._kept[i]
        try:
            image = self.preprocess.convert(self.source.load(i))
        except UnreadableImage as error:
            self.skipped[self.source.key(i)] = str(error)
            return None
        height, width = self.preprocess.size
        factor = min(image.height // (2 * height), image.width // (2 * width))
        image = image.reduce(factor) if factor > 1 else image
        size = image.width * image.height * len(image.getbands())
        if size <= self._free:
            self._free -= size
            self._kept[i] = image
        return image

    def check(self) -> None:
        """Raise `DataError` when more images are damaged than the run allows."""
        if len(self.skipped) > self.limit:
            shown = "\n".join(f"  {key}: {why}" for key, why in list(self.skipped.items())[:5])
            raise DataError(
                f"{len(self.skipped)} of {len(self.source)} images cannot be read, more than the "
                f"{self.limit / len(self.source):.0%} that training goes on with:\n{shown}\n"
                f"see them all with: vitrail data check DATA; mend or remove them, or allow more "
                f"with --data.max-unreadable"
            )


def one_hot(targets: Int[np.ndarray, "*b"], classes: int) -> Float[np.ndarray, "b c"]:
    """Targets as float32 rows: class indices become one-hot, multi-label rows stay."""
    if targets.ndim == 2:
        return targets.astype(np.float32)
    return np.eye(classes, dtype=np.float32)[targets]


class TrainLoader:
    """Endless, keyed epochs of augmented batches; the last, partial batch of each is left out."""

    def __init__(
        self,
        source: Source,
        preprocess: Preprocess,
        augment: AugmentConfig,
        *,
        batch_size: int,
        seed: int,
        workers: int = 2,
        max_unreadable: float = 0.01,
        device: torch.device | str = "cpu",
    ) -> None:
        """Raises `UsageError` for images of different sizes that are to be mixed."""
        check_mixable(augment, preprocess)
        self.source = source
        self.preprocess = preprocess
        self.config = augment
        self.augment = Augment(augment, seed=seed, size=preprocess.size)
        self.batch_size = min(batch_size, len(source))
        self.seed = seed
        self.workers = workers
        self.device = torch.device(device)
        self._shelf = _Shelf(source, preprocess, max_unreadable)

    @property
    def skipped(self) -> dict[str, str]:
        """Key and reason of every image that could not be read so far."""
        return self._shelf.skipped

    def leave_out(self, skipped: Mapping[str, str]) -> None:
        """Count images that were found unreadable elsewhere. Raises `DataError` for too many."""
        self._shelf.skipped.update(skipped)
        self._shelf.check()

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.source) // self.batch_size

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from batch `first` on."""
        order = keyed.permutation(self.seed, epoch, len(self.source))
        parts = order[: len(self) * self.batch_size].reshape(len(self), self.batch_size)[first:]
        # On a CPU the cores belong to the matrix products while a step runs: views are made
        # between steps. Beside a GPU they are made ahead.
        ahead = 0 if self.device.type == "cpu" else 4
        waiting: deque[tuple[np.ndarray, list[Future[list[_View]]]]] = deque()
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for indices in parts:
                    # A few images a task: handing over single small ones would cost as much as
                    # making their views.
                    tasks = np.array_split(indices, min(4 * self.workers, len(indices)))
                    waiting.append((indices, [pool.submit(self._look, t, epoch) for t in tasks]))
                    if len(waiting) > ahead:
                        yield from self._collate(*waiting.popleft(), epoch)
                while waiting:
                    yield from self._collate(*waiting.popleft(), epoch)
            finally:
                pool.shutdown(cancel_futures=True)

    def _look(self, indices: np.ndarray, epoch: int) -> list[_View]:
        return [self._view(i, epoch) for i in indices.tolist()]

    def _view(self, i: int, epoch: int) -> _View:
        image = self._shelf.image(i)
        if image is None:
            return None
        return view(image, self.preprocess, self.config, seed=self.seed, epoch=epoch, index=i)

    def _collate(
        self, indices: np.ndarray, tasks: Sequence[Future[list[_View]]], epoch: int
    ) -> Iterator[Batch]:
        made = [view for task in tasks for view in task.result()]
        self._shelf.check()
        good = [pixels is not None for pixels in made]
        if not any(good):
            return
        indices = indices[good]
        views = [pixels for pixels in made if pixels is not None]
        images, extent = self.preprocess.collate(self._augmented(views, indices, epoch))
        targets = one_hot(self.source.targets[indices], len(self.source.classes))
        x = self.preprocess.normalise(images)
        y = torch.from_numpy(targets).to(self.device)
        x, y = mix(x, y, indices, self.config, seed=self.seed, epoch=epoch)
        yield Batch(x, y, indices, extent)

    def _augmented(
        self, views: Sequence[UInt8[np.ndarray, "c _h _w"]], indices: np.ndarray, epoch: int
    ) -> list[UInt8[Tensor, "c _h _w"]]:
        """The views in their order, on the device; those of one size are augmented together."""
        done: dict[int, Tensor] = {}
        for shape in dict.fromkeys(pixels.shape for pixels in views):
            places = [i for i, pixels in enumerate(views) if pixels.shape == shape]
            images = torch.from_numpy(np.stack([views[i] for i in places])).to(self.device)
            images = self.augment(images, indices[places], epoch)
            done |= zip(places, images, strict=True)
        return [done[i] for i in range(len(views))]


class EvalLoader:
    """Every readable image once, in order, as `preprocess` shows it."""

    def __init__(
        self,
        source: Source,
        preprocess: Preprocess,
        *,
        batch_size: int = 64,
        workers: int = 2,
        device: torch.device | str = "cpu",
    ) -> None:
        self.source = source
        self.preprocess = preprocess
        self.batch_size = batch_size
        self.workers = workers
        self.device = torch.device(device)
        self.skipped: dict[str, str] = {}
        self._views: list[tuple[np.ndarray, list[Tensor]]] | None = None

    def __len__(self) -> int:
        """Batches of one pass."""
        return -(-len(self.source) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for indices, views in self._views or self._read():
            images, extent = self.preprocess.collate(views)
            targets = one_hot(self.source.targets[indices], len(self.source.classes))
            yield Batch(
                self.preprocess.normalise(images.to(self.device)),
                torch.from_numpy(targets).to(self.device),
                indices,
                None if extent is None else extent.to(self.device),
            )

    def _read(self) -> Iterator[tuple[np.ndarray, list[Tensor]]]:
        """Decode; and remember the views, for they stay the same, if they all fit."""
        channels, (height, width) = self.preprocess.channels, self.preprocess.size
        keep = len(self.source) * channels * height * width <= CACHE_BYTES
        kept = []
        with ThreadPoolExecutor(self.workers) as pool:
            for start in range(0, len(self.source), self.batch_size):
                indices = np.arange(start, min(start + self.batch_size, len(self.source)))
                made = list(pool.map(self._view, indices.tolist()))
                good = [pixels is not None for pixels in made]
                if not any(good):
                    continue
                views = [torch.from_numpy(pixels) for pixels in made if pixels is not None]
                if keep:
                    kept.append((indices[good], views))
                yield indices[good], views
        self._views = kept if keep else None

    def _view(self, i: int) -> _View:
        try:
            return self.preprocess.view(self.source.load(i))
        except UnreadableImage as error:
            self.skipped[self.source.key(i)] = str(error)
            return None
