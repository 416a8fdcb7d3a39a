"""COCO's JSON: bbox is [left, top, width, height] in pixels from 0.

Classes are the categories by rising id, as their file has them; ids may have gaps. `iscrowd` and
`ignore` are ignored, in learning and in measuring. What is no class goes: a row for the background
and Roboflow's kind of all categories, where no annotation is of them. Outlines are not looked at.
"""

import posixpath
import re
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from vitrail.data.names import shortened
from vitrail.data.sources.coco_masks import CocoJson, find_coco
from vitrail.data.sources.jsonfile import head_of, is_in, text_of
from vitrail.data.sources.marks import Marked, Marks, name_of, numbers, size_said
from vitrail.data.sources.source import PARTS
from vitrail.data.sources.walk import Tree
from vitrail.errors import DataError

_BOX = re.compile(rb'"bbox"\s*:\s*\[')
_LISTS = re.compile(rb'"(images|annotations)"\s*:\s*\[\s*[{\]]')
_BACKGROUND = ("background", "__background__")


def find_coco_boxes(root: str) -> list[str]:
    """The files of a folder that are COCO's, by their beginnings and ends; where none is, those
    that may be meant so.
    """
    found = find_coco(root)
    return [file for file in found if _is_coco(head_of(Path(root, file)))] or found


def has_boxes_in(file: Path) -> bool:
    """Whether a JSON file is COCO's and has boxes, which may lie behind any number of images. Those
    of panoptic segments are none.
    """
    head = head_of(file)
    if not _is_coco(head) or b'"segments_info"' in head:
        return False
    return bool(_BOX.search(head)) or is_in(file, _BOX)


def _is_coco(head: bytes) -> bool:
    """Whether the ends of a file are those of a mapping with COCO's lists."""
    return head.removeprefix(BOM_UTF8).lstrip().startswith(b"{") and bool(_LISTS.search(head))


def read_coco_boxes(root: str, files: Sequence[str], tree: Tree, *, parts: bool) -> Marks:
    """Raises `DataError` for a file that is damaged or says two things of one id."""
    marks = Marks(tree, parts=parts)
    loaded = [CocoJson(root, file, first=0) for file in files]
    used = [_used(one) for one in loaded]
    names = [_names(one, ids, marks) for one, ids in zip(loaded, used, strict=True)]
    for one, own in zip(loaded, names, strict=True):
        if set(own.values()) != set(names[0].values()):
            marks.notes.append(f"{one.file} names other classes than {loaded[0].file}: all count")
        marks.declare(own.values())
    for one in loaded:
        marks.expect(_called(one))
    for one, own in zip(loaded, names, strict=True):
        _read(one, own, marks, part=PARTS.index(one.part) if parts and one.part else None)
    marks.unnamed("no JSON file names them")
    return marks


def _used(one: CocoJson) -> set[object]:
    """The ids of categories that annotations have."""
    found = set()
    for each in one.annotations:
        try:
            found.add(each["category_id"])
        except (KeyError, TypeError, IndexError):
            continue
    return found


def _names(one: CocoJson, used: set[object], marks: Marks) -> dict[object, str]:
    """Of each category's id its name, by rising id."""
    try:
        kinds = {text_of(each.get("supercategory") or "") for each in one.categories}
        names = {each["id"]: name_of(each["name"]) for each in one.categories}
        tops = {each["id"] for each in one.categories if each.get("supercategory") == "none"}
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{one.file}: a category needs a name that can be printed") from error
    idle = {
        key: name
        for key, name in names.items()
        if key not in used and (name.lower() in _BACKGROUND or (key in tops and name in kinds))
    }
    if idle:
        rows = shortened(idle.values())
        marks.notes.append(f"{one.file}: no class, for nothing is of them: {rows}")
    return {key: name for key, name in names.items() if key not in idle}


def _called(one: CocoJson) -> Iterator[str]:
    """The images' names, where they have one."""
    for image in one.images.values():
        with suppress(KeyError, TypeError):
            yield text_of(image["file_name"])


def _read(one: CocoJson, names: dict[object, str], marks: Marks, part: int | None) -> None:
    rows: dict[object, Marked] = {}
    for number, (key, image) in enumerate(one.images.items()):
        try:
            called = text_of(image["file_name"])
        except (KeyError, TypeError):
            what = f"image {number} of {one.file}"
            marks.left.add("images without a file_name", "it says which file is meant", what)
            continue
        if (path := marks.find(called, one.file)) is None:
            continue
        size = size_said(image.get("height"), image.get("width"))
        told = marks.part(posixpath.dirname(path)) if part is None else part
        marked = marks.begin(path, told, size)
        if marked is not None:
            rows[key] = marked
    labels = {key: marks.label(name) for key, name in names.items()}
    for number, each in enumerate(one.annotations):
        try:
            marked = rows.get(each["image_id"])
            if marked is None:
                known = each["image_id"] in one.images
                why = "their image is left out" if known else "no image has their image_id"
                raise ValueError(why)
            if each["category_id"] not in labels:
                raise ValueError("no category has their category_id")
            left, top, width, height = numbers(each["bbox"])
            where = f"annotation {number} of {one.file}"
            flags = [marks.flag(each.get(key), where) for key in ("iscrowd", "ignore")]
            corners = left, top, left + width, top + height
            marked.add(corners, labels[each["category_id"]], any(flags))
        except (KeyError, TypeError, AttributeError, IndexError):
            why = "they need image_id, category_id and bbox"
            marks.left.add("annotations", why, f"annotation {number} of {one.file}")
        except ValueError as error:
            marks.left.add("annotations", str(error), f"annotation {number} of {one.file}")
