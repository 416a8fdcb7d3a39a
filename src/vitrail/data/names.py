"""Names of images and labels: many in little memory, each in one spelling, few in a message."""

import re
import unicodedata
from array import array
from collections.abc import Iterable
from pathlib import Path


class PackedNames:
    """Strings in one buffer: a list of a million would cost every worker hundreds of MB."""

    def __init__(self, names: Iterable[str]) -> None:
        text, ends = bytearray(), array("q", [0])
        for name in names:
            text += name.encode("utf-8", "surrogateescape")
            ends.append(len(text))
        self._text, self._ends = bytes(text), ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> str:
        return self._text[self._ends[i] : self._ends[i + 1]].decode("utf-8", "surrogateescape")


def label_name(label: str) -> str:
    """A label's one spelling: the same letters typed on a Mac and elsewhere differ in bytes."""
    return unicodedata.normalize("NFC", label.strip())


def text_line(text: object) -> str:
    r"""A text in its one spelling: on one line, without blanks around it, halves of letters as
    question marks. Empty for what is no text.

    >>> text_line(" a  red\ncar "), text_line(None)
    ('a red car', '')
    """
    if not isinstance(text, str):
        return ""
    whole = text.encode("utf-8", "replace").decode()
    return " ".join(unicodedata.normalize("NFC", whole).split())


def printable(path: str) -> str:
    r"""The path with bytes that are not UTF-8 as \xff, and \ doubled so that no two paths meet."""
    text = path.replace("\\", "\\\\").encode("utf-8", "surrogateescape")
    return text.decode("utf-8", "backslashreplace")


def shortened(names: Iterable[str], limit: int = 5) -> str:
    """The first names, and how many more there are.

    >>> shortened("abcdefgh")
    'a, b, c, d, e and 3 more'
    """
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def title_of(data: str) -> str:
    """What to call data in a title or the name of a folder.

    Only the ending of a file goes: `photos.v1.0` and `photos.v1.1` are two folders.

    >>> title_of("photos/my cats/"), title_of("samples:emoji"), title_of("hf:parquet:a/beans")
    ('my cats', 'emoji', 'beans')
    >>> title_of("photos.v1.0"), title_of("a/labels.csv"), title_of("mnist.npz")
    ('photos.v1.0', 'labels', 'mnist')
    """
    name = Path(re.sub(r"^(samples|hf|hf-stream):([a-z]+:)?", "", data)).name
    return re.sub(_FILE_ENDING, "", name, flags=re.IGNORECASE) or "data"


_FILE_ENDING = r"(?<=.)\.(csv|tsv|npz|tar|parquet|arrow|jsonl?)$"
"""Of files that data is kept in."""
