"""CsvSource: images that a CSV file lists, with one label or several."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

import numpy as np

from vitrail.data.names import PackedNames, label_name, printable, shortened
from vitrail.data.sources.files import FileImages
from vitrail.data.sources.listed import ListedFiles
from vitrail.data.sources.parts import part_named
from vitrail.data.sources.source import PARTS, LeftOut
from vitrail.data.sources.table import Table, is_image_name, read_table, refuse_misfits, refuse_rows
from vitrail.data.sources.walk import walk
from vitrail.data.targets import Classes
from vitrail.errors import DataError, setting

COLUMN_NAMES = {
    "image": ("file", "image", "path", "filename", "file_name"),
    "label": ("label", "class", "category"),
    "split": ("split",),
}
_SAMPLE = 50
"""Rows by which it is told what a column holds."""


class Columns(NamedTuple):
    """The columns of a CSV file to use; None for one that is found by its name or its values.

    Those of a file without a header are called "1", "2" and so on.
    """

    image: str | None = None
    label: str | None = None
    split: str | None = None
    caption: str | None = None
    """Of images with texts."""


class NoImageColumn(DataError):
    """A table that lists no images."""


def list_file(data: Path) -> Path | None:
    """The file that lists the images of `data`: itself, or its labels.csv; or None."""
    file = data / "labels.csv" if data.is_dir() else data
    return file if file.suffix.lower() in (".csv", ".tsv", ".txt") and file.is_file() else None


class CsvSource(FileImages):
    """Images listed in a CSV file, one image a row, with a header or without.

    The image column (`file`, `image`, `path`, `filename`, `file_name`) holds absolute paths or
    paths relative to the CSV file's folder; the label column (`label`, `class`, `category`) one
    label, or several between `|` or `;`. Both are found by these names, or named by the arguments;
    or else the image column is the one whose values are files, and the label column the only other
    one. A column `split`, or one of nothing but parts' names, says train, val or test. What was
    found in another way than by its name is in `notes`.

    Images beside the listed ones that the file does not list are in `left_out`: those in the same
    folders; or, with `whole_folder`, all in the CSV file's folder.

    Raises DataError, with the lines, for what cannot be understood, and where no listed image is
    there; NoImageColumn, a DataError, where there is no image column. Where some are not there,
    `notes` say so, and it shows when they are loaded.
    """

    def __init__(
        self,
        file: Path | str,
        image_column: str | None = None,
        label_column: str | None = None,
        split_column: str | None = None,
        *,
        whole_folder: bool = False,
    ) -> None:
        file = Path(file)
        self._folder = file.parent
        files = ListedFiles(str(self._folder))
        asked = Columns(image_column, label_column, split_column)
        names = (
            *chain(*COLUMN_NAMES.values()),
            *(name.lower() for name in asked if name and not name.isdecimal()),
        )
        table = read_table(file, names, files.is_file)
        places = _places(file, table, asked, files)
        refuse_misfits(file, table)
        rows = _rows(file, table, places)
        found, notes = found_files(file, table.lines, [row.image for row in rows], files)
        self.notes: tuple[str, ...] = (*_assumed(file, table, asked, places), *notes)
        super().__init__(self._folder, PackedNames(found))
        self.targets = _encoded([row.labels for row in rows])
        self.part = np.array([row.part for row in rows], np.uint8)
        self.left_out = unlisted(file, found, files, whole_folder)

    def key(self, i: int) -> str:
        """Its name as the list has it, which is printable."""
        return self.names[i]


class _Places(NamedTuple):
    """Which of a row's fields are what."""

    image: int
    label: int
    split: int | None


class _Row(NamedTuple):
    image: str
    labels: tuple[str, ...]
    part: int


