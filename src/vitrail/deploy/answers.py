"""What a model says of images, as files: a mask with a palette, and what it looks like."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Int16, UInt8
from PIL import Image

from vitrail.data.pixels.decode import AnyPicture, eight_bits, read_image
from vitrail.errors import DataError, UsageError
from vitrail.tasks import Segmentation

_OPACITY = 0.5
MOST_IN_A_PALETTE = 256


class Place(Protocol):
    """Where the answer about an image goes."""

    @property
    def files(self) -> tuple[Path, ...]:
        """All that is written."""
        ...

    def write(
        self, answer: Any, picture: AnyPicture, grey_range: tuple[float, float] | None = None
    ) -> dict[str, str]:
        """Write them; where they are, by what they are. `grey_range`: of deep greys what the model
        sees of them. Raises `DataError` where nothing can be written.
        """
        ...


def refuse_there(*files: Path) -> None:
    """Raise `UsageError` where anything would be replaced: an image, a mask mended by hand."""
    there = [file for file in files if os.path.lexists(file)]
    if there:
        more = f", and {len(there) - 1} more files" if len(there) > 1 else ""
        raise UsageError(
            f"{there[0]} is there already{more}, and nothing is replaced: choose another --out, or "
            f"move it away"
        )


class Masked(NamedTuple):
    """A mask, at the image's own size, and what it looks like.

    The mask's values are class indices: 8 bits and a palette, 16 bits for more than 256 classes.
    """

    mask: Path
    overlay: Path

    @classmethod
    def of(cls, out: Path, name: str) -> "Masked":
        """`out/NAME.png` and `out/NAME-overlay.jpg`."""
        return cls(out / f"{name}.png", out / f"{name}-overlay.jpg")

    @property
    def files(self) -> tuple[Path, ...]:
        return self.mask, self.overlay

    def write(
        self,
        answer: Segmentation,
        picture: AnyPicture,
        grey_range: tuple[float, float] | None = None,
    ) -> dict[str, str]:
        with writing(self.mask.parent):
            mask_image(answer).save(self.mask)
            overlay(picture, answer, grey_range).save(self.overlay, quality=90)
        return {"mask": str(self.mask), "overlay": str(self.overlay)}


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Make a folder to write into. Raises `DataError` where that fails, there or within."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise DataError(f"cannot write to {folder}: {error.strerror or error}") from error


def mask_image(answer: Segmentation) -> Image.Image:
    """The mask as an image of class indices."""
    if len(answer.names) > MOST_IN_A_PALETTE:
        return Image.fromarray(answer.mask.astype(np.uint16))
    image = Image.fromarray(answer.mask.astype(np.uint8), "P")
    image.putpalette(palette(len(answer.names)).tobytes())
    return image


def overlay(
    picture: AnyPicture, answer: Segmentation, grey_range: tuple[float, float] | None = None
) -> Image.Image:
    """The picture, in colour, with half of each pixel's colour its class's; the first class, which
    is mostly the background, stays as it is where it is called so. `grey_range` is that of
    `eight_bits`.
    """
    image = eight_bits(read_image(picture), grey_range).convert("RGB")
    return Image.fromarray(coloured(np.asarray(image), answer.mask, answer.names))


def coloured(
    pixels: UInt8[np.ndarray, "h w 3"], mask: Int16[np.ndarray, "h w"], names: tuple[str, ...]
) -> UInt8[np.ndarray, "h w 3"]:
    """Pixels mixed with the colours of their classes; without one, and of background, as before."""
    colours = palette(len(names))
    shown = pixels.copy()
    plain = mask < 0
    if names and names[0].lower() in ("background", "other", "unlabeled", "void"):
        plain = plain | (mask == 0)
    mixed = (1 - _OPACITY) * pixels + _OPACITY * colours[mask.clip(min=0)]
    shown[~plain] = mixed.astype(np.uint8)[~plain]
    return shown


def palette(classes: int) -> UInt8[np.ndarray, "c 3"]:
    """A colour for each class: Pascal VOC's, whose first one is black.

    >>> palette(3).tolist()
    [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
    """
    index = np.arange(classes)
    colours = np.zeros((classes, 3), np.int64)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
    return colours.astype(np.uint8)
