"""What a folder holds: its images, and all else with the reason why it is left out.

The one rule for every verb that is given a folder: training, predict, doctor, shard.
"""

import os
import posixpath
import stat
from collections.abc import Collection
from typing import NamedTuple

from vitrail.data.sources.formats import FORMATS, HEAD_BYTES, IMAGE_EXTENSIONS, image_format, unread
from vitrail.data.sources.source import LeftOut, Tally
from vitrail.errors import DataError, setting

_SYSTEM = (
    *("__macosx", "_ds_store", "icon\r", "thumbs.db", "ehthumbs.db", "desktop.ini"),
    *("$recycle.bin", "system volume information", "@eadir", "lost+found"),
)
"""What file managers, archives and servers leave behind, in small letters."""

HIDDEN = ("hidden and system files", "what begins with a dot or belongs to the system is no data")


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is no data, but for the machine."""
    return name.startswith(".") or name.lower() in _SYSTEM


class Folder(NamedTuple):
    """What one folder holds itself."""

    folders: list[str]
    """Paths of the folders in it, sorted; POSIX and relative to the root, as all of these."""
    images: list[str]
    """Paths of the images in it, sorted."""


class Tree(NamedTuple):
    """What a folder holds at any depth."""

    folders: dict[str, Folder]
    """By path; that of the root is empty."""
    left_out: tuple[LeftOut, ...]

    def images(self, folder: str = "") -> list[str]:
        """Sorted paths of the images at any depth of `folder`."""
        found: list[str] = []
        pending = [folder]
        while pending:
            here = self.folders[pending.pop()]
            found += here.images
            pending += here.folders
        return sorted(found)


def walk(root: str, *, follow_links: bool = False, used: Collection[str] = ()) -> Tree:
    """List `root`. A file is an image by its ending, or else by its first bytes. What lies at the
    paths `used` has a use already: it is neither listed nor left out.

    Symbolic links are followed to plain files anywhere, and to folders within `root`; with
    `follow_links` to folders anywhere. None is followed in a circle.

    Raises DataError for a folder that cannot be listed.
    """
    try:
        return _Walk(root, follow_links, used).tree()
    except OSError as error:
        raise DataError(f"cannot list {error.filename}: {error.strerror}") from error


class Links:
    """The one rule for which folders below `root` are entered, by links or without."""

    def __init__(self, root: str, follow_links: bool) -> None:
        self._follow_links = follow_links
        self._real = {"": os.path.realpath(root)}
        """Where each folder really lies, by its path."""
        self._linked: set[str] = set()
        """Folders that a link leads to, or that lie in one."""
        self._seen: set[str] = set()
        """Where the folders lie that are listed already."""

    def begin(self, path: str) -> None:
        """The folder at `path`, which was entered, is listed now."""
        self._seen.add(self._real[path])

    def refused(self, parent: str, path: str, is_link: bool) -> tuple[str, str] | None:
        """What the folder at `path` is and why it is not entered; None where it is, and then
        known.
        """
        real = os.path.join(self._real[parent], posixpath.basename(path))
        linked = is_link or parent in self._linked
        if is_link:
            real = os.path.realpath(real)
            inside = os.path.join(real, "").startswith(os.path.join(self._real[""], ""))
            if not (inside or self._follow_links):
                follow = f"{setting('data.follow_links', True)} follows them"
                return "symbolic links to folders elsewhere", follow
        if linked and real in self._above(parent):
            return "symbolic links", "they lead in a circle"
        # Links among linked folders can multiply without end, so these are entered once each.
        if is_link and parent in self._linked and real in self._seen:
            return "symbolic links", "what they lead to is read already"
        self._real[path] = real
        if linked:
            self._linked.add(path)
        return None

    def _above(self, path: str) -> set[str]:
        """Where the folder at `path`, and those that it lies in, really are."""
        above = {self._real[""]}
        while path:
            above.add(self._real[path])
            path = posixpath.dirname(path)
        return above


class _Walk:
    def __init__(self, root: str, follow_links: bool, used: Collection[str]) -> None:
        self._root = root
        self._used = used
        self._left_out = Tally()
        self._links = Links(root, follow_links)

    def tree(self) -> Tree:
        folders: dict[str, Folder] = {}
        pending = [""]
        while pending:
            path = pending.pop()
            self._links.begin(path)
            folders[path] = found = self._list(path)
            pending += reversed(found.folders)
        # What is meant least goes last.
        told = sorted(self._left_out.told(), key=lambda one: one.kind == HIDDEN[0])
        return Tree(folders, tuple(told))

    def _list(self, folder: str) -> Folder:
        found = Folder([], [])
        with os.scandir(os.path.join(self._root, folder)) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                path = posixpath.join(folder, entry.name)
                if path in self._used:
                    continue
                if is_hidden(entry.name):
                    self._left_out.add(*HIDDEN, path)
                    continue
                is_link = entry.is_symlink()
                if is_link:
                    try:
                        mode = os.stat(entry.path).st_mode
                    except OSError:
                        self._left_out.add("symbolic links", "they lead nowhere", path)
                        continue
                    is_folder, is_file = stat.S_ISDIR(mode), stat.S_ISREG(mode)
                else:
                    is_folder = entry.is_dir(follow_symlinks=False)
                    is_file = entry.is_file(follow_symlinks=False)
                if is_folder:
                    if why := self._links.refused(folder, path, is_link):
                        self._left_out.add(*why, path)
                    else:
                        found.folders.append(path)
                elif not is_file:
                    self._left_out.add("devices, pipes and sockets", "they are no files", path)
                elif entry.name.lower().endswith(IMAGE_EXTENSIONS) or self._is_image(path):
                    found.images.append(path)
        return found

    def _is_image(self, path: str) -> bool:
        """Whether a file of no usual ending is an image; told, if it is not."""
        try:
            with open(os.path.join(self._root, path), "rb") as stream:
                head = stream.read(HEAD_BYTES)
        except OSError as error:
            reason = f"they cannot be opened: {(error.strerror or str(error)).lower()}"
            self._left_out.add("files", reason, path)
            return False
        form = image_format(head, path)
        if form in FORMATS:
            return True
        if form is not None:
            name, reason = unread(form)
            self._left_out.add(f"{name} images", reason, path)
        elif not head:
            self._left_out.add("empty files", "they have no content", path)
        else:
            self._left_out.add("other files", "they are no images, by their content", path)
        return False
