"""What the classes of a data set are called, and which values or colours they have in its masks.

Read from a file that lies with the data: a name a line, an index and a name a line, colours as
CamVid, CVAT or Kaggle write them, ADE20K's objectInfo150.txt, or JSON and YAML of ids and names.
"""

import csv
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from vitrail.data.names import label_name, printable
from vitrail.errors import DataError
from vitrail.units import bytes_text

_STEMS = (
    *("classes", "class_names", "names", "labels", "label_names", "categories", "codes"),
    *("class_dict", "classmap", "class_map", "labelmap", "label_map", "label_colors"),
    *("label_colours", "objectinfo150", "id2label", "label2id"),
)
_ENDINGS = (".txt", ".csv", ".json", ".yaml", ".yml", ".names")
_MOST_BYTES = 4 << 20
_IGNORED = ("ignore", "ignored", "void", "unlabeled", "unlabelled", "__ignore__", "_ignore_")
"""Names, in small letters, of what is no class."""
_HOLDERS = ("categories", "classes", "labels", "names", "id2label")
_NAMES = ("name", "class", "label", "class_name", "category", "title")
_VALUES = ("id", "value", "index", "idx", "pixel", "class_id", "label_id", "labels")
_COLOURS = ("color", "colour", "rgb", "color_rgb", "hex")


class ClassMap(NamedTuple):
    """Names, and what in a mask stands for them."""

    names: tuple[str, ...]
    classes: dict[int, int]
    """From a value, or a packed colour, to the index of a name."""
    colours: bool
    ignored: tuple[int, ...] = ()
    """Values of what the file calls void or ignored."""


def find_class_map(folders: Iterable[str]) -> Path | None:
    """The first file that is called like a class map in `folders`."""
    for folder in folders:
        for entry in sorted(os.listdir(folder)):
            stem, ending = os.path.splitext(entry.lower())
            file = Path(folder, entry)
            if stem in _STEMS and ending in _ENDINGS and file.is_file():
                return file
    return None


def read_class_map(file: Path) -> ClassMap:
    """Raises `DataError` for a file that is none, saying what one looks like."""
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it has more than {bytes_text(_MOST_BYTES)}")
        text = file.read_text("utf-8-sig")
        ending = file.suffix.lower()
        if ending == ".json":
            return _mapped(_of_object(json.loads(text)))
        if ending in (".yaml", ".yml"):
            return _mapped(_of_object(yaml.safe_load(text)))
        if ending == ".csv":
            return _mapped(_of_table(list(csv.reader(text.splitlines()))))
        return _mapped(_of_lines([line.strip() for line in text.splitlines() if line.strip()]))
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError, csv.Error) as error:
        said = str(error).partition("\n")[0]
        raise DataError(
            f"{printable(str(file))} does not say what the classes are ({said}): write a name a "
            'line, the first for value 0; or a .json as {"0": "sky", "1": "sea"}, or '
            '{"sky": [0, 0, 255]} for colours'
        ) from error


_Row = tuple[int | tuple[int, ...], str]
"""A value, or a colour, and its name."""


def _mapped(rows: Sequence[_Row]) -> ClassMap:
    if not rows:
        raise ValueError("it names no class")
    colours = {isinstance(value, tuple) for value, _ in rows}
    if len(colours) > 1:
        raise ValueError("some classes have colours and some have values")
    is_colour = colours.pop()
    names: dict[str, int] = {}
    classes: dict[int, int] = {}
    ignored = []
    for found, spelt in rows:
        value, name = _number(found), label_name(spelt)
        if name.lower() in _IGNORED:
            ignored.append(value)
            continue
        if not name:
            raise ValueError("a class has no name")
        index = names.setdefault(name, len(names))
        if classes.setdefault(value, index) != index:
            raise ValueError(f"two classes have the value {found}")
    return ClassMap(tuple(names), classes, is_colour, tuple(ignored))


def _number(value: int | tuple[int, ...]) -> int:
    if isinstance(value, int):
        if not -(2**31) <= value < 2**31:
            raise ValueError(f"{value} is no value that a mask can hold")
        return value
    if len(value) != 3 or not all(0 <= part <= 255 for part in value):
        raise ValueError(f"{value} is no colour (red, green, blue)")
    return value[0] << 16 | value[1] << 8 | value[2]


