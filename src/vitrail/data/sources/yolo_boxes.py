"""YOLO: a text file an image, a row a box: class, centre x and y, width, height, in 0..1.

The text of images/17.jpg is labels/17.txt (the last `images` of its path), or lies beside it. An
image without a text, or with an empty one, shows nothing. Of a polygon (class, x, y, x, y, ...)
the box around it is taken; where data.yaml has a kpt_shape, rows are poses: points follow the box.
data.yaml says classes and parts; without it, classes.txt and the names of folders do. Boxes are
taken to lie on the image as EXIF turns it: that is how YOLO tools read.
"""

import math
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vitrail.data.names import shortened
from vitrail.data.sources.jsonfile import text_of
from vitrail.data.sources.marks import Marks, ending_in, first_lines, name_of
from vitrail.data.sources.walk import Tree
from vitrail.errors import DataError
from vitrail.units import bytes_text

_MOST_BYTES = 1 << 28
_MOST_YAML = 1 << 20
_LOOKED_AT = 200
_ROW = re.compile(r"\s*\d+(\.0*)?(\s+[-+.\de]+){4,}\s*")
_PART_KEYS = {"train": 0, "val": 1, "valid": 1, "validation": 1, "test": 2}
_NO_LABELS = frozenset(("classes.txt", "labels.txt", "train.txt", "val.txt", "test.txt"))
"""What lists of names and of images are called; where there are boxes in one, it is of test.jpg."""


def find_yolo(root: str, files: Sequence[str], named: str | None = None) -> list[str]:
    """Of `files` data.yaml, where there is one that is YOLO's, or the one that is `named`, and the
    texts of labels; or none.
    """
    near = [file for file in ending_in(files, ".yaml", ".yml") if file.count("/") < 2]
    about = [file for file in ([named] if named else near) if _is_about(root, file)]
    texts = [
        one
        for one in ending_in(files, ".txt")
        if "ImageSets/" not in one
        and (posixpath.basename(one).lower() not in _NO_LABELS or _has_row(root, one))
    ]
    # Any .txt may lie anywhere: those in a folder `labels`, or rows of numbers, are YOLO's.
    seen = any(_is_rows(root, text) for text in texts[:_LOOKED_AT])
    return [*about[:1], *texts] if seen or (about and texts) else []


def read_yolo(root: str, files: Sequence[str], tree: Tree, *, parts: bool) -> Marks:
    """Raises `DataError` for a data.yaml that cannot be read."""
    marks = Marks(tree, parts=parts, unit=True)
    about = next((file for file in files if file.lower().endswith((".yaml", ".yml"))), None)
    texts = set(files) - {about}
    places: dict[str, int] = {}
    points = 0
    names = _lines(root)
    if about is not None:
        names, places, points = _about(root, about, marks)
    count = len(names)
    marks.declare(names)
    labels: dict[int, int] = {k: marks.label(name) for k, name in enumerate(names)}
    nearest: dict[str, int] = {}
    for path in marks.paths():
        for far, each in _texts(path):
            nearest[each] = min(far, nearest.get(each, far))
    used: dict[str, list[str]] = {}
    bare: list[str] = []
    polygons = poses = 0
    for path in marks.paths():
        part = _placed(places, path) if places else marks.part(posixpath.dirname(path))
        if part is None:
            continue
        marked = marks.begin(path, part)
        if marked is None:
            continue
        # A text that is nearer to another image is the other's.
        mine = (each for far, each in _texts(path) if each in texts and nearest[each] == far)
        text = next(mine, None)
        if text is None:
            bare.append(path)
            continue
        used.setdefault(text, []).append(path)
        for number, row in enumerate(_rows(root, text, marks)):
            where = f"row {number + 1} of {text}"
            try:
                label, corners, more = _box(row, points)
            except ValueError as error:
                marks.left.add("rows", str(error), where)
                continue
            if names and label >= count:
                marks.left.add("rows of classes that no name is for", f"of {count} names", where)
                continue
            if label not in labels:
                labels[label] = marks.label(str(label))
            polygons += more and not points
            poses += more and points > 0
            marked.add(corners, labels[label])
    if polygons:
        marks.notes.append(f"polygons, of which the box around them is taken: {polygons:,}")
    if poses:
        marks.notes.append(f"poses, of which the box is taken, without points: {poses:,}")
    if bare:
        marks.notes.append(
            f"images without a text of labels, so that they show nothing: {len(bare):,} of "
            f"{len(marks.images):,}: {shortened(bare, 3)}"
        )
    if several := {text: of for text, of in used.items() if len(of) > 1}:
        count = sum(map(len, several.values()))
        called = (f"{text} of {shortened(of, 3)}" for text, of in several.items())
        marks.notes.append(
            f"texts of labels that several images have, whose boxes are taken for each: "
            f"{len(several):,}, of {count:,} images: {shortened(called, 3)}"
        )
    alone = sorted(texts - set(used))
    marks.left.add("texts of labels without an image", "no image is called like them", *alone)
    if places:
        marks.unnamed(f"{about} names no folder of theirs")
    return marks


