"""MaskedSource: images, each with a mask that says the class of every pixel.

mask_pairs.py tells which image has which mask, class_map.py and mask_values.py what values mean,
coco_masks.py draws the outlines of a COCO file. All that lies there and is not used is told.
"""

import os
import posixpath
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vitrail.data.names import PackedNames, printable
from vitrail.data.pixels.decode import UnreadableImage, read_image
from vitrail.data.pixels.values import read_header, read_values
from vitrail.data.sources.class_map import ClassMap, find_class_map, read_class_map
from vitrail.data.sources.coco_masks import find_coco, has_outlines, read_coco
from vitrail.data.sources.formats import IMAGE_EXTENSIONS
from vitrail.data.sources.known_masks import ADE20K, CITYSCAPES_IDS, CITYSCAPES_TRAIN_IDS, VOC
from vitrail.data.sources.layout import USUAL, FolderRules
from vitrail.data.sources.mask_files import MaskFiles
from vitrail.data.sources.mask_pairs import Pairs, find_pairs, looks_masked
from vitrail.data.sources.mask_values import count_values, is_grey, meaning, present
from vitrail.data.sources.source import LeftOut, Tally, file_stamp
from vitrail.data.sources.walk import is_hidden, walk
from vitrail.data.targets.coding import Coding, packed
from vitrail.data.targets.masks import Masks
from vitrail.errors import DataError, UsageError, setting

_DEEP = 4
"""Levels of folders in which names are looked for."""
_LOOKED_AT = 200
"""Folders in which class maps and lists are looked for."""
_OPENED = 3
"""Masks that are opened to see whether they are any."""
_BORDER = 255
"""The value that by custom does not count."""
_MOST_COLOURS = 64
"""Of a picture that may be a mask."""


@dataclass(frozen=True)
class MaskRules:
    """How masks are understood, where that is not as they say themselves."""

    classes: Path | None = None
    """A file that names the classes, and their values or colours."""
    ignore: tuple[int, ...] | None = None
    """Values that do not count; instead of 255."""
    reduce_zero: bool | None = None
    """Whether value 0 is no class, and 1 is the first; ADE20K's masks are so."""
    any_size: bool = False
    """Take masks of another size than their image, of which they show the whole."""


AS_THEY_SAY = MaskRules()


