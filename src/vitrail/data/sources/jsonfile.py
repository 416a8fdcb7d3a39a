"""JSON that somebody else wrote: bounded in size, and cut or nested ones told as what they are."""

import json
import os
import re
from pathlib import Path
from typing import Any

from vitrail.units import bytes_text

_MOST_BYTES = 4 << 30
_HEAD = 1 << 20
_OVERLAP = 256
"""Bytes of one piece that are looked at again with the next."""


def read_json(file: Path) -> Any:
    """What a file holds. Raises `OSError`, and `ValueError` for what is none or too large."""
    if file.stat().st_size > _MOST_BYTES:
        raise ValueError(f"it has more than {bytes_text(_MOST_BYTES)}")
    try:
        return json.loads(file.read_bytes())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except MemoryError as error:
        raise ValueError("there is not enough memory to read it") from error


def text_of(value: object) -> str:
    r"""A name that JSON, YAML or XML gives, as text that can be printed and written: halves of
    letters become question marks. Raises `TypeError` for what is no name.

    >>> text_of("cat"), text_of(7), text_of("\ud800")
    ('cat', '7', '?')
    """
    if not isinstance(value, str | int | float):
        raise TypeError("a name is text")
    return str(value).encode("utf-8", "replace").decode()


def head_of(file: Path) -> bytes:
    """The first and the last MiB of a file; nothing where there is none."""
    try:
        if not file.is_file():
            return b""
        with file.open("rb") as stream:
            head = stream.read(_HEAD)
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(_HEAD, size - _HEAD))
            return head + stream.read(_HEAD)
    except OSError:
        return b""


def is_in(file: Path, pattern: "re.Pattern[bytes]") -> bool:
    """Whether a short pattern is anywhere in a file, which is read up to it and never held."""
    try:
        with file.open("rb") as stream:
            before = b""
            while piece := stream.read(_HEAD):
                if pattern.search(before + piece):
                    return True
                before = piece[-_OVERLAP:]
    except OSError:
        pass
    return False
