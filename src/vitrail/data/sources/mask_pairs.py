"""Which image of a folder has which mask.

A folder called masks, annotations, labels and the like holds masks, and so does a name such as
17_mask.png beside 17.jpg. An image and its mask are called alike once what only says which of both
it is has been taken away: `images/train/17.jpg` and `annotations/train/17.png` are, and so are
`train/img/a/17.jpg` and `train/mask/a/17_seg.png`.
"""

import posixpath
import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

from vitrail.data.sources.formats import IMAGE_EXTENSIONS
from vitrail.data.sources.parts import part_within
from vitrail.data.sources.source import PARTS, LeftOut, Tally
from vitrail.data.sources.walk import Tree
from vitrail.errors import setting

_MASKS = frozenset(
    (
        *("mask", "masks", "annotation", "annotations", "annot", "annots", "anno", "label"),
        *("labels", "seg", "segs", "segmentation", "segmentations", "gt", "gts", "groundtruth"),
        *("trimap", "trimaps", "semantic", "gtfine", "gtcoarse", "stuffthingmaps"),
        *("segmentationclass", "segmentationclassaug", "segmentationclassraw"),
        *("semseg", "labelids", "labeltrainids", "matte", "mattes"),
    )
)
_IMAGES = frozenset(
    (
        *("image", "images", "img", "imgs", "photo", "photos", "picture", "pictures", "rgb"),
        *("jpegimages", "leftimg8bit", "input", "inputs", "jpg", "jpgs", "sat"),
    )
)
_OTHERS = frozenset(
    (
        *("segmentationobject", "instance", "instances", "instanceids", "panoptic", "colormap"),
        *("colormaps", "overlay", "overlays", "visualization", "visualizations", "vis"),
    )
)
"""Words of what is drawn of an image too and is not asked for here."""
_SUFFIX = re.compile(
    r"(?:[_\-. ](?:gtfine|gtcoarse|mask|masks|seg|segs|segmentation|gt|label|labels|labelids"
    r"|labeltrainids|groundtruth|ground_truth|anno|annotation|matte|trimap|semantic))+(_?\d{1,2})?$",
    re.IGNORECASE,
)
"""At the end of a mask's name."""
_SHORT_SUFFIX = re.compile(r"_[LP]$")
"""CamVid's; without a folder for masks it would be anything."""
_IMAGE_SUFFIX = re.compile(r"[_\-. ](?:leftimg8bit|image|img|sat|rgb|photo)$", re.IGNORECASE)
_OTHER_SUFFIX = re.compile(r"_(?:color|colour|instanceids|polygons|instances)$", re.IGNORECASE)

_PART_WORDS = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}

Role = Literal["image", "mask", "other", None]
_Key = tuple[tuple[str, ...], str]
"""The folders, and the file's name, without what says that it is an image or a mask."""


class Pairs(NamedTuple):
    """Images with masks, ordered by part and path; one row each."""

    images: list[str]
    masks: list[str]
    parts: list[int]
    """Indices in PARTS."""
    left_out: tuple[LeftOut, ...]


def find_pairs(tree: Tree, *, parts: bool = True) -> Pairs:
    """Without `parts`, all are for training."""
    paths = tree.images()
    # The innermost folder says what it holds, as in segmentation_data/images; or, where that gives
    # no pair, any folder that is called like masks, as in masks/img.
    found = _Files(paths, innermost=True).pairs(parts)
    return found if found.images else _Files(paths, innermost=False).pairs(parts)


def looks_masked(name: str, *, folder: bool) -> bool:
    """Whether a folder, or a file, may be of masks, by its name alone."""
    if folder:
        return _role(name) == "mask"
    return bool(_SUFFIX.search(posixpath.splitext(name)[0]))


def _words(folder: str) -> list[str]:
    if folder.lower() in _MASKS | _IMAGES | _OTHERS:
        return [folder.lower()]
    joined = re.sub(r"(?i)ground[\W_]?truth", "groundtruth", folder)
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", joined)
    words = re.findall(r"[^\W_]+", spaced.lower())
    # CamVid's trainannot, and the like.
    glued = (re.fullmatch(r"(train|val|test)(annot|masks?|labels?|images?)", w) for w in words)
    return [
        w
        for word, two in zip(words, glued, strict=True)
        for w in (two.groups() if two else (word,))
    ]


def _role(folder: str) -> Role:
    words = set(_words(folder))
    if words & _OTHERS:
        return "other"
    if words & _MASKS:
        return "mask"
    return "image" if words & _IMAGES else None


