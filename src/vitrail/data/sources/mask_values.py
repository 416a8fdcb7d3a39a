"""Which values the masks of a data set hold, and what they mean where no file says it."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from vitrail.data.pixels.decode import UnreadableImage
from vitrail.data.pixels.values import Values, read_header, read_palette
from vitrail.data.sources.class_map import ClassMap
from vitrail.data.sources.mask_files import MaskFiles
from vitrail.data.sources.samples import cache_folder
from vitrail.data.targets.coding import packed, value_text
from vitrail.disk import whole
from vitrail.errors import DataError, setting

_VERSION = 3  # of what is cached
MOST_VALUES = 4096
"""Different values after which no more are told apart: these are no classes."""
_MOST_GUESSED = 256
"""More classes than that are not taken from values alone."""
MOST_OF_MASK = 256
_GREY = 0x010101
"""A grey as a packed colour is so many times its value."""
_EXAMPLES = 3
_SHOWN = 5
_FEW = 0.05
"""The share of values between 0 and 255 that JPEG and resizing leave in a mask of two values."""
_MANY = 16
"""More values than that between 0 and 255 were hardly drawn."""
_LOSSY = ("JPEG", "MPO")


@dataclass
class Present:
    """What masks hold, counted over all of them."""

    masks: int = 0
    all_pixels: int = 0
    pixels: dict[int, int] = field(default_factory=dict)
    """By value, or by packed colour: of the MOST_VALUES that were met first."""
    images: dict[int, int] = field(default_factory=dict)
    """Masks that hold the value."""
    colours: bool = False
    """Whether some masks have colours, so that all are counted as such."""
    three_greys: int = 0
    """Masks of three channels that are all equal."""
    of_mask: list[list[int]] = field(default_factory=list)
    """Of each mask the values that it holds, the MOST_OF_MASK most frequent; none if unreadable."""
    coloured: int = 0
    """Masks that have colours."""
    lossy: int = 0
    """Masks in JPEG files."""
    lossy_names: list[str] = field(default_factory=list)
    """Of the first few."""
    palette: int = 0
    """Masks that are numbers of a palette."""
    deep: int = 0
    """Masks of more than 8 bits."""
    too_many: bool = False
    """Whether there are more than MOST_VALUES values, of which some are then not here."""
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason)."""

    def values(self) -> set[int]:
        """All that are in `of_mask`."""
        return set().union(*self.of_mask)

    def number(self, colours: bool) -> Callable[[int], int]:
        """From a value here to what `Coding.numbers` makes of it where classes have `colours`, or
        have not.
        """
        if self.colours and not colours:
            return lambda value: -1 if value % _GREY else value // _GREY
        return lambda value: value


class _One(NamedTuple):
    values: list[int]
    counts: list[int]
    mode: str
    lossy: bool
    packed: bool
    """Whether its values are packed colours: its own, or those of a palette."""

    @property
    def coloured(self) -> bool:
        return self.packed and self.mode not in ("P", "PA")


def present(store: MaskFiles, *, threads: int | None = None) -> Present:
    """Read all masks of `store` and count; from the user's cache where it is known of these files
    as they are now. Once: `store` keeps it.
    """
    if store.held is None:
        place, stamp = _cache_place(store)
        found = None if place is None else _read(place, stamp)
        if found is None:
            with ThreadPoolExecutor(threads or min(os.cpu_count() or 1, 8)) as pool:
                found = _counted(store, pool.map(lambda i: _look(store, i), range(len(store))))
            if place is not None:
                _write(place, stamp, found)
        store.held = found
    return store.held


def _look(store: MaskFiles, i: int) -> _One | tuple[str, str]:
    try:
        header, values = read_header(store.file(i)), store.values(i)
    except UnreadableImage as error:
        return store.name(i), error.reason
    mode = header.mode
    if values.ndim == 3 and is_grey(values):
        mode, values = "grey", values[..., 0]
    colours = values.ndim == 3
    counted = count_values(packed(values) if colours else values)
    return _One(*counted, mode, header.format in _LOSSY, colours)


def is_grey(values: Values) -> bool:
    """Whether the three channels of a colour picture are equal everywhere."""
    return bool((values == values[..., :1]).all())


