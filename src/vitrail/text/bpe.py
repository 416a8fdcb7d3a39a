"""CLIP's tokenizer: byte pair encoding of words in lower case (Sennrich et al., arXiv 1508.07909).

Its vocabulary ships with vitrail, as OpenAI published it (MIT, CLIP-LICENSE.md): 256 bytes, 256
bytes that end a word, 48,894 merges, the beginning and the end of a text. Numbers are as those of
open_clip's SimpleTokenizer, without its two libraries: letters and digits are told by Python's own
tables of Unicode, and texts mended by `vitrail.text.mend` where ftfy is not installed, which alone
undoes wrong encodings ("cafÃ©"). Which of the two it was goes with a run, and does not change.
"""

import gzip
import html
import re
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from heapq import heapify, heappop, heappush
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vitrail.errors import UsageError, unknown_name
from vitrail.text.mend import mended
from vitrail.text.tokenizer import Tokens, check_context, checked, padded

Mending = Literal["ftfy", "plain"]

_FILE = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
_MERGES = 49152 - 256 - 2
_MOST_KEPT = 1 << 16
_LONG = 64
"""Letters of a word that is not kept: nobody will ask for it again."""


class ClipTokenizer:
    """Texts for CLIP's towers: cut to `context` tokens, the last one the end, padded with zeros.

    >>> ClipTokenizer()(["a cat"]).ids[0, :5].tolist()
    [49406, 320, 2368, 49407, 0]
    """

    vocabulary = 49408
    files: Mapping[str, bytes] = {}

    def __init__(self, context: int = 77, mending: Mending | None = None) -> None:
        """`mending`: who mends texts; None is ftfy where it is installed. Raises `UsageError` for
        ftfy where it is not.
        """
        check_context(context, 3)
        has_ftfy = find_spec("ftfy") is not None
        if mending not in (None, "ftfy", "plain"):
            raise unknown_name("mending", str(mending), ("ftfy", "plain"))
        if mending == "ftfy" and not has_ftfy:
            raise UsageError(
                "the texts of this model were mended by ftfy, which is not installed: "
                "pip install 'vitrail[text]'"
            )
        self.context = context
        self.mending: Mending = mending or ("ftfy" if has_ftfy else "plain")
        self._known: dict[str, tuple[int, ...]] = {}

    def state(self) -> dict[str, Any]:
        """What JSON can say of it."""
        return {"kind": "clip", "context": self.context, "mending": self.mending}

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """The texts' tokens `[b context]`."""
        room, rows, cut = self.context - 2, [], 0
        start, end = self.vocabulary - 2, self.vocabulary - 1
        for text in checked(texts):
            ids: list[int] = []
            for word in _words().findall(self._clean(text)):
                ids += self._ids(word)
                if len(ids) > room:  # what follows changes nothing
                    cut += 1
                    break
            rows.append([start, *ids[:room], end])
        return padded(rows, self.context, 0, cut)

    def _clean(self, text: str) -> str:
        if self.mending == "ftfy":
            import ftfy  # an extra, and slow to import

            text = ftfy.fix_text(text)
        else:
            text = mended(text)
        text = html.unescape(html.unescape(text))
        return " ".join(text.split()).lower()

    def _ids(self, word: str) -> tuple[int, ...]:
        found = self._known.get(word)
        if found is None:
            found = tuple(_encoded(word))
            if len(word) <= _LONG and len(self._known) < _MOST_KEPT:
                self._known[word] = found
        return found


class _Vocabulary(NamedTuple):
    ids: dict[str, int]
    ranks: dict[tuple[str, str], int]
    letters: tuple[str, ...]
    """The letter that stands for each byte."""


@cache
def _vocabulary() -> _Vocabulary:
    lines = gzip.decompress(_FILE.read_bytes()).decode().split("\n")[1 : 1 + _MERGES]
    merges = [(first, second) for first, second in (line.split() for line in lines)]
    # A byte is the letter of its number where that can be seen, and else one after all of Latin-1.
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in seen]
    letters = {byte: chr(byte) for byte in seen} | {b: chr(256 + n) for n, b in enumerate(hidden)}
    alone = list(letters.values())
    words = [*alone, *(f"{x}</w>" for x in alone), *(first + second for first, second in merges)]
    words += ["<start_of_text>", "<end_of_text>"]
    return _Vocabulary(
        {word: i for i, word in enumerate(words)},
        {pair: rank for rank, pair in enumerate(merges)},
        tuple(letters[byte] for byte in range(256)),
    )


@cache
def _words() -> re.Pattern[str]:
    """What is a word: an English ending, letters, one digit, or what is neither.

    A text that spells the beginning or the end of a text gets their tokens, as in the original,
    which ignores case: so the long s is an s, and the mark of an iota below nothing at all.
    """
    letters, digits = _category("L"), _category("N")
    return re.compile(
        "<[s\u017f]tart_of_text>|<end_of_text>|'[s\u017f]|'t|'re|'ve|'m|'ll|'d"
        f"|[{letters}]+|[{digits}]|[^\\s\u0345{letters}{digits}]+"
    )


def _category(letter: str) -> str:
    """All characters of a category of Unicode, as ranges of a regular expression's class."""
    ranges: list[list[int]] = []
    for code in range(sys.maxunicode + 1):
        if unicodedata.category(chr(code))[0] == letter:
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges)


def _encoded(word: str) -> Iterator[int]:
    """A word's tokens: its bytes, of which the pair that was merged first in training is merged
    everywhere, and so on until no pair is known.

    By a heap, so that a word of a hundred thousand letters takes no longer than as many letters of
    words do.
    """
    ids, ranks, letters = _vocabulary()
    if word in ("<start_of_text>", "<end_of_text>"):
        yield ids[word]
        return
    parts = [letters[byte] for byte in word.encode()]
    parts[-1] += "</w>"
    after = [*range(1, len(parts)), -1]
    before = [-1, *range(len(parts) - 1)]

    def pair(i: int) -> tuple[int, int, str, str] | None:
        """Rank, place and parts of the pair that begins at `i`, if it is known."""
        if i < 0 or after[i] < 0:
            return None
        both = parts[i], parts[after[i]]
        return (ranks[both], i, *both) if both in ranks else None

    waiting = [found for i in range(len(parts)) if (found := pair(i))]
    heapify(waiting)
    while waiting:
        rank = waiting[0][0]
        fresh: list[int] = []
        while waiting and waiting[0][0] == rank:  # all of one pair, from left to right
            _, i, first, second = heappop(waiting)
            j = after[i]
            if parts[i] != first or j < 0 or parts[j] != second:
                continue  # one of the two is part of another by now
            parts[i], parts[j] = first + second, ""
            after[i] = after[j]
            if after[i] >= 0:
                before[after[i]] = i
            fresh += [before[i], i]
        for i in fresh:
            if found := pair(i):
                heappush(waiting, found)
    yield from (ids[part] for part in parts if part)