class _Files:
    def __init__(self, paths: Iterable[str], *, innermost: bool) -> None:
        self._innermost = innermost
        self._images: dict[_Key, list[str]] = {}
        self._masks: dict[_Key, list[str]] = {}
        self._loose: list[str] = []
        """By their names masks, in no folder for masks."""
        self._left_out = Tally()
        self._known: dict[str, tuple[Role, tuple[str, ...]]] = {}
        for path in paths:
            self._add(path)

    def _add(self, path: str) -> None:
        folder, name = posixpath.split(path)
        role, around = self._folder(folder)
        stem, _ = posixpath.splitext(name)
        if role == "mask" and posixpath.splitext(stem)[1].lower() in IMAGE_EXTENSIONS:
            stem = posixpath.splitext(stem)[0]  # 17.jpg.png
        if role == "other" or (role == "mask" and _OTHER_SUFFIX.search(stem)):
            self._left_out.add("other annotations", "instances, colours: not used here", path)
        elif role == "mask":
            self._masks.setdefault((around, _SUFFIX.sub("", stem)), []).append(path)
        elif _SUFFIX.search(stem):
            self._loose.append(path)
        else:
            self._images.setdefault((around, _IMAGE_SUFFIX.sub("", stem)), []).append(path)

    def _folder(self, folder: str) -> tuple[Role, tuple[str, ...]]:
        """What files in it are, and the words around them."""
        if folder not in self._known:
            names = [name for name in folder.split("/") if name]
            roles: list[Role] = [role for name in names[::-1] if (role := _role(name))]
            role = roles[0] if roles else None
            if not self._innermost and "mask" in roles:
                role = "mask"
            kept = (
                " ".join(
                    _PART_WORDS.get(word, word)
                    for word in _words(name)
                    if word not in _MASKS | _IMAGES
                )
                for name in names
            )
            self._known[folder] = role, tuple(word for word in kept if word)
        return self._known[folder]

    def pairs(self, parts: bool) -> Pairs:
        for path in self._loose:
            self._place_loose(path)
        images = {
            key: self._one(paths, "images of one name") for key, paths in self._images.items()
        }
        found = self._matched(images)
        masked = {
            image: self._one(sorted(paths, key=_preferred), "further masks of one image")
            for image, paths in found.items()
        }
        part_of = self._parts(list(masked)) if parts else dict.fromkeys(masked, 0)
        rows = sorted((part, image) for image, part in part_of.items())
        alone = sorted(set(images.values()) - set(masked))
        self._left_out.add("images without a mask", "no mask is called like them", *alone)
        return Pairs(
            [image for _, image in rows],
            [masked[image] for _, image in rows],
            [part for part, _ in rows],
            self._left_out.told(),
        )

    def _parts(self, images: list[str]) -> dict[str, int]:
        """Of each image its part, by the folders around it.

        Where none is called like training, those that are in no part are for it; and folders such
        as `test drive` are then no parts.
        """
        found = {image: _part(image) for image in images}
        if 0 not in found.values():
            whole = {image: _part(image, whole=True) for image in images}
            return {image: 0 if part is None else part for image, part in whole.items()}
        beside = sorted(image for image, part in found.items() if part is None)
        take = f"{setting('data.parts', 'none')} takes them in, and mixes the parts"
        self._left_out.add("images beside the parts", take, *beside)
        return {image: part for image, part in found.items() if part is not None}

    def _place_loose(self, path: str) -> None:
        """17_mask.png is a mask if there is a 17, and else an image like others."""
        folder, name = posixpath.split(path)
        around, stem = self._folder(folder)[1], posixpath.splitext(name)[0]
        bare = around, _SUFFIX.sub("", stem)
        if bare in self._images:
            self._masks.setdefault(bare, []).append(path)
        else:
            self._images.setdefault((around, stem), []).append(path)

    def _matched(self, images: dict[_Key, str]) -> dict[str, list[str]]:
        """The masks of each image that has any."""
        found: dict[str, list[str]] = {}
        alone: list[tuple[_Key, list[str]]] = []
        for key, paths in self._masks.items():
            image = images.get(key) or images.get((key[0], _SHORT_SUFFIX.sub("", key[1])))
            if image is None:
                alone.append((key, paths))
            else:
                found.setdefault(image, []).extend(paths)
        stems = {stem: path for (_, stem), path in images.items()}
        if not found and len(stems) == len(images):
            # Folders of images and of masks that have nothing else in common.
            by_stem = [(stems.get(key[1]), paths) for key, paths in alone]
            if len({key[1] for key, _ in alone}) == len(alone):
                found = {image: paths for image, paths in by_stem if image is not None}
                alone = [one for one in alone if one[0][1] not in stems]
        for _, paths in alone:
            self._left_out.add("masks without an image", "no image is called like them", *paths)
        return found

    def _one(self, paths: list[str], kind: str) -> str:
        if len(paths) > 1:
            self._left_out.add(kind, "the first one is taken", *paths[1:])
        return paths[0]


def _preferred(mask: str) -> tuple[bool, int, str]:
    """Cityscapes' labelTrainIds before its labelIds; and the shortest name before 17_mask_1."""
    return "labeltrainids" not in mask.lower(), len(mask), mask


def _part(image: str, *, whole: bool = False) -> int | None:
    """An index in PARTS; None where no folder around it is called like a part.

    With `whole`, what else is in its name must say nothing: test_images, and not test_drive.
    """
    found = (part_within(name) for name in image.split("/")[:-1])
    return next((PARTS.index(one.part) for one in found if one and not (whole and one.rest)), None)
