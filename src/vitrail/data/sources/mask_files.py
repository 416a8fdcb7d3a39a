"""Masks that lie in image files of their own."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vitrail.data.names import PackedNames, printable
from vitrail.data.pixels.values import Values, read_values
from vitrail.data.sources.source import file_stamp


class MaskFiles:
    """Masks as image files: `names` are paths relative to the folder `root`."""

    def __init__(self, root: str, names: Iterable[str], *, colours: bool = False) -> None:
        self._root = root
        self._names = PackedNames(names)
        self.colours = colours
        """Whether the numbers of a palette are read as its colours."""
        self.held: Any = None
        """What was counted in them (`vitrail.data.sources.mask_values.present`)."""

    def __getstate__(self) -> dict[str, Any]:
        """What was counted stays here: no other process asks for it."""
        return vars(self) | {"held": None}

    def __len__(self) -> int:
        return len(self._names)

    def file(self, i: int) -> Path:
        """Where mask `i` lies."""
        return Path(self._root, self._names[i])

    def values(self, i: int) -> Values:
        return read_values(self.file(i), colours=self.colours)

    def stamp(self, i: int) -> str:
        return file_stamp(self.file(i))

    def name(self, i: int) -> str:
        return printable(self._names[i])
