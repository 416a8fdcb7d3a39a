"""BDD100K's boxes, in the three forms in which they were published.

A file an image with `frames` of `objects`; or, of 2018, a list of images with `labels`; or that of
2020 (Scalabel), such a list or a mapping with `frames`. Names of the first two become those of the
third: person -> pedestrian, bike -> bicycle, motor -> motorcycle, van and caravan -> car. Other
persons, other vehicles and trailers are regions where nothing counts, and crowds are ignored, as
in BDD100K's own measure. box2d are corners in pixels; lanes and areas have none.
"""

import posixpath
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitrail.data.names import label_name
from vitrail.data.sources.jsonfile import head_of, read_json, text_of
from vitrail.data.sources.marks import Marks, ending_in, name_of, numbers, size_said
from vitrail.data.sources.walk import Tree
from vitrail.data.targets.boxes import ANY

NAMES = (
    *("pedestrian", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
    *("traffic light", "traffic sign"),
)
"""In the order of BDD100K."""
_NOW = {
    "person": "pedestrian",
    "bike": "bicycle",
    "motor": "motorcycle",
    "van": "car",
    "caravan": "car",
}
_REGIONS = ("other person", "other vehicle", "trailer")
_SEEN = re.compile(rb'"box2d"\s*:')
_LOOKED_AT = 20
"""Files of a folder that are opened to see whether they are any."""


def find_bdd(root: str, files: Sequence[str]) -> list[str]:
    """Of `files` the JSON ones in the folders in which the first ones are BDD100K's."""
    folders: dict[str, list[str]] = {}
    for file in ending_in(files, ".json"):
        folders.setdefault(posixpath.dirname(file), []).append(file)
    return [
        file
        for inside in folders.values()
        if any(is_bdd(Path(root, file)) for file in inside[:_LOOKED_AT])
        for file in inside
    ]


def is_bdd(file: Path) -> bool:
    """Whether a JSON file is BDD100K's, by its beginning."""
    head = head_of(file)
    return bool(_SEEN.search(head)) and b'"images"' not in head


def read_bdd(root: str, files: Sequence[str], tree: Tree, *, parts: bool) -> Marks:
    """What cannot be read is counted."""
    marks = Marks(tree, parts=parts)
    marks.declare(NAMES)
    marks.each_of_one(files)
    for file in files:
        try:
            frames, size = _frames(read_json(Path(root, file)), file)
        except (OSError, ValueError) as error:
            marks.left.add("files that are none of BDD100K's", str(error), file)
            continue
        for number, frame in enumerate(frames):
            _add(marks, frame, size, file, number)
    marks.unnamed("no JSON file names them")
    return marks


def _frames(content: Any, file: str) -> tuple[list[Any], tuple[int, int] | None]:
    """The images of a file, each with a name and `labels`; and their size, if it is said."""
    size = None
    if isinstance(content, Mapping):
        config = content.get("config")
        said = config.get("imageSize") if isinstance(config, Mapping) else None
        if isinstance(said, Mapping):
            size = size_said(said.get("height"), said.get("width"))
        frames = content.get("frames")
        if not isinstance(frames, list):
            raise ValueError("it has no frames")
        if any(isinstance(one, Mapping) and "objects" in one for one in frames):
            if len(frames) > 1:
                raise ValueError("it is of a video: frames, and not an image")
            stem = posixpath.splitext(posixpath.basename(file))[0]
            name = content.get("name") or stem
            return [{"name": name, "labels": frames[0].get("objects")}], size
        return frames, size
    if not isinstance(content, list):
        raise ValueError("it is no list of images")
    return content, size


def _add(marks: Marks, frame: Any, size: tuple[int, int] | None, file: str, number: int) -> None:
    try:
        called = text_of(frame["name"])
        labels = frame.get("labels") or ()
        if not isinstance(labels, list | tuple):
            raise TypeError
    except (KeyError, TypeError, AttributeError):
        what = f"image {number} of {file}"
        marks.left.add("images without a name, or whose labels are no list", "they need both", what)
        return
    # The first form leaves the ending out.
    by_stem = not marks.knows(posixpath.basename(called.replace("\\", "/")))
    if by_stem:
        called = posixpath.splitext(called)[0]
    path = marks.find(called, file, by_stem=by_stem)
    if path is None:
        return
    marked = marks.begin(path, marks.part(posixpath.dirname(path), file), size)
    if marked is None:
        return
    for place, each in enumerate(labels):
        where = f"label {place} of {called} in {file}"
        try:
            if each.get("box2d") is None:
                marks.left.add("labels without a box", "lanes and areas have none", where)
                continue
            box, attributes = each["box2d"], each.get("attributes") or {}
            corners = numbers([box[side] for side in ("x1", "y1", "x2", "y2")])
            name = label_name(name_of(each["category"]))
            crowd = any(marks.flag(attributes.get(key), where) for key in ("crowd", "ignored"))
        except (KeyError, TypeError, AttributeError):
            marks.left.add("labels", "they need a category, and a box2d with four corners", where)
        except ValueError as error:
            marks.left.add("labels", str(error), where)
        else:
            region = name.lower() in _REGIONS
            marked.add(corners, ANY if region else marks.label(_NOW.get(name, name)), crowd)
