"""What is wrong with the masks of a data set, found before hours are spent on it."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from vitrail.data.pixels.decode import UnreadableImage
from vitrail.data.pixels.values import read_header
from vitrail.data.sources.coco_masks import CocoMasks, outside
from vitrail.data.sources.files import FileImages
from vitrail.data.sources.mask_files import MaskFiles
from vitrail.data.sources.mask_values import is_grey
from vitrail.data.sources.source import PartedSource
from vitrail.data.targets.coding import IGNORE, value_text
from vitrail.data.targets.masks import Masks, size_complaint
from vitrail.errors import setting

_BLOCK = 32  # masks a thread: what is under way bounds the memory that is taken
_SHOWN = 5
"""Unknown values that are named."""
_MOST_COUNTED = 100_000
"""Different unknown values that are counted."""
_MANY = 16
"""More unknown values between two known ones were hardly drawn."""
_LOSSY = ("JPEG", "MPO")
_TRAIN = 0
_EIGHT_BITS = 256


@dataclass(frozen=True)
class Finding:
    """One kind of fault."""

    name: str
    """What has it, in the plural, the same in every run: "unreadable masks"."""
    count: int
    """How many."""
    sentence: str
    """What becomes of them, and what to do."""
    examples: tuple[str, ...] = ()
    """The names of all of them."""


class ClassShare(NamedTuple):
    """How much of the masks one class has."""

    name: str
    pixels: int
    share: float
    """Of all pixels of masks that can be read."""
    images: int
    """That show it."""
    images_without: int


@dataclass(frozen=True)
class MaskReport:
    """What `check_masks` found: faults, the worst first, and what the masks hold."""

    findings: tuple[Finding, ...]
    classes: tuple[ClassShare, ...]
    """By index."""
    unusable: int
    """Masks that cannot be read, or are of another size: their images are left out."""
    ignored: float
    """The share of pixels that do not count, but for unknown ones."""
    unknown: float
    """The share of pixels whose values are no class and are not known to be ignored."""


def _masks(source: PartedSource) -> Masks:
    assert isinstance(source.targets, Masks)
    return source.targets


class _Look(NamedTuple):
    """What was seen of one mask."""

    pixels: int
    ignored: int
    """Of them."""
    unknown: dict[int, int]
    """Pixels by value."""
    shown: Int64[np.ndarray, " c"]
    """Pixels of each class."""
    three_greys: bool
    lossy: bool
    turned: bool
    """Whether its image is, by EXIF, in a way that its size does not show."""
    eight_bits: bool


def check_masks(
    source: PartedSource, threads: int = 1, on_done: Callable[[int], None] | None = None
) -> MaskReport:
    """Read every mask of `source` in `threads` threads.

    `on_done` is called with the number of masks done, after each.
    """
    found, n = _Found(source), len(source)
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, n, _BLOCK * threads):
            block = range(start, min(start + _BLOCK * threads, n))
            for i, look in zip(block, pool.map(lambda i: _look(source, i), block), strict=True):
                found.add(i, look)
                if on_done:
                    on_done(i + 1)
    return found.report()


def _is_turned(source: PartedSource, i: int, mask: tuple[int, ...]) -> bool:
    """Whether EXIF turns image `i` so that a mask of this size may lie either way."""
    if not isinstance(source, FileImages):
        return False
    header = read_header(source.encoded(i))
    return header.turned and size_complaint(mask, header.size) == ""


def _look(source: PartedSource, i: int) -> _Look | str | None:
    """What mask `i` holds, or why it cannot be used; None where its image is what is damaged."""
    masks = _masks(source)
    if isinstance(source, FileImages):
        try:
            read_header(source.encoded(i))
        except UnreadableImage:  # as `check` says
            return None
    try:
        values = masks.values(i)
        header, turned = None, _is_turned(source, i, values.shape)
        if isinstance(masks.store, MaskFiles):
            header = read_header(masks.store.file(masks.at(i)))
    except UnreadableImage as error:
        return error.reason
    index = masks.coding.indices(values)
    shown = np.bincount(index[index != IGNORE], minlength=len(masks.names))
    ignored = int((index == IGNORE).sum())
    return _Look(
        pixels=index.size,
        ignored=ignored,
        unknown=masks.coding.unknown(values) if ignored else {},
        shown=shown,
        three_greys=not masks.coding.colours and values.ndim == 3 and is_grey(values),
        lossy=header is not None and header.format in _LOSSY,
        turned=turned,
        eight_bits=values.dtype == np.uint8 and values.ndim == 2,
    )


class _Found:
    def __init__(self, source: PartedSource) -> None:
        self._source = source
        self._masks = _masks(source)
        self._n: Counter[str] = Counter()
        self._names: dict[str, list[str]] = {}
        self._read = 0
        self._unknown: Counter[int] = Counter()
        self._pixels = self._ignored = 0
        self._shown = np.zeros(len(self._masks.names), np.int64)
        self._of_part = np.zeros((2, len(self._masks.names)), np.int64)
        """Masks that show each class: in training, and elsewhere."""
        self._eight_bits = False

    def add(self, i: int, look: _Look | str | None) -> None:
        if look is None:
            return
        if isinstance(look, str):
            wrong_size = look.startswith("the mask is ")
            kind = "masks of another size" if wrong_size else "unreadable masks"
            self._count(kind, i, why=f": {look}")
            return
        self._read += 1
        self._pixels += look.pixels
        self._ignored += look.ignored
        self._shown += look.shown
        self._of_part[int(self._source.part[i] != _TRAIN)] += look.shown > 0
        self._eight_bits |= look.eight_bits
        for name, holds in (
            ("masks with unknown values", bool(look.unknown)),
            ("JPEG masks", look.lossy),
            ("masks of grey in three channels", look.three_greys),
            ("masks of turned images", look.turned),
            ("masks without a pixel that counts", look.ignored == look.pixels),
        ):
            if holds:
                self._count(name, i)
        for value, count in look.unknown.items():
            if value in self._unknown or len(self._unknown) < _MOST_COUNTED:
                self._unknown[value] += count
        if isinstance(self._masks.store, CocoMasks):
            drawing = self._masks.store.drawing(self._masks.at(i))
            beyond = sum(outside(outline, drawing.size) for outline in drawing.outlines)
            if beyond:
                self._count("outlines beyond the image", i, beyond)

    def _count(self, name: str, i: int, times: int = 1, why: str = "") -> None:
        self._n[name] += times
        self._names.setdefault(name, []).append(f"{self._masks.text(i)}{why}")

    def report(self) -> MaskReport:
        unknown = sum(self._unknown.values())
        pixels = max(1, self._pixels)
        images = self._of_part.sum(axis=0).tolist()
        return MaskReport(
            findings=tuple(self._told()),
            classes=tuple(
                ClassShare(name, shown, shown / pixels, having, self._read - having)
                for name, shown, having in zip(
                    self._masks.names, self._shown.tolist(), images, strict=True
                )
            ),
            unusable=len(self._source) - self._read,
            ignored=(self._ignored - unknown) / pixels,
            unknown=unknown / pixels,
        )

    def _told(self) -> list[Finding]:
        any_size = setting("data.masks.any_size", True)
        sentences = {
            "unreadable masks": "their images are left out",
            "masks of another size": (
                "their images are left out; where masks show the whole image all the same: "
                f"{any_size}"
            ),
            "masks with unknown values": self._unknown_sentence(),
            "JPEG masks": "they hold values that nobody drew: save as PNG",
            "masks without a pixel that counts": "nothing is learned from them",
            "masks of turned images": (
                "EXIF turns these images so that their size does not show how a mask lies: it is "
                "taken to lie on the image as it is shown; if it does not, save both upright"
            ),
            "outlines beyond the image": (
                "they are cut there: are they of another image, or of this one before it was "
                "scaled?"
            ),
            "masks of grey in three channels": "read as grey",
        }
        faults = [
            Finding(name, self._n[name], sentence, tuple(self._names[name]))
            for name, sentence in sentences.items()
            if self._n[name]
        ]
        return [*faults, *self._of_classes()]

    def _unknown_sentence(self) -> str:
        if not self._unknown:
            return ""
        coding = self._masks.coding
        total = sum(self._unknown.values())
        shown = []
        for value, count in self._unknown.most_common(_SHOWN):
            share = f"{count / self._pixels:.2%}"
            near = coding.nearest(value)
            text = value_text(value, colours=coding.colours)
            shown.append(f"{'unequal channels' if value == -1 else text} ({share}; nearest {near})")
        more = len(self._unknown) - len(shown)
        text = (
            f"{total / self._pixels:.2%} of all pixels are ignored for them; values: "
            f"{len(self._unknown):,}: {', '.join(shown)}{f' and {more:,} more' if more else ''}"
        )
        if len(self._unknown) > _MANY:
            text += (
                "; so many values come of masks that were smoothed (resized other than by nearest "
                "neighbour, or saved as JPEG)"
            )
        return text

    def _of_classes(self) -> list[Finding]:
        names = self._masks.names
        train, other = self._of_part
        found = []
        if self._eight_bits and len(names) > _EIGHT_BITS:
            found.append(
                Finding(
                    "classes in masks of 8 bits",
                    len(names),
                    "masks of 8 bits hold 256 values: those from 256 on have become "
                    "others when they were saved; save them anew, as PNG of 16 bits",
                )
            )
        for name, which, sentence in (
            (
                "classes only in held-out masks",
                (train == 0) & (other > 0),
                "in no mask to train with: they cannot be learned, and count 0",
            ),
            (
                "classes never seen",
                (train == 0) & (other == 0),
                "in no mask at all: are names and values the right ones?",
            ),
        ):
            kept: Int64[np.ndarray, " k"] = np.flatnonzero(which)
            if len(kept):
                called = tuple(names[k] for k in kept)
                found.append(Finding(name, len(kept), sentence, called))
        return found
