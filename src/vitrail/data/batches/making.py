"""Pictures to batches: views, augmentation and mixing, the same whoever makes them.

What a batch holds is a pure function of the seed and of what is `Wanted`: the number of threads, of
worker processes and of processes that train together change nothing. An image that cannot be read
is left out of its batch.
"""

import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from vitrail.data import keyed
from vitrail.data.pixels.cache import Picture, as_array, as_image
from vitrail.data.sources.source import Source
from vitrail.data.views.augment import CROP_TRIES, Augment, AugmentConfig, crop_box, view
from vitrail.data.views.mix import check_mixable, mix, share_unit
from vitrail.data.views.preprocess import Canvas, Preprocess
from vitrail.errors import UsageError, setting


class Batch(NamedTuple):
    """What a task learns from and is measured on."""

    images: Float[Tensor, "b c h w"]
    """Normalised, on the device."""
    targets: Float[Tensor, "b classes"]
    """Probabilities, or zeros and ones where an image may have several labels."""
    indices: Int[np.ndarray, " b"]
    """Which images of the source these are; of a stream, their numbers in it."""
    extent: Int[Tensor, "b 2"] | None = None
    """How many (rows, columns) of patches show each image, at the top left of its canvas; None:
    all of them, for the images are of one size."""


class Loader(Protocol):
    """Endless, keyed epochs of training batches: a `TrainLoader` or a `StreamLoader`."""

    device: torch.device

    @property
    def skipped(self) -> dict[str, str]:
        """Key and reason of every image that could not be read so far, by this process."""
        ...

    def __len__(self) -> int:
        """Batches an epoch."""
        ...

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from batch `first` on."""
        ...


class Wanted(NamedTuple):
    """A batch that is to be made."""

    source: Source
    places: Int[np.ndarray, " b"]
    """Which of its images, in the batch's order: mixed are the first two, the next two, ..."""
    numbers: Int[np.ndarray, " b"]
    """What an image's random draws are keyed by, beside the seed and the epoch."""
    epoch: int


View = UInt8[np.ndarray, "c h w"]

Look = Callable[[Source, int, Callable[[], bool]], Picture | None]
"""Reads an image of a source; None: it cannot be read. It may give up once the function that it is
given says that nobody waits any more."""


