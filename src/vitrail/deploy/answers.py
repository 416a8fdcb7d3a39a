"""What a model says of images, for others: plain values, a mask with a palette, boxes drawn."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Int16, UInt8
from PIL import Image, ImageDraw, ImageFont

from vitrail.data.pixels.decode import AnyPicture, eight_bits, read_image
from vitrail.errors import DataError, UsageError
from vitrail.tasks.answers import Detections, Prediction, Segmentation

_OPACITY = 0.5
_BRIGHTER = 4 / 3
_LINES, _LETTERS, _LEAST_LETTERS = 500, 55, 11
"""Of an image's longer side a line's width and a letter's height are such a part; and pixels."""
MOST_NAMED = 40
"""With more boxes in an image their names would cover it."""
MOST_IN_A_PALETTE = 256


def told(answer: Any, top: int | None = None) -> dict[str, Any]:
    """An answer as plain values, which JSON can hold; of classes the `top` likeliest."""
    if isinstance(answer, Prediction):
        first = dict(list(answer.probabilities.items())[:top])
        return {"label": answer.label, "probabilities": first}
    if isinstance(answer, Segmentation):
        return {"shares": answer.shares}
    if isinstance(answer, Detections):
        rows = zip(answer.boxes, answer.labels, answer.scores, strict=True)
        return {
            "boxes": [
                {
                    "label": answer.names[label],
                    "score": round(float(score), 4),
                    "box": [round(float(side), 2) for side in box],
                }
                for box, label, score in rows
            ]
        }
    return {"features": answer.features.tolist()}


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


class Mark(NamedTuple):
    """How a box is drawn."""

    colour: tuple[int, int, int]
    text: str = ""
    """Beside it."""
    bold: bool = False


def drawn(image: Image.Image, detections: Detections, threshold: float) -> Image.Image:
    """The image, in colour, with each box of at least this score in its class's colour, the best
    one on top; with their names and scores where these are no more than MOST_NAMED.

    The image is upright and of the size that the boxes are in.
    """
    kept = detections.above(threshold)
    colours = (palette(len(kept.names) + 1)[1:] * _BRIGHTER).clip(0, 255).astype(int).tolist()
    named = len(kept.scores) <= MOST_NAMED
    marks = [
        Mark(tuple(colours[k]), f"{kept.names[k]} {score:.2f}" if named else "")
        for k, score in zip(kept.labels.tolist(), kept.scores.tolist(), strict=True)
    ]
    return outlined(image, kept.boxes, marks)


def outlined(
    image: Image.Image, boxes: Float[np.ndarray, "m 4"], marks: Sequence[Mark]
) -> Image.Image:
    """The image, in colour, with boxes (left, top, right, bottom) of its pixels, the first on top.

    Lines lie inside their box and are no wider than a fifth of it, so that of tiny boxes something
    is to be seen.
    """
    image = image.convert("RGB")
    draw, longer = ImageDraw.Draw(image), max(image.size)
    letters = ImageFont.load_default(max(_LEAST_LETTERS, longer / _LETTERS))
    placed = list(zip(boxes.tolist(), marks, strict=True))[::-1]
    for (left, top, right, bottom), mark in placed:
        x, y = round(left), round(top)
        end = max(x, round(right) - 1), max(y, round(bottom) - 1)
        widest = max(1, round(longer / _LINES)) * (2 if mark.bold else 1)
        width = max(1, min(widest, round(min(right - left, bottom - top) / 5)))
        draw.rectangle((x, y, *end), outline=mark.colour, width=width)
    for (left, top, _, bottom), mark in placed:
        if mark.text:
            _, _, wide, high = draw.textbbox((0, 0), mark.text, letters)
            wide, high = wide + 4, high + 3
            x = max(0, min(round(left), image.width - round(wide)))
            above = top - high >= 0 or bottom + high > image.height
            y = max(0, round(top - high if above else bottom))
            draw.rectangle((x, y, x + wide, y + high), fill=mark.colour)
            light = np.dot(mark.colour, (0.299, 0.587, 0.114)) > 140  # luma, ITU-R BT.601
            draw.text((x + 2, y + 1), mark.text, "black" if light else "white", letters)
    return image


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