def _places(file: Path, table: Table, asked: Columns, files: ListedFiles) -> _Places:
    """Where image, label and split are: as asked for, or else by name, or else by their values."""
    if not table.columns:
        raise DataError(f"{file} lists no images: it is empty")
    image, label, split = (
        None if name is None else _place(file, table, kind, name)
        for kind, name in zip(_Places._fields, asked, strict=False)
    )
    free = [i for i, name in enumerate(table.columns) if name and i not in (image, label, split)]

    def usual(kind: str) -> list[int]:
        words = COLUMN_NAMES[kind]
        return [i for word in words for i in free if table.columns[i].lower() == word]

    if image is None:
        others = [i for i in free if i not in (*usual("label"), *usual("split"))]
        image = image_place(table, usual("image"), others, files)
        if image is None:
            near = (files.reason(row[i]) for row in table.rows[:1] for i in others)
            reason = next((f"; but {reason}" for reason in near if reason), "")
            raise NoImageColumn(_undecided(file, table, "image", others) + reason)
        free.remove(image)
    if label is None and usual("label"):
        label = usual("label")[0]
        free.remove(label)
    if split is None:
        # The only column that is left is the label, even if the classes are called train and test.
        others = free if label is not None or len(free) > 1 else []
        parts = (i for i in others if _holds_parts(table, i))
        split = next(chain(usual("split"), parts), None)
        free = [i for i in free if i != split]
    if label is None:
        if len(free) != 1:
            raise DataError(_undecided(file, table, "label", free))
        label = free[0]
    for name in (table.columns[i] for i in (image, label, split) if i is not None):
        if table.columns.count(name) > 1:
            raise DataError(f"{file} has {table.columns.count(name)} columns '{name}': rename them")
    return _Places(image, label, split)


def _place(file: Path, table: Table, kind: str, name: str) -> int:
    """Of a column that the user names."""
    columns = [column.lower() for column in table.columns]
    if name.strip().lower() in columns:
        return columns.index(name.strip().lower())
    raise DataError(
        f"{file} has no column '{name}': its columns are {_told(table)}; name the one that holds "
        f"the {kind} with {setting(f'data.{kind}_column')}"
    )


def image_place(
    table: Table, usual: Sequence[int], others: Sequence[int], files: ListedFiles
) -> int | None:
    """The first column of files; or else what is usually called so; or else what looks like names.

    A number may be the name of a file without its ending, and just a number: so that comes last.
    """
    sample = table.rows[:_SAMPLE]

    def holding(is_one: Callable[[str], bool], *places: int) -> Iterator[int]:
        return (i for i in places if 2 * sum(is_one(row[i]) for row in sample) > len(sample))

    return next(
        chain(
            holding(files.is_whole, *usual, *others),
            holding(files.is_file, *usual),
            usual,
            holding(is_image_name, *others),
            holding(files.is_file, *others),
        ),
        None,
    )


def _holds_parts(table: Table, i: int) -> bool:
    values = {row[i] for row in table.rows}
    return len(values) > 1 and all(part_named(value) is not None for value in values)


def _told(table: Table) -> str:
    if table.headed or not table.rows:
        return shortened(table.columns, 20)
    first = zip(table.columns, table.rows[0], strict=True)
    return shortened((f"{i} ({shorten(value, 40)})" for i, value in first), 20)


def _undecided(file: Path, table: Table, kind: str, candidates: Sequence[int]) -> str:
    if table.headed:
        lacking = f"has no {kind} column ({', '.join(COLUMN_NAMES[kind])})"
    else:
        lacking = f"has no header, and its {kind} column cannot be told"
    likely = candidates[:1] if kind == "image" else candidates[-1:]
    name = table.columns[likely[0]] if likely else "NAME"
    return (
        f"{file} {lacking}: its columns are {_told(table)}; say which one holds the {kind}, as in "
        f"{setting(f'data.{kind}_column', name)}"
    )


def _assumed(file: Path, table: Table, asked: Columns, places: _Places) -> tuple[str, ...]:
    """A note of the columns that were not told by the user or by their names."""
    told = [
        f"the {kind}s in column '{table.columns[i]}'"
        for kind, i, name in zip(_Places._fields, places, asked[:3], strict=True)
        if i is not None and name is None
        if not table.headed or table.columns[i].lower() not in COLUMN_NAMES[kind]
    ]
    if not told:
        return ()
    header = "" if table.headed else ", which has no header,"
    return (f"{file.name}{header} has {', '.join(told)}",)


