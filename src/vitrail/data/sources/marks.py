"""Marks: what annotation files say of the boxes in images, whatever their format, before it is held
against the images themselves (box_frames.py does that).
"""

import math
import os
import posixpath
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitrail.data.names import label_name
from vitrail.data.pixels.decode import MAX_SIDE
from vitrail.data.sources.jsonfile import text_of
from vitrail.data.sources.listed import (
    is_foreign,
    is_whole,
    name_folders,
    path_folders,
    paths_meant,
)
from vitrail.data.sources.parts import part_within
from vitrail.data.sources.source import PARTS, Tally
from vitrail.data.sources.walk import Links, Tree, is_hidden
from vitrail.data.targets.boxes import ANY

REGIONS = frozenset(
    (
        *("ignore", "ignored", "ignore region", "ignored region", "ignored regions", "dontcare"),
        *("don't care", "void", "unlabeled", "unlabelled"),
    )
)
"""Names, in small letters, of what is no class, but a place where nothing counts."""
REGION = "ignored"
"""The one of them that we write."""

_TRUE = ("true", "yes", "t", "y")
_FALSE = ("", "false", "no", "f", "n", "none", "null")
_ENDINGS = (".json", ".xml", ".txt", ".yaml", ".yml", ".csv", ".tsv", ".names")
_DEEP = 8
"""Levels of folders."""
_QUICK = 60
"""Folders that are listed where it only matters whether there are any boxes."""
ABOVE = ("annotations", "labels", "labels_json", "det_20", "annotation")
"""Folders of annotations, beside which the images lie."""


@dataclass(slots=True)
class Marked:
    """What is said of one image."""

    part: int
    """Its index in PARTS."""
    size: tuple[int, int] | None
    """(height, width), where somebody says it."""
    corners: "array[float]" = field(default_factory=lambda: array("d"))
    """Left, top, right, bottom of one box after another."""
    labels: "array[int]" = field(default_factory=lambda: array("q"))
    ignored: "array[int]" = field(default_factory=lambda: array("b"))

    def add(
        self, corners: tuple[float, float, float, float], label: int, ignored: bool = False
    ) -> None:
        """One box more; what has no class is ignored."""
        self.corners.extend(corners)
        self.labels.append(label)
        self.ignored.append(ignored or label == ANY)