def has_masks(folder: Path | str) -> bool:
    """Whether `folder` holds images and their masks: by its names, and a look at a few files.

    A folder of class folders is known by a look at the names of its folders alone.
    """
    root = os.path.abspath(folder)
    if not os.path.isdir(root):
        return False
    try:
        if any(has_outlines(Path(root, file)) for file in find_coco(root)):
            return True
        if not _may_have_masks(root):
            return False
        pairs = find_pairs(walk(root))
    except (OSError, DataError):
        return False
    alone = sum(o.count for o in pairs.left_out if o.kind == "masks without an image")
    chosen = pairs.masks[:: max(1, len(pairs.masks) // _OPENED)][:_OPENED]
    few_alone = len(pairs.masks) > alone
    return few_alone and all(_is_mask(Path(root, mask)) for mask in chosen)


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


def _is_mask(file: Path) -> bool:
    """Whether a picture has few enough colours to be a mask."""
    try:
        header = read_header(file)
        if header.mode in ("1", "P") or header.mode.startswith("I"):
            return True
        values = read_values(file)
    except UnreadableImage:
        return False
    if values.ndim == 3:
        values = values[..., 0] if is_grey(values) else packed(values)
    found, count = count_values(values)
    return len(found) <= _MOST_COLOURS or sum(sorted(count)[-2:]) > 0.9 * values.size


class MaskedSource:
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
        file, lists = masks.classes or _class_file(self._root), _lists(self._root)
        coco = find_coco(self._root)
        used = {*lists, *coco, *([os.path.relpath(file, self._root)] if file else ())}
        tree = walk(self._root, follow_links=rules.follow_links, used=used)
        pairs = find_pairs(tree, parts=rules.parts == "auto")
        self.notes: tuple[str, ...] = ()
        if coco and not pairs.images:
            found = read_coco(self._root, coco, tree, parts=rules.parts == "auto")
            self._names = PackedNames(found.images)
            self.part = np.array(found.parts, np.uint8)
            self.left_out: tuple[LeftOut, ...] = (*found.left_out, *tree.left_out)
            self.notes = found.notes
            coding = Coding({k: k for k in range(len(found.names))})
            self.targets = Masks(found.names, found.store, coding, self._size(masks))
            return
        pairs, told = _by_lists(self._root, lists, pairs, auto=rules.parts == "auto")
        self.left_out = (*told, *pairs.left_out, *tree.left_out)
        if not pairs.images:
            raise DataError(_no_masks(self._root, self.left_out))
        known, notes = _meaning(self._root, pairs, file, masks)
        self.notes = notes
        self._names = PackedNames(pairs.images)
        self.part = np.array(pairs.parts, np.uint8)
        coding = Coding(known.classes, ignored=known.ignored, colours=known.colours)
        files = MaskFiles(self._root, pairs.masks, colours=known.colours)
        self.targets = Masks(known.names, files, coding, self._size(masks))

    def _size(self, masks: MaskRules) -> "_Sizes | None":
        return None if masks.any_size else _Sizes(self._root, self._names)

    def __len__(self) -> int:
        return len(self._names)

    def key(self, i: int) -> str:
        return printable(self._names[i])

    def load(self, i: int) -> Image.Image:
        return read_image(self.encoded(i))

    def encoded(self, i: int) -> Path:
        """Where image `i` lies."""
        return Path(self._root, self._names[i])

    def stamp(self, i: int) -> str:
        return file_stamp(self.encoded(i))


class _Sizes:
    """(height, width) of images as they are shown, by their headers."""

    def __init__(self, root: str, names: PackedNames) -> None:
        self._root = root
        self._names = names

    def __call__(self, i: int) -> tuple[int, int]:
        return read_header(Path(self._root, self._names[i])).shown


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


def _meaning(
    root: str, pairs: Pairs, file: Path | None, rules: MaskRules
) -> tuple[ClassMap, tuple[str, ...]]:
    """What the values of masks mean, by the first of: what the user says, a file that lies there,
    the data set that it is, the values themselves.
    """
    notes: tuple[str, ...] = ()
    found: ClassMap | None = None
    if file is not None:
        try:
            found = read_class_map(file)
        except DataError as error:
            if rules.classes:
                raise
            notes = (f"passed over: {error}",)
        else:
            notes = (f"classes are those of {printable(os.path.relpath(file, root))}",)
    known = _known(root, pairs)
    if known is not None and known[1] is ADE20K and rules.reduce_zero is False:
        known = None
    if found is None and known is not None:
        name, found = known
        notes += (f"masks are understood as {name}'s",)
    if found is None:
        found, more = _by_values(root, pairs, rules)
        notes += more
    elif file is not None and known is None and not found.colours:
        found = _checked(root, pairs, found, file, rules)
    if rules.reduce_zero:
        found = _reduced(found)
    if rules.ignore is not None:
        return _without(found, rules.ignore), notes
    if not found.colours and _BORDER not in found.classes:
        found = found._replace(ignored=tuple({*found.ignored, _BORDER}))
    return found, notes


def _without(found: ClassMap, ignored: tuple[int, ...]) -> ClassMap:
    """Without the classes that all values of are ignored."""
    classes = {value: index for value, index in found.classes.items() if value not in ignored}
    kept = sorted(set(classes.values()))
    return ClassMap(
        tuple(found.names[k] for k in kept),
        {value: kept.index(index) for value, index in classes.items()},
        found.colours,
        ignored,
    )


def _known(root: str, pairs: Pairs) -> tuple[str, ClassMap] | None:
    first = pairs.masks[0]
    if first.lower().endswith(("_labeltrainids.png", "_labelids.png")):
        kinds = {"labeltrainids" in mask.lower() for mask in pairs.masks}
        if len(kinds) > 1:
            raise DataError(
                "some masks are labelIds and some labelTrainIds, whose numbers mean other "
                "classes: make all of one kind"
            )
        return "Cityscapes", CITYSCAPES_TRAIN_IDS if kinds.pop() else CITYSCAPES_IDS
    if "segmentationclass" in posixpath.dirname(first).lower():
        return "Pascal VOC", VOC
    if "ADEChallengeData" in root or posixpath.basename(first).startswith("ADE_"):
        return "ADE20K", ADE20K
    return None


def _by_values(root: str, pairs: Pairs, rules: MaskRules) -> tuple[ClassMap, tuple[str, ...]]:
    files = MaskFiles(root, pairs.masks)
    found, notes = meaning(present(files), rules.ignore, lambda: files.file(0))
    return found, notes


def _checked(root: str, pairs: Pairs, found: ClassMap, file: Path, rules: MaskRules) -> ClassMap:
    """Names alone, held against the values that are there: is the first name value 0's or 1's?"""
    values = present(MaskFiles(root, pairs.masks))
    if values.colours or found.colours:
        return found
    listed, there = set(found.classes), set(values.pixels)
    c = len(found.names)
    if there == {0, 255} and listed == {0, 1}:
        return found._replace(classes={0: found.classes[0], 255: found.classes[1]})
    one_more = listed == set(range(c)) and c in there and 0 in there
    if one_more and rules.reduce_zero is None:
        raise DataError(
            f"{printable(str(file))} names {c} classes, but the masks hold the values 0 to {c}: "
            f"if 0 has no class, {setting('data.reduce_zero', True)}; if it is the background, "
            "name it first"
        )
    return found


def _reduced(found: ClassMap) -> ClassMap:
    """Of the same names, the first of which is of value 1."""
    if 0 not in found.classes:
        return found._replace(ignored=(*found.ignored, 0))
    if found.colours:
        raise UsageError(f"{setting('data.reduce_zero', True)} is for values, these are colours")
    if found.names[:1] == ("0",):  # by the values themselves: 0's own name goes
        classes = {v: k - 1 for v, k in found.classes.items() if v}
        return found._replace(names=found.names[1:], classes=classes, ignored=(*found.ignored, 0))
    classes = {value + 1: index for value, index in found.classes.items()}
    return found._replace(classes=classes, ignored=(*found.ignored, 0))
