"""COCO's JSON: outlines of objects as polygons and run lengths, drawn as masks of classes.

Categories are the classes 1.., by rising id, and what no object covers is 0, the background. Larger
objects are drawn first. Polygons are drawn by Pillow's `ImageDraw.polygon`, whose borders differ
from those of pycocotools by up to a pixel. Panoptic masks are for coco_panoptic.py.
"""

import hashlib
import math
import os
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Float32, Int64
from PIL import Image, ImageDraw

from vitrail.data.names import label_name, printable
from vitrail.data.pixels.decode import MAX_SIDE, UnreadableImage
from vitrail.data.pixels.values import Values
from vitrail.data.sources.jsonfile import head_of, read_json
from vitrail.data.sources.listed import path_folders, paths_meant
from vitrail.data.sources.parts import part_within
from vitrail.data.sources.source import PARTS, LeftOut, Tally
from vitrail.data.sources.walk import Tree
from vitrail.data.targets.masks import MaskStore
from vitrail.errors import DataError

BACKGROUND = "background"
_MOST_PIXELS = 64_000_000
_FOLDERS = ("", "annotations", *("train", "val", "valid", "test"))
_SEGMENTS = b'"segments_info"'
_OUTLINE = re.compile(rb'"segmentation"\s*:\s*(\[\s*\[|\{\s*"(counts|size)")')


Drawn = TypeVar("Drawn")
"""What a file says of an image."""


class Outline(NamedTuple):
    """One object of an image."""

    label: int
    """Its class index."""
    area: float
    polygons: tuple[Float32[np.ndarray, "k 2"], ...] = ()
    """Corners (x, y); pixel centres are at halves."""
    runs: Int64[np.ndarray, " r"] | None = None
    """Lengths, column by column, of pixels outside and inside in turn; of the whole image."""


class Drawing(NamedTuple):
    """What is drawn of one image."""

    size: tuple[int, int]
    """(height, width), as the file says."""
    outlines: tuple[Outline, ...]


class CocoMasks:
    """Masks drawn from outlines, of the class indices 0 (background) and up."""

    def __init__(self, names: Sequence[str], drawings: Sequence[Drawing]) -> None:
        self._names = names
        self._drawings = drawings

    def __len__(self) -> int:
        return len(self._drawings)

    def drawing(self, i: int) -> Drawing:
        """What mask `i` is drawn from."""
        return self._drawings[i]

    def classes(self, i: int) -> set[int]:
        """Those that mask `i` may show, without a look at what covers what."""
        return {0, *(one.label for one in self._drawings[i].outlines)}

    def values(self, i: int) -> Values:
        size, outlines = self._drawings[i]
        if size[0] * size[1] > _MOST_PIXELS or max(size) > MAX_SIDE or min(size) < 1:
            raise UnreadableImage(f"the file says {size[1]} x {size[0]} pixels", self.name(i))
        canvas = Image.new("I", (size[1], size[0]))
        draw = ImageDraw.Draw(canvas)
        for one in sorted(outlines, key=lambda one: -one.area):
            for corners in one.polygons:
                # Pillow's pixel 0 is at 0, COCO's from 0 to 1.
                draw.polygon([(x, y) for x, y in (corners - 0.5).tolist()], fill=one.label)
            if one.runs is not None:
                canvas.paste(one.label, mask=Image.fromarray(_covered(one.runs, size)))
        return np.asarray(canvas)

    def stamp(self, i: int) -> str:
        size, outlines = self._drawings[i]
        digest = hashlib.blake2b(f"{size}".encode(), digest_size=16)
        for one in outlines:
            digest.update(f"{one.label} {one.area}".encode())
            for part in (*one.polygons, *(() if one.runs is None else (one.runs,))):
                digest.update(f"{part.shape}".encode() + part.tobytes())
        return digest.hexdigest()

    def name(self, i: int) -> str:
        return self._names[i]


