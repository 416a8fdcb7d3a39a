"""Preprocess: from a decoded image to what a model takes, the same wherever a model is used.

It travels with every checkpoint and every export. `view` is all that is done in pixels; what
follows (vitrail.data.views.canvas) is arithmetic. Nothing here imports torch: an exported model
does without it.

The image is scaled as a whole, with antialiasing, and a window of `size` is cut from its middle.
With S = floor(size / crop) on each axis, the scaled image is

- crop:    of the least size that covers S at the image's own aspect; the rest is cut off
- squash:  S itself, whatever the aspect
- pad:     of the greatest size that fits into S at the image's own aspect
- letterbox: as pad, with background up to all of `size`; with a `tile` no larger than a tile is
- short:   of the least size that covers S at the image's own aspect, and nothing is cut off
- tiles:   of `size` for each `tile` pixels of the image, and nothing is cut off
- native:  squashed, but with a `size` of the image's own: whole patches in each direction, as many
           as `size` has, in the numbers whose aspect is nearest to the image's (NaFlex)

The first two are the definition of torchvision (resize the short side, then centre crop) and of
timm's crop modes "center" and "squash"; they and letterbox fill `size`. Views of the others differ
in size and consist of whole patches: `pad` has the image at the top left and background in what is
left over of the last row and column, and nowhere else, for no token should be spent on background.
`vitrail.data.views.canvas.collate` makes a batch of them.

Scaling and cutting are one call here, so that only what is shown is ever computed: an image of
1 x 20000 pixels costs no more than another.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from math import ceil, floor, log, sqrt
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vitrail.data.pixels.decode import eight_bits
from vitrail.data.views.seen import Seen
from vitrail.errors import DataError, UsageError, setting, unknown_name

Resize = Literal["crop", "squash", "pad", "letterbox", "native", "short", "tiles"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]

_MODES = {1: "L", 3: "RGB"}

_LONGEST = 4
"""A side of a native view has at most so many times the patches of `size`'s: a batch's canvas holds
its tallest and its widest image."""


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How an image becomes a model's input; a value out of range is a `UsageError`.

    >>> preprocess = Preprocess(size=(32, 48), crop=0.875)
    >>> preprocess.view(Image.new("RGB", (640, 480))).shape
    (3, 32, 48)
    """

    size: tuple[int, int]
    """(height, width) of the model's input in pixels; the most of either for pad, and for native
    the size that has as many patches."""
    resize: Resize = "crop"
    crop: float = 1.0
    """The part of the scaled image's side that is shown: 0.875 gives the usual 256 -> 224."""
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Subtracted from each channel, in units where white is 1; its length is the channels'."""
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    background: int = 255
    """The grey level, 0 to 255, of what pad, letterbox and tiles add."""
    patch: tuple[int, int] = (1, 1)
    """(height, width) in pixels of the model's patches, of which pad and native show whole ones."""
    tile: int | None = None
    """Of tiles: how many pixels of the image the longer side of `size` shows. None: as many as it
    has. Of letterbox: so many at least."""
    grey_range: tuple[float, float] | None = None
    """Of greys of more than 8 bits, the values that become black and white; what is outside is
    clipped. None: 0 to 65535 of integers within that, else each image's own least and greatest."""

    def __post_init__(self) -> None:
        if not _whole(self.size, least=1) or len(self.size) != 2:
            raise UsageError(
                f"preprocess size {self.size!r}: give (height, width), two whole numbers from 1"
            )
        if not _whole(self.patch, least=1) or len(self.patch) != 2:
            raise UsageError(
                f"preprocess patch {self.patch!r}: give (height, width), two whole numbers from 1"
            )
        if self.resize not in get_args(Resize):
            raise unknown_name("resize rule", str(self.resize), get_args(Resize))
        if self.interpolation not in get_args(Interpolation):
            raise unknown_name("interpolation", str(self.interpolation), get_args(Interpolation))
        if not _real([self.crop]) or not 0 < self.crop <= 1:
            raise UsageError(f"preprocess crop {self.crop!r}: give a fraction above 0 and up to 1")
        if not (_real(self.mean) and _real(self.std) and len(self.mean) == len(self.std)):
            raise UsageError(
                f"preprocess mean {self.mean!r} and std {self.std!r}: "
                f"give each one number a channel, 1 or 3"
            )
        if len(self.mean) not in _MODES:
            raise UsageError(f"preprocess mean has {len(self.mean)} channels: give 1 or 3")
        if min(self.std) <= 0:
            raise UsageError(f"preprocess std {self.std!r}: every channel's must be above 0")
        if not _whole([self.background], least=0) or self.background > 255:
            raise UsageError(f"preprocess background {self.background!r}: give a level 0 to 255")
        if self.tile is not None and not _whole([self.tile], least=1):
            raise UsageError(f"preprocess tile {self.tile!r}: give a whole number of pixels")
        if self.grey_range is not None and not (
            _real(self.grey_range)
            and len(self.grey_range) == 2
            and self.grey_range[0] < self.grey_range[1]
        ):
            raise UsageError(
                f"the range of deep greys {self.grey_range!r}: give two numbers, the value that is "
                f"black and then a greater one that is white, as in "
                f"{setting('data.grey_range', (0, 4095))}"
            )

    @property
    def one_size(self) -> bool:
        """Whether every view has the same size."""
        return self.resize in ("crop", "squash", "letterbox")

    @property
    def alone(self) -> bool:
        """Whether views are as large as their images, so that a batch of them might be too much."""
        return self.resize == "tiles"

    @property
    def channels(self) -> int:
        """1 for greyscale, 3 for RGB."""
        return len(self.mean)

    @property
    def grey(self) -> "Preprocess":
        """The same for greyscale: by the mean of the channels' means, and of their deviations."""
        mean, std = (sum(values) / len(values) for values in (self.mean, self.std))
        return replace(self, mean=(mean,), std=(std,))

    @property
    def resampling(self) -> Image.Resampling:
        """Pillow's name of the interpolation."""
        return Image.Resampling[self.interpolation.upper()]

    def view(self, image: Image.Image) -> UInt8[np.ndarray, "c h w"]:
        """The pixels of a decoded image that a model is evaluated on. Raises as `convert` does."""
        image = self.convert(image)
        box, (height, width) = self._placed(image.height, image.width)
        shown = image.resize((width, height), self.resampling, box=box)
        return pixels(self._whole_patches(shown))

    def zoom(self, height: int, width: int) -> float:
        """Pixels of a view for one of an image of this size: so many that the image fits into the
        view where it is letterboxed, and covers it otherwise.
        """
        shares = self.size[0] / height, self.size[1] / width
        if self.resize != "letterbox":
            return max(shares)
        return min(*shares, max(self.size) / self.tile) if self.tile else min(shares)

    def seen(self, height: int, width: int) -> Seen:
        """How `view` shows an image of this size."""
        box, shown = self._placed(height, width)
        return Seen.of_box(box, (height, width), shown)._replace(size=self._whole(*shown))

    def seen_part(self, box: tuple[float, float, float, float], height: int, width: int) -> Seen:
        """How `view_part` shows this part of an image of this size."""
        shown = self._part_size(box)
        return Seen.of_box(box, (height, width), shown)._replace(size=self._whole(*shown))

    def view_part(
        self, image: Image.Image, box: tuple[float, float, float, float]
    ) -> UInt8[np.ndarray, "c h w"]:
        """The part (left, top, right, bottom) of a converted image, all of it: squashed to `size`
        by the rules crop and squash, at its own aspect by pad and native.
        """
        size = self._part_size(box)
        # Four times as fast for photographs of 12 megapixels, and nothing for small images.
        shown = image.resize(size[::-1], self.resampling, box=box, reducing_gap=2.0)
        return pixels(self._whole_patches(shown))

    def keeps(self, height: int, width: int) -> bool:
        """Whether `view` shows an image of this size just as it is, pixel for pixel."""
        if (height, width) != self._scaled(height, width):
            return False
        if self.resize == "letterbox" and (height, width) != self.size:
            return False
        if self.resize == "tiles" and (height, width) != self._whole(height, width):
            return False
        if self.resize == "pad":
            fits = height <= self.size[0] and width <= self.size[1]
            return fits and height % self.patch[0] == 0 and width % self.patch[1] == 0
        return (height, width) == self._frame(height, width)

    def convert(self, image: Image.Image) -> Image.Image:
        """The image in the mode of `channels`: greys are repeated, colours become their luma, and
        of deeper greys 8 bits are kept, as `grey_range` says.

        Raises `DataError` for an image of another mode than `read_image` gives: what becomes of
        transparency is settled there.
        """
        image = eight_bits(image, self.grey_range)
        if image.mode not in _MODES.values():
            raise DataError(
                f"an image of Pillow's mode '{image.mode}' cannot be preprocessed: "
                f"bring it to one that can with vitrail.data.read_image(image)"
            )
        mode = _MODES[self.channels]
        return image if image.mode == mode else image.convert(mode)

    def to_dict(self) -> dict[str, object]:
        """The fields as JSON holds them."""
        values = asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "Preprocess":
        """The inverse of `to_dict`. Raises `UsageError` for a name or a value that is wrong."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise unknown_name("preprocess field", str(name), known)
        if "size" not in values:
            raise UsageError("preprocess has no size: give (height, width)")
        tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**tuples)  # type: ignore[arg-type]  # checked by __post_init__

    def _frame(self, height: float, width: float) -> tuple[int, int]:
        """(height, width) of what is cut from the middle of the scaled image: `size`, or, for
        native, the image's own.
        """
        if self.resize == "short":
            sides = (floor(side / self.crop) for side in self.size)
            return _at_aspect(int(height), int(width), (next(sides), next(sides)), max)
        if self.resize == "tiles":
            zoom = max(self.size) / (self.tile or max(self.size))
            return max(1, round(height * zoom)), max(1, round(width * zoom))
        if self.resize != "native":
            return self.size
        most = [ceil(side / p) for side, p in zip(self.size, self.patch, strict=True)]
        rows, columns = _native_grid((height / self.patch[0]) / (width / self.patch[1]), most)
        return rows * self.patch[0], columns * self.patch[1]

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the scaled image, of which the frame is cut from the middle."""
        # timm's rounding: 224 / 0.9 = 248.9 becomes 248.
        frame = self.size if self.resize == "short" else self._frame(height, width)
        target_h, target_w = (floor(side / self.crop) for side in frame)
        match self.resize:
            case "crop" | "short":
                return _at_aspect(height, width, (target_h, target_w), max)
            case "letterbox" if self.tile and max(height, width) < self.tile:
                longer = max(target_h, target_w)
                return max(1, height * longer // self.tile), max(1, width * longer // self.tile)
            case "pad" | "letterbox":
                return _at_aspect(height, width, (target_h, target_w), min)
            case "tiles":
                return frame
        return target_h, target_w

    def _placed(
        self, height: int, width: int
    ) -> tuple[tuple[float, float, float, float], tuple[int, int]]:
        """Which part of an image is shown, and at what (height, width), before whole patches."""
        scaled, frame = self._scaled(height, width), self._frame(height, width)
        rows, columns = _window(height, scaled[0], frame[0]), _window(width, scaled[1], frame[1])
        box = columns.start, rows.start, columns.stop, rows.stop
        return box, (rows.pixels, columns.pixels)

    def _part_size(self, box: tuple[float, float, float, float]) -> tuple[int, int]:
        height, width = box[3] - box[1], box[2] - box[0]
        size = self._frame(height, width)
        if self.resize in ("pad", "letterbox"):
            scale = min(size[0] / height, size[1] / width)
            size = max(1, round(scale * height)), max(1, round(scale * width))
        return size

    def _whole(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of what is shown: all of `size`, or up to the next whole patches."""
        if self.resize == "letterbox":
            return self.size
        if self.resize == "tiles":
            height, width = max(height, self.size[0]), max(width, self.size[1])
        elif self.resize not in ("pad", "short"):
            return height, width
        p, q = self.patch
        return -(-height // p) * p, -(-width // q) * q

    def _whole_patches(self, shown: Image.Image) -> Image.Image:
        """With background at the right and below, up to what `_whole` says."""
        height, width = self._whole(shown.height, shown.width)
        if shown.size == (width, height):
            return shown
        canvas = Image.new(shown.mode, (width, height), (self.background,) * self.channels)
        canvas.paste(shown)
        return canvas


class _Window(NamedTuple):
    """Along one axis: `pixels` that show the source from `start` to `stop`."""

    start: float
    stop: float
    pixels: int


def _window(source: int, scaled: int, size: int) -> _Window:
    """The middle `size` pixels of `source` pixels brought to `scaled`; all, if they are fewer."""
    shown = min(scaled, size)
    first = round((scaled - shown) / 2)
    return _Window(source * first / scaled, source * (first + shown) / scaled, shown)


def _at_aspect(
    height: int, width: int, target: tuple[int, int], which: Callable[[int, int], int]
) -> tuple[int, int]:
    """An image's size at its own aspect: the greatest that fits into the target (min), or the least
    that covers it (max). The fraction of a pixel is dropped, as torchvision does.
    """
    by_height, by_width = target[0] * width, target[1] * height
    if by_height == which(by_height, by_width):
        return target[0], max(1, by_height // height)
    return max(1, by_width // width), target[1]


def _native_grid(aspect: float, most: Sequence[int]) -> tuple[int, int]:
    """The grid (rows, columns) for an image of `aspect` rows a column, with the tokens of `most`.

    Of the grids next to the one of exactly that aspect and number, the nearest in aspect of those
    that do not have more tokens.
    """
    tokens = most[0] * most[1]
    ideal = sqrt(tokens * aspect), sqrt(tokens / aspect)
    rows, columns = (
        {min(max(1, side), tokens, _LONGEST * limit) for side in (floor(n), ceil(n))}
        for n, limit in zip(ideal, most, strict=True)
    )
    grids = [grid for grid in product(rows, columns) if grid[0] * grid[1] <= tokens]
    return min(grids, key=lambda grid: (abs(log(grid[0] / grid[1] / aspect)), -grid[0]))


def pixels(image: Image.Image) -> UInt8[np.ndarray, "c h w"]:
    """A greyscale or RGB image as an array of its own."""
    array = np.asarray(image)
    return np.array(array[None] if array.ndim == 2 else array.transpose(2, 0, 1), order="C")


def _real(values: object) -> bool:
    """Whether these are plain numbers: what a JSON or YAML file says is not to be trusted."""
    return isinstance(values, Sequence) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < float("inf")
        for v in values
    )


def _whole(values: object, least: int) -> bool:
    return isinstance(values, Sequence) and all(
        isinstance(v, int) and not isinstance(v, bool) and v >= least for v in values
    )
