"""Images with texts, in every way that people keep them.

    captions.csv, .tsv, .txt   one image a row; several rows of one image are several texts of it
    COCO captions              images and annotations in JSON, about five texts an image
    *.tar                      WebDataset: KEY.jpg beside KEY.txt or KEY.json (shards.py)
    hf:NAME                    an image column and a text column, which may hold lists (hub.py)
    samples:emoji-names        the emoji and their names

What has no text is left out and counted; which columns are what is found, and said. The library of
Hugging Face, tar files and samples are read by their own files; tables and COCO's JSON here.
"""

import os
import posixpath
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from vitrail.data.names import PackedNames, label_name, shortened, text_line
from vitrail.data.sources.csvfile import COLUMN_NAMES, Columns, found_files, image_place, unlisted
from vitrail.data.sources.files import FileImages
from vitrail.data.sources.jsonfile import head_of, read_json, text_of
from vitrail.data.sources.listed import ListedFiles, path_folders, paths_meant
from vitrail.data.sources.parts import part_named, part_within
from vitrail.data.sources.source import PARTS, LeftOut, Tally
from vitrail.data.sources.table import Table, read_table, refuse_misfits, refuse_rows
from vitrail.data.sources.walk import walk
from vitrail.data.targets import Classes, Texts
from vitrail.errors import DataError, setting

TEXT_NAMES = (
    *("caption", "captions", "text", "texts", "title", "sentence", "description", "comment"),
    *("alt_text", "alt", "prompt", "report"),
)
"""What columns of texts are called, the most usual first."""
_IMAGE_NAMES = (*COLUMN_NAMES["image"], "filepath", "image_path", "image_name", "image_file", "img")
_LISTS = ("captions", "metadata", "pairs", "labels")
"""What a table in a folder of images is called."""
_JSON_FOLDERS = ("", "annotations")
_CAPTION = re.compile(rb'"caption"\s*:')
_ADDRESS = re.compile(r"[a-z]+://\S+$")
_SAMPLE = 50
"""Rows by which it is told what a column holds."""


class PairFiles(FileImages):
    """Images in files below one folder, with their texts."""

    def __init__(
        self,
        folder: Path | str,
        names: Sequence[str],
        texts: Texts,
        part: UInt8[np.ndarray, " n"],
        left_out: Iterable[LeftOut],
        notes: Iterable[str],
    ) -> None:
        super().__init__(folder, PackedNames(names))
        self.targets = texts
        self.part = part
        self.left_out = tuple(left_out)
        self.notes = tuple(notes)


def has_texts(place: Path | str) -> bool:
    """Whether a table, COCO's JSON or a folder of one says texts of images and no classes, by the
    usual names of columns and a look at the first line.
    """
    path = Path(place)
    if path.is_file() and path.suffix.lower() == ".json":
        return _is_coco(path)
    if path.is_dir() and find_coco_captions(path):
        return True
    table = pair_table(path)
    if table is None:
        return False
    try:
        with table.open(encoding="utf-8-sig", errors="replace") as stream:
            words = {
                word.strip(" \"'\r\n").lower() for word in re.split("[,\t;|]", stream.readline())
            }
    except OSError:
        return False
    return bool(words & {*TEXT_NAMES}) and not words & {*COLUMN_NAMES["label"]}


def pair_table(path: Path) -> Path | None:
    """The table that lists pairs: the file itself, or in a folder the one that is called so."""
    endings = (".csv", ".tsv", ".txt")
    if path.is_dir():
        names = (path / f"{name}{ending}" for name in _LISTS for ending in endings)
        return next((file for file in names if file.is_file()), None)
    return path if path.suffix.lower() in endings and path.is_file() else None


def read_pairs(file: Path, columns: Columns, *, whole_folder: bool = False) -> PairFiles:
    """The pairs that a table lists, with a header or without.

    The columns are found by usual names, or named in `columns`, or else the image's is the one
    whose values are files, and the text's the only other one. A column of labels is kept to measure
    by, and one `split` says train, val or test. Raises DataError, with the lines, for what cannot
    be understood, and for a list of addresses, which are no files.
    """
    files = ListedFiles(str(file.parent))
    asked = tuple(name.lower() for name in columns if name and not name.isdecimal())
    known = (*_IMAGE_NAMES, *TEXT_NAMES, *COLUMN_NAMES["label"], *COLUMN_NAMES["split"], *asked)
    table = read_table(file, known, files.is_file)
    places = _places(file, table, columns, files)
    refuse_misfits(file, table)
    left, rows = Tally(), _rows(file, table, places)
    empty = [f"line {row.line}" for row in rows if not row.text]
    left.add("rows without a text", "there is nothing to learn from", *empty)
    images: dict[str, list[_Row]] = {}
    for row in rows:
        if row.text:
            images.setdefault(os.path.normpath(row.image), []).append(row)
    if not images:
        raise DataError(f"{file} has no row with an image and a text")
    lines = [of[0].line for of in images.values()]
    found, notes = found_files(file, lines, list(images), files)
    texts = Texts.written(([row.text for row in of] for of in images.values()), _classes(images))
    return PairFiles(
        file.parent,
        found,
        texts,
        np.array([of[0].part for of in images.values()], np.uint8),
        (*left.told(), *unlisted(file, found, files, whole_folder)),
        (_told(file, table, places), *notes),
    )