def _covered(runs: Int64[np.ndarray, " r"], size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """The pixels of an image of (height, width) that run lengths say are inside."""
    inside = np.arange(len(runs)) % 2 == 1
    return np.ascontiguousarray(np.repeat(inside, runs).reshape(size[1], size[0]).T)


def _are_runs(runs: Int64[np.ndarray, " r"], pixels: int) -> bool:
    return bool((runs >= 0).all() and (runs <= pixels).all() and runs.sum() == pixels)


def read_runs(counts: str | bytes) -> Int64[np.ndarray, " r"]:
    """The run lengths in COCO's compressed text: 5 bits a letter, and from the fourth number on
    differences to the last but one. Raises `ValueError` for text that is none.
    """
    letters = np.frombuffer(counts.encode("ascii") if isinstance(counts, str) else counts, "u1")
    letters = letters.astype(np.int64) - 48
    if not len(letters):
        return np.zeros(0, np.int64)
    if letters.min() < 0 or letters.max() > 63 or letters[-1] & 32:
        raise ValueError("its run lengths are no such text")
    ends = np.flatnonzero((letters & 32) == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 10:
        raise ValueError("its run lengths have too many digits")
    place = np.arange(len(letters)) - np.repeat(starts, lengths)
    values = np.add.reduceat((letters & 31) << (5 * place), starts)
    values -= np.where(letters[ends] & 16, np.int64(1) << (5 * lengths), 0)
    for first in (1, 2):
        values[first::2] = values[first::2].cumsum()
    return values


def find_coco(root: str) -> list[str]:
    """The JSON files of `root`, relative to it, that may be COCO's."""
    found = []
    for folder in _FOLDERS:
        place = os.path.join(root, folder)
        if os.path.isdir(place):
            found += [
                posixpath.join(folder, name)
                for name in sorted(os.listdir(place))
                if name.lower().endswith(".json") and _is_coco(Path(place, name))
            ]
    # Of COCO's own: instances and panoptic masks, and neither captions nor keypoints.
    of_outlines = [file for file in found if posixpath.basename(file).startswith("instances_")]
    return [
        file
        for file in found
        if not of_outlines or file in of_outlines or has_segments(Path(root, file))
    ]


def _is_coco(file: Path) -> bool:
    head = head_of(file)
    return b'"images"' in head or b'"annotations"' in head


def has_outlines(file: Path) -> bool:
    """Whether outlines are seen at the beginning or the end of a JSON file."""
    return bool(_OUTLINE.search(head_of(file)))


def has_segments(file: Path) -> bool:
    """Whether panoptic segments are seen there."""
    return _SEGMENTS in head_of(file)


class Coco(NamedTuple):
    """What COCO files say; one row an image, ordered by part and path."""

    images: list[str]
    parts: list[int]
    names: tuple[str, ...]
    store: MaskStore
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]


def read_coco(root: str, files: Sequence[str], tree: Tree, *, parts: bool) -> Coco:
    """All images that the JSON `files` name and that are there.

    Raises `DataError` for a file that is damaged, says two things of one image, or other classes
    than another one.
    """
    problems = Tally()
    loaded = [CocoJson(root, file) for file in files]
    drawings = [one.drawings(problems) for one in loaded]
    names, rows, left = named_images(root, loaded, drawings, tree.images(), problems, parts=parts)
    store = CocoMasks([printable(path) for path, _, _ in rows], [each for _, _, each in rows])
    note = (
        f"outlines of {', '.join(files)} are drawn by Pillow's ImageDraw.polygon, larger objects "
        f"first; what none covers is '{BACKGROUND}'"
    )
    images, numbers = [path for path, _, _ in rows], [part for _, part, _ in rows]
    return Coco(images, numbers, (BACKGROUND, *names), store, left, (note,))


def named_images(
    root: str,
    loaded: "Sequence[CocoJson]",
    drawings: "Sequence[Sequence[tuple[str, Drawn]]]",
    images: Iterable[str],
    problems: Tally,
    *,
    parts: bool,
) -> "tuple[tuple[str, ...], list[tuple[str, int, Drawn]], tuple[LeftOut, ...]]":
    """The classes; path, part and drawing of each of the `images` that the files name, ordered by
    part and path; and what is left out.

    `drawings` are of each file: the name that it gives an image, and what is drawn of it. Raises
    `DataError` where files name other classes, or no image that is there.
    """
    left = Tally()
    by_name: dict[str, list[str]] = {}
    for image in images:
        by_name.setdefault(posixpath.basename(image), []).append(image)
    here = {folder for image in images for folder in path_folders(image)}
    names = loaded[0].names
    rows: dict[str, tuple[int, Drawn]] = {}
    for one, of_file in zip(loaded, drawings, strict=True):
        if one.names != names:
            raise DataError(
                f"{one.file} names other classes than {loaded[0].file}: they must be the same"
            )
        part = PARTS.index(one.part) if one.part and parts else 0
        for called, drawing in of_file:
            places = paths_meant(called, one.file, by_name, here)
            path = places[0] if places else ""
            if not places:
                left.add("images that are named and not there", f"{one.file} names them", called)
            elif len(places) > 1:
                left.add("images that may be meant", f"{one.file} names one of them", *places)
            elif path in rows:
                left.add("images that are named twice", "the first one is taken", path)
            else:
                rows[path] = part, drawing
    told = (*problems.told(), *left.told())
    if not rows:
        files = ", ".join(one.file for one in loaded)
        why = "".join(f"; {each.sentence()}" for each in told)
        raise DataError(f"none of the images that {files} names lies in {root}{why}")
    unnamed = sorted({path for paths in by_name.values() for path in paths} - set(rows))
    left.add("images without a mask", "no JSON file names them", *unnamed)
    ordered = sorted((part, path) for path, (part, _) in rows.items())
    return (
        names,
        [(path, part, rows[path][1]) for part, path in ordered],
        (*problems.told(), *left.told()),
    )


class CocoJson:
    """A file of COCO's. Raises `DataError` for one that is none."""

    def __init__(self, root: str, file: str, first: int = 1) -> None:
        """`file` is relative to `root`; the first category has the index `first`."""
        self.file = file
        words = (posixpath.splitext(posixpath.basename(file))[0], *file.split("/")[:-1])
        found = next((name for word in words if (name := part_within(word))), None)
        self.part = found and found.part
        """Which part of the data it is for, by its name or its folders'."""
        try:
            content = read_json(Path(root, file))
            self.images = {one["id"]: one for one in content["images"]}
            if len(self.images) != len(content["images"]):
                raise ValueError("two images have one id")
            categories = sorted(content["categories"], key=lambda one: one["id"])
            self.categories: list[Any] = categories
            """By rising id."""
            # Roboflow writes a category and its kind alike: of one name they are one class.
            index = {BACKGROUND: 0} if first else {}
            self.index = {
                one["id"]: index.setdefault(label_name(str(one["name"])), len(index))
                for one in categories
            }
            if len(self.index) != len(categories):
                raise ValueError("two categories have one id")
            self.names = tuple(index)[first:]
            self.annotations: list[Any] = list(content["annotations"])
        except (OSError, ValueError) as error:
            raise DataError(f"{file} is no COCO file that can be read: {error}") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{file} is no COCO file that can be read: it does not list images and categories, "
                f"each with an id, and annotations"
            ) from error

    def drawings(self, problems: Tally) -> list[tuple[str, Drawing]]:
        """Of each image its file's name and what is drawn of it."""
        named: dict[Any, tuple[str, tuple[int, int]]] = {}
        for number, (key, image) in enumerate(self.images.items()):
            try:
                named[key] = str(image["file_name"]), _size(image)
            except (KeyError, TypeError, ValueError, OverflowError):
                what = "without a file_name, height and width"
                problems.add("images", what, f"image {number} of {self.file}")
        outlines: dict[Any, list[Outline]] = {}
        for number, one in enumerate(self.annotations):
            try:
                key, label = self.known(one)
                if key not in named:
                    raise Misdrawn("its image is left out")
                outlines.setdefault(key, []).append(_outline(one, label, named[key][1]))
            except Misdrawn as error:
                problems.add("outlines", str(error), f"annotation {number} of {self.file}")
        return [
            (name, Drawing(size, tuple(outlines.get(key, ()))))
            for key, (name, size) in named.items()
        ]

    def known(self, one: Any, *, category: bool = True) -> tuple[Any, int]:
        """The image that an annotation is of, and its class index; without a `category`, -1."""
        try:
            image, label = one["image_id"], self.index[one["category_id"]] if category else -1
            if image in self.images:
                return image, label
        except (KeyError, TypeError, IndexError):
            pass
        raise Misdrawn("an annotation needs an image and a category that the file lists")


