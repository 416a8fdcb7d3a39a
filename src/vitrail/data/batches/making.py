"""Pictures to batches: views, augmentation and mixing, the same whoever makes them.

What a batch holds is a pure function of the seed and of what is `Wanted`: the number of threads, of
worker processes and of processes that train together change nothing. An image that cannot be read
is left out of its batch.
"""

import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor

from vitrail.data import keyed
from vitrail.data.batches.batch import Batch
from vitrail.data.pixels.cache import Picture, as_array, as_image
from vitrail.data.pixels.decode import UnreadableImage
from vitrail.data.sources.source import Source
from vitrail.data.sources.stream import Position
from vitrail.data.targets import Boxes, Targets, blank_rows, stacked
from vitrail.data.views import scaled
from vitrail.data.views.augment import (
    Augment,
    AugmentConfig,
    crop_box,
    crop_draws,
    view_of,
)
from vitrail.data.views.canvas import Canvas, collate, normalise
from vitrail.data.views.mix import check_mixable, mix, share_unit
from vitrail.data.views.mosaic import joined
from vitrail.data.views.preprocess import Preprocess
from vitrail.data.views.seen import Seen
from vitrail.errors import UsageError, setting

Strong = Callable[[int], bool]
"""Whether a batch, by its number in the epoch, may have mosaics and blends. It is asked when the
batch is wanted."""


def always(batch: int) -> bool:
    """Strong from the first batch to the last."""
    return True


class Loader(Protocol):
    """Endless, keyed epochs of training batches: a `TrainLoader` or a `StreamLoader`."""

    source: Any
    """A `Source`, or a `StreamSource`."""
    preprocess: Preprocess
    device: torch.device
    share: int
    """Images of a batch that are this process's, if all can be read."""

    @property
    def position(self) -> Position | None:
        """Of a stream, where it is after the last batch; None: any batch can be made at once."""
        ...

    def seek(self, position: Position) -> None:
        """Of a stream: let the next epoch begin from a position of all processes."""
        ...

    def leave_out(self, skipped: Mapping[str, str]) -> None:
        """Count images that a look at all of them found unreadable. `DataError` for too many."""
        ...

    @property
    def skipped(self) -> dict[str, str]:
        """Key and reason of every image that could not be read so far, by this process."""
        ...

    def __len__(self) -> int:
        """Batches an epoch."""
        ...

    def epoch(self, epoch: int, first: int = 0, strong: Strong = always) -> Iterator[Batch]:
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
    strong: bool = True
    """Whether there may be mosaics and blends."""


View = UInt8[np.ndarray, "c h w"]


class _Made(NamedTuple):
    """Of one image, before it goes to the device."""

    views: tuple[View, ...]
    said: dict[str, np.ndarray]
    """What is said of the first view."""


Look = Callable[[Source, int, Callable[[], bool]], Picture | None]
"""Reads an image of a source; None: it cannot be read. It may give up once the function that it is
given says that nobody waits any more."""


Skip = Callable[[str, str], None]
"""Told of an image that is left out, by its key, and why."""


