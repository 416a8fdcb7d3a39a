"""Greys of more than 8 bits: which range of their values a data set fills.

Cameras of 10, 12 and 14 bits write files of 16, scanners of bodies write signed numbers, and
others write floats. A model is shown 8 bits, so a part of the file's range must be chosen, and the
same one for all images, for how bright one is beside another may be what tells them apart.

Chosen is the first of these that holds every value looked at, and leaves the middle 99.8% of them
at least `_LEVELS` of the 256 levels:

- what 8, 10, 12, 14 or 16 bits hold, or, of floats, 0 to 1: images not looked at fit as well
- from the least value to the greatest

and where a few values are so far out that neither does (dead pixels of a camera, a bright speck),
the range in which the middle has that many; what lies outside is clipped.
"""

from collections.abc import Sequence
from math import ceil, floor
from typing import Literal, NamedTuple

import numpy as np

from vitrail.data.pixels.decode import UnreadableImage, depth
from vitrail.data.sources.source import Source, encoded
from vitrail.data.sources.stream import StreamSource

_HEADERS = 256
"""Files of which the header is read, to see whether greys are deep; spread over the data."""
_DECODED = 64
"""Of those that are, so many are decoded."""
_PIXELS = 2**14
"""About so many pixels of each count for the middle."""
_BITS = (8, 10, 12, 14, 16)
_MIDDLE = (0.001, 0.999)
_LEVELS = 64


class Greys(NamedTuple):
    """What was found in the deep greys of some images."""

    images: int
    """Looked at."""
    least: float
    greatest: float
    clipped: float
    """The share of values outside of `range`."""
    range: tuple[float, float] | None
    """What is to be black and white: `Preprocess.grey_range`; None where all is of one value."""

    def sentence(self) -> str:
        """One line for the user."""
        found = f"deep: values {range_text((self.least, self.greatest), ' to ')} in the "
        found += f"{self.images} images looked at"
        if self.range is None:
            return found
        text = f"{found}; {range_text(self.range)} become black to white"
        if self.clipped:
            text += f", and the {100 * self.clipped:.2g}% of values outside are cut off"
        return f"{text} (`vitrail train --data.grey-range LOW HIGH` sets another)"


def range_text(ends: tuple[float, float], between: str = "..") -> str:
    """Two numbers, as people write them.

    >>> range_text((0.0, 4095.0)), range_text((-0.25, 1.5))
    ('0..4,095', '-0.25..1.5')
    """
    return between.join(f"{v:,.0f}" if float(v).is_integer() else f"{v:.4g}" for v in ends)


class Depths(NamedTuple):
    """What was found of more than 8 bits in a look at some images."""

    greys: Greys | None = None
    colours: int = 0
    """Images whose colours are cut to their upper 8 bits."""

    def sentences(self) -> list[str]:
        """Lines for the user."""
        lines = [f"greys     {self.greys.sentence()}"] if self.greys else []
        return lines + ([f"colours   {cut_sentence(self.colours)}"] if self.colours else [])


def cut_sentence(images: int) -> str:
    """One line on so many images with deep colours."""
    return (
        f"{images} of the images looked at have 16 bits a colour, of which the upper 8 are read: "
        f"where few of the 65,536 values are used, scale them to 8 bits yourself"
    )


def look_at_depths(
    source: Source | StreamSource,
    held: Source | None = None,
    given: tuple[float, float] | None = None,
) -> Depths:
    """Look at some images of `source`, spread over it, for a range that suits or for one `given`.

    Of a stream, whose images cost a connection, `held` are some that are here: where none of these
    is deep, the stream is not asked.
    """
    if isinstance(source, StreamSource):
        if held is None or not any(_depths(held).values()):
            return Depths()
        source = source.sample(_DECODED)
    found = _depths(source)
    deep = [i for i, kind in found.items() if kind == "grey"]
    colours = sum(kind == "colour" for kind in found.values())
    return Depths(_look_at_greys(source, deep, given), colours)


def _depths(source: Source) -> dict[int, Literal["grey", "colour"] | None]:
    """What is deep of some images of `source`, by their headers."""
    return {i: depth_of(source, i) for i in _spread(len(source), _HEADERS)}


def depth_of(source: Source, i: int) -> Literal["grey", "colour"] | None:
    """What image `i` has more than 8 bits of."""
    try:
        file = encoded(source, i)
    except UnreadableImage:
        return None
    return file if file is None else depth(file)


def _spread(count: int, most: int) -> list[int]:
    """No more than `most` of the first `count` numbers."""
    return np.unique(np.linspace(0, count - 1, most).astype(int)).tolist() if count else []


def _look_at_greys(
    source: Source, deep: Sequence[int], given: tuple[float, float] | None
) -> Greys | None:
    least, greatest, whole, sample = np.inf, -np.inf, True, []
    for at in _spread(len(deep), _DECODED):
        try:
            image = source.load(deep[at])
        except UnreadableImage:
            continue
        values = np.asarray(image, np.float64).reshape(-1)
        values = values[np.isfinite(values)]
        if len(values):
            least, greatest = min(least, values.min()), max(greatest, values.max())
            whole &= image.mode == "I"
            sample.append(values[:: len(values) // _PIXELS | 1])  # odd, or it would see few columns
    if not sample:
        return None
    values = np.concatenate(sample)
    middle = np.quantile(values, _MIDDLE)
    found = given or _fitting(float(least), float(greatest), *middle.tolist(), whole=whole)
    clipped = float(((values < found[0]) | (values > found[1])).mean()) if found else 0.0
    return Greys(len(sample), float(least), float(greatest), clipped, found)


def _fitting(
    least: float, greatest: float, low: float, high: float, *, whole: bool
) -> tuple[float, float] | None:
    """The range for values from `least` to `greatest`, most of which are from `low` to `high`."""
    if least == greatest:
        return None
    most = (high - low) * 256 / _LEVELS
    usual = [(0.0, 2.0**bits - 1) for bits in _BITS] if whole else [(0.0, 1.0)]
    for start, end in (*usual, (least, greatest)):
        if start <= least and greatest <= end and (end - start <= most or low == high):
            return start, end
    # As much room on both sides of the middle; what one side cannot use is the other's.
    room = most - (high - low)
    above = min(greatest - high, room / 2)
    below = min(low - least, room - above)
    above = min(greatest - high, room - below)
    start, end = low - below, high + above
    return (float(floor(start)), float(ceil(end))) if whole else (start, end)