class Misdrawn(ValueError):
    """What an annotation says cannot be drawn, and why."""


def _size(image: Mapping[str, Any]) -> tuple[int, int]:
    return int(image["height"]), int(image["width"])


def _outline(one: Mapping[str, Any], index: int, size: tuple[int, int]) -> Outline:
    """Raises `Misdrawn` for what is neither polygons nor run lengths of such an image."""
    try:
        found, area = one.get("segmentation"), float(one.get("area") or 0)
        if not 0 < area < math.inf:
            area = 0
        drawn = _runs(found, size) if isinstance(found, Mapping) else _polygons(found)
    except Misdrawn:
        raise
    except (ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
        raise Misdrawn("an outline is polygons, or run lengths with a size") from error
    if isinstance(drawn, tuple):
        return Outline(index, area or sum(map(_area, drawn)), drawn)
    return Outline(index, area or float(drawn[1::2].sum()), runs=drawn)


def _runs(found: Mapping[str, Any], size: tuple[int, int]) -> Int64[np.ndarray, " r"]:
    counts, of = found["counts"], tuple(int(side) for side in found["size"])
    if of != size:
        raise Misdrawn("run lengths are for another size than the image's")
    pixels = size[0] * size[1]
    if pixels > _MOST_PIXELS or len(counts) > 8 * pixels + 8:
        raise Misdrawn("more run lengths than an image can have")
    runs = read_runs(counts) if isinstance(counts, str) else np.array(counts, np.int64)
    if runs.ndim != 1 or not _are_runs(runs, pixels):
        raise Misdrawn("run lengths do not add up to the image's pixels")
    return runs


def _polygons(found: Any) -> tuple[Float32[np.ndarray, "k 2"], ...]:
    if any(len(part) % 2 for part in found):
        raise Misdrawn("a polygon has an odd number of coordinates")
    polygons = tuple(np.array(part, np.float32).reshape(-1, 2) for part in found)
    if not polygons or any(len(p) < 3 for p in polygons):
        raise Misdrawn("an outline needs at least one polygon of three corners")
    if not all((np.abs(p) < 4 * MAX_SIDE).all() for p in polygons):
        raise Misdrawn("a polygon has corners far beyond any image")
    return polygons


def _area(corners: Float32[np.ndarray, "k 2"]) -> float:
    x, y = corners.T.astype(np.float64)
    return float(abs((x * np.roll(y, 1) - y * np.roll(x, 1)).sum()) / 2)


def outside(outline: Outline, size: tuple[int, int]) -> bool:
    """Whether a polygon reaches beyond an image of (height, width), by more than a pixel."""
    limit = np.array([size[1], size[0]]) + 1
    return any(bool(((p < -1) | (p > limit)).any()) for p in outline.polygons)
