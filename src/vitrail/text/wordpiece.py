"""BERT's tokenizer: words, and their pieces from a vocabulary (WordPiece, arXiv 1609.08144).

A text is rid of controls, set off by spaces around every ideograph, in lower case and without
accents where the vocabulary is; it is cut at spaces and punctuation, and each word into the longest
pieces that the vocabulary has, from the left. Numbers are as those of transformers' BertTokenizer,
but for the 500 marks and signs that came after the tables of Unicode 8 that it has.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from vitrail.errors import DataError
from vitrail.text.tokenizer import Tokens, check_context, checked, padded

FILE = "vocab.txt"
_MOST_LETTERS = 100
"""Of a word that is looked at: a longer one is unknown."""
_MOST_KEPT = 1 << 16
_MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_NEEDED = _MARKS[:4]
_IDEOGRAPHS = (  # CJK, as Google's code has it: no Hangul, no kana
    *((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F)),
    *((0x2B740, 0x2B81F), (0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)),
)


class WordPiece:
    """Texts for BERT's towers: [CLS], the pieces, [SEP]; padded to the longest of them."""

    def __init__(
        self, vocabulary: bytes, context: int = 512, *, closed: bool = True, lower: bool = True
    ) -> None:
        """`vocabulary`: the content of a vocab.txt, a piece a line. `closed`: with [SEP] at the
        end. Raises `DataError` for what is no such file.
        """
        check_context(context, 3)
        try:
            lines = vocabulary.decode().split("\n")
        except UnicodeDecodeError as error:
            raise DataError(f"the vocabulary ({FILE}) is no text in UTF-8: {error}") from error
        lines = [line.rstrip("\r") for line in lines[: len(lines) - (lines[-1] == "")]]
        self._pieces = {piece: i for i, piece in enumerate(lines)}
        if lacking := [mark for mark in _NEEDED if mark not in self._pieces]:
            raise DataError(
                f"the vocabulary ({FILE}) lacks {', '.join(lacking)}: it has a piece of BERT's a "
                f"line, and this one {len(lines):,} lines of something else"
            )
        self.vocabulary = len(lines)
        self.context = context
        self.closed = closed
        self.lower = lower
        self.files: Mapping[str, bytes] = {FILE: vocabulary}
        marks = [mark for mark in _MARKS if mark in self._pieces]
        self._marks = re.compile("|".join(f"({re.escape(mark)})" for mark in marks))
        self._clean, self._split = _Clean(), _Split(lower)
        self._known: dict[str, tuple[int, ...]] = {}

    def state(self) -> dict[str, Any]:
        """What JSON can say of it."""
        return {
            "kind": "wordpiece",
            "context": self.context,
            "closed": self.closed,
            "lower": self.lower,
        }

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """The texts' tokens, `[b t]`, where t is that of the longest."""
        room, cut, rows = self.context - 1 - self.closed, 0, []
        end = [self._pieces["[SEP]"]] * self.closed
        for text in checked(texts):
            ids: list[int] = []
            for part in filter(None, self._marks.split(text)):
                if part in _MARKS:  # spelt out in a text they are themselves, as in the original
                    ids.append(self._pieces[part])
                    continue
                for word in self._words(part):
                    ids += self._ids(word)
                    if len(ids) > room:
                        break
                if len(ids) > room:  # what follows changes nothing
                    break
            cut += len(ids) > room
            rows.append([self._pieces["[CLS]"], *ids[:room], *end])
        return padded(rows, max(map(len, rows), default=1), self._pieces["[PAD]"], cut)

    def _words(self, text: str) -> list[str]:
        text = text.translate(self._clean)
        if self.lower:
            text = unicodedata.normalize("NFD", text)
        return text.translate(self._split).split(" ")

    def _ids(self, word: str) -> tuple[int, ...]:
        found = self._known.get(word)
        if found is None:
            found = tuple(self._cut(word))
            if len(self._known) < _MOST_KEPT:
                self._known[word] = found
        return found

    def _cut(self, word: str) -> list[int]:
        """The longest pieces from the left; the unknown one, if the word has a part without."""
        ids: list[int] = []
        first = 0
        while first < len(word) and len(word) <= _MOST_LETTERS:
            for last in range(len(word), first, -1):
                piece = self._pieces.get("##" * (first > 0) + word[first:last])
                if piece is not None:
                    ids.append(piece)
                    first = last
                    break
            else:
                return [self._pieces["[UNK]"]]
        return ids if len(word) <= _MOST_LETTERS else [self._pieces["[UNK]"]]


class _Clean(dict[int, str]):
    """What becomes of each character before accents: filled as they are met."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        found = char
        if char in "\t\n\r":
            found = " "
        elif code in (0, 0xFFFD) or unicodedata.category(char) in ("Cc", "Cf", "Co"):
            found = ""  # vertical tabs and form feeds too
        elif char.isspace():
            found = " "
        elif any(first <= code <= last for first, last in _IDEOGRAPHS):
            found = f" {char} "
        self[code] = found
        return found


class _Split(dict[int, str]):
    """And after: accents off, lower case, spaces around punctuation."""

    def __init__(self, lower: bool) -> None:
        super().__init__()
        self.lower = lower

    def __missing__(self, code: int) -> str:
        char = chr(code)
        category = unicodedata.category(char)
        ascii_mark = code < 128 and char.isprintable() and not char.isalnum() and char != " "
        if ascii_mark or category[0] == "P":
            found = f" {char} "
        elif self.lower:
            found = "" if category == "Mn" else char.lower()
        else:
            found = char
        self[code] = found
        return found