class Marks:
    """Collects what the files of a data set say, image by image, and what is at fault in them."""

    def __init__(self, tree: Tree, *, parts: bool, unit: bool = False) -> None:
        """`parts`: whether names of files and folders say which part an image is for; `unit`:
        whether boxes are told in the image's unit square, instead of in pixels.
        """
        self.images: dict[str, Marked] = {}
        """By path."""
        self.left = Tally()
        self.notes: list[str] = []
        self.unit = unit
        self._parts = parts
        self._paths = tree.images()
        self._by_name: dict[str, list[str]] = {}
        self._by_stem: dict[str, list[str]] = {}
        for path in self._paths:
            name = posixpath.basename(path)
            self._by_name.setdefault(name, []).append(path)
            self._by_stem.setdefault(posixpath.splitext(name)[0], []).append(path)
        self._there = set(self._paths)
        self._here = {folder for path in self._paths for folder in path_folders(path)}
        self._files_in: set[str] = set()
        self._names: set[str] = set()
        self._named_in: set[str] = set()
        self._meant: dict[str, tuple[str, bool]] = {}
        self._index: dict[str, int] = {}
        self._declared = 0

    def paths(self) -> list[str]:
        """Of all images that are there, sorted."""
        return self._paths

    def is_there(self, path: str) -> bool:
        """Whether there is an image at `path`."""
        return path in self._there

    def knows(self, name: str, *, by_stem: bool = False) -> bool:
        """Whether any image is called `name`; `by_stem`: but for its ending."""
        return name in (self._by_stem if by_stem else self._by_name)

    def each_of_one(self, files: Iterable[str]) -> None:
        """That these annotation files are of one image each: where one lies tells which."""
        self._files_in = {folder for file in files for folder in path_folders(file)}

    def expect(self, names: Iterable[str]) -> None:
        """All names that lists have: what one of them means depends on what others do."""
        for name in names:
            self._names.add(posixpath.normpath(name.replace("\\", "/")))
            self._named_in.update(name_folders(name))

    def declare(self, names: Iterable[str]) -> None:
        """Classes in the order that their data set gives them."""
        for name in names:
            self.label(name)
        self._declared = len(self._index)

    def label(self, name: str) -> int:
        """The number of a class until `classes` orders them; ANY for a region of none."""
        name = label_name(name)
        if name.lower() in REGIONS:
            return ANY
        return self._index.setdefault(name, len(self._index))

    def classes(self) -> tuple[tuple[str, ...], list[int]]:
        """The names: first those that were declared, then the others, sorted; and of each number
        that `label` gave its place among them.
        """
        known = list(self._index)
        first, others = known[: self._declared], known[self._declared :]
        # Python reads no number of thousands of digits.
        numbers = all(name.isdecimal() and len(name) < 100 for name in others)
        ordered = [*first, *sorted(others, key=lambda name: (int(name) if numbers else 0, name))]
        place = {name: k for k, name in enumerate(ordered)}
        return tuple(ordered), [place[name] for name in known]

    def flag(self, value: object, where: str) -> bool:
        """Whether a flag of an ignored object is set; what is none is counted, and not set."""
        try:
            return flag_of(value)
        except ValueError as error:
            self.left.add("flags of ignored objects", f"{error}: their objects count", where)
            return False

    def part(self, *paths: str) -> int:
        """The part that the first of these paths with a word for one is of, by its last such word;
        else training.
        """
        if self._parts:
            for path in paths:
                stem = posixpath.splitext(path)[0]
                for word in reversed(stem.split("/")):
                    if found := part_within(word):
                        return PARTS.index(found.part)
        return 0

    def find(self, called: str, file: str, *, by_stem: bool = False) -> str | None:
        """The one image that the annotation file `file` means; none is counted as such.

        By its path from the file's folder or the root, or else by how its path ends; `by_stem`: by
        its name without ending. Two names are one image only if its path has all of both.
        """
        ends = posixpath.normpath(called.replace("\\", "/"))
        for folder in () if by_stem else (posixpath.dirname(file), ""):
            path = posixpath.normpath(posixpath.join(folder, ends))
            if path in self._there:
                return self._only(path, path, f"{called} in {file}", whole=True)
        by_name = self._by_stem if by_stem else self._by_name
        near = paths_meant(called, file, by_name, self._here)
        found = [path for path in near if not self._is_another(called, file, path)]
        if len(found) == 1:
            return self._only(found[0], ends, f"{called} in {file}", is_whole(called, found[0]))
        if found:
            self.left.add("images that may be meant", f"{file} names one of them", *found)
        elif ends.startswith("../") or posixpath.isabs(ends):
            self.left.add("images outside the folder", "a data set lies in one folder", called)
        else:
            why = "no file is called so"
            if posixpath.basename(ends) in by_name:
                why = "what is called so in other folders are other images"
            self.left.add("images that are named and not there", why, called)
        return None

    def _is_another(self, called: str, file: str, path: str) -> bool:
        """Whether the image at `path` is another one, for a list names that by all that it says; or
        by what tells apart the folders of names that begin at the root of some machine, or those of
        annotation files of one image each.
        """
        if self._names and not is_whole(called, path):
            parts = path.split("/")
            if any("/".join(parts[k:]) in self._names for k in range(len(parts))):
                return True
        place = set(path_folders(path))
        ways = [(set(path_folders(file)), self._files_in)] if self._files_in else []
        ways += [(set(name_folders(called)), self._named_in)] if is_foreign(called) else []
        # Annotations/x.xml may be of JPEGImages/x.jpg. But a/x.xml is not of b/x.jpg where there
        # are images in a folder a, or files in a folder b.
        return any(
            own - place and place - own and ((own - place) & self._here or (place - own) & others)
            for own, others in ways
        )

    def _only(self, path: str, name: str, what: str, whole: bool) -> str | None:
        """`path`; None, which is counted, where an image was found for another name, and not all of
        either name says that it is this one.
        """
        before, sure = self._meant.setdefault(path, (name, whole))
        if before != name and not (sure and whole):
            why = "an image is called so, and another name was taken for it before"
            self.left.add("names of images that are not there, or named twice", why, what)
            return None
        return path

    def begin(self, path: str, part: int, size: tuple[int, int] | None = None) -> Marked | None:
        """To say what is on an image; None where it was said before, which is counted."""
        if path in self.images:
            self.left.add("images that are named twice", "the first one is taken", path)
            return None
        self.images[path] = marked = Marked(part, size)
        return marked

    def unnamed(self, why: str) -> None:
        """Leave out the images of which nothing is said."""
        rest = [path for path in self._paths if path not in self.images]
        self.left.add("images without boxes or a word that they have none", why, *rest)