def count_values(values: np.ndarray) -> tuple[list[int], list[int]]:
    """The different numbers in an array, rising, and how often each occurs."""
    if values.dtype == np.uint8:
        count = np.array(Image.fromarray(values).histogram())  # half of bincount's time
        found = np.flatnonzero(count)
        return found.tolist(), count[found].tolist()
    found, count = np.unique(values, return_counts=True)
    return found.tolist(), count.tolist()


def _counted(store: MaskFiles, looks: Iterable[_One | tuple[str, str]]) -> Present:
    found = Present()
    masks: list[_One | None] = []
    for i, one in enumerate(looks):
        masks.append(one if isinstance(one, _One) else None)
        if not isinstance(one, _One):
            found.unreadable.append(one)
            continue
        found.masks += 1
        found.three_greys += one.mode == "grey"
        found.palette += one.mode == "P"
        found.deep += one.mode.startswith(("I", "F"))
        found.coloured += one.coloured
        found.too_many |= len(one.values) > MOST_VALUES
        found.lossy += one.lossy
        if one.lossy and len(found.lossy_names) < _EXAMPLES:
            found.lossy_names.append(store.name(i))
    found.colours = found.coloured > 0 or store.colours
    found.of_mask = [[] if one is None else _add(found, one) for one in masks]
    return found


def _add(found: Present, one: _One) -> list[int]:
    """Count a mask's values; the most frequent are returned."""
    # Among colours, a mask that has numbers only holds colours too: greys.
    spread = found.colours and not one.packed
    values = [value * _GREY for value in one.values] if spread else one.values
    order = sorted(range(len(values)), key=lambda k: -one.counts[k])
    found.all_pixels += sum(one.counts)
    for value, count in ((values[k], one.counts[k]) for k in order[:MOST_VALUES]):
        if value not in found.pixels and len(found.pixels) >= MOST_VALUES:
            found.too_many = True
            continue
        found.pixels[value] = found.pixels.get(value, 0) + count
        found.images[value] = found.images.get(value, 0) + 1
    return [values[k] for k in order[:MOST_OF_MASK]]


class Meaning(NamedTuple):
    """What values mean, and what to tell the user about it."""

    classes: ClassMap
    notes: tuple[str, ...] = ()


def meaning(
    found: Present, ignored: tuple[int, ...] | None, palette: Callable[[], Path | None]
) -> Meaning:
    """Each value that is present is a class, by its number; but

    - 0 and 255 alone are two classes, also where JPEG or resizing left a few values in between
    - 255 beside others (of 16 bits: 65,535) is to be ignored, unless 254 is there too

    `ignored` are the values to ignore instead of that; `palette` gives a file with a palette.
    Raises `DataError` where so many values are there that they are no classes.
    """
    values = sorted(found.pixels)
    if not values:
        raise DataError("no mask can be read" + "".join(f": {n}: {r}" for n, r in found.unreadable))
    notes = []
    black, white = 0, _white(found)
    total = sum(found.pixels.values())
    if ignored is None and two_values(found):
        between = total - found.pixels[black] - found.pixels[white]
        notes.append(_two_values(len(values) - 2, between / total, found))
        return Meaning(ClassMap(("0", "255"), {black: 0, white: 1}, found.colours), tuple(notes))
    refuse_lossy(found.lossy_names, found.lossy, found.masks)
    if ignored is None:
        ignored = ()
        top = white if found.colours else 65_535 if values[-1] > 255 else 255
        if not found.colours and top in values and top - 1 not in values and len(values) > 2:
            ignored = (top,)
    kept = [value for value in values if value not in ignored]
    if found.too_many or len(kept) > _MOST_GUESSED:
        what = "colours" if found.colours else "values"
        why = "numbers of instances, or edges that were smoothed when the masks were resized"
        count = f"more than {MOST_VALUES:,}" if found.too_many else f"{len(kept):,}"
        raise DataError(
            f"the masks hold {count} different {what}, which are no classes ({why}). Say "
            f"which ones are, in a file that {setting('data.masks.classes')} names; the most "
            f"frequent are {_frequent(found)}"
        )
    if len(kept) > _MANY and (rare := _rare(found, kept)):
        share = sum(found.pixels[value] for value in rare) / total
        what = "colours" if found.colours else "values"
        notes.append(
            f"{len(rare)} of {len(kept)} classes have {share:.2%} of all pixels between them: if "
            f"these are edges that were smoothed, say which {what} are classes, in a file that "
            f"{setting('data.masks.classes')} names; the most frequent are {_frequent(found)}"
        )
    colours = _palette_of(palette() if found.palette == found.masks else None)
    names = tuple(
        value_text(value, colours=found.colours)
        + (f" {colours[value]}" if value in colours else "")
        for value in kept
    )
    return Meaning(
        ClassMap(names, {v: k for k, v in enumerate(kept)}, found.colours, ignored), tuple(notes)
    )