class Maker:
    """Makes batches of augmented views, in threads and on the device.

    Raises `UsageError` for images of different sizes that are to be mixed.
    """

    def __init__(
        self,
        preprocess: Preprocess,
        augments: Sequence[AugmentConfig],
        *,
        seed: int,
        workers: int,
        device: torch.device,
        fast: bool,
    ) -> None:
        """`augments`: of each view that a batch is to have."""
        check_mixable(augments[0], preprocess)
        self.preprocess = preprocess
        self.configs = tuple(augments)
        self.shapes = tuple(
            replace(preprocess, size=config.size or preprocess.size) for config in augments
        )
        """How an image is fitted to each view."""
        self.augments = tuple(
            Augment(config, seed=seed, size=shape.size, view=number)
            for number, (config, shape) in enumerate(zip(augments, self.shapes, strict=True))
        )
        self.seed = seed
        self.workers = workers
        self.device = device
        self._fast = (
            fast
            and preprocess.resize in ("crop", "squash")
            and preprocess.interpolation in ("bilinear", "bicubic")
        )

    def made(
        self, wanted: Iterable[Wanted], look: Look, skip: Skip, check: Callable[[], None]
    ) -> Generator[Batch]:
        """One batch for each that is `wanted`; `check` is called when its images were read, and
        `skip` for an image of which what is said cannot be.
        """
        # On a CPU the cores belong to the matrix products while a step runs: views are made
        # between steps. Beside a GPU they are made ahead.
        ahead = 0 if self.device.type == "cpu" else 4
        waiting: deque[tuple[Wanted, list[Future[list[_Made | None]]]]] = deque()
        over = threading.Event()

        def some(one: Wanted, rows: np.ndarray) -> list[_Made | None]:
            return self._some(one, rows, lambda i: look(one.source, i, over.is_set), skip)

        def batch(one: Wanted, tasks: Sequence[Future[list[_Made | None]]]) -> Batch:
            made = [image for task in tasks for image in task.result()]
            check()
            return self._collate(one, made)

        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for one in wanted:
                    # A few images a task: handing over single small ones would cost as much as
                    # making their views.
                    rows = np.arange(len(one.places))
                    tasks = np.array_split(rows, min(4 * self.workers, len(rows)))
                    waiting.append((one, [pool.submit(some, one, task) for task in tasks]))
                    if len(waiting) > ahead:
                        yield batch(*waiting.popleft())
                while waiting:
                    yield batch(*waiting.popleft())
            finally:
                over.set()
                pool.shutdown(cancel_futures=True)

    def _some(
        self, one: Wanted, rows: np.ndarray, look: Callable[[int], Picture | None], skip: Skip
    ) -> list[_Made | None]:
        numbers = one.numbers[rows]
        boxes = [
            crop_draws(self.seed, one.epoch, numbers, view) if config.crops else None
            for view, config in enumerate(self.configs)
        ]
        made: list[_Made | None] = []
        joins = one.strong and self.configs[0].joins
        for row, place in enumerate(one.places[rows].tolist()):
            picture = look(place)
            if picture is None:
                made.append(None)
                continue
            drawn = [None if each is None else each[row] for each in boxes]
            number = int(numbers[row])
            try:
                if joins:
                    made.append(self._joined(one, place, number, picture, drawn[0], look, skip))
                else:
                    made.append(self._image(one, place, number, picture, drawn))
            except UnreadableImage as error:  # a mask that is damaged, or of another image
                skip(one.source.key(place), error.reason)
                made.append(None)
        return made

    def _image(
        self,
        one: Wanted,
        place: int,
        number: int,
        picture: Picture,
        drawn: Sequence[list[float] | None],
    ) -> _Made:
        """All views of an image; `drawn` is what the crops of those that have some are made by."""
        if self.configs[0].scale is not None:
            return self._scaled(one, place, number, as_image(picture))
        views = [self._view(one, number, picture, view, draws) for view, draws in enumerate(drawn)]
        said = self._said(one, place, number, views[0][1])
        return _Made(tuple(pixels for pixels, _ in views), said)

    def _view(
        self, one: Wanted, number: int, picture: Picture, view: int, draws: list[float] | None
    ) -> tuple[View, Seen]:
        if draws is not None and self._fast:
            return self._quick_view(as_array(picture), view, draws)
        return view_of(
            as_image(picture),
            self.shapes[view],
            self.configs[view],
            seed=self.seed,
            epoch=one.epoch,
            index=number,
            view=view,
            draws=draws,
        )

    def _scaled(self, one: Wanted, place: int, number: int, image: Image.Image) -> _Made:
        """A window that may reach beyond the image, and is not nearly all of one class."""
        config, size = self.configs[0], (image.height, image.width)
        for box in self._windows(one, number, size):
            seen = Seen.of_box(box, size, self.preprocess.size)
            said = self._said(one, place, number, seen)
            if "mask" not in said or not scaled.dominated(said["mask"], config.dominance):
                break
        return _Made((scaled.shown(image, box, self.preprocess)[0],), said)

    def _windows(
        self, one: Wanted, number: int, size: tuple[int, int]
    ) -> Iterator[tuple[float, float, float, float]]:
        """Of an image of (height, width) pixels, the windows that are tried one after another."""
        scale = self.configs[0].scale
        draws = keyed.uniform(self.seed, one.epoch, np.array([number]), "window", 3 * scaled.TRIES)
        for drawn in draws.reshape(scaled.TRIES, 3):
            assert scale is not None
            zoom = self.preprocess.zoom(*size)
            yield scaled.window(size, self.preprocess.size, scale, drawn, zoom)

    def _joined(
        self,
        one: Wanted,
        place: int,
        number: int,
        picture: Picture,
        drawn: list[float] | None,
        look: Callable[[int], Picture | None],
        skip: Skip,
    ) -> _Made:
        """A view that may show other images too, with the boxes of all of them."""
        image, targets = as_image(picture), one.source.targets
        assert isinstance(targets, Boxes)
        targets.size(place)  # raises where the boxes cannot be this image's

        def other(i: int) -> Image.Image | None:
            found = look(i)
            try:
                targets.size(i)
            except UnreadableImage as error:
                skip(one.source.key(i), error.reason)
                return None
            return None if found is None else as_image(found)

        def alone() -> tuple[View, Seen]:
            if self.configs[0].scale is None:
                return self._view(one, number, picture, 0, drawn)
            box = next(self._windows(one, number, (image.height, image.width)))
            return scaled.shown(image, box, self.preprocess)

        view = joined(
            image, place, len(one.source), other, alone, self.preprocess, self.configs[0],
            seed=self.seed, epoch=one.epoch, index=number,
        )  # fmt: skip
        size = (view.pixels.shape[1], view.pixels.shape[2])
        moves = self.augments[0].moves(np.array([number]), one.epoch, size)
        parts = ((i, seen.then(moves[0])) for i, seen in view.parts)
        return _Made((view.pixels,), targets.joined_target(parts))

    def _said(self, one: Wanted, place: int, number: int, seen: Seen) -> dict[str, np.ndarray]:
        """What is said of the first view, as it will be when the device has moved its pixels."""
        if one.source.targets.placed:
            moves = self.augments[0].moves(np.array([number]), one.epoch, seen.size)
            seen = seen.then(moves[0])
        return one.source.targets.target(place, seen)

    def _quick_view(
        self, pixels: UInt8[np.ndarray, "_h _w c"], view: int, draws: list[float]
    ) -> tuple[View, Seen]:
        """As `view_of`, in a third of the time, but for fractions of a pixel: the crop is cut at
        whole pixels, and torch scales it, with antialiasing as Pillow's.
        """
        (height, width), config, size = pixels.shape[:2], self.configs[view], self.shapes[view].size
        box = crop_box(width, height, config.crop_scale, config.crop_ratio, draws)
        left, top = min(round(box[0]), width - 1), min(round(box[1]), height - 1)
        right, bottom = max(round(box[2]), left + 1), max(round(box[3]), top + 1)
        # Torch's kernel wants colours side by side, as they are; else it copies before and after.
        crop = torch.from_numpy(np.ascontiguousarray(pixels[top:bottom, left:right]))[None]
        crop, mode = crop.permute(0, 3, 1, 2), self.preprocess.interpolation
        shown = F.interpolate(crop, size, mode=mode, antialias=True)[0].numpy()
        seen = Seen.of_box((left, top, right, bottom), (height, width), size)
        return shown, seen

    def _collate(self, wanted: Wanted, made: Sequence[_Made | None]) -> Batch:
        good = np.array([image is not None for image in made], dtype=bool)
        readable = [image for image in made if image is not None]
        found = wanted.numbers[good]
        views = [
            self._augmented(k, [image.views[k] for image in readable], found, wanted.epoch)
            for k in range(len(self.augments))
        ]
        shown = [Canvas(normalised(self.preprocess, images), ext) for images, ext in views]
        said = [image.said for image in readable]
        y = on_device(said, wanted.source.targets, self.preprocess.size, self.device)
        if self.configs[0].mixes and len(found):
            x, y["classes"] = self._mixed(
                shown[0].images, y["classes"], wanted.numbers, good, wanted.epoch
            )
            shown[0] = shown[0]._replace(images=x)
        return Batch(tuple(shown), y, found, wanted.epoch)

    def _augmented(
        self, view: int, views: Sequence[View], numbers: np.ndarray, epoch: int
    ) -> Canvas:
        """All images of a view in their order, on the device; those of one size are augmented
        together.
        """
        if not views:
            return no_images(self.shapes[view], self.device)
        done: dict[int, Tensor] = {}
        for shape in dict.fromkeys(pixels.shape for pixels in views):
            places = [i for i, pixels in enumerate(views) if pixels.shape == shape]
            images = torch.from_numpy(np.stack([views[i] for i in places])).to(self.device)
            images = self.augments[view](images, numbers[places], epoch)
            if len(places) == len(views):
                return Canvas(images, None)
            done |= zip(places, images, strict=True)
        return collate([done[i] for i in range(len(views))], self.preprocess.patch)

    def _mixed(
        self,
        x: Float[Tensor, "g c h w"],
        y: Float[Tensor, "g k"],
        numbers: np.ndarray,
        good: Bool[np.ndarray, " b"],
        epoch: int,
    ) -> tuple[Float[Tensor, "g c h w"], Float[Tensor, "g k"]]:
        """Mixed in the pairs of the whole batch: where one cannot be read, the other is alone."""
        config = self.configs[0]
        whole = np.zeros(len(numbers), bool)
        pairs = good[: len(numbers) // 2 * 2].reshape(-1, 2).min(axis=1)
        whole[: 2 * len(pairs)] = pairs.repeat(2)
        if good.all():
            return mix(x, y, numbers, config, seed=self.seed, epoch=epoch)
        rows = torch.from_numpy(np.flatnonzero(whole[good])).to(x.device)
        x[rows], y[rows] = mix(
            x[rows], y[rows], numbers[whole], config, seed=self.seed, epoch=epoch
        )
        return x, y


def on_device(
    said: Sequence[Mapping[str, np.ndarray]],
    targets: Targets,
    size: tuple[int, int],
    device: torch.device,
) -> dict[str, Tensor]:
    """What is said of the images of a batch; of a batch of none, for views of `size`."""
    rows = stacked(said) if said else blank_rows(targets, size)
    return {name: torch.from_numpy(values).to(device) for name, values in rows.items()}


_AT_ONCE = 4
"""Images that a processor's own cache holds as floats."""


def normalised(
    preprocess: Preprocess, images: UInt8[Tensor, "b c h w"]
) -> Float[Tensor, "b c h w"]:
    """As `normalise`; on a CPU a few at a time, so that memory is written once."""
    if images.device.type != "cpu":
        return normalise(preprocess, images)
    done = torch.empty(images.shape)
    for some, place in zip(images.split(_AT_ONCE), done.split(_AT_ONCE), strict=True):
        place.copy_(normalise(preprocess, some))
    return done


def no_images(preprocess: Preprocess, device: torch.device) -> Canvas:
    """A batch of none."""
    size = (0, preprocess.channels, *preprocess.size)
    return Canvas(torch.empty(size, dtype=torch.uint8, device=device), None)


def check_joinable(augment: AugmentConfig, targets: Targets) -> None:
    """Raise `UsageError` where images are to be joined whose targets cannot be."""
    if augment.joins and not isinstance(targets, Boxes):
        raise UsageError(
            f"mosaic and blend make one view of several images, whose boxes can be put side by "
            f"side, but not {targets.kind}: switch them off ({setting('augment.mosaic', 0)} and "
            f"{setting('augment.blend', 0)})"
        )


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