def size_said(height: Any, width: Any) -> tuple[int, int] | None:
    """(height, width) as a file says it; None where it says nothing that an image can have."""
    try:
        size = int(float(height)), int(float(width))
    except (TypeError, ValueError, OverflowError):
        return None
    return size if all(0 < side <= 4 * MAX_SIDE for side in size) else None


def numbers(values: Sequence[Any]) -> tuple[float, float, float, float]:
    """Four numbers, whatever their size. Raises `ValueError` for anything else."""
    try:
        first, second, third, fourth = map(float, values)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError("a box is four numbers") from error
    return first, second, third, fourth


def flag_of(value: object) -> bool:
    """A flag as people write it, in whatever format; nothing at all is none that is set. Raises
    `ValueError` for what is neither true nor false.

    >>> flag_of("TRUE"), flag_of("1.0"), flag_of("0"), flag_of("false"), flag_of(None)
    (True, True, False, False, False)
    """
    said = "" if value is None else str(value).strip().lower()
    if said in _TRUE or said in _FALSE:
        return said in _TRUE
    try:
        number = float(said)
    except ValueError:
        number = -1
    if math.isnan(number):  # as tables say nothing
        return False
    if number not in (0, 1):
        raise ValueError("a flag is 0 or 1, or false or true")
    return number == 1


def name_of(value: object) -> str:
    """A class's name as a file gives it. Raises `ValueError` for what is none."""
    try:
        name = label_name(text_of(value))
    except TypeError as error:
        raise ValueError("a class has a name") from error
    if not name or not name.isprintable():
        raise ValueError("a class has a name")
    return name


def annotation_files(root: str, *, follow_links: bool = False, quick: bool = False) -> list[str]:
    """The files in `root` that may tell something of images, sorted, relative to it; links are
    followed as `walk` does. `quick`: in a few folders alone, first those of annotations.
    """
    found: list[str] = []
    pending = deque([("", 0)])
    links = Links(root, follow_links)
    seen = 0
    while pending and not (quick and seen >= _QUICK):
        folder, level = pending.popleft()
        links.begin(folder)
        seen += 1
        below: list[tuple[str, bool]] = []
        try:
            with os.scandir(os.path.join(root, folder)) as entries:
                # All of them, whatever their order: one file may lie among a million images.
                for entry in entries:
                    path = posixpath.join(folder, entry.name)
                    if is_hidden(entry.name):
                        continue
                    # Of what is no link, the entry tells without a look; what loops is neither.
                    is_link = entry.is_symlink()
                    if entry.name.lower().endswith(_ENDINGS):
                        is_file = os.path.isfile(entry.path) if is_link else entry.is_file()
                        found += [path] if is_file else []
                    elif level < _DEEP and (
                        os.path.isdir(entry.path) if is_link else entry.is_dir()
                    ):
                        below.append((path, is_link))
        except OSError:  # as `walk` says of those that it cannot list
            continue
        for path, is_link in sorted(below):
            if links.refused(folder, path, is_link):  # as `walk` says of these, too
                continue
            if any(word in ABOVE for word in path.lower().split("/")):
                pending.appendleft((path, level + 1))
            else:
                pending.append((path, level + 1))
    return sorted(found)


def ending_in(files: Iterable[str], *endings: str) -> list[str]:
    """Those of them that have one of these endings, in small letters."""
    return [file for file in files if file.lower().endswith(endings)]


def first_lines(root: str, file: str, size: int = 4096) -> str:
    """The beginning of a text file; empty where there is none."""
    try:
        with Path(root, file).open("rb") as stream:
            return stream.read(size).decode("utf-8-sig", "replace")
    except OSError:
        return ""
