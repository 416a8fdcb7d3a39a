"""COCO's panoptic masks: the colour of a pixel is the number of its segment, and the JSON file says
which class that has.

Categories are the classes 0.., by rising id, and what is void does not count. A segment's number is
red + 256 green + 65,536 blue (panopticapi); a crowd is of its class.
"""

import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from vitrail.data.names import printable
from vitrail.data.pixels.decode import UnreadableImage
from vitrail.data.pixels.values import Values, read_values
from vitrail.data.sources.coco_masks import Coco, CocoJson, Misdrawn, named_images
from vitrail.data.sources.parts import part_within
from vitrail.data.sources.source import Tally, file_stamp
from vitrail.data.sources.walk import Tree
from vitrail.data.targets.coding import IGNORE

_ByName: TypeAlias = Mapping[str, list[str]]
"""The paths that end in a name."""
_WORDS = ("panoptic", "segment", "mask")
"""In the names of folders of masks."""
_VOID = 0
_NOT_NAMED = -2
"""Of a pixel whose number is no segment's."""


class Painted(NamedTuple):
    """A panoptic mask."""

    file: str
    """Relative to the folder of the data."""
    segments: tuple[tuple[int, int], ...]
    """A segment's number, and its class index."""


class PanopticMasks:
    """Masks of class indices, IGNORE where they are void; `painted` lie in the folder `root`."""

    def __init__(self, root: str, painted: Sequence[Painted]) -> None:
        self._root = root
        self._painted = painted

    def __len__(self) -> int:
        return len(self._painted)

    def classes(self, i: int) -> set[int]:
        """Those that mask `i` shows, by the JSON file."""
        return {index for _, index in self._painted[i].segments}

    def values(self, i: int) -> Values:
        file, segments = self._painted[i]
        colours = read_values(Path(self._root, file), colours=True)
        if colours.ndim != 3:
            raise UnreadableImage("a panoptic mask has colours, and it is grey", self.name(i))
        red, green, blue = (colours[..., c].astype(np.int32) for c in range(3))
        numbers = red + 256 * green + 65_536 * blue
        found = np.where(numbers == _VOID, np.int32(IGNORE), np.int32(_NOT_NAMED))
        if segments:
            known, classes = np.array(sorted(segments), np.int32).T
            at = np.searchsorted(known, numbers).clip(max=len(known) - 1)
            found = np.where(known[at] == numbers, classes[at], found)
        return found

    def stamp(self, i: int) -> str:
        file, segments = self._painted[i]
        return f"{file_stamp(Path(self._root, file))} {segments}"

    def name(self, i: int) -> str:
        return printable(self._painted[i].file)


def read_panoptic(root: str, files: Sequence[str], tree: Tree, *, parts: bool) -> Coco | None:
    """All images of which the JSON `files` name a mask that is there; None where none is.

    Raises as `read_coco` does.
    """
    problems = Tally()
    loaded = [CocoJson(root, file, first=0) for file in files]
    by_name: dict[str, list[str]] = {}
    for image in tree.images():
        by_name.setdefault(posixpath.basename(image), []).append(image)
    painted = [_painted(one, by_name, problems) for one in loaded]
    masks = {mask.file for of_file in painted for _, mask in of_file}
    if not masks:
        return None
    images = [image for image in tree.images() if image not in masks]
    names, rows, left = named_images(root, loaded, painted, images, problems, parts=parts)
    store = PanopticMasks(root, [mask for _, _, mask in rows])
    note = f"masks are panoptic: segments, whose classes {', '.join(files)} says"
    paths, numbers = [path for path, _, _ in rows], [part for _, part, _ in rows]
    return Coco(paths, numbers, names, store, left, (note,))


def _painted(loaded: CocoJson, by_name: _ByName, problems: Tally) -> list[tuple[str, Painted]]:
    """Of each image its file's name and its mask, where that is there."""
    rows = []
    for number, one in enumerate(loaded.annotations):
        try:
            key, _ = loaded.known(one, category=False)
            image, segments, mask = _segments(loaded, one, loaded.images[key])
        except Misdrawn as error:
            problems.add("masks", str(error), f"annotation {number} of {loaded.file}")
            continue
        places = _masks_at(mask, image, loaded, by_name)
        if len(places) == 1:
            rows.append((image, Painted(places[0], segments)))
        else:
            what = f"may be one of {len(places)}" if places else "is not there"
            problems.add("masks", f"a mask that {loaded.file} names {what}", mask)
    return rows


def _segments(
    loaded: CocoJson, one: Mapping[str, Any], image: Mapping[str, Any]
) -> tuple[str, tuple[tuple[int, int], ...], str]:
    """The image's name; number and class index of each segment; the mask's name."""
    try:
        segments = tuple(
            (int(each["id"]), loaded.index[each["category_id"]]) for each in one["segments_info"]
        )
        names = str(image["file_name"]), str(one["file_name"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise Misdrawn(
            "a mask needs a file_name, and segments with an id and a category that the file lists"
        ) from error
    if any(not 0 < segment < 1 << 24 for segment, _ in segments):
        raise Misdrawn("a segment's number is none of a colour")
    return names[0], segments, names[1]


def _masks_at(name: str, image: str, loaded: CocoJson, by_name: _ByName) -> list[str]:
    """Where a mask may lie: in a folder that is called as the JSON file and speaks of segments, as
    COCO has it, or else one that does one of both; never in one of another part, and nowhere else
    if the image has its name.
    """
    ends = posixpath.normpath(name.replace("\\", "/"))
    own = posixpath.splitext(posixpath.basename(loaded.file))[0]
    ranked: dict[int, list[str]] = {}
    for path in by_name.get(posixpath.basename(ends), []):
        folders = path.split("/")[:-1]
        parts = {part.part for folder in folders if (part := part_within(folder))}
        if parts and loaded.part is not None and loaded.part not in parts:
            continue
        speaks = any(word in folder.lower() for folder in folders for word in _WORDS)
        rank = 2 * speaks + (own in folders)
        ranked.setdefault(rank, []).append(path)
    best = max(ranked, default=0)
    if not best and posixpath.basename(image) == posixpath.basename(ends):
        return []
    found = ranked.get(best, [])
    return [path for path in found if f"/{path}".endswith(f"/{ends}")] or found