def _is_about(root: str, file: str) -> bool:
    text = first_lines(root, file, _MOST_YAML)
    keys = set(re.findall(r"^(\w+)\s*:", text, re.MULTILINE))
    return bool({"names", "nc"} & keys) and bool({"train", "val", "path", "test"} & keys)


def _is_rows(root: str, file: str) -> bool:
    lines = [line for line in first_lines(root, file).splitlines()[:-1] if line.strip()]
    if not lines:
        lines = first_lines(root, file, 1024).splitlines()[:1]
    return bool(lines) and all(_ROW.fullmatch(line) for line in lines[:10])


def _has_row(root: str, file: str) -> bool:
    """Whether any of its first lines is a box."""
    return any(map(_ROW.fullmatch, first_lines(root, file).splitlines()))


def _lines(root: str) -> list[str]:
    """classes.txt: a name a line."""
    for file in ("classes.txt", "labels/classes.txt", "obj.names"):
        lines = first_lines(root, file, _MOST_YAML).splitlines()
        try:
            if found := [name_of(line) for line in lines if line.strip()]:
                return found
        except ValueError:
            continue
    return []


def _about(root: str, file: str, marks: Marks) -> tuple[list[str], dict[str, int], int]:
    """The names; of folders and images the part that they are for; and how many numbers follow the
    box of a pose.
    """
    try:
        place = Path(root, file)
        if place.stat().st_size > _MOST_YAML:
            raise ValueError(f"it has more than {bytes_text(_MOST_YAML)}")
        found = _content(place.read_text("utf-8-sig"))
        names, points = _names(found), _points(found.get("kpt_shape"))
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        said = str(error).partition("\n")[0]
        raise DataError(f"{file} is no data.yaml that can be read: {said}") from error
    places: dict[str, int] = {}
    lost: list[str] = []
    for key, part in _PART_KEYS.items():
        given = found.get(key)
        for one in given if isinstance(given, list) else [given] if given else ():
            try:
                where = _place(root, file, text_of(found.get("path") or ""), text_of(one), marks)
                told = text_of(one)[:80]
            except (TypeError, ValueError):  # lists of lists, which may be without end
                where, told = [], "which, or its path, is no text"
            if not where:
                lost.append(f"{key}: {told!r}")
            for path in where:
                places.setdefault(path, part)
    if lost:
        marks.notes.append(f"{file} names places that are not in the folder: {shortened(lost, 3)}")
    return names, places, points


def _points(shape: object) -> int:
    """The numbers of a pose's points, of `kpt_shape`; 0 where there are none."""
    match shape:
        case None:
            return 0
        case [int(count), 2 | 3 as each] if 0 < count < 100_000:
            return count * int(each)
    raise ValueError("kpt_shape is how many points a pose has, and 2 or 3 numbers a point")


def _content(text: str) -> Mapping[Any, Any]:
    """Raises `ValueError`, `RecursionError` and `yaml.YAMLError`."""
    try:
        found = yaml.load(text, _Loader)
    except (LookupError, AttributeError, ArithmeticError) as error:  # of PyYAML: !!int "" and such
        raise ValueError("a value is none of what its tag says") from error
    if not isinstance(found, Mapping):
        raise ValueError("it is no mapping")
    return found