def _of_object(found: Any) -> list[_Row]:
    if isinstance(found, Mapping):
        for holder in _HOLDERS:
            if isinstance(found.get(holder), list | dict):
                return _of_object(found[holder])
        rows: list[_Row] = []
        for key, value in found.items():
            if isinstance(value, str) and _is_value(key):  # 0: sky, or "#0000ff": sky
                rows.append((_value(key), value))
            elif isinstance(value, Mapping):  # 0: {name: sky, labels: [0, 7]}
                name = _first(value, _NAMES)
                values = _first(value, (*_COLOURS, *_VALUES))
                rows += [(_value(one), str(name or key)) for one in _several(values, key)]
            else:  # sky: 0, or sky: [0, 0, 255]
                rows.append((_value(value), str(key)))
        return rows
    if not isinstance(found, list):
        raise ValueError("it is neither a list nor a mapping")
    if all(isinstance(one, str) for one in found):
        return list(enumerate(found))
    rows = []
    for place, one in enumerate(found):
        if not isinstance(one, Mapping) or (name := _first(one, _NAMES)) is None:
            raise ValueError(f"its entry {place} has no name")
        rows += [
            (_value(value), str(name))
            for value in _several(_first(one, (*_COLOURS, *_VALUES)), place)
        ]
    return rows


def _first(found: Mapping[Any, Any], names: Iterable[str]) -> Any:
    return next((found[name] for name in names if found.get(name) is not None), None)


def _several(values: Any, otherwise: Any) -> list[Any]:
    """One value, one colour, or a list of either."""
    if values is None:
        return [otherwise]
    is_colour = isinstance(values, list) and len(values) == 3
    if isinstance(values, list) and (not is_colour or isinstance(values[0], list)):
        return values
    return [values]


def _value(found: Any) -> int | tuple[int, ...]:
    if isinstance(found, int) and not isinstance(found, bool):
        return found
    if isinstance(found, list | tuple):
        return tuple(int(part) for part in found)
    text = str(found).strip()
    if re.fullmatch(r"#[0-9a-fA-F]{6}", text):
        return tuple(bytes.fromhex(text[1:]))
    if re.fullmatch(r"-?\d{1,9}", text):
        return int(text)
    if re.fullmatch(r"\(?\d{1,3}[,\s]+\d{1,3}[,\s]+\d{1,3}\)?", text):
        return tuple(map(int, re.findall(r"\d+", text)))
    raise ValueError(f"'{text[:40]}' is neither a value nor a colour")


def _is_value(found: Any) -> bool:
    try:
        _value(found)
    except ValueError:
        return False
    return True


def _of_table(rows: Sequence[Sequence[str]]) -> list[_Row]:
    cells = [[cell.strip() for cell in row] for row in rows if any(row)]
    if not cells:
        return []
    header = [cell.lower() for cell in cells[0]]
    name = next((header.index(word) for word in _NAMES if word in header), None)
    if name is None:  # no header: name,r,g,b
        return _of_lines([" ".join((*row[1:], row[0])) for row in cells])
    parts = [next((i for i, h in enumerate(header) if h in (c, c[0])), None) for c in _RGB]
    whole = next((i for i, h in enumerate(header) if h in _COLOURS), None)
    value = next((i for i, h in enumerate(header) if h in _VALUES and i != name), None)
    found: list[_Row] = []
    for place, row in enumerate(cells[1:]):
        if None not in parts:
            found.append((tuple(int(row[i]) for i in parts if i is not None), row[name]))
        elif whole is not None or value is not None:
            at = whole if whole is not None else value
            assert at is not None
            found.append((_value(row[at]), row[name]))
        elif len(header) == 1:
            found.append((place, row[name]))
        else:
            raise ValueError(f"its columns are {', '.join(header[:6])}")
    return found


_RGB = ("red", "green", "blue")


def _of_lines(lines: Sequence[str]) -> list[_Row]:
    if lines and re.match(r"idx\s+ratio\s", lines[0], re.IGNORECASE):  # ADE20K's: 0 is no class
        rows = [line.split("\t") for line in lines[1:]]
        return [(0, "void"), *((int(row[0]), row[-1].split(",")[0]) for row in rows)]
    lines = [line for line in lines if not line.startswith("# ")]
    for pattern in (
        r"(?P<name>[^:]+):(?P<value>\d{1,3},\d{1,3},\d{1,3})(:.*)?",  # CVAT
        r"(?P<value>\d{1,3}[,\s]+\d{1,3}[,\s]+\d{1,3})[,\s]+(?P<name>\D.*)",  # CamVid
        r"(?P<value>\d{1,9})\s*[:,;\s]\s*(?P<name>\S.*)",
    ):
        found = [re.fullmatch(pattern, line) for line in lines]
        if all(found):
            return [(_value(one["value"]), one["name"]) for one in found if one]
    return list(enumerate(lines))
