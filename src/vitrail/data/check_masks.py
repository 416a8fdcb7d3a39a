"""What is wrong with the masks of a data set, found before hours are spent on it."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from vitrail.data.names import shortened
from vitrail.data.pixels.decode import UnreadableImage
from vitrail.data.pixels.values import read_header
from vitrail.data.sources.coco_masks import CocoMasks, outside
from vitrail.data.sources.mask_files import MaskFiles
from vitrail.data.sources.mask_values import is_grey
from vitrail.data.sources.source import PartedSource
from vitrail.data.targets.coding import IGNORE, Coding, value_text
from vitrail.data.targets.masks import Masks

_BLOCK = 32  # masks a thread: what is under way bounds the memory that is taken
_EXAMPLES = 5
_SHOWN = 5
"""Unknown values that are named."""
_MOST_COUNTED = 100_000
"""Different unknown values that are counted."""
_MANY = 16
"""More unknown values between two known ones were hardly drawn."""
_LOSSY = ("JPEG", "MPO")
_TRAIN = 0
_EIGHT_BITS = 255


@dataclass(frozen=True)
class Finding:
    """One kind of fault."""

    name: str
    """In short, the same in every run: "unknown values"."""
    count: int
    """Masks, classes or outlines that have it."""
    sentence: str
    """What it is, and what to do."""
    examples: tuple[str, ...] = ()
    """Names of the first few."""


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
    has: Bool[np.ndarray, " c"]
    """The classes that it shows."""
    three_greys: bool
    lossy: bool
    eight_bits: bool


def check_masks(
    source: PartedSource, threads: int = 1, on_done: Callable[[int], None] | None = None
) -> list[Finding]:
    """Read every mask of `source` in `threads` threads; what is worth a word, the worst first.

    `on_done` is called with the number of masks done, after each.
    """
    masks, n = _masks(source), len(source)
    found = _Found(source)
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, n, _BLOCK * threads):
            block = range(start, min(start + _BLOCK * threads, n))
            for i, look in zip(block, pool.map(lambda i: _look(masks, i), block), strict=True):
                found.add(i, look)
                if on_done:
                    on_done(i + 1)
    return found.told()


def _look(masks: Masks, i: int) -> _Look | str:
    """What mask `i` holds, or why it cannot be used."""
    try:
        values = masks.values(i)
        header = None
        if isinstance(masks.store, MaskFiles):
            header = read_header(masks.store.file(masks.at(i)))
    except UnreadableImage as error:
        return error.reason
    index = masks.coding.indices(values)
    has = np.bincount(index[index != IGNORE], minlength=len(masks.names)) > 0
    ignored = int((index == IGNORE).sum())
    return _Look(
        pixels=index.size,
        ignored=ignored,
        unknown=masks.coding.unknown(values) if ignored else {},
        has=has,
        three_greys=not masks.coding.colours and values.ndim == 3 and is_grey(values),
        lossy=header is not None and header.format in _LOSSY,
        eight_bits=values.dtype == np.uint8 and values.ndim == 2,
    )


class _Found:
    def __init__(self, source: PartedSource) -> None:
        self._source = source
        self._masks = _masks(source)
        self._n: Counter[str] = Counter()
        self._names: dict[str, list[str]] = {}
        self._reasons: Counter[str] = Counter()
        self._unknown: Counter[int] = Counter()
        self._pixels = 0
        self._of_part = np.zeros((2, len(self._masks.names)), np.int64)
        """Masks that show each class: in training, and elsewhere."""
        self._eight_bits = False

    def add(self, i: int, look: _Look | str) -> None:
        if isinstance(look, str):
            wrong_size = look.startswith("the mask is ")
            self._count("another size" if wrong_size else "unreadable masks", i)
            self._reasons[look] += 1
            return
        self._pixels += look.pixels
        self._of_part[int(self._source.part[i] != _TRAIN)] += look.has
        self._eight_bits |= look.eight_bits
        for name, holds in (
            ("unknown values", bool(look.unknown)),
            ("JPEG masks", look.lossy),
            ("grey in three channels", look.three_greys),
            ("nothing but ignored", look.ignored == look.pixels),
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

    def _count(self, name: str, i: int, times: int = 1) -> None:
        self._n[name] += times
        examples = self._names.setdefault(name, [])
        if len(examples) < _EXAMPLES:
            examples.append(self._masks.text(i))

    def told(self) -> list[Finding]:
        sentences = {
            "unreadable masks": f"masks that cannot be read: {self._reason('the mask is ', False)}",
            "another size": (
                f"{self._reason('the mask is ', True)} (masks that show the whole image all the "
                f"same: vitrail train DATA --data.masks.any-size)"
            ),
            "unknown values": self._unknown_sentence(),
            "JPEG masks": "masks in JPEG files, which hold values that nobody drew: save as PNG",
            "nothing but ignored": (
                "masks without a pixel that counts: nothing is learned from them"
            ),
            "outlines beyond the image": (
                "outlines reach beyond their image, and are cut there: are they of another one, or "
                "of the image before it was scaled?"
            ),
            "grey in three channels": "masks are greys saved as three channels: read as grey",
        }
        faults = [
            Finding(name, self._n[name], sentence, tuple(self._names[name]))
            for name, sentence in sentences.items()
            if self._n[name]
        ]
        return [*faults, *self._of_classes()]

    def _reason(self, start: str, starts: bool) -> str:
        """The most frequent one."""
        fitting = [r for r, _ in self._reasons.most_common() if r.startswith(start) == starts]
        return fitting[0] if fitting else ""

    def _unknown_sentence(self) -> str:
        if not self._unknown:
            return ""
        coding = self._masks.coding
        total = sum(self._unknown.values())
        shown = []
        for value, count in self._unknown.most_common(_SHOWN):
            share = f"{count / self._pixels:.2%}"
            near = nearest_known(value, coding)
            text = value_text(value, colours=coding.colours)
            shown.append(f"{'unequal channels' if value == -1 else text} ({share}; nearest {near})")
        more = len(self._unknown) - len(shown)
        text = (
            f"{total / self._pixels:.2%} of all pixels hold {len(self._unknown):,} values that are "
            f"no class, and are ignored: {', '.join(shown)}{f' and {more:,} more' if more else ''}"
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
                    "more than 255 classes in 8 bits",
                    len(names),
                    f"{len(names)} classes, but masks of 8 bits hold 256 values: those from 256 on "
                    "have become others when they were saved; save as PNG of 16 bits",
                )
            )
        for name, which, sentence in (
            (
                "classes only in validation",
                (train == 0) & (other > 0),
                "classes that no training mask shows, but validation or test does: they cannot be "
                "learned, and count 0",
            ),
            (
                "classes never seen",
                (train == 0) & (other == 0),
                "classes that no mask shows: are the values those that the class map says?",
            ),
        ):
            kept: Int64[np.ndarray, " k"] = np.flatnonzero(which)
            if len(kept):
                called = tuple(names[k] for k in kept)
                text = f"{sentence} ({shortened(called)})"
                found.append(Finding(name, len(kept), text, called[:_EXAMPLES]))
        return found


def nearest_known(value: int, coding: Coding) -> str:
    """The value, or the colour, of a class that is nearest to `value`, as a user knows it."""
    known = [*coding.classes, *(v for v in coding.ignored if v >= 0)]
    if not known:
        return "none"
    if not coding.colours:
        near = min(known, key=lambda one: (abs(one - value), one))
    else:
        near = min(known, key=lambda one: (_distance(one, value), one))
    return value_text(near, colours=coding.colours)


def _distance(first: int, second: int) -> int:
    """Between two packed colours."""
    return sum(((first >> bits & 255) - (second >> bits & 255)) ** 2 for bits in (0, 8, 16))
