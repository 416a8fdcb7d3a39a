"""Tiles of images: what is small in a large image is large enough in a part of it.

An image is cut into squares that overlap by a quarter, so that an object that one of them cuts is
whole in another, unless it is larger than that. An image that fits into a tile is one.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from vitrail.data.pixels.decode import UnreadableImage
from vitrail.data.sources.source import Source
from vitrail.data.targets import NO_BOXES, Boxes, Said
from vitrail.data.views.seen import Seen
from vitrail.found import OVERLAP


class Tile(NamedTuple):
    """A part of an image."""

    image: int
    """Which, in the source."""
    box: tuple[int, int, int, int]
    """(left, top, right, bottom), in its pixels."""


class Tiled:
    """The tiles of all images of a source with boxes, as images.

    What a tile shows less than `LEAST_SEEN` of is ignored in it (`Boxes.target`). An image of which
    nobody knows the size, as it cannot be read, is one tile.
    """

    def __init__(self, source: Source, side: int) -> None:
        """`side` in pixels."""
        assert isinstance(source.targets, Boxes)
        self._source = source
        self._boxes = source.targets
        self.tiles = tuple(tile for i in range(len(source)) for tile in self._cut(i, side))
        said = [self._said(tile) for tile in self.tiles]
        self.targets = Boxes.listed(self._boxes.names, said, self._size)

    def __len__(self) -> int:
        return len(self.tiles)

    def key(self, i: int) -> str:
        tile = self.tiles[i]
        return f"{self._source.key(tile.image)} at {tile.box[0]},{tile.box[1]}"

    def load(self, i: int) -> Image.Image:
        tile = self.tiles[i]
        return self._source.load(tile.image).crop(tile.box)

    def stamp(self, i: int) -> str:
        tile = self.tiles[i]
        return f"{self._source.stamp(tile.image)} {tile.box}"

    def _cut(self, i: int, side: int) -> list[Tile]:
        try:
            height, width = self._boxes.size(i)
        except UnreadableImage:  # told when it is loaded
            return [Tile(i, (0, 0, side, side))]
        return [
            Tile(i, (left, top, min(left + side, width), min(top + side, height)))
            for top in starts(height, side)
            for left in starts(width, side)
        ]

    def _size(self, i: int) -> tuple[int, int]:
        left, top, right, bottom = self.tiles[i].box
        return bottom - top, right - left

    def _said(self, tile: Tile) -> Said:
        left, top, right, bottom = tile.box
        try:
            size = self._boxes.size(tile.image)
        except UnreadableImage:
            return NO_BOXES
        seen = Seen.of_box(tile.box, size, (bottom - top, right - left))
        found = self._boxes.target(tile.image, seen)
        unit = found["boxes"].astype(np.float64) / np.tile(seen.size[::-1], 2)
        return Said(unit, found["labels"], found["ignored"] > 0)


def starts(side: int, window: int) -> list[int]:
    """Where tiles begin along a side: evenly, the last one at its end, overlapping by at least a
    quarter.

    >>> starts(100, 100), starts(175, 100), starts(300, 100), starts(80, 100)
    ([0], [0, 75], [0, 66, 133, 200], [0])
    """
    if side <= window:
        return [0]
    count = math.ceil((side - window) / (window * (1 - OVERLAP))) + 1
    return [i * (side - window) // (count - 1) for i in range(count)]
