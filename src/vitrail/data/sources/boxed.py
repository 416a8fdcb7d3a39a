"""BoxedSource: images, each with boxes around its objects, in every format that people have.

coco_boxes.py, bdd_boxes.py, yolo_boxes.py, voc_boxes.py and csv_boxes.py read one format each into
marks.py's `Marks`; box_frames.py holds these against the images. All that lies there and is not
used is told.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from vitrail.data.names import PackedNames, printable, shortened
from vitrail.data.sources.bdd_boxes import find_bdd, is_bdd, read_bdd
from vitrail.data.sources.box_frames import Framed, framed
from vitrail.data.sources.coco_boxes import find_coco_boxes, has_boxes_in, read_coco_boxes
from vitrail.data.sources.coco_masks import has_outlines, has_segments
from vitrail.data.sources.csv_boxes import find_csv, has_header, read_csv
from vitrail.data.sources.files import FileImages
from vitrail.data.sources.formats import IMAGE_EXTENSIONS
from vitrail.data.sources.layout import USUAL, FolderRules
from vitrail.data.sources.marks import ABOVE, Marks, annotation_files
from vitrail.data.sources.source import LeftOut
from vitrail.data.sources.voc_boxes import find_voc, read_voc
from vitrail.data.sources.walk import Tree, walk
from vitrail.data.sources.yolo_boxes import find_yolo, read_yolo
from vitrail.errors import DataError, UsageError, setting

_LISTS = ("classes.txt", "obj.names", *(f"{part}.txt" for part in ("train", "val", "test")))


class _Format(NamedTuple):
    """One way to write boxes down."""

    name: str
    files: list[str]
    """Relative to the folder of the data."""
    read: Callable[..., Marks]


def has_boxes(place: Path | str) -> bool:
    """Whether a folder, or a file, tells boxes of images and nothing finer: by its names, and a
    look at a few files. COCO's outlines are masks, unless somebody asks for their boxes.
    """
    root, file = _root(os.path.abspath(place))
    if not os.path.isdir(root):
        return False
    try:
        if file is not None:
            return _of_file(root, file, annotation_files(root, quick=True)) is not None
        coco = [Path(root, one) for one in find_coco_boxes(root)]
        if any(has_outlines(one) or has_segments(one) for one in coco):
            return False
        if any(map(has_boxes_in, coco)):
            return True
        files = annotation_files(root, quick=True)
        return any(find(root, files) for find in (find_bdd, find_voc, find_yolo, find_csv))
    except OSError:
        return False


class BoxedSource(FileImages):
    """Images that have boxes, or of which it is said that they show nothing, ordered by part and
    path; `targets` are their `Boxes`.

    `place` is a folder, or one file of annotations in it. Raises DataError where no image has a
    word said of it, or a file that all depend on is damaged; UsageError for rules that do not fit.
    """

    def __init__(self, place: Path | str, rules: FolderRules = USUAL) -> None:
        if rules.parts not in ("auto", "none"):
            raise UsageError(
                f"{setting('data.parts', rules.parts)}: of images with boxes it is auto or none"
            )
        self._root, file = _root(os.path.abspath(place))
        files = annotation_files(self._root, follow_links=rules.follow_links)
        if file is None:
            formats = _formats(self._root, files)
        else:
            named = _of_file(self._root, file, files)
            formats = [named] if named else []
        if not formats:
            raise DataError(
                f"nothing in {printable(str(place))} tells boxes of images: give COCO's JSON, "
                f"Pascal VOC's XML, YOLO's labels/ beside images/, BDD100K's JSON, or a .csv with "
                f"image_path,xmin,ymin,xmax,ymax,label"
            )
        chosen, *other = formats
        used = {name for one in formats for name in one.files}
        used |= {name for name in files if os.path.basename(name) in _LISTS}
        tree = walk(self._root, follow_links=rules.follow_links, used=used)
        marks = chosen.read(self._root, chosen.files, tree, parts=rules.parts == "auto")
        found = framed(self._root, marks)
        left: tuple[LeftOut, ...] = (*marks.left.told(), *tree.left_out)
        if not found.paths:
            raise DataError(_nothing(self._root, chosen, tree, left))
        super().__init__(self._root, PackedNames(found.paths))
        self.part = found.part
        self.targets = found.boxes
        self.left_out = left
        self.told = found.told
        """Boxes that the files tell of the images."""
        self.cut = found.cut
        """Those of them that reach beyond their image."""
        passed = tuple(f"passed over: {len(o.files):,} files of {o.name}" for o in other)
        self.notes = (
            f"boxes as {chosen.name} tells them, in {len(chosen.files):,} files",
            *passed,
            *marks.notes,
            *found.notes,
            *_said(found),
        )


def _said(found: Framed) -> tuple[str, ...]:
    boxes = found.boxes
    objects = int(boxes.counts().sum())
    names = shortened(boxes.names, 8)
    several = "classes" if len(boxes.names) != 1 else "class"
    notes = [f"{objects:,} objects of {len(boxes.names):,} {several}: {names}"]
    if found.ignored:
        notes.append(f"objects and regions that are ignored: {found.ignored:,}")
    if empty := boxes.empty():
        notes.append(f"images without an object, which show what is none: {empty:,}")
    return tuple(notes)


def _root(place: str) -> tuple[str, str | None]:
    """The folder that images and annotations lie in, and the file that was asked for."""
    if not os.path.isfile(place):
        return place, None
    folder, name = os.path.split(place)
    above, around = os.path.split(folder)
    if around.lower() not in ABOVE:
        return folder, name
    top, between = os.path.split(above)
    # BDD100K's labels/det_20 is two levels below the folder that its images/ are in.
    if between.lower() in ABOVE and _shows_images(top) and not _shows_images(above):
        return top, f"{between}/{around}/{name}"
    return above, f"{around}/{name}"


def _shows_images(folder: str) -> bool:
    """Whether the names in a folder are those of images, or of folders of them."""
    try:
        names = [name.lower() for name in os.listdir(folder)]
    except OSError:
        return False
    return any("images" in name or name.endswith(IMAGE_EXTENSIONS) for name in names)


def _formats(root: str, files: Sequence[str]) -> list[_Format]:
    """The formats in which a folder has boxes; the first is the one that is read."""
    coco = _Format("COCO", find_coco_boxes(root), read_coco_boxes)
    # Any JSON may have a word for images: without a box it is asked last.
    seen = any(has_boxes_in(Path(root, file)) for file in coco.files)
    found = [
        *([coco] if seen else [_Format("BDD100K", find_bdd(root, files), read_bdd)]),
        _Format("Pascal VOC", find_voc(root, files), read_voc),
        _Format("YOLO", find_yolo(root, files), read_yolo),
        _Format("a table", find_csv(root, files), read_csv),
        *([] if seen else [coco]),
    ]
    return [one for one in found if one.files]


def _of_file(root: str, file: str, files: Sequence[str]) -> _Format | None:
    """The format of one file that was named."""
    place, ending = Path(root, file), os.path.splitext(file)[1].lower()
    if ending == ".json":
        if has_boxes_in(place):
            return _Format("COCO", [file], read_coco_boxes)
        return _Format("BDD100K", [file], read_bdd) if is_bdd(place) else None
    if ending in (".yaml", ".yml"):
        found = find_yolo(root, files, named=file)
        return _Format("YOLO", found, read_yolo) if file in found else None
    return _Format("a table", [file], read_csv) if has_header(place) else None


def _nothing(root: str, chosen: _Format, tree: Tree, left: Sequence[LeftOut]) -> str:
    told = "".join(f"; {one.sentence()}" for one in left)
    there = len(tree.images())
    files = shortened(map(printable, chosen.files), 3)
    if not there:
        told += "; is it the folder of the annotations alone? Name the one above, with both"
    return (
        f"none of the {there:,} images in {root} has boxes, or a word that it has none, by "
        f"{chosen.name} ({files}){told}"
    )
