"""Images to batches: keyed order, decoding beside, a memory of what was decoded, augmentation.

What a batch holds is a pure function of (seed, epoch, position): the number of threads, of worker
processes and of processes that train together, the cache, and the place where a run was resumed
change nothing. An image that cannot be read is left out of its batch and remembered in `skipped`.

Files are decoded in processes (vitrail.data.workers), since a decoder may crash or hang; all else
happens in threads of this process, where the decoded images are kept.
"""

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor

from vitrail.data import keyed
from vitrail.data.augment import CROP_TRIES, Augment, AugmentConfig, crop_box, view
from vitrail.data.cache import (
    Cache,
    DiskCache,
    MemoryCache,
    Picture,
    as_array,
    as_image,
    open_disk_cache,
)
from vitrail.data.decode import UnreadableImage, read_pixels, reduced
from vitrail.data.mix import check_mixable, mix
from vitrail.data.preprocess import Canvas, Preprocess
from vitrail.data.source import Source, encoded
from vitrail.data.workers import GivenUp, Request, Workers, shared_workers
from vitrail.errors import DataError, UsageError, unknown_name

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
            raise UsageError(f"image_seconds must be above 0, not {self.image_seconds}")


_USUAL = Reading()


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


_View = UInt8[np.ndarray, "c h w"]

Notify = Callable[[str], None]
"""Told of what a user should know of the caches."""


def _silent(sentence: str) -> None:
    pass


class _Reader:
    """Reads images, here or in other processes, and remembers which cannot be read."""

    def __init__(
        self, source: Source, preprocess: Preprocess, workers: int, reading: Reading
    ) -> None:
        self.source = source
        self.preprocess = preprocess
        self.skipped: dict[str, str] = {}
        self._given_up: set[int] = set()
        self._mode = "L" if preprocess.channels == 1 else "RGB"
        self._workers: Workers | None = None
        wanted = {"threads": False, "processes": True, "auto": len(source) >= _FEW}
        if wanted[reading.decoders] and sys.executable and _has_files(source):
            self._workers = shared_workers(workers, reading.image_seconds)

    def read(
        self,
        i: int,
        shown: tuple[int, int] | None,
        abandoned: Callable[[], bool],
        *,
        fast: bool = False,
    ) -> Picture | None:
        """Image `i` in the model's mode, for a model that takes `shown`; None: it is unreadable.

        `fast` gives an array. Raises `Abandoned` where other processes decode.
        """
        if i in self._given_up:
            return None
        try:
            return self._decode(i, shown, abandoned, fast)
        except UnreadableImage as error:
            if isinstance(error, GivenUp):
                self._given_up.add(i)  # every try costs a process, or a minute
            self.skipped[self.source.key(i)] = str(error)
            return None

    def _decode(
        self, i: int, shown: tuple[int, int] | None, abandoned: Callable[[], bool], fast: bool
    ) -> Picture:
        file = encoded(self.source, i) if self._workers or fast else None
        if file is None:
            image = reduced(self.preprocess.convert(self.source.load(i)), shown)
            return as_array(image) if fast else image
        if self._workers:
            pixels = self._workers.run(Request(file, self._mode, shown, fast), abandoned)
        else:
            pixels = read_pixels(file, mode=self._mode, shown=shown, fast=fast)
        return pixels if fast else as_image(pixels)


def _has_files(source: Source) -> bool:
    try:
        return len(source) > 0 and encoded(source, 0) is not None
    except UnreadableImage:
        return True


