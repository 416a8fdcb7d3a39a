"""What is said of masks once, before anything is learned from them."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, UInt8

from vitrail.data.names import shortened
from vitrail.data.sources.coco_masks import CocoMasks
from vitrail.data.sources.coco_panoptic import PanopticMasks
from vitrail.data.sources.mask_files import MaskFiles
from vitrail.data.sources.mask_values import Present, present
from vitrail.data.targets.coding import Coding, value_text
from vitrail.data.targets.masks import Masks

_TRAIN, _LEFT_OUT = 0, 255
_EIGHT_BITS = 256
"""Values that they hold."""
_SHOWN = 5
"""Values and masks that are named."""


def told(masks: Masks, part: UInt8[np.ndarray, " n"]) -> tuple[str, ...]:
    """A sentence each, with counts, before anything is learned: what `held` says, and classes that
    no mask shows, or none to train with.

    `part` is each mask's index in PARTS; those of another number are left out.
    """
    has = np.zeros((2, len(masks.names)), bool)
    for number, shown in zip(part, _shown(masks), strict=True):
        if number != _LEFT_OUT:
            has[int(number != _TRAIN), sorted(shown)] = True
    return (*held(masks), *(of_classes(masks.names, has) if _knows(masks) else ()))


def held(masks: Masks) -> tuple[str, ...]:
    """A sentence each, with counts: masks that cannot be read, that are grey in three channels, of
    too few bits; values that are unknown, or ignored; masks without a pixel that counts. Of masks
    in files of their own; others say nothing.
    """
    store, notes = masks.store, []
    if isinstance(store, MaskFiles):
        found = present(store)
        if found.unreadable:
            names = shortened((f"{name} ({why})" for name, why in found.unreadable), _SHOWN)
            notes.append(f"masks that cannot be read, and are left out: {names}")
        if found.three_greys and not masks.coding.colours:
            count = _counted(found.three_greys, found.masks)
            notes.append(f"masks of grey in three channels, read as grey: {count}")
        greatest = 0 if masks.coding.colours else max(masks.coding.classes, default=0)
        if greatest >= _EIGHT_BITS and not found.deep:
            notes.append(
                f"{len(masks.names)} classes, but masks of 8 bits, which hold {_EIGHT_BITS} "
                f"values: those from {_EIGHT_BITS} on have become others when they were saved; "
                f"save them anew, as PNG of 16 bits"
            )
        notes += _of_values(found, masks.coding)
        idle = [masks.text(int(i)) for i in np.flatnonzero(idle_masks(masks))]
        if idle:
            notes.append(
                f"without a pixel that counts, so that they say nothing: "
                f"{_counted(len(idle), len(masks))}: {shortened(idle, _SHOWN)}"
            )
    return tuple(notes)


def idle_masks(masks: Masks) -> Bool[np.ndarray, " n"]:
    """Which masks have no pixel that counts; none that are not in files of their own."""
    idle = np.zeros(len(masks), bool)
    if isinstance(masks.store, MaskFiles):
        found = present(masks.store)
        for i, shown in enumerate(_shown(masks)):
            idle[i] = bool(found.of_mask[masks.at(i)]) and not shown
    return idle


def _knows(masks: Masks) -> bool:
    """Whether it is known, without reading it now, what each mask shows."""
    return isinstance(masks.store, MaskFiles | CocoMasks | PanopticMasks)


def _shown(masks: Masks) -> Iterator[set[int]]:
    """The class indices in each mask; none where that is not known."""
    store = masks.store
    if isinstance(store, MaskFiles):
        found, classes = present(store), masks.coding.classes
        number = found.number(masks.coding.colours)
        known = {value: classes.get(number(value)) for value in found.values()}
        for i in range(len(masks)):
            yield {k for value in found.of_mask[masks.at(i)] if (k := known[value]) is not None}
    elif isinstance(store, CocoMasks | PanopticMasks):
        yield from (store.classes(masks.at(i)) for i in range(len(masks)))
    else:
        yield from (set() for _ in range(len(masks)))


def of_classes(names: Sequence[str], has: Bool[np.ndarray, "2 c"]) -> tuple[str, ...]:
    """What to say of classes that no mask shows (of those to train with: `has[0]`; of others:
    `has[1]`), at most once of each.
    """
    train, other = has
    return tuple(
        f"{sentence}: {len(kept)} of {len(names)}: {shortened(names[k] for k in kept.tolist())}"
        for which, sentence in (
            (~train & other, "classes in held-out masks only, which cannot be learned"),
            (~train & ~other, "classes in no mask (are names and values the right ones?)"),
        )
        if len(kept := np.flatnonzero(which))
    )


def _of_values(found: Present, coding: Coding) -> list[str]:
    """Of those that do not count."""
    number, total = found.number(coding.colours), max(1, found.all_pixels)
    known = {*coding.classes, *coding.ignored}
    unknown = [value for value in found.pixels if number(value) not in known]
    ignored = [value for value in found.pixels if number(value) in coding.ignored]
    notes = []
    for kind, values in (("unknown", unknown), ("ignored", ignored)):
        if not values:
            continue
        values.sort(key=lambda value: -found.pixels[value])
        share = sum(found.pixels[value] for value in values) / total
        texts = [
            _text(value, found)
            + (f" (nearest {coding.nearest(number(value))})" if kind == "unknown" else "")
            for value in values[:_SHOWN]
        ]
        more = f" and {len(values) - _SHOWN:,} more" if len(values) > _SHOWN else ""
        those = {*values}
        masks = sum(not those.isdisjoint(each) for each in found.of_mask)
        noun = "colours" if found.colours else "values"
        what = f"unknown {noun}, ignored" if kind == "unknown" else f"ignored {noun}"
        count = f"at least {len(values):,}" if found.too_many else f"{len(values):,}"
        notes.append(
            f"{what}: {count}, in {_counted(masks, found.masks)}, {share:.2%} of all pixels: "
            f"{', '.join(texts)}{more}"
        )
    return notes


def _text(value: int, found: Present) -> str:
    return value_text(value, colours=found.colours)


def _counted(some: int, of: int) -> str:
    return f"{some:,} of {of:,} masks"
