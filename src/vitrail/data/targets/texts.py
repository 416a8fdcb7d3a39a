"""What is written of images: one text each or several, and a class where that is known as well."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import Int, Int32, Int64, UInt64

from vitrail.data.targets.classes import Classes
from vitrail.data.targets.targets import PADDING
from vitrail.data.views.seen import Seen

_BETWEEN = " | "


class Texts:
    """The texts of each image, as rows of one table: texts that are equal are one row.

    A batch has the rows; the words are looked up in `table` by whoever reads them.

    >>> texts = Texts.written([("a cat", "a pet"), ("a dog",), ("a pet",)])
    >>> texts.table, texts.target(1, None)["texts"].tolist()
    (('a cat', 'a pet', 'a dog'), [2, -1])
    """

    kind: ClassVar[str] = "texts"
    placed: ClassVar[bool] = False
    names: tuple[str, ...]
    """Of the classes; none where no image has one."""

    def __init__(
        self, table: tuple[str, ...], own: Int32[np.ndarray, "n k"], classes: Classes | None = None
    ) -> None:
        """`own` are each image's rows of `table`, at least one, then -1; `classes` are only to
        measure by.
        """
        self.table = table
        self.own = own
        self.classes = classes
        self.names = () if classes is None else classes.names

    @classmethod
    def written(cls, texts: Iterable[Sequence[str]], classes: Classes | None = None) -> "Texts":
        """From the texts of each image."""
        table: dict[str, int] = {}
        rows = [
            list(dict.fromkeys(table.setdefault(text, len(table)) for text in some))
            for some in texts
        ]
        own = np.full((len(rows), max(map(len, rows), default=1)), PADDING, np.int32)
        for place, row in zip(own, rows, strict=True):
            place[: len(row)] = row
        return cls(tuple(table), own, classes)

    def __len__(self) -> int:
        return len(self.own)

    @classmethod
    def joined(cls, parts: "Sequence[Texts]") -> "Texts":
        """Those of several parts of one data set, one after another, which have one table."""
        first = parts[0]
        if any(part.table is not first.table for part in parts):
            raise ValueError("texts of several tables cannot be joined")
        classes = [part.classes for part in parts if part.classes is not None]
        own = np.concatenate([part.own for part in parts])
        return cls(first.table, own, Classes.joined(classes) if classes else None)

    def rows(self, chosen: Int[np.ndarray, " m"]) -> "Texts":
        """Those of the images `chosen`, with the whole table."""
        classes = None if self.classes is None else self.classes.rows(chosen)
        return Texts(self.table, self.own[chosen], classes)

    def present(self) -> tuple[str, ...]:
        """The names of classes that any of the images has."""
        return () if self.classes is None else self.classes.present()

    def renumbered(self, names: tuple[str, ...]) -> "Texts":
        """The same with classes in another table of names."""
        if self.classes is None or names == self.names:
            return self
        return Texts(self.table, self.own, self.classes.renumbered(names))

    def target(self, i: int, seen: Seen | None) -> dict[str, np.ndarray]:
        """`texts [k]`, rows of the table and then -1, as many as the image of the most has; and
        `classes [c]`, where they are known.
        """
        said = {} if self.classes is None else self.classes.target(i, seen)
        return {"texts": self.own[i].astype(np.int64), **said}

    def blank(self, size: tuple[int, int]) -> dict[str, np.ndarray]:
        """No text, of no class."""
        said = {} if self.classes is None else self.classes.blank(size)
        return {"texts": np.full(self.own.shape[1], PADDING, np.int64), **said}

    def strata(self) -> Int64[np.ndarray, " n"] | None:
        """The class, where it is known."""
        return None if self.classes is None else self.classes.strata()

    def hashes(self) -> UInt64[np.ndarray, " n"]:
        """Of the texts in their order, and of the class."""
        of_text = np.array([*map(_digest, self.table), 0], np.uint64)  # -1 is the last one
        places = np.arange(1, 2 * self.own.shape[1], 2, dtype=np.uint64)
        found = (of_text[self.own] * places).sum(axis=1, dtype=np.uint64)
        return found if self.classes is None else found + self.classes.hashes()

    def of(self, i: int) -> tuple[str, ...]:
        """The texts of image `i`."""
        return tuple(self.table[row] for row in self.own[i] if row != PADDING)

    def text(self, i: int) -> str:
        """All of them."""
        return _BETWEEN.join(self.of(i))

    def different(self) -> int:
        """How many different texts these images have."""
        return len(np.unique(self.own[self.own != PADDING]))


def _digest(text: str) -> int:
    content = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
