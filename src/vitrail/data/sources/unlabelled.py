"""Images of which nothing is said, to learn features from: a folder of any nesting, a list, shards.

A data set that has labels may be opened so as well; they then do not count. What else lies there is
told as of a labelled one (walk.py, csvfile.py, shards.py).
"""

import os
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import TypeAlias

import numpy as np
from jaxtyping import UInt8

from vitrail.data.names import PackedNames, shortened
from vitrail.data.sources.csvfile import (
    COLUMN_NAMES,
    NoImageColumn,
    found_files,
    image_place,
    unlisted,
)
from vitrail.data.sources.files import FileImages
from vitrail.data.sources.formats import IMAGE_EXTENSIONS
from vitrail.data.sources.layout import USUAL, FolderRules, find_layout
from vitrail.data.sources.listed import ListedFiles
from vitrail.data.sources.parts import part_named
from vitrail.data.sources.shards import UnlabelledShards, has_shards
from vitrail.data.sources.source import PARTS, LeftOut, Tally
from vitrail.data.sources.table import read_table, refuse_misfits, refuse_rows
from vitrail.data.sources.walk import Tree, walk
from vitrail.data.targets import Nothing
from vitrail.errors import DataError, UsageError, setting


class UnlabelledFiles(FileImages):
    """Images in files below one folder, by their names in it."""

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        part: UInt8[np.ndarray, " n"],
        left_out: Iterable[LeftOut],
        notes: Iterable[str],
    ) -> None:
        super().__init__(folder, PackedNames(names))
        self.targets = Nothing(len(names))
        self.part = part
        self.left_out = tuple(left_out)
        self.notes = tuple(notes)


Unlabelled: TypeAlias = UnlabelledFiles | UnlabelledShards


def open_unlabelled(
    data: Path | str, *, image_column: str | None = None, rules: FolderRules = USUAL
) -> Unlabelled:
    """Open the images at `data`, whole: a folder, a .csv, .tsv or .txt file that lists them, tar
    files of WebDataset or a folder of them.

    `image_column` is for lists, `rules` for folders. Raises UsageError for one of the two where it
    has no use, and DataError for data that is not there or holds no images.
    """
    path = Path(os.path.expanduser(str(data)))
    try:
        return _opened(path, image_column, rules)
    except OSError as error:
        raise DataError(f"cannot open {data}: {error.strerror}") from error


def _opened(path: Path, image_column: str | None, rules: FolderRules) -> Unlabelled:
    listing = path.is_file() and path.suffix.lower() in (".csv", ".tsv", ".txt")
    shards = has_shards(path) if path.is_dir() else path.is_file() and path.suffix == ".tar"
    if image_column is not None and not listing:
        raise UsageError(f"a column is named, but {path} is no list of images")
    if rules != USUAL and (listing or shards or not path.is_dir()):
        raise UsageError(
            f"{setting('data.parts')} and {setting('data.follow_links')} are for folders of "
            f"images, but {path} is none"
        )
    if listing:
        return _list(path, image_column)
    if shards:
        return UnlabelledShards(path)
    if path.is_dir():
        return _folder(path, rules)
    if path.exists():
        raise DataError(
            f"{path} holds no images: give a folder of them, a .csv or .txt file that lists them, "
            f"or a .tar file of WebDataset"
        )
    raise DataError(f"no such file or folder: {path}")


def _folder(root: Path, rules: FolderRules) -> UnlabelledFiles:
    """All images below a folder, sorted by their paths."""
    tree = walk(os.path.abspath(root), follow_links=rules.follow_links)
    if rules.parts in ("auto", "none"):
        names = tree.images()
        part, notes = _parts(names, told=rules.parts == "none")
        beside: tuple[LeftOut, ...] = ()
    else:
        names, part, beside = _told_parts(tree, rules.parts, str(root))
        notes = ()
    if not names:
        told = "".join(f"; {one.sentence()}" for one in (*beside, *tree.left_out))
        raise DataError(f"no images in {root} ({' '.join(IMAGE_EXTENSIONS)}){told}")
    folder = Path(os.path.abspath(root))
    return UnlabelledFiles(folder, names, part, (*beside, *tree.left_out), notes)


