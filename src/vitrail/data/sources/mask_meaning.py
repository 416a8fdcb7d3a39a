"""What the values in the masks of a folder mean: which are classes, and what does not count."""

import os
import posixpath
from dataclasses import dataclass
from pathlib import Path

from vitrail.data.names import printable, shortened
from vitrail.data.sources.class_map import ClassMap, read_class_map
from vitrail.data.sources.known_masks import ADE20K, CITYSCAPES_IDS, CITYSCAPES_TRAIN_IDS, VOC
from vitrail.data.sources.mask_files import MaskFiles
from vitrail.data.sources.mask_values import Meaning, meaning, present, refuse_lossy, two_values
from vitrail.data.targets.coding import value_text
from vitrail.errors import DataError, UsageError, setting

_BORDER = 255
"""The value that by custom does not count."""
_LOSSY = (".jpg", ".jpeg")


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


def meaning_of(root: str, masks: list[str], file: Path | None, rules: MaskRules) -> Meaning:
    """What the values in the files `masks` of the folder `root` mean, by the first of: the class
    map `file`, the data set that they are of, the values themselves.

    Raises `DataError` where it is not certain, `UsageError` for rules that do not fit.
    """
    notes: tuple[str, ...] = ()
    named: ClassMap | None = None
    if file is not None:
        if rules.classes and not file.is_file():
            raise DataError(
                f"no such file: {printable(str(file))} ({setting('data.masks.classes')} names it)"
            )
        try:
            named = read_class_map(file)
        except DataError as error:
            if rules.classes:
                raise
            notes = (f"passed over: {error}",)
        else:
            notes = (f"classes are those of {_called(root, file)}",)
    known = _known(root, masks)
    if known is not None and known[1] is ADE20K and rules.reduce_zero is False:
        known = None
    if named is not None and any("stuffthingmaps" in mask for mask in masks[:1]):
        named = _of_stuff(named)
    if known is not None and (named is None or _are_names(named, known[1])):
        lossy = [mask for mask in masks if mask.lower().endswith(_LOSSY)]
        refuse_lossy(lossy[:3], len(lossy), len(masks))
        names = known[1].names if named is None else named.names
        found, more = Meaning(
            known[1]._replace(names=names), (f"masks are understood as {known[0]}'s",)
        )
    elif named is None or file is None:
        files = MaskFiles(root, masks)
        if (there := present(files)).colours and there.palette:  # whose numbers are colours, too
            there = present(MaskFiles(root, masks, colours=True))
        found, more = meaning(there, rules.ignore, lambda: files.file(0))
    else:
        found, more = _held_against(root, masks, named, file, rules)
    notes += more
    if rules.reduce_zero:
        found = _reduced(found)
    if rules.ignore is not None:
        return Meaning(_without(found, rules.ignore), notes)
    if not found.colours and _BORDER not in found.classes:
        found = found._replace(ignored=tuple({*found.ignored, _BORDER}))
    return Meaning(found, notes)


def _called(root: str, file: Path) -> str:
    """A class map as a user knows it: within the data by where it lies there."""
    path = os.path.relpath(file, root)
    return printable(str(file) if path.startswith(os.pardir) else path)


def _are_names(named: ClassMap, known: ClassMap) -> bool:
    """Whether a file gives nothing but the names of the classes that are known."""
    c = len(named.names)
    return c == len(known.names) and set(named.classes) == set(range(c)) and not named.colours


def _of_stuff(named: ClassMap) -> ClassMap:
    """COCO-Stuff's ids are one more than the values in its maps, where 255 is unlabelled."""
    if 0 in named.classes or named.colours:
        return named
    return named._replace(
        classes={value - 1: index for value, index in named.classes.items()}, ignored=(_BORDER,)
    )


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


def _known(root: str, masks: list[str]) -> tuple[str, ClassMap] | None:
    first = masks[0]
    if first.lower().endswith(("_labeltrainids.png", "_labelids.png")):
        kinds = {"labeltrainids" in mask.lower() for mask in masks}
        if len(kinds) > 1:
            raise DataError(
                "some masks are labelIds and some labelTrainIds, whose numbers mean other "
                "classes: make all of one kind"
            )
        return "Cityscapes", CITYSCAPES_TRAIN_IDS if kinds.pop() else CITYSCAPES_IDS
    if "segmentationclass" in posixpath.dirname(first).lower():
        return "Pascal VOC", VOC
    if "ADEChallengeData" in f"{root}/{first}" or posixpath.basename(first).startswith("ADE_"):
        return "ADE20K", ADE20K
    return None


def _held_against(
    root: str, masks: list[str], found: ClassMap, file: Path, rules: MaskRules
) -> Meaning:
    """What a file says, held against the values that are there."""
    values = present(MaskFiles(root, masks, colours=found.colours))
    listed, there = set(found.classes), {*map(values.number(found.colours), values.pixels)}
    c = len(found.names)
    if not found.colours and not values.colours and listed == {0, 1} and two_values(values):
        classes = {0: found.classes[0], 255: found.classes[1]}
        return Meaning(
            found._replace(classes=classes), ("masks hold 0 and 255: these are 0 and 1",)
        )
    refuse_lossy(values.lossy_names, values.lossy, values.masks)
    if values.coloured == values.masks > 0 and not found.colours:
        shown = shortened(value_text(value, colours=True) for value in sorted(values.pixels))
        raise DataError(
            f"{printable(str(file))} gives the classes values, but the masks hold colours "
            f'({shown}): give each class its colour, as in {{"sky": [0, 0, 255]}}'
        )
    one_more = listed == set(range(c)) and {0, c} <= there and not found.colours
    if one_more and rules.reduce_zero is None:
        raise DataError(
            f"{printable(str(file))} names {c} classes, but the masks hold the values 0 to {c}: "
            f"if 0 has no class, {setting('data.masks.reduce_zero', True)}; if it is the "
            "background, name it first"
        )
    return Meaning(found)


def _reduced(found: ClassMap) -> ClassMap:
    """Of the same names, the first of which is of value 1."""
    if 0 not in found.classes:
        return found._replace(ignored=(*found.ignored, 0))
    if found.colours:
        raise UsageError(
            f"{setting('data.masks.reduce_zero', True)} is for values, these are colours"
        )
    if found.names[:1] == ("0",):  # by the values themselves: 0's own name goes
        classes = {v: k - 1 for v, k in found.classes.items() if v}
        return found._replace(names=found.names[1:], classes=classes, ignored=(*found.ignored, 0))
    classes = {value + 1: index for value, index in found.classes.items()}
    return found._replace(classes=classes, ignored=(*found.ignored, 0))