def two_values(found: Present) -> bool:
    """Whether masks hold 0 and 255 alone, but for a few values in between that JPEG or resizing
    left.
    """
    ends = {0, _white(found)}
    if not ends <= found.pixels.keys():
        return False
    between = sum(count for value, count in found.pixels.items() if value not in ends)
    smoothed = found.lossy or len(found.pixels) > _MANY
    return not between or bool(smoothed and between < _FEW * sum(found.pixels.values()))


def _white(found: Present) -> int:
    return 0xFFFFFF if found.colours else 255


def refuse_lossy(names: Sequence[str], lossy: int, masks: int) -> None:
    """Raise `DataError` for masks in JPEG files."""
    if lossy:
        more = f" and {lossy - len(names):,} more" if lossy > len(names) else ""
        raise DataError(
            f"masks in JPEG files, {lossy:,} of {masks:,}: {', '.join(names)}{more}. JPEG changes "
            f"the values that were drawn: save them as PNG, from what they were drawn with; those "
            f"of two values can be mended in a copy: mogrify -threshold 50% -format png COPY/*.jpg "
            f"&& rm COPY/*.jpg"
        )


def _frequent(found: Present) -> str:
    """The values that most pixels hold, with their share."""
    total = sum(found.pixels.values())
    most = sorted(found.pixels, key=lambda value: -found.pixels[value])[:_SHOWN]
    return ", ".join(
        f"{value_text(value, colours=found.colours)} ({found.pixels[value] / total:.1%})"
        for value in most
    )


def _rare(found: Present, kept: Sequence[int]) -> list[int]:
    """Values that together have next to no pixels, if most are such."""
    total, rare, seen = sum(found.pixels.values()), [], 0
    for value in sorted(kept, key=lambda value: found.pixels[value]):
        seen += found.pixels[value]
        if seen > _FEW * total:
            break
        rare.append(value)
    return rare if 2 * len(rare) > len(kept) else []


def _two_values(others: int, share: float, found: Present) -> str:
    text = "masks hold 0 and 255: these are two classes, 0 and 1"
    if others:
        how = "JPEG files" if found.lossy else "resized with smoothing"
        text += f"; {share:.2%} of pixels hold {others} values in between ({how}?) and are ignored"
    return text


def _palette_of(file: Path | None) -> dict[int, str]:
    """The colour of each number of a palette that is more than greys."""
    found = None if file is None else read_palette(file)
    if found is None or is_grey(found[None]):
        return {}
    return {
        value: value_text(int(colour), colours=True) for value, colour in enumerate(packed(found))
    }


def _cache_place(store: MaskFiles) -> tuple[Path | None, str]:
    try:
        folder = cache_folder() / "masks"
    except DataError:
        return None, ""
    names, stamps = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    for i in range(len(store)):
        names.update(os.fsencode(store.file(i)) + (b"c" if store.colours else b"\0"))
        stamps.update(store.stamp(i).encode() + b"\0")
    return folder / f"{names.hexdigest()}.json", f"{_VERSION} {stamps.hexdigest()}"


def _read(place: Path, stamp: str) -> Present | None:
    """What the cache holds; None if there is none of this stamp, or it is damaged."""
    try:
        known = json.loads(place.read_bytes())
        if known.pop("stamp") != stamp:
            return None
        for name in ("pixels", "images"):
            known[name] = {int(value): count for value, count in known[name].items()}
        known["unreadable"] = [(name, reason) for name, reason in known["unreadable"]]
        return Present(**known)
    except Exception:  # whatever is wrong with it, the masks are read anew
        return None


def _write(place: Path, stamp: str, found: Present) -> None:
    with suppress(OSError):  # without a cache it is only slower
        place.parent.mkdir(parents=True, exist_ok=True)
        with whole(place, flush=False) as beside:
            beside.write_text(json.dumps({"stamp": stamp, **asdict(found)}))
