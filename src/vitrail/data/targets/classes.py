"""Each image's class, or any number of them."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int, Int64, UInt8, UInt64

from vitrail.data.targets.targets import Targets
from vitrail.data.views.seen import Seen
from vitrail.errors import UsageError

Values = Int64[np.ndarray, " n"] | UInt8[np.ndarray, "n c"]


class Classes:
    """One class an image as int64 `[n]`; where an image may have several, uint8 `[n c]` of zeros
    and ones.

    >>> labels = Classes(("cat", "dog"), np.array([1, 0]))
    >>> labels.text(0), labels.target(0, None)["classes"].tolist(), labels.several
    ('dog', [0.0, 1.0], False)
    """

    kind: ClassVar[str] = "classes"
    placed: ClassVar[bool] = False

    def __init__(self, names: tuple[str, ...], values: Values) -> None:
        self.names = names
        self.values = values

    @classmethod
    def numbered(cls, names: tuple[str, ...], labels: Iterable[Any], *, several: bool) -> "Classes":
        """From each image's number; or numbers, where it may have several."""
        if not several:
            return cls(names, np.fromiter(labels, np.int64))
        found = list(labels)
        values = np.zeros((len(found), len(names)), np.uint8)
        for row, numbers in zip(values, found, strict=True):
            row[list(numbers)] = 1
        return cls(names, values)

    @classmethod
    def named(
        cls, names: tuple[str, ...], labels: Iterable[tuple[str, ...]], *, several: bool
    ) -> "Classes":
        """From the names that each image has: one, or where it may have `several`, any."""
        index = {name: i for i, name in enumerate(names)}
        numbers = ([index[label] for label in found] for found in labels)
        if several:
            return cls.numbered(names, numbers, several=True)
        return cls.numbered(names, (number for (number,) in numbers), several=False)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def several(self) -> bool:
        """Whether an image may have any number of classes."""
        return self.values.ndim == 2

    @classmethod
    def joined(cls, parts: "Sequence[Classes]") -> "Classes":
        """Those of several sources one after another, which have the same names."""
        return cls(parts[0].names, np.concatenate([part.values for part in parts]))

    def rows(self, chosen: Int[np.ndarray, " m"]) -> "Classes":
        """Those of the images `chosen`, with all names."""
        return Classes(self.names, self.values[chosen])

    def of(self, kept: Int[np.ndarray, " c"]) -> "Classes":
        """With the classes `kept` only, sorted, which must be all that these images have."""
        names = tuple(self.names[k] for k in kept)
        values = self.values[:, kept] if self.several else np.searchsorted(kept, self.values)
        return Classes(names, values)

    def present(self) -> tuple[str, ...]:
        """The names that any of the images has."""
        return tuple(self.names[k] for k in np.flatnonzero(self.counts()))

    def renumbered(self, names: tuple[str, ...]) -> "Classes":
        """The same in another table of names, which has all that are present."""
        index = {name: k for k, name in enumerate(names)}
        used = np.flatnonzero(self.counts())
        places = np.array([index[self.names[k]] for k in used], np.int64)
        if self.several:
            values = np.zeros((len(self), len(names)), np.uint8)
            values[:, places] = self.values[:, used]
            return Classes(names, values)
        table = np.zeros(len(self.names), np.int64)
        table[used] = places
        return Classes(names, table[self.values])

    def counts(self) -> Int64[np.ndarray, " c"]:
        """How many images are of each class."""
        if self.several:
            return self.values.sum(axis=0, dtype=np.int64)
        return np.bincount(self.values, minlength=len(self.names))

    def shares(self, chosen: Int[np.ndarray, "*m"] | int) -> np.ndarray:
        """What a model is to say of images, as float32 rows `[*m c]`: probabilities that add up to
        1, or zeros and ones.
        """
        if self.several:
            return self.values[chosen].astype(np.float32)
        # Not rows of np.eye, which for one image of ImageNet-21k would be two gigabytes.
        own = np.asarray(self.values[chosen])[..., None]
        shares = np.zeros((*own.shape[:-1], len(self.names)), np.float32)
        np.put_along_axis(shares, own, 1, axis=-1)
        return shares

    def target(self, i: int, seen: Seen | None) -> dict[str, np.ndarray]:
        """`classes [c]`, whatever part of the image is seen."""
        return {"classes": self.shares(i)}

    def blank(self, size: tuple[int, int]) -> dict[str, np.ndarray]:
        """`classes [c]` of zeros."""
        return {"classes": np.zeros(len(self.names), np.float32)}

    def strata(self) -> Int64[np.ndarray, " n"] | None:
        """The class; None where there may be several."""
        return None if self.several else self.values

    def hashes(self) -> UInt64[np.ndarray, " n"]:
        """Of the names, not of the indices; of several, the sum."""
        of_class = np.array(
            [
                int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
                for name in self.names
            ],
            np.uint64,
        )
        if not self.several:
            return of_class[self.values]
        total = np.zeros(len(self), np.uint64)
        for column, number in enumerate(of_class):  # not a product: that is [n c] of 8 bytes
            total += np.where(self.values[:, column] > 0, number, np.uint64(0))
        return total

    def text(self, i: int) -> str:
        """Its name; several as a|b."""
        found = np.flatnonzero(self.values[i]) if self.several else [self.values[i]]
        return "|".join(self.names[k] for k in found)


def classes_of(targets: Targets, what: str) -> Classes:
    """The classes that `what` needs. Raises `UsageError` for targets of another kind."""
    if isinstance(targets, Classes):
        return targets
    raise UsageError(f"{what} is for images with classes, and these come with {targets.kind}")