class _Shelf:
    """Decoded images for training, kept as far as they may be."""

    def __init__(
        self, reader: _Reader, cache: Cache | None, *, fast: bool, most: float, share: int
    ) -> None:
        """Of `share` images, this process's part, a part of `most` may be unreadable."""
        self.reader = reader
        self.cache = cache
        self._fast = fast
        self._most = most
        self._share = share
        self._seen = np.zeros(len(reader.source), bool)

    def picture(self, i: int, abandoned: Callable[[], bool]) -> Picture | None:
        """Image `i` at no more than about twice the model's size; None if it cannot be read.

        It is shrunk cache or no cache, so that the memory at hand never changes what a model sees.
        """
        self._seen[i] = True
        kept = self.cache.get(i) if self.cache else None
        if kept is not None:
            return kept if self._fast else as_image(kept)
        found = self.reader.read(i, self.reader.preprocess.size, abandoned, fast=self._fast)
        if found is not None and self.cache:
            self.cache.put(i, found)
        return found

    def leave_out(self, skipped: Mapping[str, str]) -> None:
        """Images that a look at all of them has found unreadable."""
        self._seen[:] = True
        self.reader.skipped.update(skipped)
        self.check()

    def check(self) -> None:
        """Raise `DataError` when more images are damaged than the run allows."""
        skipped = self.reader.skipped
        # As epochs go by, a process sees other images than its first share of them.
        seen = max(self._share, int(self._seen.sum())) if skipped else 0
        if len(skipped) > self._most * seen:
            shown = "\n".join(f"  {key}: {why}" for key, why in list(skipped.items())[:5])
            raise DataError(
                f"{len(skipped)} of {seen} images cannot be read, more than the {self._most:.0%} "
                f"that training goes on with:\n{shown}\n"
                f"see them all with: vitrail data check DATA; mend or remove them, or allow more "
                f"with --data.max-unreadable"
            )