class _Places(NamedTuple):
    image: int
    text: int
    label: int | None
    split: int | None


class _Row(NamedTuple):
    line: int
    image: str
    text: str
    label: str
    part: int


def _places(file: Path, table: Table, asked: Columns, files: ListedFiles) -> _Places:
    columns = [name.lower() for name in table.columns]
    there = _shown(table)

    def place(kind: str, name: str | None) -> int | None:
        if name is None:
            return None
        if name.strip().lower() not in columns:
            raise DataError(f"{file} has no column '{name}': its columns are {there}")
        return columns.index(name.strip().lower())

    def usual(names: Sequence[str]) -> list[int]:
        return [i for name in names for i, column in enumerate(columns) if column == name]

    image, text, label, split = (
        place(kind, getattr(asked, kind)) for kind in ("image", "caption", "label", "split")
    )
    free = [i for i in range(len(columns)) if columns[i] and i not in (image, text, label, split)]
    if image is None:
        likely = [i for i in usual(_IMAGE_NAMES) if i in free]
        image = image_place(table, likely, [i for i in free if i not in likely], files)
    if image is None or _are_addresses(table, image):
        raise DataError(_no_images(file, table))
    split = next(iter(usual(COLUMN_NAMES["split"])), None) if split is None else split
    label = next(iter(usual(COLUMN_NAMES["label"])), None) if label is None else label
    if text is None:
        free = [i for i in free if i not in (image, label, split)]
        named = [i for i in usual(TEXT_NAMES) if i in free]
        text = next(iter(named or (free if len(free) == 1 else ())), None)
    if text is None:
        raise DataError(
            f"{file}: which column holds the texts cannot be told: its columns are {there}; say "
            f"it, as in {setting('data.caption_column', table.columns[free[-1]] if free else 'N')}"
        )
    return _Places(image, text, label, split)


def _are_addresses(table: Table, i: int) -> bool:
    sample = table.rows[:_SAMPLE]
    return 2 * sum(bool(_ADDRESS.match(row[i])) for row in sample) > len(sample)


def _no_images(file: Path, table: Table) -> str:
    addresses = [i for i in range(len(table.columns)) if _are_addresses(table, i)]
    if not addresses:
        return (
            f"{file} lists no images: its columns are {_shown(table)}; say which one holds their "
            f"files, as in {setting('data.image_column', table.columns[0] if table.columns else 1)}"
        )
    kind = ""
    if len(table.columns) == 2:
        kind = ", as CC3M's list does" if addresses[0] else ", as CC12M's list does"
    return (
        f"{file} lists addresses of images{kind} (column '{table.columns[addresses[0]]}'), and no "
        f"files: fetch the images first, with img2dataset for instance, and train on the tar files "
        f"that it writes"
    )


def _shown(table: Table) -> str:
    """The columns; of a table without a header with what the first row has in them."""
    if table.headed or not table.rows:
        return shortened(table.columns, 20)
    first = zip(table.columns, table.rows[0], strict=True)
    return shortened((f"{i} ({shorten(value, 40)})" for i, value in first), 20)


def _rows(file: Path, table: Table, places: _Places) -> list[_Row]:
    rows, faults = [], []
    for line, row in zip(table.lines, table.rows, strict=True):
        part = PARTS[0] if places.split is None else part_named(row[places.split])
        label = "" if places.label is None else row[places.label]
        if not row[places.image]:
            faults.append(f"line {line}: '{table.columns[places.image]}' is empty")
        elif part is None:
            faults.append(f"line {line}: the split is '{row[places.split or 0]}'")
        else:
            text = text_line(row[places.text])
            rows.append(_Row(line, row[places.image], text, label, PARTS.index(part)))
    what = "without an image or a known part"
    refuse_rows(file, faults, what, f"give each an image, and a split of {', '.join(PARTS)}")
    return rows


