"""What files need, whoever writes them: to be told apart, to be there whole or not at all, and to
be there after a power cut.
"""

import hashlib
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from vitrail.errors import DataError


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal. Raises `DataError` for one that cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


@contextmanager
def whole(path: Path, *, flush: bool = True) -> Iterator[Path]:
    """A hidden name beside `path` to write a file under, which gets the name `path` at the end, in
    place of what had it; after an error nothing of it is left.

    The file lies on the disk itself before it gets the name; not so without `flush`, for what can
    be made again, and is seen to be whole when it is read. Raises `OSError`.
    """
    # Threads and processes may write the same file at once: the last one stays.
    writer = f"{os.getpid()}-{threading.get_native_id()}"
    beside = path.with_name(f".{path.name}.{writer}.writing")
    try:
        yield beside
        if flush:
            with beside.open("rb+") as stream:
                os.fsync(stream.fileno())
        beside.replace(path)
        if flush:
            flush_folder(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file, whole or not at all. Raises `OSError`."""
    with whole(path) as beside:
        beside.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """The same for text. Raises `DataError`, with what the system says."""
    try:
        # The name of a folder may be bytes that are no text.
        write_whole(path, text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error


def meant(name: str) -> str:
    """The name that a file was to get which a killed process left half written, or its own.

    >>> meant(".config.yaml.71-72.writing"), meant("config.yaml")
    ('config.yaml', 'config.yaml')
    """
    found = re.fullmatch(r"\.(.+?)(?:\.\d+-\d+)?\.writing", name)  # older ones have no numbers
    return found[1] if found else name


def flush_file(stream: IO[bytes]) -> None:
    """Bring what was written so far to the disk itself."""
    stream.flush()
    os.fsync(stream.fileno())


def flush_folder(folder: Path) -> None:
    """Make the names in a folder as durable as the files' contents."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
