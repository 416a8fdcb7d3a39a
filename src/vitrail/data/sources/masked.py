"""MaskedSource: images, each with a mask that says the class of every pixel.

mask_pairs.py tells which image has which mask, mask_meaning.py what its values mean, coco_masks.py
draws the outlines of a COCO file, coco_panoptic.py reads its masks of segments. All that lies there
and is not used is told.
"""

import os
import posixpath
from pathlib import Path

import numpy as np

from vitrail.data.names import PackedNames
from vitrail.data.pixels.decode import UnreadableImage
from vitrail.data.pixels.values import read_header, read_values
from vitrail.data.sources.class_map import find_class_map
from vitrail.data.sources.coco_masks import Coco, find_coco, has_outlines, has_segments, read_coco
from vitrail.data.sources.coco_panoptic import read_panoptic
from vitrail.data.sources.files import FileImages
from vitrail.data.sources.formats import IMAGE_EXTENSIONS
from vitrail.data.sources.layout import USUAL, FolderRules
from vitrail.data.sources.mask_files import MaskFiles
from vitrail.data.sources.mask_meaning import AS_THEY_SAY, MaskRules, meaning_of
from vitrail.data.sources.mask_pairs import Pairs, find_pairs, looks_masked
from vitrail.data.sources.mask_values import count_values, is_grey
from vitrail.data.sources.source import LeftOut, Tally
from vitrail.data.sources.walk import Tree, is_hidden, walk
from vitrail.data.targets.coding import IGNORE, Coding, packed
from vitrail.data.targets.masks import Masks
from vitrail.errors import DataError, UsageError, setting

_DEEP = 4
"""Levels of folders in which names are looked for."""
_LOOKED_AT = 200
"""Folders in which class maps and lists are looked for."""
_OPENED = 3
"""Masks that are opened to see whether they are any."""
_MOST_COLOURS = 64
"""Of a picture that may be a mask."""


