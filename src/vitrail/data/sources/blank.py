"""Images that nobody looks at: what is known of them was found out before, and they need not be
decoded again.
"""

from PIL import Image

from vitrail.data.sources.source import Source

_SIDE = 8


class Blank:
    """A source's targets, and a blank in the place of each image."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.targets = source.targets

    def __len__(self) -> int:
        return len(self._source)

    def key(self, i: int) -> str:
        return self._source.key(i)

    def load(self, i: int) -> Image.Image:
        return Image.new("L", (_SIDE, _SIDE))

    def stamp(self, i: int) -> str:
        return self._source.stamp(i)