def _rows(file: Path, table: Table, places: _Places) -> list[_Row]:
    """What the rows say; those that do not say it are refused together."""
    if not table.rows:
        raise DataError(f"{file} lists no images: below its header, each line is one")
    rows, faults = [], []
    for line, row in zip(table.lines, table.rows, strict=True):
        image = row[places.image]
        labels = tuple(
            dict.fromkeys(filter(None, map(label_name, re.split("[|;]", row[places.label]))))
        )
        part = PARTS[0] if places.split is None else part_named(row[places.split])
        if not image:
            faults.append(f"line {line}: '{table.columns[places.image]}' is empty")
        elif not labels:
            faults.append(f"line {line}: '{table.columns[places.label]}' is empty for '{image}'")
        elif part is None:
            assert places.split is not None
            faults.append(f"line {line}: the split is '{row[places.split]}'")
        else:
            rows.append(_Row(image, labels, PARTS.index(part)))
    refuse_rows(
        file,
        faults,
        "without an image, a label or a known part",
        f"give every image at least one label, and a split of {', '.join(PARTS)}",
    )
    return rows


def found_files(
    file: Path, lines: Sequence[int], names: Sequence[str], files: ListedFiles
) -> tuple[list[str], tuple[str, ...]]:
    """The names of the files that are meant, and notes of what is not there or read otherwise.

    Raises DataError, with the lines, where a name may mean several files, an image is listed twice,
    or no listed file is there.
    """
    means = [files.find(name) for name in names]
    several = [
        f"line {line}: '{name}' may be {' or '.join(found)}"
        for line, name, found in zip(lines, names, means, strict=True)
        if len(found) > 1
    ]
    refuse_rows(file, several, "whose image may be several files", "write the ending as well")
    found = [meant[0] if meant else name for name, meant in zip(names, means, strict=True)]
    _refuse_twice(file, lines, found)
    notes: list[str] = []
    missing = [i for i, meant in enumerate(means) if not meant]
    if missing:
        shown = shortened(f"line {lines[i]}: {names[i]}" for i in missing)
        where = f"in {file.parent.resolve()} ({shown})"
        reason = files.reason(names[missing[0]])
        if len(missing) == len(names):
            hint = reason or "names are relative to the list's folder, so move it to the images"
            raise DataError(
                f"none of the {len(names):,} files that {file} lists is {where}: {hint}"
            )
        note = f"{file.name}: {len(missing):,} of {len(names):,} files are not {where}"
        notes.append(f"{note}: {reason}" if reason else note)
    slashed = sum(
        "\\" in name and "\\" not in meant for name, meant in zip(names, found, strict=True)
    )
    if slashed:
        notes.append(f"{file.name}: \\ was read as / in {slashed:,} of {len(names):,} names")
    endings = Counter(
        os.path.splitext(meant)[1]
        for name, meant in zip(names, found, strict=True)
        if len(meant) > len(name)
    )
    if endings:
        told = ", ".join(f"{ending} to {n:,}" for ending, n in endings.most_common())
        notes.append(f"{file.name}: names lack their ending, which was added: {told}")
    return found, tuple(notes)


def _refuse_twice(file: Path, lines: Sequence[int], names: Sequence[str]) -> None:
    first: dict[str, int] = {}
    twice = []
    for line, name in zip(lines, names, strict=True):
        before = first.setdefault(os.path.normpath(name), line)
        if before != line:
            twice.append(f"line {line}: '{name}' is in line {before} already")
    way_out = "put several labels of one image into one field, as in red|round"
    refuse_rows(file, twice, "with an image that another has", way_out)


def unlisted(
    file: Path, names: Sequence[str], files: ListedFiles, whole_folder: bool
) -> tuple[LeftOut, ...]:
    """The images beside the listed ones that the file does not list; or, in all of its folder, what
    is no image as well.
    """
    root = str(file.parent)
    listed = {os.path.normpath(os.path.join(root, name)) for name in names}
    others: tuple[LeftOut, ...] = ()
    if whole_folder:
        used = {os.path.relpath(place, root) for place in listed}
        tree = walk(root, used={file.name, *used})
        unlisted, others = tree.images(), tree.left_out
    else:
        unlisted = sorted(
            name
            for name in files.beside(names)
            if os.path.normpath(os.path.join(root, name)) not in listed
        )
    if not unlisted:
        return others
    reason = "to use them, add a row for each"
    kind = f"images that {file.name} does not list"
    return (LeftOut(kind, len(unlisted), reason, tuple(map(printable, unlisted[:5]))), *others)


def _encoded(labels: Sequence[tuple[str, ...]]) -> Classes:
    """One class an image where all have one; the names are sorted."""
    names = tuple(sorted(set(chain.from_iterable(labels))))
    return Classes.named(names, labels, several=any(len(found) != 1 for found in labels))