class _Loader(yaml.SafeLoader):
    """As PyYAML's own, without merges: of a few lines these make mappings that no memory holds."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise ValueError("it merges mappings (<<): write their keys out")
        super().flatten_mapping(node)


def _names(found: Mapping[Any, Any]) -> list[str]:
    names = found.get("names")
    if isinstance(names, Mapping):
        try:
            given = {int(key): name_of(name) for key, name in names.items()}
        except (TypeError, OverflowError) as error:
            raise ValueError("names are of numbers") from error
        if given and (min(given) < 0 or max(given) > 100_000):
            raise ValueError("a class has a number of 0 or more")
        return [given.get(k, f"class {k}") for k in range(max(given, default=-1) + 1)]
    if isinstance(names, list):
        return [name_of(name) for name in names]
    count = found.get("nc")
    return [str(k) for k in range(count)] if isinstance(count, int) and 0 < count < 100_000 else []


def _place(root: str, file: str, base: str, given: str, marks: Marks) -> list[str]:
    """The folder, or the images of a list, that data.yaml means; all within the data."""
    beside = posixpath.dirname(file)
    tail = re.sub(r"^(\.\./|\./|/)+", "", given.replace("\\", "/"))
    ways = [posixpath.join(beside, base, given), posixpath.join(beside, given), tail]
    # Somebody else's `path`, and Roboflow's ../train: what is left of it at the end.
    words = tail.split("/")
    ways += ["/".join(words[k:]) for k in range(1, len(words))]
    for way in ways:
        path = posixpath.normpath(way)
        if path.startswith(("..", "/")) or "\0" in path:
            continue
        if path.lower().endswith(".txt") and Path(root, path).is_file():
            lines = first_lines(root, path, _MOST_BYTES).splitlines()
            called = [re.sub(r"^\./", "", line.strip()) for line in lines if line.strip()]
            marks.expect(called)
            found = (marks.find(each, path) for each in called)
            return [each for each in found if each is not None]
        if Path(root, path).is_dir():
            return ["" if path == "." else path]
    return []


def _placed(places: Mapping[str, int], path: str) -> int | None:
    """The part of the nearest place that an image lies in."""
    while path:
        if path in places:
            return places[path]
        path = posixpath.dirname(path)
    return places.get("")


def _texts(path: str) -> Iterator[tuple[int, str]]:
    """Where the labels of an image may lie, and how far from where YOLO looks for them."""
    stem = posixpath.splitext(path)[0]
    before, found, after = f"/{stem}".rpartition("/images/")
    if found:
        yield 0, f"{before}/labels/{after}.txt"[1:]
    folder, name = posixpath.split(stem)
    yield 1, posixpath.join(folder, "labels", f"{name}.txt")
    yield 2, f"{stem}.txt"
    yield 3, f"labels/{name}.txt"


def _rows(root: str, file: str, marks: Marks) -> list[list[str]]:
    place = Path(root, file)
    try:
        if place.stat().st_size > _MOST_BYTES:
            raise ValueError(f"they have more than {bytes_text(_MOST_BYTES)}")
        return [row for line in place.read_text("utf-8-sig").splitlines() if (row := line.split())]
    except (OSError, ValueError) as error:
        why = "they are no text" if isinstance(error, UnicodeError) else str(error)
        marks.left.add("files of labels", why, file)
        return []


def _box(row: Sequence[str], points: int) -> tuple[int, tuple[float, float, float, float], bool]:
    """The class, the corners, and whether there is more than a box: `points` numbers of a pose, or
    else the polygon that corners are around.
    """
    try:
        values = [float(one) for one in row]
    except ValueError as error:
        raise ValueError("they are numbers: class, centre x, centre y, width, height") from error
    if not math.isfinite(values[0]) or values[0] != int(values[0]) or not 0 <= values[0] < 1e5:
        raise ValueError("a class is a whole number from 0")
    label = int(values[0])
    if len(values) in (5, 5 + points):
        x, y, width, height = values[1:5]
        corners = x - width / 2, y - height / 2, x + width / 2, y + height / 2
        return label, corners, len(values) > 5
    if points:
        raise ValueError(f"a row is a class, four numbers and, by kpt_shape, {points} of points")
    if len(values) >= 7 and len(values) % 2:
        across, down = values[1::2], values[2::2]
        if not all(map(math.isfinite, values)):
            raise ValueError("a polygon has corners that are no numbers")
        return label, (min(across), min(down), max(across), max(down)), True
    raise ValueError("a row is a class and four numbers, or the corners of a polygon")
