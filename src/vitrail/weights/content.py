"""What the reader of one kind of weights file gives, and what several of them need for it."""

import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vitrail.errors import DataError, unknown_name
from vitrail.units import bytes_text

MOST_BYTES = 64 << 30
"""More than any published ViT has (22 B parameters in bfloat16 are 44 GB): a header that claims
more is hostile or damaged."""


class Content(NamedTuple):
    """What the reader of one kind of file gives."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    notes: tuple[str, ...]


def within(path: Path, tensors: Mapping[str, Any], part: str) -> dict[str, Any]:
    """What lies under the prefix `part`. Raises `UsageError`, with what there is, for no such."""
    found = {key: x for key, x in tensors.items() if str(key).startswith((f"{part}.", f"{part}/"))}
    if not found:
        firsts = dict.fromkeys(re.split("[./]", str(key))[0] for key in tensors)
        raise unknown_name(f"part of {path}:", part, firsts)
    return {key[len(part) + 1 :]: x for key, x in found.items()}


@contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """The zip archive at `path`, whose members claim no more than can be honest.

    Raises `DataError` for damage and for an archive that would unpack to far more than weights do.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(member.file_size for member in archive.infolist())
            # Deflate takes little off weights, except zeros: a head that was never trained.
            if claimed > min(MOST_BYTES, max(1 << 30, 20 * path.stat().st_size)):
                raise DataError(
                    f"{path} would unpack to {bytes_text(claimed)}, more than weights do: "
                    f"it is damaged or hostile"
                )
            if len(archive.infolist()) != _members(path):  # one damaged entry may cover others
                raise DataError(
                    f"{path} is damaged or cut short: its list of contents has "
                    f"{len(archive.infolist())} entries of {_members(path)}. Fetch it again"
                )
            yield archive
    except DataError:
        raise
    except Exception as error:  # whatever zipfile throws at damage, the file is at fault
        raise DataError(f"{path} is damaged or cut short: {error}. Fetch it again") from error


def _members(path: Path) -> int:
    """How many members a zip archive says it has, at its end (PKWARE's APPNOTE.TXT, 4.3.14, 16)."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 16) - 200))
        tail = file.read()
    end, wide = tail.rfind(b"PK\5\6"), tail.rfind(b"PK\6\6")
    count = int.from_bytes(tail[end + 10 : end + 12], "little")
    return int.from_bytes(tail[wide + 32 : wide + 40], "little") if count == 0xFFFF else count


def from_numpy(array: np.ndarray, what: str) -> Tensor:
    """The array as a tensor, without a copy where its bytes are as torch wants them.

    Two-byte voids are bfloat16, as big_vision stores it. Raises `DataError`, about `what`, for
    a type that holds no numbers.
    """
    try:
        if array.dtype.kind == "V" and array.dtype.itemsize == 2 and array.dtype.names is None:
            return (
                torch.from_numpy(np.ascontiguousarray(array).view(np.int16))
                .view(torch.bfloat16)
                .reshape(array.shape)
            )
        if array.dtype.kind not in "fiub":
            raise TypeError("no type of number")
        native = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
        return torch.from_numpy(native).reshape(array.shape)  # numpy makes 0-d arrays 1-d
    except TypeError as error:
        raise DataError(f"{what} is of the type {array.dtype.str}, not weights: {error}") from error
