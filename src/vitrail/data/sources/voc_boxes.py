"""Pascal VOC: an XML file an image, with the corners of each object.

VOC's own coordinates begin at 1 and include the last pixel (VOC2012's devkit: the top left pixel is
(1, 1)); other tools write them from 0. Which of both is decided of the whole data set: from 0 where
a left or top is 0, unless that is a slip among many that are 1. `difficult` objects are ignored, as
VOC's own measure does.

`ImageSets/Main/{train,val,test}.txt` say the parts, or else the names of folders. A file's
<filename> says which image it is of, or else its own name; <folder> is not looked at.
"""

import posixpath
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.parsers import expat

from vitrail.data.names import shortened
from vitrail.data.sources.jsonfile import text_of
from vitrail.data.sources.marks import Marks, ending_in, first_lines, name_of, numbers
from vitrail.data.sources.marks import size_said as said
from vitrail.data.sources.walk import Tree
from vitrail.units import bytes_text

_MOST_BYTES = 1 << 30
_DEEPEST = 16
_LONGEST = 4096
"""Letters of a text that are read."""
_LOOKED_AT = 3
_SLIPS = 4
"""So many lefts or tops of 1 speak louder than one of less."""
_LISTS = "/ImageSets/Main"
_PART_OF_LIST = {"train": 0, "val": 1, "test": 2, "trainval": 0}
_FLAGS = ["1"], ["0"], ["-1"]
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


class VocObject(NamedTuple):
    """One object, as it is written."""

    name: str
    corners: tuple[str, ...]
    """Left, top, right, bottom; fewer where some are not there."""
    difficult: str


class VocFile(NamedTuple):
    """What one file says."""

    filename: str
    size: tuple[int, int] | None
    """(height, width)."""
    objects: list[VocObject]


def find_voc(root: str, files: Sequence[str]) -> list[str]:
    """Of `files` the XML ones, where any of the first is VOC's; and its lists of images."""
    found = ending_in(files, ".xml")
    if not any("<annotation" in first_lines(root, file) for file in found[:_LOOKED_AT]):
        return []
    texts = ending_in(files, ".txt")
    lists = [file for file in texts if f"/{posixpath.dirname(file)}".endswith(_LISTS)]
    return [*found, *lists]


def read_voc(root: str, files: Sequence[str], tree: Tree, *, parts: bool) -> Marks:
    """What cannot be read is counted."""
    marks = Marks(tree, parts=parts)
    marks.declare(_names(root))
    listed = _listed(root, ending_in(files, ".txt"), marks) if parts else {}
    marks.each_of_one(ending_in(files, ".xml"))
    found: dict[str, tuple[str, VocFile]] = {}
    by_stem: list[str] = []
    for file in ending_in(files, ".xml"):
        try:
            voc = read_voc_file(Path(root, file))
        except (OSError, ValueError) as error:
            marks.left.add("files that are no annotation of VOC's", str(error), file)
            continue
        if (path := _image(marks, voc, file, by_stem)) is None:
            continue
        part = _part(marks, listed, path, file)
        if part is None:
            marks.left.add("images that no list names", f"those in {_LISTS[1:]} say which", path)
        elif marks.begin(path, part, voc.size) is not None:
            found[path] = file, voc
    begin = _begin(voc for _, voc in found.values())
    for path, (file, voc) in found.items():
        _add(marks, path, file, voc, begin.first)
    if by_stem:
        marks.notes.append(
            f"{len(by_stem):,} files name an image that is not there: taken is the one that is "
            f"called like the file: {shortened(by_stem, 3)}"
        )
    if any(voc.objects for _, voc in found.values()):
        marks.notes.append(_told(begin))
    marks.unnamed("no XML file is of them")
    return marks


def read_voc_file(file: Path) -> VocFile:
    """Raises `OSError`, and `ValueError` for what is no annotation: a document type, which could
    name other files or grow without end, is refused.
    """
    if file.stat().st_size > _MOST_BYTES:
        raise ValueError(f"it has more than {bytes_text(_MOST_BYTES)}")
    reader = _Reader()
    try:
        with file.open("rb") as stream:
            reader.parser.ParseFile(stream)
    except expat.ExpatError as error:
        raise ValueError("it is cut or damaged XML") from error
    except LookupError as error:
        raise ValueError("it names an encoding that there is not") from error
    if not reader.is_annotation:
        raise ValueError("it holds other XML")
    return VocFile(text_of(reader.filename), said(*reader.size), reader.objects)


