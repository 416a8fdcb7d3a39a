"""CSV: a row a box, with the image's name, the corners in pixels from 0, and a class.

The columns are found by their usual names, those of deepforest (image_path, xmin, ymin, xmax, ymax,
label), TensorFlow (with the image's width and height), Open Images (corners in 0..1) among them;
with x and y, width and height are the box's. A row of no corners, or of nothing but zeros, says
that its image shows nothing. Names are relative to the list.
"""

import math
import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vitrail.data.names import printable, shortened
from vitrail.data.sources.marks import Marks, ending_in, first_lines, name_of, numbers
from vitrail.data.sources.marks import size_said as said
from vitrail.data.sources.parts import part_named
from vitrail.data.sources.source import PARTS
from vitrail.data.sources.table import Table, read_table
from vitrail.data.sources.walk import Tree
from vitrail.errors import DataError
from vitrail.units import bytes_text

_MOST_BYTES = 1 << 30
_ENDINGS = (".csv", ".tsv")
_IMAGE = (
    *("image_path", "filename", "file_name", "file", "image", "path", "img", "image_id"),
    *("imageid", "img_path", "image_name", "filepath"),
)
_LABEL = ("label", "class", "category", "class_name", "labelname", "label_name", "name", "class_id")
_CORNERS = (
    ("xmin", "ymin", "xmax", "ymax"),
    ("x_min", "y_min", "x_max", "y_max"),
    ("x1", "y1", "x2", "y2"),
    ("left", "top", "right", "bottom"),
    ("bbox_xmin", "bbox_ymin", "bbox_xmax", "bbox_ymax"),
)
_SIDES = (
    ("x", "y", "width", "height"),
    ("x", "y", "w", "h"),
    ("left", "top", "width", "height"),
    ("bbox_x", "bbox_y", "bbox_width", "bbox_height"),
)
_IGNORED = ("difficult", "iscrowd", "ignore", "ignored", "isgroupof")
_SLACK = 0.5
_ODD = 0.1
"""Of boxes in 0..1, the share that may lie elsewhere."""
_OBJECT = "object"
"""The class of all boxes, where no column names one."""


class _Columns(NamedTuple):
    """Where in a row each thing is."""

    image: int
    box: tuple[int, ...]
    corners: bool
    """Whether the box is told by its corners, or by its sides."""
    label: int | None
    size: tuple[int, int] | None
    split: int | None
    ignored: int | None


def find_csv(root: str, files: Sequence[str]) -> list[str]:
    """Of `files` the tables whose header has columns of boxes."""
    return [file for file in ending_in(files, *_ENDINGS) if has_header(Path(root, file))]


def has_header(file: Path) -> bool:
    """Whether the first line of a table names the columns of boxes."""
    line = first_lines(str(file.parent), file.name).split("\n", 1)[0].lower()
    for mark in ",\t;|":
        words = [word.strip().strip("\"'") for word in line.split(mark)]
        if _columns(words) is not None:
            return True
    return False


def read_csv(root: str, files: Sequence[str], tree: Tree, *, parts: bool) -> Marks:
    """Raises `DataError` for a table that cannot be read."""
    tables = [_table(root, file) for file in files]
    boxes = [_boxes(table, columns) for table, columns in tables]
    drawn = [box for of_file in boxes for box in of_file if box is not None]
    unit, near, odd = _in_unit(drawn)
    marks = Marks(tree, parts=parts, unit=unit)
    if unit:
        but = f", but those of {odd:,} of {near + odd:,} boxes" if odd else ""
        marks.notes.append(f"corners lie in 0..1{but}: taken as shares of the image's sides")
    elif near:
        marks.notes.append(
            f"corners are taken as pixels; those of {near:,} of {near + odd:,} boxes lie in 0..1: "
            f"if they are shares of the image's sides, write all boxes as shares"
        )
    for table, columns in tables:
        marks.expect({row[columns.image] for row in table.rows})
    begun: dict[str, int] = {}
    for number, (file, (table, columns), of_file) in enumerate(
        zip(files, tables, boxes, strict=True)
    ):
        marks.left.add("rows of another number of fields", f"of {file}", *table.misfits)
        _read(marks, file, table, columns, of_file, begun, number)
    marks.unnamed("no table names them: to use them, add a row for each")
    return marks


