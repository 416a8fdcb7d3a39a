"""What files need, whoever writes them: to be told apart, and to be there after a power cut."""

import hashlib
import os
from pathlib import Path

from vitrail.errors import DataError


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal. Raises `DataError` for one that cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def flush_folder(folder: Path) -> None:
    """Make the names in a folder as durable as the files' contents."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
