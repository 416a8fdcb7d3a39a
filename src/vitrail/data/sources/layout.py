"""Which folders of a data set are its parts, and which are its classes.

Names tell parts, whole ones (train2017, Validation, test_images) or alike ones (seg_train,
seg_test). Where names and what lies below them disagree, the user is asked: a split that is learned
as a class gives a model of nothing, and no number would show it.
"""

import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import NamedTuple

from vitrail.data.names import printable, shortened
from vitrail.data.sources.parts import PartName, part_named, part_within
from vitrail.data.sources.source import PARTS
from vitrail.data.sources.walk import Tree
from vitrail.errors import UsageError, setting

_PLAIN = ("train", "training", "val", "valid", "validation", "test", "testing")
"""Names of parts that go without saying."""


@dataclass(frozen=True)
class FolderRules:
    """How a folder of images is understood."""

    parts: str = "auto"
    """Which folders are its parts. auto: by their names; none: all are classes; or as
    train=DIR,val=DIR,test=DIR, where a part may be given twice."""
    follow_links: bool = False
    """Follow symbolic links to folders elsewhere. Those to files and within the data are
    followed anyway."""


USUAL = FolderRules()


class Layout(NamedTuple):
    """Where the class folders lie."""

    places: tuple[tuple[str, str], ...]
    """(part, folder): the folder's folders are classes. Without parts, ("train", "")."""
    notes: tuple[str, ...] = ()


def find_layout(tree: Tree, parts: str, name: str) -> Layout:
    """The parts of a data set that `name` stands for in messages, by `FolderRules.parts`.

    Raises UsageError where it is not certain, or `parts` names what is not there.
    """
    if parts == "none":
        return Layout((("train", ""),))
    finder = _Finder(tree, name)
    return finder.found() if parts == "auto" else finder.told(parts)