def one_hot(targets: Int[np.ndarray, "*b"], classes: int) -> Float[np.ndarray, "b c"]:
    """Targets as float32 rows: class indices become one-hot, multi-label rows stay."""
    if targets.ndim == 2:
        return targets.astype(np.float32)
    return np.eye(classes, dtype=np.float32)[targets]


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
        augment: AugmentConfig,
        *,
        batch_size: int,
        seed: int,
        workers: int = 2,
        max_unreadable: float = 0.01,
        device: torch.device | str = "cpu",
        part: tuple[int, int] = (0, 1),
        reading: Reading = _USUAL,
        notify: Notify = _silent,
    ) -> None:
        """`batch_size` counts the images of all processes; no batch is larger than the data.

        Raises `UsageError` for images of different sizes that are to be mixed, and for a batch that
        the processes cannot share evenly.
        """
        check_mixable(augment, preprocess)
        self.source = source
        self.preprocess = preprocess
        self.config = augment
        self.augment = Augment(augment, seed=seed, size=preprocess.size)
        self.batch_size = min(batch_size, len(source))
        self.share = _share(self.batch_size, part, augment, len(source))
        self.part = part
        self.seed = seed
        self.workers = workers
        self.device = torch.device(device)
        self._quick = (
            reading.decode == "fast"
            and augment.crops
            and preprocess.one_size
            and preprocess.interpolation in ("bilinear", "bicubic")
        )
        size = (*preprocess.size, preprocess.channels)
        self._shelf = _Shelf(
            _Reader(source, preprocess, workers, reading),
            _cache(source, reading, ("train", *size, reading.decode), notify),
            fast=reading.decode == "fast",
            most=max_unreadable,
            share=-(-len(source) // part[1]),
        )

    @property
    def skipped(self) -> dict[str, str]:
        """Key and reason of every image that could not be read so far, by this process."""
        return self._shelf.reader.skipped

    def leave_out(self, skipped: Mapping[str, str]) -> None:
        """Count images that a look at all of them found unreadable. `DataError` for too many."""
        self._shelf.leave_out(skipped)

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.source) // self.batch_size

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from batch `first` on."""
        order = keyed.permutation(self.seed, epoch, len(self.source))
        batches = order[: len(self) * self.batch_size].reshape(len(self), self.part[1], self.share)
        # On a CPU the cores belong to the matrix products while a step runs: views are made
        # between steps. Beside a GPU they are made ahead.
        ahead = 0 if self.device.type == "cpu" else 4
        waiting: deque[tuple[np.ndarray, list[Future[list[_View | None]]]]] = deque()
        over = threading.Event()
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for indices in batches[first:, self.part[0]]:
                    # A few images a task: handing over single small ones would cost as much as
                    # making their views.
                    tasks = np.array_split(indices, min(4 * self.workers, len(indices)))
                    futures = [pool.submit(self._look, t, epoch, over) for t in tasks]
                    waiting.append((indices, futures))
                    if len(waiting) > ahead:
                        yield self._collate(*waiting.popleft(), epoch)
                while waiting:
                    yield self._collate(*waiting.popleft(), epoch)
            finally:
                over.set()
                pool.shutdown(cancel_futures=True)
        if isinstance(self._shelf.cache, DiskCache):
            self._shelf.cache.tell_growth()

    def _look(self, indices: np.ndarray, epoch: int, over: threading.Event) -> list[_View | None]:
        pictures = (self._shelf.picture(i, over.is_set) for i in indices.tolist())
        if self._quick:
            draws = keyed.uniform(self.seed, epoch, indices, "crop", 2 * CROP_TRIES + 2)
            return [
                None if picture is None else self._quick_view(as_array(picture), drawn)
                for picture, drawn in zip(pictures, draws.tolist(), strict=True)
            ]
        return [
            None if picture is None else self._view(as_image(picture), epoch, i)
            for picture, i in zip(pictures, indices.tolist(), strict=True)
        ]

    def _view(self, image: Image.Image, epoch: int, i: int) -> _View:
        return view(image, self.preprocess, self.config, seed=self.seed, epoch=epoch, index=i)

    def _quick_view(self, pixels: UInt8[np.ndarray, "_h _w c"], draws: list[float]) -> _View:
        """As `view`, in a third of the time, but for fractions of a pixel: the crop is cut at whole
        pixels, and torch scales it, with antialiasing as Pillow's.
        """
        height, width = pixels.shape[:2]
        config = self.config
        box = crop_box(width, height, config.crop_scale, config.crop_ratio, draws)
        left, top = min(round(box[0]), width - 1), min(round(box[1]), height - 1)
        right, bottom = max(round(box[2]), left + 1), max(round(box[3]), top + 1)
        # Torch's kernel wants colours side by side, as they are; else it copies before and after.
        crop = torch.from_numpy(np.ascontiguousarray(pixels[top:bottom, left:right]))[None]
        crop, mode = crop.permute(0, 3, 1, 2), self.preprocess.interpolation
        return F.interpolate(crop, self.preprocess.size, mode=mode, antialias=True)[0].numpy()

    def _collate(
        self, indices: np.ndarray, tasks: Sequence[Future[list[_View | None]]], epoch: int
    ) -> Batch:
        made = [view for task in tasks for view in task.result()]
        self._shelf.check()
        good = np.array([pixels is not None for pixels in made], dtype=bool)
        views = [pixels for pixels in made if pixels is not None]
        found = indices[good]
        images, extent = self._augmented(views, found, epoch) if views else self._nothing()
        x = _normalised(self.preprocess, images)
        targets = one_hot(self.source.targets[found], len(self.source.classes))
        y = torch.from_numpy(targets).to(self.device)
        if self.config.mixes and len(x):
            x, y = self._mixed(x, y, indices, good, epoch)
        return Batch(x, y, found, extent)

    def _augmented(self, views: Sequence[_View], indices: np.ndarray, epoch: int) -> Canvas:
        """The views in their order, on the device; those of one size are augmented together."""
        done: dict[int, Tensor] = {}
        for shape in dict.fromkeys(pixels.shape for pixels in views):
            places = [i for i, pixels in enumerate(views) if pixels.shape == shape]
            images = torch.from_numpy(np.stack([views[i] for i in places])).to(self.device)
            images = self.augment(images, indices[places], epoch)
            if len(places) == len(views):
                return Canvas(images, None)
            done |= zip(places, images, strict=True)
        return self.preprocess.collate([done[i] for i in range(len(views))])

    def _nothing(self) -> Canvas:
        return _no_images(self.preprocess, self.device)

    def _mixed(
        self,
        x: Float[Tensor, "g c h w"],
        y: Float[Tensor, "g k"],
        indices: np.ndarray,
        good: Bool[np.ndarray, " b"],
        epoch: int,
    ) -> tuple[Float[Tensor, "g c h w"], Float[Tensor, "g k"]]:
        """Mixed in the pairs of the whole batch: where one cannot be read, the other is alone."""
        whole = np.zeros(len(indices), bool)
        pairs = good[: len(indices) // 2 * 2].reshape(-1, 2).min(axis=1)
        whole[: 2 * len(pairs)] = pairs.repeat(2)
        if good.all():
            return mix(x, y, indices, self.config, seed=self.seed, epoch=epoch)
        rows = torch.from_numpy(np.flatnonzero(whole[good])).to(x.device)
        x[rows], y[rows] = mix(
            x[rows], y[rows], indices[whole], self.config, seed=self.seed, epoch=epoch
        )
        return x, y


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
        reading: Reading = _USUAL,
        notify: Notify = _silent,
    ) -> None:
        which, parts = _checked_part(part)
        self.source = source
        self.preprocess = preprocess
        self.batch_size = batch_size
        self.workers = workers
        self.device = torch.device(device)
        self.part = part
        self._own = range(which * len(source) // parts, (which + 1) * len(source) // parts)
        self._reader = _Reader(source, preprocess, workers, reading)
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
    ) -> dict[int, _View]:
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

    def _view(self, i: int, over: threading.Event) -> _View | None:
        picture = self._reader.read(i, None, over.is_set)
        if picture is None:
            return None
        pixels = self.preprocess.view(as_image(picture))
        if self._cache:
            self._cache.put(i, pixels)
        return pixels

    def _collate(self, views: Mapping[int, _View]) -> Batch:
        indices = np.fromiter(views, np.int64)
        images, extent = (
            self.preprocess.collate([torch.from_numpy(pixels) for pixels in views.values()])
            if views
            else _no_images(self.preprocess, torch.device("cpu"))
        )
        targets = one_hot(self.source.targets[indices], len(self.source.classes))
        return Batch(
            _normalised(self.preprocess, images.to(self.device)),
            torch.from_numpy(targets).to(self.device),
            indices,
            None if extent is None else extent.to(self.device),
        )


_AT_ONCE = 4
"""Images that a processor's own cache holds as floats."""


