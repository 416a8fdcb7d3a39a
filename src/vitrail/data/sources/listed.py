"""The files that the names in a list mean.

Lists come from other machines: their names may have backslashes, or lack their endings (as
Kaggle's do). A name is taken as it stands where such a file is there; or else with slashes; or else
with the ending of the one image that is called so.
"""

import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import NamedTuple

from vitrail.data.sources.formats import IMAGE_EXTENSIONS

_SEARCHED = 200
"""Folders that are looked through for where a name may lead instead."""


def paths_meant(name: str, file: str, by_name: Mapping[str, list[str]]) -> list[str]:
    """The images that `name` in the annotation file `file` may mean: at paths that end like it, and
    of these at the ones that have most words in common with the path of the file.

    `by_name` has the paths by their last part.
    """
    ends = posixpath.normpath(name.replace("\\", "/"))
    called = by_name.get(posixpath.basename(ends), [])
    found = [path for path in called if f"/{path}".endswith(f"/{ends}")] or called
    words = set(re.findall(r"[a-z]+\d*", file.lower()))
    common = {path: len(words & set(path.lower().split("/"))) for path in found}
    return [path for path in found if common[path] == max(common.values())]


class _Folder(NamedTuple):
    files: frozenset[str]
    images: dict[str, list[str]]
    """Names of images by their names without ending."""


class ListedFiles:
    """The files in and around the folder `root`, by names relative to it, or absolute.

    Each folder that a name leads to is listed once: to look at each of a million files would take
    minutes where the folder lies on another machine.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._folders: dict[str, _Folder] = {}

    def find(self, name: str) -> list[str]:
        """The names of the files that `name` may mean; none if there is no such file."""
        slashed = name.replace("\\", "/")
        for spelt in (name, slashed) if slashed != name else (name,):
            if self._is_file(spelt):
                return [spelt]
        return self._with_ending(slashed)

    def is_file(self, name: str) -> bool:
        """Whether there is a file that `name` may mean."""
        return bool(self.find(name))

    def is_whole(self, name: str) -> bool:
        """Whether there is a file of this name, with its ending."""
        return self._is_file(name) or self._is_file(name.replace("\\", "/"))

    def beside(self, names: Iterable[str]) -> Iterator[str]:
        """The images in the folders of the files `names`, without what lies in folders of these."""
        for folder in dict.fromkeys(os.path.normpath(os.path.dirname(name)) for name in names):
            for images in self._folder(folder).images.values():
                yield from (os.path.normpath(os.path.join(folder, image)) for image in images)

    def reason(self, name: str) -> str | None:
        """Why the file `name` may not be there, and what to do; None if that cannot be told."""
        if re.match(r"[A-Za-z]:[\\/]|\\\\", name):
            return "these are places on a Windows machine: write them relative to the list's folder"
        if re.match(r"[a-z]+://", name):
            return "these are addresses: download the images, and list the files"
        above = os.path.join(self._root, os.pardir)
        places = [above, *(folder for folder, _, _ in islice(os.walk(self._root), _SEARCHED))]
        for tail in (name, re.split(r"[\\/]", name)[-1]):
            for place in places:
                if found := self.find(os.path.relpath(os.path.join(place, tail), self._root)):
                    return (
                        f"'{found[0]}' is there: names are relative to the list's folder, so write "
                        f"them like that, or move the list"
                    )
        return None

    def _is_file(self, name: str) -> bool:
        folder, base = os.path.split(name)
        listed = self._folder(folder)
        # A folder may be read but not listed; and a file system may know cat.PNG as cat.png, too.
        return base in listed.files or os.path.isfile(os.path.join(self._root, name))

    def _with_ending(self, name: str) -> list[str]:
        folder, base = os.path.split(name)
        if base.lower().endswith(IMAGE_EXTENSIONS):
            return []
        return [os.path.join(folder, image) for image in self._folder(folder).images.get(base, ())]

    def _folder(self, folder: str) -> _Folder:
        if folder not in self._folders:
            self._folders[folder] = _list(os.path.join(self._root, folder))
        return self._folders[folder]


def _list(folder: str) -> _Folder:
    images: dict[str, list[str]] = {}
    try:
        with os.scandir(folder) as entries:
            files = frozenset(entry.name for entry in entries if entry.is_file())
    except (OSError, ValueError):  # not there, or no name of a folder
        return _Folder(frozenset(), {})
    for name in sorted(filter(_is_image, files)):
        images.setdefault(os.path.splitext(name)[0], []).append(name)
    return _Folder(files, images)


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(IMAGE_EXTENSIONS)