def _parts(names: Sequence[str], *, told: bool) -> tuple[UInt8[np.ndarray, " n"], tuple[str, ...]]:
    """By the folders in the root that are called like parts; all else is learned from.

    Where that leaves nothing to learn from, or it is `told` that there are none, there are none.
    """
    tops = [name.partition("/")[0] if "/" in name else "" for name in names]
    known = {} if told else {top: part_named(top) for top in dict.fromkeys(tops) if top}
    part = np.array([PARTS.index(known.get(top) or "train") for top in tops], np.uint8)
    if not part.any():
        return part, ()
    if part.all():
        return np.zeros_like(part), ()
    said = (
        f"{one} is {shortened(sorted(top for top, its in known.items() if its == one))}"
        for one in ("val", "test")
        if one in known.values()
    )
    note = (
        f"parts: {', '.join(said)}, train all else; to have it otherwise: {setting('data.parts')}"
    )
    return part, (note,)


def _told_parts(
    tree: Tree, parts: str, name: str
) -> tuple[list[str], UInt8[np.ndarray, " n"], tuple[LeftOut, ...]]:
    """As the user says where they lie; what lies beside them is left out."""
    part_of = {
        image: PARTS.index(part)
        for part, place in find_layout(tree, parts, name).places
        for image in tree.images(place)
    }
    names = sorted(part_of)
    beside = Tally()
    beside.add(
        "images beside the parts",
        f"{setting('data.parts')} can take them in",
        *(image for image in tree.images() if image not in part_of),
    )
    return names, np.array([part_of[image] for image in names], np.uint8), beside.told()


def _list(file: Path, column: str | None) -> UnlabelledFiles:
    """The images that a table lists, in its order. A column `split` says train, val or test."""
    files = ListedFiles(str(file.parent))
    asked = (column.lower(),) if column else ()
    table = read_table(file, (*chain(*COLUMN_NAMES.values()), *asked), files.is_file)
    columns = [name.lower() for name in table.columns]
    if column is None:
        usual = [
            i for word in COLUMN_NAMES["image"] for i, name in enumerate(columns) if name == word
        ]
        place = image_place(table, usual, range(len(columns)), files)
    else:
        place = columns.index(column.strip().lower()) if column.strip().lower() in columns else None
    if place is None:
        there = shortened(table.columns, 20)
        raise NoImageColumn(
            f"{file} has no column '{column}': its columns are {there}"
            if column
            else f"{file} lists no images: say which column holds them, as in "
            f"{setting('data.image_column', there or 'NAME')}"
        )
    refuse_misfits(file, table)
    split = next((i for i, name in enumerate(columns) if name in COLUMN_NAMES["split"]), None)
    faults, names, parts = [], [], []
    for line, row in zip(table.lines, table.rows, strict=True):
        part = PARTS[0] if split is None else part_named(row[split])
        if not row[place]:
            faults.append(f"line {line}: '{table.columns[place]}' is empty")
        elif part is None:
            faults.append(f"line {line}: the split is '{row[split or 0]}'")
        else:
            names.append(row[place])
            parts.append(PARTS.index(part))
    refuse_rows(
        file,
        faults,
        "without an image or a known part",
        f"give each an image, and a split of {', '.join(PARTS)}",
    )
    if not names:
        raise DataError(f"{file} lists no images: each line is one")
    found, notes = found_files(file, table.lines, names, files)
    unused = [name for i, name in enumerate(table.columns) if name and i not in (place, split)]
    if unused:
        notes = (*notes, f"{file.name}: not used are the columns {shortened(unused)}")
    left_out = unlisted(file, found, files, whole_folder=False)
    return UnlabelledFiles(file.parent, found, np.array(parts, np.uint8), left_out, notes)
