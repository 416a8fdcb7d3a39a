"""Which images differ between two data sets, told from 75 kB of each, however many there are.

A data set's sketch is a table of cells. Each image is a record of fixed size (its name, a hash of
its label, a hash of its content); it is combined by exclusive or into three cells that its own hash
chooses. Of two tables combined likewise, every record that both have is gone: what is left are the
records that differ. A cell that holds but one of them shows it whole, name and all; taken out of
its two other cells it uncovers more. So up to about 450 differing records come out exactly, and the
images need not be kept, nor be in any order (Eppstein, Goodrich, Uyeda and Varghese: What's the
Difference? SIGCOMM 2011, doi 10.1145/2018436.2018462).
"""

import base64
import zlib
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
from jaxtyping import Int64, UInt64

_PARTS, _CELLS_A_PART = 3, 200
_CELLS = _PARTS * _CELLS_A_PART
_NAME_BYTES = 64
_NAME_WORDS = _NAME_BYTES // 8
_WORDS = _NAME_WORDS + 2  # the name, the label's hash, the content's hash
_CUT = "..."

Words = UInt64[np.ndarray, "n w"]


class Record(NamedTuple):
    """One image: a name over 64 bytes keeps its end, behind three dots."""

    name: str
    label: int
    content: int


class Sketch:
    """A table of cells: `sums [cells w+1]` (a record's words and its hash), `counts [cells]`."""

    def __init__(self) -> None:
        self.sums = np.zeros((_CELLS, _WORDS + 1), np.uint64)
        self.counts = np.zeros(_CELLS, np.int64)

    def add(
        self,
        names: Sequence[str],
        labels: UInt64[np.ndarray, " n"],
        contents: UInt64[np.ndarray, " n"],
    ) -> None:
        """Put images in; the same ones may come in any order, and in any portions."""
        if not len(names):
            return
        packed = np.array([_packed(name) for name in names], f"S{_NAME_BYTES}")
        words = np.empty((len(names), _WORDS + 1), np.uint64)
        words[:, :_NAME_WORDS] = packed.view("<u8").reshape(len(names), _NAME_WORDS)
        words[:, _NAME_WORDS] = labels
        words[:, _NAME_WORDS + 1] = contents
        words[:, _WORDS] = _hashes(words[:, :_WORDS])
        for cells in _cells(words[:, _WORDS]).T:
            order = np.argsort(cells, kind="stable")
            which, starts, held = np.unique(cells[order], return_index=True, return_counts=True)
            self.sums[which] ^= np.bitwise_xor.reduceat(words[order], starts, axis=0)
            self.counts[which] += held

    def differences(self, other: Self) -> tuple[list[Record], list[Record]] | None:
        """The records of this table alone, and of the other alone; None: too many to be told."""
        sums, counts = self.sums ^ other.sums, self.counts - other.counts
        ours: list[Record] = []
        theirs: list[Record] = []
        for _ in range(_CELLS):  # each turn takes one record out of its cells
            candidates = np.flatnonzero(np.abs(counts) == 1)
            whole = _hashes(sums[candidates, :_WORDS]) == sums[candidates, _WORDS]
            for cell in candidates[whole]:
                places = _cells(sums[cell : cell + 1, _WORDS])[0]
                if cell in places:
                    break
            else:
                break
            (ours if counts[cell] == 1 else theirs).append(_record(sums[cell]))
            words, sign = sums[cell].copy(), counts[cell]
            sums[places] ^= words
            counts[places] -= sign
        return None if sums.any() or counts.any() else (ours, theirs)

    def text(self) -> str:
        """The table as printable text: at most 75 kB, and far less for few images."""
        content = self.sums.astype("<u8").tobytes() + self.counts.astype("<i8").tobytes()
        return base64.b64encode(zlib.compress(content)).decode()

    @classmethod
    def parse(cls, text: str) -> Self:
        """The inverse of `text`. Raises ValueError for what is no such table."""
        sketch = cls()
        size = sketch.sums.nbytes
        most = size + sketch.counts.nbytes
        try:
            content = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), most)
        except zlib.error as error:
            raise ValueError(f"it is no sketch of a data set: {error}") from error
        if len(content) != most:
            raise ValueError(f"a sketch of a data set has {most} bytes, not {len(content)}")
        sketch.sums[:] = np.frombuffer(content[:size], "<u8").reshape(sketch.sums.shape)
        sketch.counts[:] = np.frombuffer(content[size:], "<i8")
        return sketch


def _packed(name: str) -> bytes:
    text = name.encode("utf-8", "surrogateescape")
    if len(text) <= _NAME_BYTES:
        return text
    end = text[len(_CUT) - _NAME_BYTES :].decode("utf-8", "ignore")  # not from within a letter
    return f"{_CUT}{end}".encode()


def _record(words: UInt64[np.ndarray, " w"]) -> Record:
    name = words[:_NAME_WORDS].astype("<u8").tobytes().rstrip(b"\0")
    label, content = words[_NAME_WORDS : _NAME_WORDS + 2].tolist()
    return Record(name.decode("utf-8", "backslashreplace"), label, content)


def _hashes(words: Words) -> UInt64[np.ndarray, " n"]:
    """One hash a row."""
    found = np.zeros(len(words), np.uint64)
    for column in words.T:
        found = _mixed(found ^ column)
    return found


def _mixed(values: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """SplitMix64 (doi 10.1145/2714064.2660195): every bit of the input changes half the output."""
    values = values + np.uint64(0x9E3779B97F4A7C15)  # arrays of uint64 wrap around silently
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _cells(hashes: UInt64[np.ndarray, " n"]) -> Int64[np.ndarray, "n parts"]:
    """The cells of each record, one in each third of the table, so that they are three."""
    chosen = []
    for part in range(_PARTS):
        hashes = _mixed(hashes)
        chosen.append((hashes % np.uint64(_CELLS_A_PART)).astype(np.int64) + part * _CELLS_A_PART)
    return np.stack(chosen, axis=1)