def _columns(names: Sequence[str]) -> _Columns | None:
    """By the names of the columns, in small letters; None where boxes have none."""

    def first(usual: Sequence[str]) -> int | None:
        return next((names.index(name) for name in usual if name in names), None)

    image = first(_IMAGE)
    for kinds, corners in ((_CORNERS, True), (_SIDES, False)):
        for kind in kinds:
            if image is not None and all(name in names for name in kind):
                box = tuple(names.index(name) for name in kind)
                sides = corners and "width" in names and "height" in names
                size = (names.index("height"), names.index("width")) if sides else None
                label = first([name for name in _LABEL if name in names])
                label = None if label == image else label
                return _Columns(
                    image, box, corners, label, size, first(("split", "part")), first(_IGNORED)
                )
    return None


def _table(root: str, file: str) -> tuple[Table, _Columns]:
    place = Path(root, file)
    try:
        size = place.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error
    if size > _MOST_BYTES:
        raise DataError(f"{file} has more than {bytes_text(_MOST_BYTES)}: divide it by parts")
    known = {*_IMAGE, *_LABEL, *(name for kind in (*_CORNERS, *_SIDES) for name in kind)}
    table = read_table(place, tuple(known), lambda name: False)
    columns = _columns([name.lower() for name in table.columns])
    if columns is None:
        raise DataError(
            f"{file} has no columns of boxes: its header needs image_path,xmin,ymin,xmax,ymax,label"
        )
    return table, columns


_Box = tuple[float, float, float, float]


def _boxes(table: Table, columns: _Columns) -> "list[_Box | None]":
    """Of each row the corners; None for none; NaN for what is no number."""
    found: list[_Box | None] = []
    for row in table.rows:
        given = [row[place] for place in columns.box]
        if not any(given):
            found.append(None)
            continue
        try:
            first, second, third, fourth = numbers(given)
        except ValueError:
            found.append((math.nan,) * 4)
            continue
        if first == second == third == fourth == 0:
            found.append(None)
        elif columns.corners:
            found.append((first, second, third, fourth))
        else:
            found.append((first, second, first + third, second + fourth))
    return found


def _in_unit(boxes: "Sequence[_Box]") -> tuple[bool, int, int]:
    """Whether corners lie in 0..1, but for a few boxes: a slip in one row shall not make pixels of
    all; how many boxes lie there, and how many do not. What is no number tells nothing.
    """
    told = [box for box in boxes if all(map(math.isfinite, box))]
    # No box of pixels is so small, and shares reach beyond their image as pixels do.
    near = [box for box in told if all(-_SLACK <= value <= 1 + _SLACK for value in box)]
    between = any(0 < value < 1 for box in near for value in box)
    odd = len(told) - len(near)
    return between and odd <= _ODD * len(told), len(near), odd


def _read(
    marks: Marks,
    file: str,
    table: Table,
    columns: _Columns,
    boxes: "Sequence[_Box | None]",
    begun: dict[str, int],
    number: int,
) -> None:
    paths: dict[str, str | None] = {}
    several: dict[str, None] = {}
    for line, row, box in zip(table.lines, table.rows, boxes, strict=True):
        where = f"line {line} of {file}"
        called = row[columns.image]
        if not called:
            marks.left.add("rows without an image", "each names one", where)
            continue
        if called not in paths:
            paths[called] = _find(marks, called, file)
        path = paths[called]
        if path is None:
            continue
        if begun.setdefault(path, number) != number:
            marks.left.add("rows of images that another table has", "the first is taken", where)
            continue
        marked = marks.images.get(path)
        told = part_named(row[columns.split]) if columns.split is not None else None
        if marked is not None and told and PARTS.index(told) != marked.part:
            several[path] = None
        if marked is None:
            part = PARTS.index(told) if told else marks.part(posixpath.dirname(path), file)
            size = None
            if columns.size is not None:
                size = said(row[columns.size[0]], row[columns.size[1]])
            marked = marks.begin(path, part, size)
            assert marked is not None
        if box is None:
            continue
        try:
            name = _OBJECT if columns.label is None else name_of(row[columns.label])
        except ValueError as error:
            marks.left.add("rows", str(error), where)
            continue
        ignored = columns.ignored is not None and marks.flag(row[columns.ignored], where)
        marked.add(box, marks.label(name), ignored)
    if several:
        marks.notes.append(
            f"images whose rows in {file} are of several parts, of which the first is taken: "
            f"{len(several):,}: {shortened(map(printable, several), 3)}"
        )


def _find(marks: Marks, called: str, file: str) -> str | None:
    """The image that a row means; Open Images' ids have no ending."""
    name = posixpath.basename(called.replace("\\", "/"))
    return marks.find(called, file, by_stem=not marks.knows(name) and "." not in name)
