"""Images of which nothing is said: what is learned without labels."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import Int, UInt64

from vitrail.data.views.seen import Seen


class Nothing:
    """No targets, of `n` images."""

    kind: ClassVar[str] = "no labels"
    placed: ClassVar[bool] = False
    names: tuple[str, ...] = ()

    def __init__(self, n: int) -> None:
        self._n = n

    def __len__(self) -> int:
        return self._n

    @classmethod
    def joined(cls, parts: "Sequence[Nothing]") -> "Nothing":
        """As many as all of them."""
        return cls(sum(map(len, parts)))

    def rows(self, chosen: Int[np.ndarray, " m"]) -> "Nothing":
        """As many as are chosen."""
        return Nothing(len(chosen))

    def present(self) -> tuple[str, ...]:
        """None."""
        return ()

    def renumbered(self, names: tuple[str, ...]) -> "Nothing":
        """Still nothing."""
        return self

    def target(self, i: int, seen: Seen | None) -> dict[str, np.ndarray]:
        """Nothing."""
        return {}

    def blank(self, size: tuple[int, int]) -> dict[str, np.ndarray]:
        """Nothing."""
        return {}

    def strata(self) -> None:
        """All images are one group."""

    def hashes(self) -> UInt64[np.ndarray, " n"]:
        """All the same."""
        return np.zeros(self._n, np.uint64)

    def text(self, i: int) -> str:
        """Nothing."""
        return ""