class Maker:
    """Makes augmented batches, in threads and on the device.

    Raises `UsageError` for images of different sizes that are to be mixed.
    """

    def __init__(
        self,
        preprocess: Preprocess,
        augment: AugmentConfig,
        *,
        seed: int,
        workers: int,
        device: torch.device,
        fast: bool,
    ) -> None:
        check_mixable(augment, preprocess)
        self.preprocess = preprocess
        self.config = augment
        self.augment = Augment(augment, seed=seed, size=preprocess.size)
        self.seed = seed
        self.workers = workers
        self.device = device
        self._quick = (
            fast
            and augment.crops
            and preprocess.one_size
            and preprocess.interpolation in ("bilinear", "bicubic")
        )

    def made(
        self, wanted: Iterable[Wanted], look: Look, check: Callable[[], None]
    ) -> Generator[Batch]:
        """One batch for each that is `wanted`; `check` is called when its images were read."""
        # On a CPU the cores belong to the matrix products while a step runs: views are made
        # between steps. Beside a GPU they are made ahead.
        ahead = 0 if self.device.type == "cpu" else 4
        waiting: deque[tuple[Wanted, list[Future[list[View | None]]]]] = deque()
        over = threading.Event()

        def views(one: Wanted, rows: np.ndarray) -> list[View | None]:
            places = one.places[rows].tolist()
            pictures = (look(one.source, i, over.is_set) for i in places)
            return self._views(pictures, one.numbers[rows], one.epoch)

        def batch(one: Wanted, tasks: Sequence[Future[list[View | None]]]) -> Batch:
            made = [view for task in tasks for view in task.result()]
            check()
            return self._collate(one, made)

        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for one in wanted:
                    # A few images a task: handing over single small ones would cost as much as
                    # making their views.
                    rows = np.arange(len(one.places))
                    tasks = np.array_split(rows, min(4 * self.workers, len(rows)))
                    waiting.append((one, [pool.submit(views, one, task) for task in tasks]))
                    if len(waiting) > ahead:
                        yield batch(*waiting.popleft())
                while waiting:
                    yield batch(*waiting.popleft())
            finally:
                over.set()
                pool.shutdown(cancel_futures=True)

    def _views(
        self, pictures: Iterable[Picture | None], numbers: np.ndarray, epoch: int
    ) -> list[View | None]:
        if self._quick:
            draws = keyed.uniform(self.seed, epoch, numbers, "crop", 2 * CROP_TRIES + 2)
            return [
                None if picture is None else self._quick_view(as_array(picture), drawn)
                for picture, drawn in zip(pictures, draws.tolist(), strict=True)
            ]
        return [
            None if picture is None else self._view(picture, epoch, number)
            for picture, number in zip(pictures, numbers.tolist(), strict=True)
        ]

    def _view(self, picture: Picture, epoch: int, number: int) -> View:
        return view(
            as_image(picture),
            self.preprocess,
            self.config,
            seed=self.seed,
            epoch=epoch,
            index=number,
        )

    def _quick_view(self, pixels: UInt8[np.ndarray, "_h _w c"], draws: list[float]) -> View:
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

    def _collate(self, wanted: Wanted, made: Sequence[View | None]) -> Batch:
        source, places, numbers, epoch = wanted
        good = np.array([pixels is not None for pixels in made], dtype=bool)
        views = [pixels for pixels in made if pixels is not None]
        found = numbers[good]
        images, extent = self._augmented(views, found, epoch) if views else self._nothing()
        x = normalised(self.preprocess, images)
        targets = one_hot(source.targets[places[good]], len(source.classes))
        y = torch.from_numpy(targets).to(self.device)
        if self.config.mixes and len(x):
            x, y = self._mixed(x, y, numbers, good, epoch)
        return Batch(x, y, found, extent)

    def _augmented(self, views: Sequence[View], numbers: np.ndarray, epoch: int) -> Canvas:
        """The views in their order, on the device; those of one size are augmented together."""
        done: dict[int, Tensor] = {}
        for shape in dict.fromkeys(pixels.shape for pixels in views):
            places = [i for i, pixels in enumerate(views) if pixels.shape == shape]
            images = torch.from_numpy(np.stack([views[i] for i in places])).to(self.device)
            images = self.augment(images, numbers[places], epoch)
            if len(places) == len(views):
                return Canvas(images, None)
            done |= zip(places, images, strict=True)
        return self.preprocess.collate([done[i] for i in range(len(views))])

    def _nothing(self) -> Canvas:
        return no_images(self.preprocess, self.device)

    def _mixed(
        self,
        x: Float[Tensor, "g c h w"],
        y: Float[Tensor, "g k"],
        numbers: np.ndarray,
        good: Bool[np.ndarray, " b"],
        epoch: int,
    ) -> tuple[Float[Tensor, "g c h w"], Float[Tensor, "g k"]]:
        """Mixed in the pairs of the whole batch: where one cannot be read, the other is alone."""
        whole = np.zeros(len(numbers), bool)
        pairs = good[: len(numbers) // 2 * 2].reshape(-1, 2).min(axis=1)
        whole[: 2 * len(pairs)] = pairs.repeat(2)
        if good.all():
            return mix(x, y, numbers, self.config, seed=self.seed, epoch=epoch)
        rows = torch.from_numpy(np.flatnonzero(whole[good])).to(x.device)
        x[rows], y[rows] = mix(
            x[rows], y[rows], numbers[whole], self.config, seed=self.seed, epoch=epoch
        )
        return x, y


def one_hot(targets: Int[np.ndarray, "*b"], classes: int) -> Float[np.ndarray, "b c"]:
    """Targets as float32 rows: class indices become one-hot, multi-label rows stay."""
    if targets.ndim == 2:
        return targets.astype(np.float32)
    return np.eye(classes, dtype=np.float32)[targets]


_AT_ONCE = 4
"""Images that a processor's own cache holds as floats."""


def normalised(
    preprocess: Preprocess, images: UInt8[Tensor, "b c h w"]
) -> Float[Tensor, "b c h w"]:
    """As `preprocess.normalise`; on a CPU a few at a time, so that memory is written once."""
    if images.device.type != "cpu":
        return preprocess.normalise(images)
    done = torch.empty(images.shape)
    for some, place in zip(images.split(_AT_ONCE), done.split(_AT_ONCE), strict=True):
        place.copy_(preprocess.normalise(some))
    return done


def no_images(preprocess: Preprocess, device: torch.device) -> Canvas:
    """A batch of none."""
    size = (0, preprocess.channels, *preprocess.size)
    return Canvas(torch.empty(size, dtype=torch.uint8, device=device), None)


def checked_part(part: tuple[int, int]) -> tuple[int, int]:
    """`part` (which process, of how many), counted from 0. Raises `UsageError`."""
    if not 0 <= part[0] < part[1]:
        raise UsageError(f"part {part}: give (which, of how many), counted from 0")
    return part


def share_of(
    batch: int, part: tuple[int, int], augment: AugmentConfig, images: int = sys.maxsize
) -> int:
    """Rows of a batch for each process; there are so many `images`, if that is known.

    Raises `UsageError`, with the batch sizes next to it that can be, where they cannot share it.
    """
    _, parts = checked_part(part)
    unit = share_unit(augment, parts)
    if batch % unit == 0:
        return batch // parts
    fitting = [
        size for size in (batch // unit * unit, -(-batch // unit) * unit) if 0 < size <= images
    ]
    pairs = " in pairs, as mixup and cutmix need it" if unit > parts else ""
    raise UsageError(
        f"a batch of {batch} images cannot be shared evenly{pairs} by {parts} processes: "
        + (
            f"set {setting('data.batch_size')} to {' or '.join(map(str, fitting))}"
            if fitting
            else f"there are only {images} images, so take fewer processes"
        )
    )
