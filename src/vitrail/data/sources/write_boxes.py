"""From any source with boxes to a new folder of COCO, YOLO or Pascal VOC.

Image files go in as they are, byte by byte; arrays, as PNG. Boxes lie on the upright image, in
fractions of a pixel. What a format cannot hold is counted: YOLO has no word for what is ignored.
"""

import json
import os
import posixpath
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

import yaml

from vitrail.data.pixels.decode import Slice, UnreadableImage
from vitrail.data.sources.files import FileImages
from vitrail.data.sources.formats import HEAD_BYTES, image_format
from vitrail.data.sources.marks import REGION
from vitrail.data.sources.source import PARTS, PartedSource, encoded
from vitrail.data.sources.write_shards import refuse_place
from vitrail.data.targets.boxes import ANY, Boxes
from vitrail.disk import flush_folder
from vitrail.errors import DataError, unknown_name

FORMATS = ("coco", "yolo", "voc")
_DIGITS = 6
"""Of a pixel, behind the point."""
_UNIT_DIGITS = 10
_LONGEST = 120
"""Letters of a file's name."""


class WrittenBoxes(NamedTuple):
    """What `write_boxes` made."""

    images: int
    boxes: int
    size: int
    """Of all files, in bytes."""
    left_out: tuple[tuple[str, str], ...]
    """(key, reason) of images that cannot be read."""
    notes: tuple[str, ...]
    """What the format cannot hold, a sentence each."""


class _One(NamedTuple):
    """One image as it is written."""

    number: int
    name: str
    part: str
    size: tuple[int, int]
    boxes: list[tuple[list[float], int, bool]]
    """Corners in pixels, class index or ANY, ignored."""

    @property
    def stem(self) -> str:
        return posixpath.splitext(self.name)[0]


def write_boxes(
    source: PartedSource,
    out: Path,
    *,
    to: str,
    data: Path | None = None,
    on_done: Callable[[int], None] | None = None,
) -> WrittenBoxes:
    """Write `source`, whose targets are `Boxes`, into the new folder `out`, which appears whole or
    not at all. `data` is where the source lies; `on_done` is called with the number of images done.

    Raises UsageError for a format that is not in FORMATS and an `out` that is not empty or lies in
    `data`; DataError where it cannot be written.
    """
    if to not in FORMATS:
        raise unknown_name("format", to, FORMATS)
    boxes = source.targets
    if not isinstance(boxes, Boxes):
        raise DataError(f"{boxes.kind} are no boxes: only boxes are converted")
    refuse_place(out, data)
    if isinstance(source, FileImages):
        refuse_place(out, Path(source.folder))
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        images, left_out = _images(source, boxes, beside, to, on_done)
        {"coco": _coco, "yolo": _yolo, "voc": _voc}[to](beside, images, boxes.names)
        beside.rename(out)
        flush_folder(out.parent)
    except OSError as error:
        why = error.strerror or error
        raise DataError(f"cannot write to {out}: {why}; nothing of it is left") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    notes, lost = [], [one for one in images if any(each[2] for each in one.boxes)]
    count = sum(each[2] for one in images for each in one.boxes)
    total = sum(len(one.boxes) for one in images)
    if to == "yolo" and count:
        total -= count
        notes.append(
            f"YOLO has no word for what is ignored: {count:,} boxes in {len(lost):,} images are "
            f"left out, and what they are around counts as background"
        )
    if to == "voc" and (thin := sum(_is_thin(each[0]) for one in images for each in one.boxes)):
        notes.append(
            f"Pascal VOC's corners are pixels, and both are within: {thin:,} boxes of less than a "
            f"pixel across are written as one pixel across"
        )
    return WrittenBoxes(len(images), total, size, tuple(left_out), tuple(notes))


def _images(
    source: PartedSource,
    boxes: Boxes,
    folder: Path,
    to: str,
    on_done: Callable[[int], None] | None,
) -> tuple[list[_One], list[tuple[str, str]]]:
    """Copy them, and say what is on each."""
    names = _names([source.key(i) for i in range(len(source))])
    images: list[_One] = []
    left_out: list[tuple[str, str]] = []
    for i, stem in enumerate(names):
        part = PARTS[source.part[i]]
        place = folder / ("JPEGImages" if to == "voc" else f"images/{part}")
        place.mkdir(parents=True, exist_ok=True)
        try:
            height, width = boxes.size(i)
            name = _copy(source, i, place, stem)
        except UnreadableImage as error:
            left_out.append((source.key(i), error.reason))
        else:
            said = boxes.of(i)
            corners = (said.corners * [width, height, width, height]).tolist()
            rows = zip(corners, said.labels.tolist(), said.ignored.tolist(), strict=True)
            images.append(_One(len(images) + 1, name, part, (height, width), list(rows)))
        if on_done:
            on_done(i + 1)
    return images, left_out


def _copy(source: PartedSource, i: int, place: Path, stem: str) -> str:
    """Write image `i`; its file's name."""
    found = encoded(source, i)
    if isinstance(found, Path):
        name = stem + found.suffix
        with found.open("rb") as stream, (place / name).open("wb") as copy:
            shutil.copyfileobj(stream, copy)
        return name
    if found is None:
        source.load(i).save(place / f"{stem}.png")
        return f"{stem}.png"
    content = found
    if isinstance(found, Slice):
        with found.file.open("rb") as stream:
            stream.seek(found.start)
            content = stream.read(found.size)
    assert isinstance(content, bytes)
    form = image_format(content[:HEAD_BYTES]) or "png"
    name = f"{stem}.{ {'JPEG': 'jpg', 'TIFF': 'tif'}.get(form, form.lower()) }"
    (place / name).write_bytes(content)
    return name


