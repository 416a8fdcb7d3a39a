"""FolderSource: images whose folder says their class."""

import os
import posixpath
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from vitrail.data.decode import IMAGE_EXTENSIONS, read_image
from vitrail.data.names import PackedNames, label_name, printable, shortened
from vitrail.data.source import PART_NAMES, PARTS, Targets, file_stamp
from vitrail.errors import DataError


class FolderSource:
    """Images in class folders, nested or not: ROOT/cat/1.jpg, ROOT/dog/summer/2.jpg.

    The class folders may lie in one folder a part: ROOT/train/cat/1.jpg, ROOT/val/cat/2.jpg, and
    ROOT/test, where `val` may be spelt valid or validation. Images are known by their extension.
    Hidden files are skipped; symbolic links are followed only to files within `root`. The order is
    by class, then part, then path.

    Raises DataError where no class folder has an image, or a folder cannot be listed.
    """

    def __init__(self, root: Path | str) -> None:
        self._root = os.path.abspath(root)
        try:
            listing = _list(self._root)
        except OSError as error:
            raise DataError(f"cannot list {error.filename}: {error.strerror}") from error
        filled = sorted(folder for folder in listing.folders if folder.images)
        if not filled:
            raise DataError(_no_images(self._root, listing))
        self.classes = tuple(sorted({folder.label for folder in filled}))
        self.notes = _folder_notes(listing, self.classes)
        sizes = [len(folder.images) for folder in filled]
        index = {name: i for i, name in enumerate(self.classes)}
        labels = [index[folder.label] for folder in filled]
        self.targets: Targets = np.repeat(np.array(labels, np.int64), sizes)
        self.part = np.repeat(np.array([folder.part for folder in filled], np.uint8), sizes)
        self._names = PackedNames(chain.from_iterable(folder.images for folder in filled))

    def __len__(self) -> int:
        return len(self._names)

    def key(self, i: int) -> str:
        return printable(self._names[i])

    def load(self, i: int) -> Image.Image:
        return read_image(self.encoded(i))

    def encoded(self, i: int) -> Path:
        """Where image `i` lies."""
        return Path(self._root, self._names[i])

    def stamp(self, i: int) -> str:
        return file_stamp(f"{self._root}/{self._names[i]}")


class _ClassFolder(NamedTuple):
    label: str
    part: int
    path: str
    images: list[str]


class _Listing(NamedTuple):
    """What lies under a folder; `loose` are images outside class folders, `links` left out."""

    folders: list[_ClassFolder]
    loose: list[str]
    links: list[str]


def _list(root: str) -> _Listing:
    listing = _Listing([], [], [])
    for part, place in _places(root).items():
        for kind, path in _entries(root, place):
            if kind == "folder":
                label = label_name(printable(posixpath.basename(path)))
                images = _images(root, path, listing.links)
                listing.folders.append(_ClassFolder(label, PARTS.index(part), path, images))
            else:
                (listing.links if kind == "link" else listing.loose).append(path)
    return listing


def _places(root: str) -> dict[str, str]:
    """For each part, the folder that its class folders lie in, relative to `root`."""
    folders = {path.lower(): path for kind, path in _entries(root, "") if kind == "folder"}
    places = {part: folders[name] for part in PARTS for name in PART_NAMES[part] if name in folders}
    parted = "train" in places and (len(places) > 1 or len(folders) == 1)
    return places if parted else {"train": ""}


def _images(root: str, folder: str, links: list[str]) -> list[str]:
    """Sorted paths of the images at any depth of `folder`; links not followed go to `links`."""
    images: list[str] = []
    pending = [folder]
    lists = {"folder": pending, "image": images, "link": links}
    while pending:
        for kind, path in _entries(root, pending.pop()):
            lists[kind].append(path)
    return sorted(images)


def _entries(root: str, folder: str) -> Iterator[tuple[Literal["folder", "image", "link"], str]]:
    """What counts in one folder: kind, and POSIX path relative to `root`."""
    with os.scandir(os.path.join(root, folder)) as entries:
        for entry in entries:
            path = posixpath.join(folder, entry.name)
            if entry.name.startswith("."):
                continue
            if entry.is_symlink() and not _is_file_within(root, entry.path):
                yield "link", path
            elif entry.is_dir(follow_symlinks=False):
                yield "folder", path
            elif entry.name.lower().endswith(IMAGE_EXTENSIONS) and entry.is_file():
                yield "image", path


def _is_file_within(root: str, link: str) -> bool:
    target = Path(os.path.realpath(link))
    return target.is_relative_to(os.path.realpath(root)) and target.is_file()


def _no_images(root: str, listing: _Listing) -> str:
    if listing.loose:
        example = printable(posixpath.basename(min(listing.loose)))
        return (
            f"images lie directly in {root}, in no class folder: make a folder for each class, as "
            f"in {root}/cat/{example}, or list them in {root}/labels.csv with the columns "
            "file,label"
        )
    message = (
        f"no images in {root}: each class needs a folder with images ({' '.join(IMAGE_EXTENSIONS)})"
    )
    if listing.links:
        message += (
            f"; {len(listing.links)} symbolic links were not followed, since they lead to folders "
            "or out of it: give the folder that they lead to"
        )
    return message


def _folder_notes(listing: _Listing, classes: Sequence[str]) -> tuple[str, ...]:
    empty = sorted({folder.label for folder in listing.folders} - set(classes))
    left_out = (
        ("class folders without images", empty),
        ("images outside the class folders", sorted(listing.loose)),
        ("symbolic links to folders or out of the data", sorted(listing.links)),
    )
    return tuple(
        f"{what} are left out ({len(names)}): {shortened(map(printable, names))}"
        for what, names in left_out
        if names
    )