class _Finder:
    def __init__(self, tree: Tree, name: str) -> None:
        self._tree = tree
        self._name = name
        self._holding: set[str] = set()
        """Folders with images in them, at any depth."""
        for path, folder in tree.folders.items():
            while folder.images and path not in self._holding:
                self._holding.add(path)
                path = posixpath.dirname(path)

    def told(self, parts: str) -> Layout:
        """The parts as the user gives them."""
        places = []
        for one in re.split(f",(?=(?:{'|'.join(PARTS)})=)", parts):
            part, equals, folder = one.partition("=")
            if not equals or part not in PARTS:
                raise UsageError(
                    f"{setting('data.parts', parts)}: it is auto, none, or as in "
                    "train=DIR,val=DIR,test=DIR"
                )
            place = posixpath.normpath(folder) if folder not in (".", "./") else ""
            if place not in self._tree.folders:
                near = get_close_matches(place, self._tree.folders, n=1)
                hint = f": did you mean {printable(near[0])}?" if near else ""
                raise UsageError(
                    f"{setting('data.parts')}: {self._name} has no folder {folder}{hint}"
                )
            places.append((part, self._through(place)))
        for _, one in places:
            if sum(not one or f"{other}/".startswith(f"{one}/") for _, other in places) > 1:
                raise UsageError(
                    f"{setting('data.parts')}: {one or '.'} would be in two parts, or twice in one"
                )
        return Layout(tuple(places))

    def found(self) -> Layout:
        """The parts by their names."""
        top = self._top()
        folders = self._inside(top)
        named = self._named(top)
        parts = {name.part for name in named.values()}
        places = {path: self._through(path) for path in named}
        beside = len(named) < len(folders)
        filled = [place for place in places.values() if self._inside(place)]
        # A class may be called train, and hold folders beside its images.
        if beside and len(parts) == 1:
            filled = [place for place in filled if self._is_solid(place)]
        if len(parts) < 2 and not filled:
            self._refuse_alike(folders)
            return Layout((("train", ""),))
        if not filled:
            raise self._asking(named, "they hold images, and no class folders")
        if beside and len(parts) == 1:
            raise self._asking(named, "folders of other names lie beside", folders)
        self._refuse_two_kinds_of_val(named)
        found = self._unwrapped({(named[path].part, place) for path, place in places.items()})
        return Layout(found, self._notes(found))

    def _inside(self, path: str) -> list[str]:
        return [path for path in self._tree.folders[path].folders if path in self._holding]

    def _is_solid(self, path: str) -> bool:
        """Whether a folder holds folders of images, and no image itself."""
        return bool(self._inside(path)) and not self._tree.folders[path].images

    def _top(self) -> str:
        """The folder that the parts lie in: the root, or one that all else lies in."""
        path = ""
        while self._is_solid(path) and len(inside := self._inside(path)) == 1:
            path = inside[0]
            if len({name.part for name in self._named(path).values()}) > 1:
                return path
        return ""

    def _named(self, top: str) -> dict[str, PartName]:
        """The folders in `top` that are called like parts, all in one way."""
        ways: dict[tuple[str, ...], dict[str, PartName]] = {}
        for path in self._inside(top):
            if name := part_within(posixpath.basename(path)):
                ways.setdefault(name.rest, {})[path] = name
        several = [way for way in ways.values() if len({name.part for name in way.values()}) > 1]
        whole = ways.get((), {})
        if whole in several or not several:
            return whole
        if len(several) > 1:
            every = {path: name for way in several for path, name in way.items()}
            raise self._asking(every, "they are called like the parts of several data sets")
        return several[0]

    def _through(self, path: str) -> str:
        """`path`, or the folder in it that is all it holds and repeats its name."""
        while self._is_solid(path) and len(inside := self._inside(path)) == 1:
            outer, inner = (posixpath.basename(p).lower() for p in (path, inside[0]))
            names = part_within(outer), part_within(inner)
            if inner != outer and not (names[0] and names[1] and names[0].part == names[1].part):
                break
            path = inside[0]
        return path

    def _unwrapped(self, places: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
        """`places`, without folders around all the class folders of one: train/images/cat."""
        ordered = sorted(places, key=lambda place: (PARTS.index(place[0]), place[1]))
        inner = {path: self._wrapped(path) for _, path in ordered}
        if all(inner.values()):
            return tuple((part, inner[path] or path) for part, path in ordered)
        bare = [self._classes(path) for _, path in ordered if inner[path] is None]
        classes = set().union(*bare)
        return tuple(
            (part, within if within and classes & self._classes(within) else path)
            for part, path in ordered
            for within in [inner[path]]
        )

    def _wrapped(self, path: str) -> str | None:
        """The only folder in `path`, where that holds folders of images and no images."""
        inside = self._inside(path)
        return inside[0] if len(inside) == 1 and self._is_solid(inside[0]) else None

    def _classes(self, path: str) -> set[str]:
        return {posixpath.basename(inside) for inside in self._inside(path)}

    def _refuse_alike(self, folders: Sequence[str]) -> None:
        """Refuse folders that hold the same folders: they may be parts, of names we do not know."""
        solid = {path: self._classes(path) for path in folders if self._is_solid(path)}
        count = Counter(name for names in solid.values() for name in names)
        shared = {name for name, often in count.items() if often > 1}
        alike = [path for path, names in solid.items() if len(names & shared) > 1]
        if len(alike) < 2:
            return
        below = shortened(sorted(map(printable, shared)), 3)
        if len({part_named(name) for name in shared} - {None}) > 1:
            raise UsageError(
                f"{self._name}: {shortened(map(printable, alike), 3)} hold {below} each, but parts "
                f"hold the classes: let folders lie as in train/{posixpath.basename(alike[0])}; "
                f"or mix the parts with {setting('data.parts', 'none')}"
            )
        raise self._asking({}, f"they hold the same folders: {below}", alike)

    def _refuse_two_kinds_of_val(self, named: dict[str, PartName]) -> None:
        """Where there is no test part, eval beside val may be meant for it."""
        val = {path: name for path, name in named.items() if name.part == "val"}
        kinds = {name.word.startswith("eval") for name in val.values()}
        if len(kinds) > 1 and all(name.part != "test" for name in named.values()):
            proposed = {
                path: name._replace(part="test") if name.word.startswith("eval") else name
                for path, name in named.items()
            }
            raise self._asking(proposed, "both may be for validation, or one for the last test")

    def _asking(
        self, named: dict[str, PartName], why: str, folders: Sequence[str] = ()
    ) -> UsageError:
        """What to say where it is not certain; the largest folder is proposed for training."""
        likely = {path: name.part for path, name in named.items()}
        known = [self._classes(self._through(path)) for path in named]
        for path in sorted(folders, key=lambda path: -len(self._tree.images(path))):
            free = [part for part in ("train", "test", "val") if part not in likely.values()]
            alike = not known or any(len(self._classes(path) & names) > 1 for names in known)
            if path not in likely and free and alike:
                likely[path] = free[0]
        asked = list(named) or list(folders)
        value = ",".join(f"{part}={path}" for path, part in sorted(likely.items(), key=_by_part))
        question = "are {} parts of a split, or classes?"
        if len(asked) == 1:
            question = "is {} a part of a split, or a class?"
        return UsageError(
            f"{self._name}: {question.format(shortened(map(printable, asked), 3))} ({why}) "
            f"Say which: {setting('data.parts', 'none')} if all folders are classes, or as in "
            f"{setting('data.parts', value)}"
        )

    def _notes(self, places: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
        """Which folders are which part, where that is not plain to see."""
        parts = [part for part, _ in places]
        plain = all(path.lower() in _PLAIN for _, path in places)
        if plain and len(set(parts)) == len(parts):
            return ()
        told = (
            f"{part} is {' and '.join(printable(path) for one, path in places if one == part)}"
            for part in dict.fromkeys(parts)
        )
        return (f"parts: {', '.join(told)}; to have it otherwise: {setting('data.parts')}",)


def _by_part(item: tuple[str, str]) -> int:
    return PARTS.index(item[1])