def _names(keys: Sequence[str]) -> list[str]:
    """A name without ending for each image, that no other has: its own, or else its path's."""
    stems = [posixpath.splitext(posixpath.basename(key))[0] for key in keys]
    often = Counter(stem.lower() for stem in stems)
    taken: set[str] = set()
    names = []
    for key, stem in zip(keys, stems, strict=True):
        whole = stem if often[stem.lower()] == 1 else posixpath.splitext(key)[0].replace("/", "_")
        safe = re.sub(r"[^\w.\- ()]", "_", whole)[-_LONGEST:].strip(" .") or "image"
        name, number = safe, 1
        while name.lower() in taken:
            number += 1
            name = f"{safe}_{number}"
        taken.add(name.lower())
        names.append(name)
    return names


def _coco(folder: Path, images: Sequence[_One], names: Sequence[str]) -> None:
    categories: list[dict[str, Any]] = [{"id": k + 1, "name": name} for k, name in enumerate(names)]
    if any(label == ANY for one in images for _, label, _ in one.boxes):
        categories.append({"id": len(names) + 1, "name": REGION})
    (folder / "annotations").mkdir()
    number = 0
    for part in PARTS:
        own = [one for one in images if one.part == part]
        if not own:
            continue
        annotations = []
        for one in own:
            for (left, top, right, bottom), label, ignored in one.boxes:
                number += 1  # from 1: an id of 0 spoils what pycocotools measures
                width, height = right - left, bottom - top
                annotations.append(
                    {
                        "id": number,
                        "image_id": one.number,
                        "category_id": len(names) + 1 if label == ANY else label + 1,
                        "bbox": [round(side, _DIGITS) for side in (left, top, width, height)],
                        "area": round(width * height, _DIGITS),
                        "iscrowd": int(ignored),
                    }
                )
        content = {
            "images": [
                {
                    "id": one.number,
                    "file_name": one.name,
                    "width": one.size[1],
                    "height": one.size[0],
                }
                for one in own
            ],
            "annotations": annotations,
            "categories": categories,
        }
        file = folder / f"annotations/instances_{part}.json"
        file.write_text(json.dumps(content), encoding="utf-8")


def _yolo(folder: Path, images: Sequence[_One], names: Sequence[str]) -> None:
    for one in images:
        rows = []
        height, width = one.size
        for (left, top, right, bottom), label, ignored in one.boxes:
            if not ignored:
                x, y = (left + right) / 2 / width, (top + bottom) / 2 / height
                sides = (x, y, (right - left) / width, (bottom - top) / height)
                told = " ".join(f"{round(side, _UNIT_DIGITS):.{_UNIT_DIGITS}f}" for side in sides)
                rows.append(f"{label} {told}\n")
        file = folder / f"labels/{one.part}/{one.stem}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(rows), encoding="utf-8")
    there = [part for part in PARTS if any(one.part == part for one in images)]
    about = {
        "path": ".",
        **{part: f"images/{part}" for part in there},
        "nc": len(names),
        "names": dict(enumerate(names)),
    }
    text = yaml.safe_dump(about, sort_keys=False)
    (folder / "data.yaml").write_text(text, encoding="utf-8")


def _is_thin(corners: Sequence[float]) -> bool:
    left, top, right, bottom = corners
    return min(right - left, bottom - top) < 1 - 10**-_DIGITS


def _voc_side(first: float, last: float) -> tuple[float, float]:
    """The first and the last pixel from `first` to `last`: the image's first one is 1, and the last
    one is within. Of less than a pixel both are one, which begins or ends there.
    """
    begin = max(1.0, min(first + 1, last))
    return round(begin, _DIGITS), round(max(begin, last), _DIGITS)


def _voc_corners(corners: Sequence[float]) -> str:
    (xmin, xmax), (ymin, ymax) = _voc_side(*corners[::2]), _voc_side(*corners[1::2])
    sides = {"xmin": xmin, "ymin": ymin, "xmax": xmax, "ymax": ymax}
    return "".join(f"<{side}>{value}</{side}>" for side, value in sides.items())


def _voc(folder: Path, images: Sequence[_One], names: Sequence[str]) -> None:
    (folder / "Annotations").mkdir()
    (folder / "ImageSets/Main").mkdir(parents=True)
    for one in images:
        objects = "".join(
            f"  <object>\n    <name>{escape(REGION if label == ANY else names[label])}</name>\n"
            f"    <difficult>{int(ignored)}</difficult>\n"
            f"    <bndbox>{_voc_corners(corners)}</bndbox>\n  </object>\n"
            for corners, label, ignored in one.boxes
        )
        text = (
            f"<annotation>\n  <folder>JPEGImages</folder>\n"
            f"  <filename>{escape(one.name)}</filename>\n"
            f"  <size><width>{one.size[1]}</width><height>{one.size[0]}</height>"
            f"<depth>3</depth></size>\n{objects}</annotation>\n"
        )
        (folder / f"Annotations/{one.stem}.xml").write_text(text, encoding="utf-8")
    for part in PARTS:
        stems = [one.stem for one in images if one.part == part]
        if stems:
            (folder / f"ImageSets/Main/{part}.txt").write_text(
                "".join(f"{stem}\n" for stem in stems), encoding="utf-8"
            )
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