def has_masks(folder: Path | str) -> bool:
    """Whether `folder` holds images and their masks: by its names, and a look at a few files.

    A folder of class folders is known by a look at the names of its folders alone.
    """
    root = os.path.abspath(folder)
    if not os.path.isdir(root):
        return False
    try:
        files = [Path(root, file) for file in find_coco(root)]
        if any(has_outlines(file) or has_segments(file) for file in files):
            return True
        if not _may_have_masks(root):
            return False
        pairs = find_pairs(walk(root))
    except (OSError, DataError):
        return False
    alone = sum(o.count for o in pairs.left_out if o.kind == "masks without an image")
    chosen = pairs.masks[:: max(1, len(pairs.masks) // _OPENED)][:_OPENED]
    few_alone = len(pairs.masks) > alone
    return few_alone and all(_may_be_mask(Path(root, mask)) for mask in chosen)


def _may_have_masks(root: str) -> bool:
    pending = [(root, 0)]
    while pending:
        folder, level = pending.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                if entry.is_dir():
                    if looks_masked(entry.name, folder=True):
                        return True
                    if level < _DEEP and not entry.is_symlink():
                        pending.append((entry.path, level + 1))
                elif entry.name.lower().endswith(IMAGE_EXTENSIONS) and looks_masked(
                    entry.name, folder=False
                ):
                    return True
    return False


def _may_be_mask(file: Path) -> bool:
    """Whether a picture has few enough colours to be a mask; a damaged one has no say."""
    try:
        header = read_header(file)
        if header.mode in ("1", "P") or header.mode.startswith("I"):
            return True
        values = read_values(file)
    except UnreadableImage:
        return True
    if values.ndim == 3:
        values = values[..., 0] if is_grey(values) else packed(values)
    found, count = count_values(values)
    return len(found) <= _MOST_COLOURS or sum(sorted(count)[-2:]) > 0.9 * values.size


class MaskedSource(FileImages):
    """Images of a folder that have masks, ordered by part and path.

    `targets` are their `Masks`. Raises DataError where no image has a mask, or where it is not
    certain what the values of masks mean; UsageError for rules that do not fit.
    """

    def __init__(
        self, root: Path | str, rules: FolderRules = USUAL, masks: MaskRules = AS_THEY_SAY
    ) -> None:
        self._root = os.path.abspath(root)
        if rules.parts not in ("auto", "none"):
            raise UsageError(
                f"{setting('data.parts', rules.parts)}: of images with masks it is auto or none"
            )
        named = masks.classes and masks.classes.expanduser()
        file, lists = named or _class_file(self._root), _lists(self._root)
        coco = find_coco(self._root)
        used = {*lists, *coco, *([os.path.relpath(file, self._root)] if file else ())}
        tree = walk(self._root, follow_links=rules.follow_links, used=used)
        pairs = find_pairs(tree, parts=rules.parts == "auto")
        self.notes: tuple[str, ...] = ()
        if coco:
            found = self._by_coco(coco, tree, pairs, parts=rules.parts == "auto")
            if found is not None:
                super().__init__(self._root, PackedNames(found.images))
                self.part = np.array(found.parts, np.uint8)
                self.left_out: tuple[LeftOut, ...] = (*found.left_out, *tree.left_out)
                self.notes += found.notes
                coding = Coding({k: k for k in range(len(found.names))}, ignored=(IGNORE,))
                self.targets = Masks(found.names, found.store, coding, self._size(masks))
                return
        pairs, told = _by_lists(self._root, lists, pairs, auto=rules.parts == "auto")
        self.left_out = (*told, *pairs.left_out, *tree.left_out)
        if not pairs.images:
            raise DataError(_no_masks(self._root, self.left_out))
        known, notes = meaning_of(self._root, pairs.masks, file, masks)
        self.notes += notes
        super().__init__(self._root, PackedNames(pairs.images))
        self.part = np.array(pairs.parts, np.uint8)
        coding = Coding(known.classes, ignored=known.ignored, colours=known.colours)
        files = MaskFiles(self._root, pairs.masks, colours=known.colours)
        self.targets = Masks(known.names, files, coding, self._size(masks))

    def _by_coco(self, files: list[str], tree: Tree, pairs: Pairs, *, parts: bool) -> Coco | None:
        """What COCO's files say: panoptic masks, or outlines where there are no masks at all."""
        segments = [file for file in files if has_segments(Path(self._root, file))]
        outlines = [file for file in files if file not in segments]
        if segments:
            found = read_panoptic(self._root, segments, tree, parts=parts)
            if found is None:
                said = f"the panoptic masks that {', '.join(segments)} names are not there"
                self.notes += (said,)
        else:
            found = None
        if outlines and (found or pairs.images):
            said = f"outlines in {', '.join(outlines)} are not used: there are masks"
            self.notes += (said,)
        elif outlines:
            found = read_coco(self._root, outlines, tree, parts=parts)
        return found

    def _size(self, masks: MaskRules) -> "_Sizes | None":
        return None if masks.any_size else _Sizes(self._root, self.names)


class _Sizes:
    """(height, width) of images as they are shown, by their headers."""

    def __init__(self, root: str, names: PackedNames) -> None:
        self._root = root
        self.names = names

    def __call__(self, i: int) -> tuple[int, int]:
        return read_header(Path(self._root, self.names[i])).shown


def _no_masks(root: str, left_out: tuple[LeftOut, ...]) -> str:
    told = "".join(f"; {one.sentence()}" for one in left_out)
    return (
        f"no image in {root} has a mask: masks lie as in images/17.jpg and masks/17.png, or "
        f"17.jpg and 17_mask.png{told}"
    )


_LISTS = "ImageSets/Segmentation"
_PART_OF_LIST = {"trainaug": 0, "train": 0, "val": 1, "test": 2}
"""Of the lists of Pascal VOC, and of the one that people add; the first that there is of a part."""


def _near(root: str) -> list[str]:
    """`root` and the folders in it, two levels deep, without links."""
    found = [root]
    for folder in found:
        if folder.count(os.sep) - root.count(os.sep) < 2 and len(found) < _LOOKED_AT:
            with os.scandir(folder) as entries:
                inside = [e.path for e in entries if e.is_dir(follow_symlinks=False)]
            found += sorted(path for path in inside if not is_hidden(os.path.basename(path)))
    return found


def _class_file(root: str) -> Path | None:
    return find_class_map(_near(root))


def _lists(root: str) -> list[str]:
    """Pascal VOC's lists, relative to `root`."""
    places = [place for folder in _near(root) if os.path.isdir(place := f"{folder}/{_LISTS}")]
    return [
        os.path.relpath(f"{place}/{name}", root)
        for place in places
        for name in sorted(os.listdir(place))
        if name.endswith(".txt")
    ]


def _by_lists(
    root: str, lists: list[str], pairs: Pairs, *, auto: bool
) -> tuple[Pairs, tuple[LeftOut, ...]]:
    """The pairs that the lists name, in the parts that these are for."""
    part_of: dict[str, int] = {}
    for part in range(3) if auto else ():
        names = [name for name, of in _PART_OF_LIST.items() if of == part]
        of_part = {name: [f for f in lists if f.endswith(f"/{name}.txt")] for name in names}
        for file in next((files for files in of_part.values() if files), ()):
            text = Path(root, file).read_text("utf-8", "surrogateescape")
            for stem in text.split():
                part_of.setdefault(stem, part)
    if not part_of:
        return pairs, ()
    left = Tally()
    stems = [posixpath.splitext(posixpath.basename(image))[0] for image in pairs.images]
    rows = [
        (part_of[stem], image, mask)
        for stem, image, mask in zip(stems, pairs.images, pairs.masks, strict=True)
        if stem in part_of
    ]
    absent = [im for stem, im in zip(stems, pairs.images, strict=True) if stem not in part_of]
    left.add("images that no list names", f"{_LISTS}/train.txt and val.txt say which", *absent)
    rows.sort()
    return Pairs(
        [image for _, image, _ in rows],
        [mask for _, _, mask in rows],
        [part for part, _, _ in rows],
        pairs.left_out,
    ), left.told()
