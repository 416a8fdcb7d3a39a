"""CsvSource: images that a CSV file lists, with one label or several."""

import csv
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
from PIL import Image

from vitrail.data.decode import read_image
from vitrail.data.names import PackedNames, label_name
from vitrail.data.parts import part_named
from vitrail.data.source import PARTS, LeftOut, Targets, file_stamp
from vitrail.errors import DataError

_COLUMN_NAMES = {
    "image": ("file", "image", "path", "filename", "file_name"),
    "label": ("label", "class", "category"),
    "split": ("split",),
}


class Columns(NamedTuple):
    """The columns of a CSV file to use; None for one that is found by its usual name."""

    image: str | None = None
    label: str | None = None
    split: str | None = None


class CsvSource:
    """Images listed in a CSV file with a header row, one image a line.

    The image column (`file`, `image`, `path`, `filename`, `file_name`) holds absolute paths or
    paths relative to the CSV file's folder; the label column (`label`, `class`, `category`) one
    label, or several between `|` or `;`. Both are found by these names, or named by the arguments.
    A column `split`, if there is one, says train, val or test.

    Raises DataError, with the line, for what cannot be understood. An image that is not there
    shows when it is loaded.
    """

    def __init__(
        self,
        file: Path | str,
        image_column: str | None = None,
        label_column: str | None = None,
        split_column: str | None = None,
    ) -> None:
        self._folder = Path(file).parent
        rows = _read_csv(Path(file), Columns(image_column, label_column, split_column))
        self._names = PackedNames(row.image for row in rows)
        self.classes, self.targets = _encoded([row.labels for row in rows])
        self.part = np.array([row.part for row in rows], np.uint8)
        self.left_out: tuple[LeftOut, ...] = ()
        self.notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self._names)

    def key(self, i: int) -> str:
        return self._names[i]

    def load(self, i: int) -> Image.Image:
        return read_image(self.encoded(i))

    def encoded(self, i: int) -> Path:
        """Where image `i` lies."""
        return self._folder / self._names[i]

    def stamp(self, i: int) -> str:
        return file_stamp(self._folder / self._names[i])


class _Row(NamedTuple):
    image: str
    labels: tuple[str, ...]
    part: int


def _read_csv(file: Path, columns: Columns) -> list[_Row]:
    if not file.is_file():
        raise DataError(f"no such CSV file: {file}")
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            rows = list(_rows(file, stream, columns))
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} is not a CSV file in UTF-8 ({error}): save it as one") from error
    if not rows:
        raise DataError(f"{file} lists no images: below its header, each line is one")
    return rows


def _rows(file: Path, stream: TextIO, columns: Columns) -> Iterator[_Row]:
    delimiter = max(",;\t", key=stream.readline().count)
    stream.seek(0)
    reader = csv.DictReader(stream, delimiter=delimiter, restval="")
    header = reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
    image = _column(file, header, "image", columns.image)
    label = _column(file, header, "label", columns.label)
    has_split = columns.split is not None or "split" in map(str.lower, header)
    split = _column(file, header, "split", columns.split) if has_split else None
    lines: dict[str, int] = {}
    for row in reader:
        where = f"{file}, line {reader.line_num}"
        name = row[image].strip()
        if not name:
            raise DataError(f"{where}: the column '{image}' is empty, where an image should be")
        if name in lines:
            raise DataError(
                f"{where}: '{name}' is in line {lines[name]} already; several labels of one "
                "image go into one cell, as in red|round"
            )
        lines[name] = reader.line_num
        labels = tuple(dict.fromkeys(filter(None, map(label_name, re.split("[|;]", row[label])))))
        if not labels:
            raise DataError(f"{where}: the column '{label}' is empty: '{name}' needs a label")
        yield _Row(name, labels, _part_index(where, row[split]) if split else 0)


def _column(file: Path, header: Sequence[str], kind: str, chosen: str | None) -> str:
    """The header's own spelling of the chosen column, or of the first usual one for its kind."""
    own = {name.lower(): name for name in reversed(header)}
    for name in _COLUMN_NAMES[kind] if chosen is None else (chosen,):
        if name.lower() in own:
            return own[name.lower()]
    lacking = f"column '{chosen}'" if chosen else f"{kind} column"
    raise DataError(
        f"{file} has no {lacking}: its columns are {', '.join(header) or 'none'}; "
        f"say which one holds the {kind} with {kind}_column"
    )


def _part_index(where: str, name: str) -> int:
    part = part_named(name)
    if part is None:
        raise DataError(f"{where}: the split is '{name}', not {', '.join(PARTS)}")
    return PARTS.index(part)


def _encoded(labels: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], Targets]:
    """The class table, sorted by name, and the targets: `[n]` if all have one label, or `[n c]`."""
    classes = tuple(sorted(set(chain.from_iterable(labels))))
    index = {name: i for i, name in enumerate(classes)}
    if all(len(names) == 1 for names in labels):
        return classes, np.array([index[name] for (name,) in labels], np.int64)
    targets = np.zeros((len(labels), len(classes)), np.uint8)
    for row, names in zip(targets, labels, strict=True):
        row[[index[name] for name in names]] = 1
    return classes, targets
