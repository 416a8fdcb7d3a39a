"""What lies where in a tar file, found by its headers alone: nothing is ever unpacked.

Python's tarfile makes an object of every member and keeps them all, which takes minutes and
gigabytes for a million of them. This reads what images in tar files need: names (also the long
ones of pax and GNU), kinds, offsets and sizes, as tarfile finds them; a test compares the two.
Formats: POSIX.1-2017, pax, "ustar Interchange Format"; GNU tar manual, "Basic Tar Format".
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from vitrail.errors import DataError

BLOCK = 512
_WINDOW = 16 * 1024
_MOST_HEADER_BYTES = 1 << 20  # of one long name or one list of pax records
_TRAILING_BYTES = 64 * 1024  # more than any usual padding behind the end mark

Kind = Literal["file", "folder", "link", "device", "sparse", "other"]

_KINDS: dict[bytes, Kind] = {
    **{b"0": "file", b"\0": "file", b"7": "file", b"S": "sparse", b"5": "folder"},
    **{b"1": "link", b"2": "link", b"3": "device", b"4": "device", b"6": "device"},
}
_WITHOUT_CONTENT = ("folder", "link", "device")


class Member(NamedTuple):
    """One entry of a tar file; its content is `size` bytes from `offset` on.

    `name` is as the file has it, absolute or with "..", bytes that are not UTF-8 as surrogates.
    """

    name: str
    kind: Kind
    offset: int
    size: int


class TarReader:
    """The members of a tar file, in its order. Raises DataError if the file cannot be opened."""

    def __init__(self, file: Path | str) -> None:
        self._file = file
        try:
            # Without O_NONBLOCK, a pipe of this name would be waited for.
            self._fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror}") from error
        self._end = os.fstat(self._fd).st_size
        self._start = 0
        self._window = b""
        self.trailing = 0
        """Bytes behind the end mark, once all members were read: another tar file, perhaps."""

    def __enter__(self) -> "TarReader":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def read(self, offset: int, size: int) -> bytes:
        """The bytes there, fewer if the file ends. Raises DataError where the disk fails."""
        if offset < self._start or offset + size > self._start + len(self._window):
            try:
                self._window = os.pread(self._fd, max(size, _WINDOW), offset)
            except OSError as error:
                raise DataError(f"cannot read {self._file}: {error.strerror}") from error
            self._start = offset
        return self._window[offset - self._start : offset - self._start + size]

    def members(self) -> Iterator[Member]:
        """What the headers list. Raises DataError where one is damaged or the file is cut short."""
        at = 0
        shared: dict[str, str] = {}  # pax records for all members that follow
        own: dict[str, str] = {}  # for the next one
        while True:
            header = self.read(at, BLOCK)
            if not header.strip(b"\0"):
                self.trailing = max(0, self._end - at - _TRAILING_BYTES)
                return
            kind, size = self._checked(header, at)
            content = at + BLOCK
            if kind in (b"x", b"X", b"g"):
                (shared if kind == b"g" else own).update(self._records(at, content, size))
                at = content + _padded(size)
                continue
            if kind in (b"L", b"K"):
                if kind == b"L":
                    own["path"] = _text(self._header_content(at, content, size))
                at = content + _padded(size)
                continue
            records = shared | own if shared or own else own
            own = {}
            member_kind = _KINDS.get(kind, "other")
            name = records.get("path") or _name(header)
            if member_kind == "sparse":
                content = self._behind_sparse_map(header, content)
            elif any(record.startswith("GNU.sparse.") for record in records):
                member_kind = "sparse"
            elif kind == b"\0" and _name(header).endswith("/"):  # as tar files of 1979 mark them
                member_kind = "folder"
            if "size" in records:
                size = self._number(records["size"].encode(), 10, at)
            if member_kind in _WITHOUT_CONTENT:
                yield Member(name, member_kind, content, 0)
                at = content
                continue
            if content + size > self._end:
                raise DataError(
                    f"{self._file} is cut short: {_shown(name)} should end at byte "
                    f"{content + size}, the file has {self._end}"
                )
            yield Member(name, member_kind, content, size)
            at = content + _padded(size)

    def _checked(self, header: bytes, at: int) -> tuple[bytes, int]:
        """Kind and size in a header, if it is one."""
        if len(header) < BLOCK:
            raise DataError(f"{self._file} is cut short: it ends within the header at byte {at}")
        stated = self._number(header[148:156], 8, at)
        field = header[148:156]
        if sum(header) - sum(field) + 8 * ord(" ") != stated:
            # Some old programs summed signed bytes.
            high = sum(byte > 127 for byte in header) - sum(byte > 127 for byte in field)
            if sum(header) - sum(field) + 8 * ord(" ") - 256 * high != stated:
                raise self._damaged(at)
        return header[156:157], self._number(header[124:136], 8, at)

    def _number(self, field: bytes, base: int, at: int) -> int:
        """A number in octal or decimal digits, or, with the first bit set, in binary."""
        if field[:1] in (b"\x80", b"\xff"):
            if field[0] == 0xFF:
                raise self._damaged(at)  # negative
            return int.from_bytes(field[1:], "big")
        digits = field.split(b"\0", 1)[0].strip()
        if digits and not digits.isdigit():
            raise self._damaged(at)
        try:
            return int(digits or b"0", base)
        except ValueError as error:
            raise self._damaged(at) from error

    def _header_content(self, at: int, content: int, size: int) -> bytes:
        found = self.read(content, size) if size <= _MOST_HEADER_BYTES else b""
        if len(found) < size or not size:
            raise self._damaged(at)
        return found

    def _records(self, at: int, content: int, size: int) -> dict[str, str]:
        r"""The records "LENGTH NAME=VALUE\n" of a pax header."""
        rest = self._header_content(at, content, size).rstrip(b"\0")
        records = {}
        while rest:
            digits, space, _ = rest[:20].partition(b" ")
            length = self._number(digits, 10, at)
            name, equals, value = rest[len(digits) + 1 : length].partition(b"=")
            if not space or not equals or not value.endswith(b"\n") or length > len(rest):
                raise self._damaged(at)
            records[_text(name)] = _text(value[:-1])
            rest = rest[length:]
        return records

    def _behind_sparse_map(self, header: bytes, content: int) -> int:
        """Where the content begins: the map of a GNU sparse file may go on after its header."""
        goes_on = header[482]
        while goes_on:
            extension = self.read(content, BLOCK)
            if len(extension) < BLOCK:
                raise DataError(f"{self._file} is cut short at byte {content}")
            goes_on = extension[504]
            content += BLOCK
        return content

    def _damaged(self, at: int) -> DataError:
        return DataError(f"{self._file} is no tar file, or is damaged: no header at byte {at}")


def _name(header: bytes) -> str:
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _shown(name: str) -> str:
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return repr(text if len(text) <= 100 else f"{text[:100]}...")