def _normalised(
    preprocess: Preprocess, images: UInt8[Tensor, "b c h w"]
) -> Float[Tensor, "b c h w"]:
    """As `preprocess.normalise`; on a CPU a few at a time, so that memory is written once."""
    if images.device.type != "cpu":
        return preprocess.normalise(images)
    done = torch.empty(images.shape)
    for some, place in zip(images.split(_AT_ONCE), done.split(_AT_ONCE), strict=True):
        place.copy_(preprocess.normalise(some))
    return done


def _no_images(preprocess: Preprocess, device: torch.device) -> Canvas:
    size = (0, preprocess.channels, *preprocess.size)
    return Canvas(torch.empty(size, dtype=torch.uint8, device=device), None)


def _cache(source: Source, reading: Reading, what: object, notify: Notify) -> Cache | None:
    match reading.cache:
        case "memory":
            return MemoryCache()
        case "disk":
            return open_disk_cache(source, what, notify)
    return None


def _checked_part(part: tuple[int, int]) -> tuple[int, int]:
    if not 0 <= part[0] < part[1]:
        raise UsageError(f"part {part}: give (which, of how many), counted from 0")
    return part


def _share(batch: int, part: tuple[int, int], augment: AugmentConfig, images: int) -> int:
    """Rows of a batch for each process."""
    _, parts = _checked_part(part)
    unit = 2 * parts if augment.mixes and parts > 1 else parts
    if batch % unit == 0:
        return batch // parts
    fitting = [
        size for size in (batch // unit * unit, -(-batch // unit) * unit) if 0 < size <= images
    ]
    pairs = " in pairs, as mixup and cutmix need it" if unit > parts else ""
    raise UsageError(
        f"a batch of {batch} images cannot be shared evenly{pairs} by {parts} processes: "
        + (
            f"set data.batch_size to {' or '.join(map(str, fitting))}"
            if fitting
            else f"there are only {images} images, so take fewer processes"
        )
    )
