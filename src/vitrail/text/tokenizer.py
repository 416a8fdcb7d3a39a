"""What a tokenizer is: from texts to the tokens that its tower was trained on, padded as it needs.

Letters: b texts, t tokens.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int64

from vitrail.errors import DataError, UsageError, setting


class Tokens(NamedTuple):
    """Texts as numbers."""

    ids: Int64[np.ndarray, "b t"]
    mask: Bool[np.ndarray, "b t"]
    """Which of them are the text's, and no padding."""
    cut: int
    """How many texts were longer than the tower's context, and have lost their end."""


@runtime_checkable
class Tokenizer(Protocol):
    """Reads texts for a tower. The padding is the tower's own: a caller cannot get it wrong."""

    @property
    def context(self) -> int:
        """Tokens of the longest text."""

    @property
    def vocabulary(self) -> int:
        """How many different tokens there are."""

    @property
    def files(self) -> Mapping[str, bytes]:
        """The files that it was read from, by name; none of what ships with vitrail."""

    def state(self) -> dict[str, Any]:
        """What JSON can say of it: with `files` enough for `tokenizer_of`."""

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Raises `UsageError` for what is no list of texts."""


def checked(texts: Sequence[str]) -> Sequence[str]:
    """Texts, and no half characters: what of a text is no Unicode becomes U+FFFD.

    Raises `UsageError` for one text in place of several, and for what is no text.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise UsageError("a tokenizer takes a list of texts (str)")
    return [_HALF.sub("�", _PAIR.sub(_joined, text)) for text in texts]


def padded(
    rows: Sequence[Sequence[int]], length: int, pad: int, cut: int, *, counted: bool = False
) -> Tokens:
    """Rows of token numbers, none longer than `length`, as one array; `counted`: as if the padding
    were of the text.
    """
    ids = np.full((len(rows), length), pad, dtype=np.int64)
    mask = np.full((len(rows), length), counted)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = True
    return Tokens(ids, mask, cut)


def check_context(context: int, least: int) -> None:
    """Raise `UsageError` for a context without room for a text's ends and a word."""
    if context < least:
        raise UsageError(f"{setting('text.context')} must be at least {least}, not {context}")


def check_fits(tokenizer: Tokenizer, rows: int, where: str) -> None:
    """Raise `DataError` where a tokenizer is not that of a token table with so many rows.

    Tables are often rounded up, to a multiple of 8 to 128.
    """
    had = tokenizer.vocabulary
    if had == rows or any(-(-had // step) * step == rows for step in (8, 16, 32, 64, 128)):
        return
    raise DataError(
        f"{where} has {had:,} words, and the text tower a table of {rows:,}: it is of another "
        f"model. Give the file that came with these weights"
    )


_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_HALF = re.compile("[\ud800-\udfff]")


def _joined(pair: re.Match[str]) -> str:
    return pair[0].encode("utf-16", "surrogatepass").decode("utf-16")