def _classes(images: dict[str, list[_Row]]) -> Classes | None:
    """Those of the images, where any row has one."""
    of = [
        tuple(
            dict.fromkeys(
                filter(None, map(label_name, chain(*(re.split("[|;]", r.label) for r in rows))))
            )
        )
        for rows in images.values()
    ]
    names = tuple(sorted({*chain.from_iterable(of)}))
    return Classes.named(names, of, several=any(len(o) != 1 for o in of)) if names else None


def _told(file: Path, table: Table, places: _Places) -> str:
    columns = table.columns
    header = "" if table.headed else ", which has no header,"
    mark = {"\t": "tab", " ": "blank"}.get(table.delimiter, table.delimiter)
    said = [f"images in column '{columns[places.image]}', texts in '{columns[places.text]}'"]
    if places.label is not None:
        said.append(f"classes, only to measure by, in '{columns[places.label]}'")
    unused = [name for i, name in enumerate(columns) if name and i not in places]
    if unused:
        said.append(f"not used: {shortened(unused)}")
    return f"{file.name}{header} is divided by '{mark}': {'; '.join(said)}"


def find_coco_captions(root: Path) -> list[str]:
    """The JSON files of a folder, relative to it, that are COCO's and have captions."""
    found = []
    for folder in _JSON_FOLDERS:
        place = root / folder
        names = sorted(os.listdir(place)) if place.is_dir() else []
        found += [
            posixpath.join(folder, name)
            for name in names
            if name.lower().endswith(".json") and _is_coco(place / name)
        ]
    return found


def _is_coco(file: Path) -> bool:
    head = head_of(file)
    return bool(_CAPTION.search(head)) and b'"annotations"' in head


def open_coco_captions(place: Path) -> PairFiles:
    """Images and their captions, by one JSON file of COCO's, or by all of a folder.

    Raises DataError for a file that is none, and where no image has a caption.
    """
    if place.is_dir():
        root, files = place, find_coco_captions(place)
    else:
        above = place.parent.name in _JSON_FOLDERS
        root = place.parent.parent if above else place.parent
        files = [place.relative_to(root).as_posix()]
    tree = walk(os.path.abspath(root), used={*files})
    by_name: dict[str, list[str]] = {}
    for image in tree.images():
        by_name.setdefault(posixpath.basename(image), []).append(image)
    here = {folder for image in tree.images() for folder in path_folders(image)}
    left, rows = Tally(), dict[str, tuple[int, list[str]]]()
    for file in files:
        words = (posixpath.splitext(posixpath.basename(file))[0],)
        part = next((found.part for word in words if (found := part_within(word))), PARTS[0])
        for called, texts in _captions(root, file, left):
            paths = paths_meant(called, file, by_name, here)
            if not paths:
                left.add("images that are named and not there", f"{file} names them", called)
            elif len(paths) > 1:
                left.add("images that may be meant", f"{file} names one of them", *paths)
            elif not texts:
                left.add("images without a text", f"{file} has none of them", called)
            else:
                rows.setdefault(paths[0], (PARTS.index(part), []))[1].extend(texts)
    if not rows:
        told = "".join(f"; {one.sentence()}" for one in left.told())
        raise DataError(f"none of the images that {', '.join(files)} names lies in {root}{told}")
    names = sorted(rows, key=lambda path: (rows[path][0], path))
    unnamed = sorted({*tree.images()} - rows.keys())
    left.add("images without a caption", "no JSON file has one of them", *unnamed)
    return PairFiles(
        os.path.abspath(root),
        names,
        Texts.written(rows[path][1] for path in names),
        np.array([rows[path][0] for path in names], np.uint8),
        (*left.told(), *tree.left_out),
        (f"captions as COCO tells them, in {', '.join(files)}",),
    )


def _captions(root: Path, file: str, left: Tally) -> list[tuple[str, list[str]]]:
    """Each image's name in the file, and its captions."""
    try:
        content = read_json(root / file)
        named = {one["id"]: text_of(one["file_name"]) for one in content["images"]}
        annotations: list[Any] = list(content["annotations"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file} is no COCO file that can be read: it has to list images, each with an id and "
            f"a file_name, and annotations ({error})"
        ) from error
    found: dict[Any, list[str]] = {key: [] for key in named}
    for number, one in enumerate(annotations):
        where = f"annotation {number} of {file}"
        try:
            texts, text = found[one["image_id"]], text_line(one["caption"])
        except (KeyError, TypeError):
            left.add("annotations", "they need a caption, and the image_id of a listed one", where)
            continue
        if text:
            texts.append(text)
        else:
            left.add("annotations whose caption is empty", "there is nothing to learn from", where)
    return [(named[key], texts) for key, texts in found.items()]
