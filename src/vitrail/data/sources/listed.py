"""The files that the names in a list mean.

Lists come from other machines: their names may have backslashes, or lack their endings (as
Kaggle's do). A name is taken as it stands where such a file is there; or else with slashes; or else
with the ending of the one image that is called so.
"""

import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import islice
from typing import NamedTuple

from vitrail.data.sources.formats import IMAGE_EXTENSIONS

_SEARCHED = 200
"""Folders that are looked through for where a name may lead instead."""
_SAY_NOTHING = frozenset(
    ("image", "images", "img", "imgs", "jpegimages", "data", "dataset", "photos", "pictures")
)
"""Names of folders, in small letters, under which everybody keeps images."""


def paths_meant(
    name: str, file: str, by_name: Mapping[str, list[str]], here: Set[str]
) -> list[str]:
    """The images that `name` in the annotation file `file` may mean: of those that are called so,
    the ones whose paths have the longest end in common with it, and of these the ones that have
    most words in common with the path of the file.

    A name may have more folders in front, of another machine, or fewer. One that is relative, and
    whose folder is another one than an image's, does not mean it: cam0/1.jpg is not cam1/1.jpg.
    Folders like `images` say nothing of that, unless there are such ones.

    `by_name` has the paths by their last part; `here` are the folders on the paths of all images,
    in small letters.
    """
    folders = name_folders(name)
    called = by_name.get(posixpath.basename(posixpath.normpath(name.replace("\\", "/"))), [])
    possible = [path for path in called if is_foreign(name) or _agree(folders, path, here)]
    shared = {path: _shared(folders, path_folders(path)) for path in possible}
    most = max(shared.values(), default=0)
    if folders and not most and len(possible) < len(called):
        return []  # nothing but the file's name says that it is this one, and others have that
    found = [path for path in possible if shared[path] == most]
    # The folder seq_1 is one word, and so is the train of instances_train.json.
    words = {*re.findall(r"[a-z]+\d*", file.lower()), *file.lower().split("/")}
    common = {path: len(words & set(path.lower().split("/"))) for path in found}
    return [path for path in found if common[path] == max(common.values())]


def name_folders(name: str) -> list[str]:
    """The folders that a name in a list leads through, in small letters."""
    return path_folders(posixpath.normpath(name.replace("\\", "/")))


def path_folders(path: str) -> list[str]:
    """The folders of a path, in small letters."""
    return [part for part in path.lower().split("/")[:-1] if part not in ("", "..", ".")]


def is_foreign(name: str) -> bool:
    """Whether a name begins at the root of some machine, whose first folders mean nothing here."""
    return re.match(r"[A-Za-z]+:[\\/]|[\\/]", name) is not None


def is_whole(name: str, path: str) -> bool:
    """Whether all that a name says is found at the end of the path."""
    folders = name_folders(name)
    return _shared(folders, path_folders(path)) == len(folders)


def _shared(folders: Sequence[str], others: Sequence[str]) -> int:
    """How many of the last folders are the same."""
    pairs = zip(reversed(folders), reversed(others), strict=False)
    return next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(folders), len(others)))


def _agree(folders: Sequence[str], path: str, here: Set[str]) -> bool:
    """Whether one of both is all there is of the other's end, but for what says nothing."""
    others = path_folders(path)
    silent = _SAY_NOTHING - (here - set(others))
    mine = [one for one in folders if one not in silent]
    its = [one for one in others if one not in _SAY_NOTHING]
    return _shared(mine, its) == min(len(mine), len(its))


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
