"""Preprocess: from a decoded image to what a model takes, the same wherever a model is used.

It travels with every checkpoint and every export. `view` is the part that needs an image library,
`normalise` the part that a graph can carry.

The image is scaled as a whole, with antialiasing, and a window of `size` is cut from its middle.
With S = floor(size / crop) on each axis, the scaled image is

- crop:    of the least size that covers S at the image's own aspect; the rest is cut off
- squash:  S itself, whatever the aspect
- pad:     of the greatest size that fits into S at the image's own aspect; the rest is background

This is the definition of torchvision (resize the short side, then centre crop) and of timm's crop
modes "center", "squash" and "border". Scaling and cutting are one call here, so that only what
is shown is ever computed: an image of 1 x 20000 pixels costs no more than another.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import floor
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float32, Num, UInt8
from PIL import Image
from torch import Tensor

from vitrail.errors import DataError, UsageError, unknown_name

Resize = Literal["crop", "squash", "pad"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]

_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How an image becomes a model's input; a value out of range is a `UsageError`.

    >>> preprocess = Preprocess(size=(32, 48), crop=0.875)
    >>> tuple(preprocess(Image.new("RGB", (640, 480))).shape)
    (3, 32, 48)
    """

    size: tuple[int, int]
    """(height, width) of the model's input in pixels."""
    resize: Resize = "crop"
    crop: float = 1.0
    """The part of the scaled image's side that is shown: 0.875 gives the usual 256 -> 224."""
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Subtracted from each channel, in units where white is 1; its length is the channels'."""
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    background: int = 255
    """The grey level, 0 to 255, of what `pad` adds."""

    def __post_init__(self) -> None:
        if not _whole(self.size, least=1) or len(self.size) != 2:
            raise UsageError(
                f"preprocess size {self.size!r}: give (height, width), two whole numbers from 1"
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

    @property
    def channels(self) -> int:
        """1 for greyscale, 3 for RGB."""
        return len(self.mean)

    @property
    def resampling(self) -> Image.Resampling:
        """Pillow's name of the interpolation."""
        return Image.Resampling[self.interpolation.upper()]

    def __call__(self, image: Image.Image) -> Float32[Tensor, "c h w"]:
        """The model's input for one image."""
        return self.normalise(torch.from_numpy(self.view(image))[None])[0]

    def view(self, image: Image.Image) -> UInt8[np.ndarray, "c h w"]:
        """The pixels that a model is evaluated on. Raises as `convert` does."""
        image = self.convert(image)
        height, width = self._scaled(image.height, image.width)
        rows = _window(image.height, height, self.size[0])
        columns = _window(image.width, width, self.size[1])
        shown = image.resize(
            (columns.pixels, rows.pixels),
            self.resampling,
            box=(columns.start, rows.start, columns.stop, rows.stop),
        )
        return pixels(self._on_background(shown))

    def keeps(self, height: int, width: int) -> bool:
        """Whether `view` shows an image of this size just as it is, pixel for pixel."""
        return (height, width) == self.size == self._scaled(height, width)

    def convert(self, image: Image.Image) -> Image.Image:
        """The image in the mode of `channels`: greys are repeated, colours become their luma.

        Raises `DataError` for an image that is neither greyscale nor RGB, 8 bits a channel: what
        becomes of transparency or of deeper greys is settled where files are decoded.
        """
        if image.mode not in _MODES.values():
            raise DataError(
                f"an image of Pillow's mode '{image.mode}' cannot be preprocessed: "
                f"decode it to 'RGB' or 'L' first"
            )
        mode = _MODES[self.channels]
        return image if image.mode == mode else image.convert(mode)

    def normalise(self, x: Num[Tensor, "b c h w"]) -> Float32[Tensor, "b c h w"]:
        """Grey levels 0 to 255, uint8 or float, as (x / 255 - mean) / std."""
        x = x.to(torch.float32, copy=True)  # and the rest in place: a batch is large
        scale = x.new_tensor([1 / (255 * std) for std in self.std])
        shift = x.new_tensor([m / std for m, std in zip(self.mean, self.std, strict=True)])
        return x.mul_(scale[:, None, None]).sub_(shift[:, None, None])

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

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the scaled image, of which `size` is cut from the middle."""
        # timm's rounding: 224 / 0.9 = 248.9 becomes 248; and, below, torchvision's: of the side
        # that follows from the aspect, the fraction is dropped.
        target_h, target_w = (floor(side / self.crop) for side in self.size)
        if self.resize == "squash":
            return target_h, target_w
        height_rules = target_h * width >= target_w * height
        if height_rules == (self.resize == "crop"):
            return target_h, max(1, target_h * width // height)
        return max(1, target_w * height // width), target_w

    def _on_background(self, shown: Image.Image) -> Image.Image:
        height, width = self.size
        if shown.size == (width, height):
            return shown
        canvas = Image.new(shown.mode, (width, height), (self.background,) * self.channels)
        canvas.paste(shown, ((width - shown.width) // 2, (height - shown.height) // 2))
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
