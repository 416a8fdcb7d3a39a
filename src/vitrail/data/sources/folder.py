"""FolderSource: images whose folder says their class."""

import os
import posixpath
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vitrail.data.names import PackedNames, label_name, printable, shortened
from vitrail.data.sources.files import FileImages
from vitrail.data.sources.formats import IMAGE_EXTENSIONS
from vitrail.data.sources.layout import USUAL, FolderRules, Layout, find_layout
from vitrail.data.sources.source import PARTS, LeftOut, Tally
from vitrail.data.sources.walk import Tree, walk
from vitrail.data.targets import Classes
from vitrail.errors import DataError, setting


class FolderSource(FileImages):
    """Images in class folders, nested or not: ROOT/cat/1.jpg, ROOT/dog/summer/2.jpg.

    The class folders may lie in one folder a part: ROOT/train/cat/1.jpg, ROOT/val/cat/2.jpg, and
    ROOT/test. layout.py knows parts by their names, walk.py what is an image; `left_out` has every
    file that is not used. The order is by class, then part, then path.

    Raises DataError where no class folder has an image, or a folder cannot be listed; UsageError
    where parts cannot be told from classes.
    """

    def __init__(self, root: Path | str, rules: FolderRules = USUAL) -> None:
        self._root = os.path.abspath(root)
        tree = walk(self._root, follow_links=rules.follow_links)
        layout = find_layout(tree, rules.parts, str(root))
        folders = [
            _ClassFolder(
                label_name(printable(posixpath.basename(path))),
                PARTS.index(part),
                path,
                tree.images(path),
            )
            for part, place in layout.places
            for path in tree.folders[place].folders
        ]
        filled = sorted(folder for folder in folders if folder.images)
        self.left_out = (*_unused(tree, layout, folders), *tree.left_out)
        if not filled:
            raise DataError(_no_images(self._root, tree, self.left_out))
        names = tuple(sorted({folder.label for folder in filled}))
        empty = sorted({folder.label for folder in folders} - set(names))
        self.notes = layout.notes
        if empty:
            self.notes += (f"class folders without images: {shortened(empty)}",)
        sizes = [len(folder.images) for folder in filled]
        index = {name: i for i, name in enumerate(names)}
        labels = [index[folder.label] for folder in filled]
        self.targets = Classes(names, np.repeat(np.array(labels, np.int64), sizes))
        self.part = np.repeat(np.array([folder.part for folder in filled], np.uint8), sizes)
        names_of = chain.from_iterable(folder.images for folder in filled)
        super().__init__(self._root, PackedNames(names_of))


class _ClassFolder(NamedTuple):
    label: str
    part: int
    path: str
    images: list[str]


def _unused(tree: Tree, layout: Layout, folders: list[_ClassFolder]) -> tuple[LeftOut, ...]:
    """Images that lie in no class folder."""
    classes = {folder.path for folder in folders}
    places = [place for _, place in layout.places]
    around = {parent for place in places for parent in _upwards(place)}
    unused = Tally()
    beside = f"beside {', '.join(map(printable, places))}; {setting('data.parts')} can take them in"
    for path, folder in tree.folders.items():
        if folder.images and classes.isdisjoint(_upwards(path)):
            if path in around:
                unused.add(
                    "images outside the class folders", "a folder is a class", *folder.images
                )
            else:
                unused.add("images beside the parts", beside, *folder.images)
    return unused.told()


def _upwards(path: str) -> list[str]:
    """A folder, and all that it lies in."""
    found = [path]
    while path:
        path = posixpath.dirname(path)
        found.append(path)
    return found


def _no_images(root: str, tree: Tree, left_out: tuple[LeftOut, ...]) -> str:
    if loose := tree.folders[""].images:
        example = printable(loose[0])
        return (
            f"images lie directly in {root}, in no class folder: make a folder for each class, as "
            f"in {root}/cat/{example}, or list them in {root}/labels.csv with the columns "
            f"file,label; or learn from them without labels: {setting('task', 'mocov3')}"
        )
    needed = f"each class needs a folder with images ({' '.join(IMAGE_EXTENSIONS)})"
    told = "".join(f"; {one.sentence()}" for one in left_out)
    return f"no images in {root}: {needed}{told}"