class _Reader:
    """Of the elements that count, the texts; of all others nothing is kept."""

    def __init__(self) -> None:
        self.parser = expat.ParserCreate()
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._text_in
        self.parser.StartDoctypeDeclHandler = self._refuse
        self.parser.buffer_text = True
        self.filename = ""
        self.size = ["", ""]
        self.objects: list[VocObject] = []
        self.is_annotation = False
        self._path: list[str] = []
        self._text = ""
        self._object: dict[str, str] = {}

    def _refuse(self, *_: object) -> None:
        raise ValueError("it declares a document type, which is not read")

    def _start(self, tag: str, _: dict[str, str]) -> None:
        self._path.append(tag)
        self._text = ""
        if len(self._path) > _DEEPEST:
            raise ValueError("it is nested too deeply")
        if self._path == ["annotation"]:
            self.is_annotation = True
        elif self._path == ["annotation", "object"]:
            self._object = {}

    def _text_in(self, text: str) -> None:
        if len(self._text) < _LONGEST:
            self._text += text[:_LONGEST]

    def _end(self, tag: str) -> None:
        # By the whole path: a <part> of an object has a name and a box, too.
        match self._path:
            case ["annotation", "filename"]:
                self.filename = self._text.strip()
            case ["annotation", "size", "height" | "width"]:
                self.size[tag == "width"] = self._text
            case ["annotation", "object", "name" | "difficult"]:
                self._object[tag] = self._text.strip()
            case ["annotation", "object", "bndbox", side]:
                self._object[side] = self._text
            case ["annotation", "object"]:
                one = self._object
                corners = tuple(one[side] for side in _CORNERS if side in one)
                self.objects.append(
                    VocObject(one.get("name", ""), corners, one.get("difficult", ""))
                )
        self._path.pop()
        self._text = ""


def _names(root: str) -> list[str]:
    """A list of classes beside the files, as `vitrail data convert` writes it."""
    lines = first_lines(root, "classes.txt", 1 << 20).splitlines()
    try:
        return [name_of(line) for line in lines if line.strip()]
    except ValueError:
        return []


def _image(marks: Marks, voc: VocFile, file: str, by_stem: list[str]) -> str | None:
    called = posixpath.basename(voc.filename.replace("\\", "/"))
    if called and marks.knows(called):
        # Beside its image, a file may have been moved with it from the folder that it names.
        beside = marks.is_there(posixpath.join(posixpath.dirname(file), called))
        return marks.find(called if beside else voc.filename, file)
    stem = posixpath.splitext(posixpath.basename(file))[0]
    path = marks.find(stem, file, by_stem=True)
    if path is not None and called and posixpath.splitext(called)[0] != stem:
        by_stem.append(file)
    return path


def _listed(root: str, files: Sequence[str], marks: Marks) -> dict[tuple[str, str], int]:
    """The part of each (folder of VOC, name without ending) that a list names."""
    found: dict[tuple[str, str], str] = {}
    for file in files:
        name = posixpath.splitext(posixpath.basename(file))[0]
        folder = posixpath.dirname(file)
        if name not in _PART_OF_LIST:
            continue
        around = folder[: -len(_LISTS) + 1].rstrip("/")
        for line in first_lines(root, file, 1 << 26).splitlines():
            if not (stem := line.strip()):
                continue
            # "2008_000001 1" in lists of a class; but names may hold blanks as well.
            words = stem.split()
            if words[1:] in _FLAGS and not marks.knows(stem, by_stem=True):
                stem = words[0]
            before = found.get((around, stem))
            others = before is not None and _PART_OF_LIST[before] != _PART_OF_LIST[name]
            if others and {before, name} != {"trainval", "val"}:  # of which that one is a part
                taken = f"{before if name == 'trainval' else name}.txt is taken"
                marks.left.add("second parts of images that two lists name", taken, stem)
            if before is None or name != "trainval":
                found[around, stem] = name
    return {key: _PART_OF_LIST[name] for key, name in found.items()}


def _part(marks: Marks, listed: dict[tuple[str, str], int], path: str, file: str) -> int | None:
    if not listed:
        return marks.part(posixpath.dirname(path), posixpath.dirname(file))
    stem = posixpath.splitext(posixpath.basename(path))[0]
    around = posixpath.dirname(path)
    while True:
        if (around, stem) in listed:
            return listed[around, stem]
        if not around:
            return None
        around = posixpath.dirname(around)


class _Begin(NamedTuple):
    """What the first pixel is called, and by what that is known."""

    first: int
    less: int
    """Lefts and tops below 1."""
    total: int


def _begin(files: Iterable[VocFile]) -> _Begin:
    """From 0 where a left or top is 0, or more than one in a thousand less: one of less than 0 is a
    slip in either. At the edge of images from 1 many are 1: there a few of less are slips, too.
    """
    negative, zero, one, total = 0, 0, 0, 0
    for voc in files:
        for each in voc.objects:
            for text in each.corners[:2]:
                try:
                    value = float(text)
                except ValueError:
                    continue
                total += 1
                negative += value < 0
                zero += 0 <= value < 1
                one += 1 <= value < 2
    seen = zero > 0 or negative > max(1, total / 1000)
    return _Begin(int(not seen or (zero + negative) * _SLIPS < one), negative + zero, total)


def _told(begin: _Begin) -> str:
    few = f"{begin.less:,} of {begin.total:,} lefts and tops are less"
    if not begin.first:
        return f"coordinates begin at 0, unlike VOC's: {few} than 1"
    why = f"{few}, which are slips" if begin.less else "no left or top is less"
    return f"coordinates begin at 1, as VOC's do: {why}, and 1 is taken from each"


def _add(marks: Marks, path: str, file: str, voc: VocFile, first: int) -> None:
    marked = marks.images[path]
    for number, one in enumerate(voc.objects):
        try:
            left, top, right, bottom = numbers(one.corners)
            label = marks.label(name_of(one.name))
        except ValueError as error:
            marks.left.add("objects", f"{error}", f"object {number} of {file}")
            continue
        ignored = marks.flag(one.difficult, f"object {number} of {file}")
        marked.add((left - first, top - first, right, bottom), label, ignored)
