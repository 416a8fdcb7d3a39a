"""The data: what is there, and how fast a sample of it can be read."""

import shlex
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from vitrail.data import Classes, Source, UnreadableImage, open_splits
from vitrail.data.found import open_found
from vitrail.data.names import shortened
from vitrail.data.sources.csvfile import Columns
from vitrail.data.sources.hub import HUB_PREFIX, STREAM_PREFIX, open_streams
from vitrail.data.sources.layout import USUAL, FolderRules
from vitrail.data.sources.mask_meaning import AS_THEY_SAY, MaskRules
from vitrail.data.sources.mask_told import told as mask_told
from vitrail.data.sources.stream import StreamSettings
from vitrail.data.targets import Masks, Nothing
from vitrail.doctor.finding import Finding
from vitrail.doctor.machine import cores
from vitrail.errors import VitrailError

_SAMPLE = 50
_FEW = 10
"""Images of a class from which little can be learned."""
_UNEVEN = 10
"""Times as many images as another class has."""
_LARGE = 24_000_000
"""Pixels: decoding such an image takes a fifth of a second."""


class Look(NamedTuple):
    """One image that was read, or why it could not be."""

    key: str
    size: tuple[int, int]
    """Width and height; 0 if it cannot be read."""
    fault: str


def data_findings(
    data: str,
    columns: Columns,
    rules: FolderRules = USUAL,
    masks: MaskRules = AS_THEY_SAY,
) -> Iterator[Finding]:
    """All of this file, for what the user calls `data`."""
    check = f"vitrail data check {shlex.quote(data)}"
    if data.startswith(STREAM_PREFIX):
        yield from _stream_findings(data, columns)
        return
    try:
        source = open_found(data, columns, rules, masks)
    except VitrailError as error:
        yield Finding("data", "problem", str(error), "vitrail doctor --help  # what DATA can be")
        return
    try:
        splits = open_splits(
            data,
            seed=0,
            image_column=columns.image,
            label_column=columns.label,
            split_column=columns.split,
            rules=rules,
            masks=masks,
            targets=type(source.targets),
            source=source,
        )
        parts = [("train", splits.train), ("val", splits.val), ("test", splits.test)]
        told = ", ".join(f"{name} {len(part):,}" for name, part in parts if part is not None)
        classes = len(source.targets.names)
        numbers = {"images": len(source), "classes": classes}
        yield Finding("data", "ok", f"{_held(source)} ({told})", numbers=numbers)
    except VitrailError as error:
        yield Finding("data", "problem", f"it cannot be trained on: {error}", check)
    of_masks = mask_told(source.targets, source.part) if isinstance(source.targets, Masks) else ()
    for note in (*(one.sentence() for one in source.left_out), *source.notes, *of_masks):
        yield Finding("data", "note", note, check)
    if isinstance(source.targets, Nothing):
        learn = f"vitrail train {shlex.quote(data)} --task mocov3"
        yield Finding("task", "note", "without labels, features can be learned from them", learn)
    if isinstance(source.targets, Classes):
        yield judge_balance(source.targets)
    yield from judge_sample(source, check, of=len(source))


def _held(source: Source) -> str:
    """How many images, and what is said of them."""
    targets = source.targets
    if isinstance(targets, Nothing):
        return f"{len(source):,} images without labels"
    told = "in" if isinstance(targets, Classes) else f"with {targets.kind} of"
    return f"{len(source):,} images {told} {len(targets.names):,} classes"


def _stream_findings(data: str, columns: Columns) -> Iterator[Finding]:
    """The first images of a stream, which is not read to its end for this."""
    try:
        name = data.removeprefix(STREAM_PREFIX)
        settings = StreamSettings(buffer=_SAMPLE)
        streams, left_out = open_streams(name, columns, seed=0, settings=settings)
        train = streams["train"]
        sample = train.sample(_SAMPLE)
    except VitrailError as error:
        yield Finding("data", "problem", str(error), "vitrail doctor --help  # what DATA can be")
        return
    known = f"{train.images:,}" if train.images else "an unknown number of"
    parts = ", ".join(streams)
    text = f"a stream of {known} images in {len(train.targets.names):,} classes ({parts})"
    yield Finding("data", "ok", text, numbers={"classes": len(train.targets.names)})
    for one in left_out:
        yield Finding("data", "note", one.sentence())
    whole = f"vitrail train {shlex.quote(HUB_PREFIX + name)}  # read whole, if there is room"
    if train.lanes == 1:
        text = "it is one shard: its images are shuffled in blocks only"
        yield Finding("shards", "note", text, whole)
    else:
        yield Finding("shards", "ok", f"{len(train.shards):,}, of which {train.lanes} are open")
    yield from judge_sample(sample, whole, of=train.images)


def judge_balance(targets: Classes) -> Finding:
    """How uneven the classes are."""
    counts, names = targets.counts(), targets.names
    least, most = int(counts.argmin()), int(counts.argmax())
    few = [f"{names[i]} ({counts[i]})" for i in np.flatnonzero(counts < _FEW)]
    text = f"{counts[least]:,} ({names[least]}) to {counts[most]:,} ({names[most]}) images a class"
    numbers = {"least": int(counts[least]), "most": int(counts[most])}
    if counts[most] > _UNEVEN * counts[least]:
        text += ": rare classes will be missed more often"
        mend = "vitrail train DATA --classify.class-weights balanced"
        return Finding("classes", "note", text, mend, numbers)
    if few:
        text += f"; too few to learn much from: {shortened(few)}"
        mend = "vitrail train DATA --weights focus_s14 --recipe probe"
        return Finding("classes", "note", text, mend, numbers)
    return Finding("classes", "ok", text, numbers=numbers)


def judge_sample(
    source: Source, check: str, threads: int | None = None, *, of: int | None
) -> Iterator[Finding]:
    """Read some images from all over the data, and say how long reading all of them takes: `of` so
    many, if that is known.
    """
    threads = threads or cores().usable
    chosen = np.unique(np.linspace(0, len(source) - 1, _SAMPLE).astype(int)).tolist()
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        looks = list(pool.map(lambda i: _look(source, i), chosen))
    seconds = time.perf_counter() - started
    broken = [look for look in looks if look.fault]
    if broken:
        faults = shortened((f"{look.key}: {look.fault}" for look in broken), 3)
        text = f"{len(broken)} of {len(looks)} that were tried cannot be read: {faults}"
        yield Finding("images", "problem", text, check, {"unreadable": [b.key for b in broken]})
    good = [look for look in looks if not look.fault]
    if not good:
        return
    rate = len(looks) / seconds
    largest = max(good, key=lambda look: look.size[0] * look.size[1])
    w, h = largest.size
    everything = f": {_duration(of / rate)} for all {of:,}" if of else ""
    text = (
        f"{rate:,.0f} images/s decoded in {threads} thread{'s' * (threads > 1)}{everything}; "
        f"the largest of {len(good)} is {w} x {h}"
    )
    numbers = {
        "images_per_second": round(rate, 1),
        "threads": threads,
        "epoch_seconds": round(of / rate, 1) if of else None,
        "largest": [w, h],
    }
    if w * h > _LARGE:
        text += f" ({largest.key}): smaller copies would be read sooner"
        yield Finding(
            "decoding", "note", text, "mogrify -resize 1024x1024\\> COPY/*/*.jpg", numbers
        )
    else:
        yield Finding("decoding", "ok", text, numbers=numbers)


def _look(source: Source, i: int) -> Look:
    try:
        look = Look(source.key(i), source.load(i).size, "")
        if isinstance(source.targets, Masks):
            source.targets.target(i, None)
        return look
    except UnreadableImage as error:
        return Look(source.key(i), (0, 0), error.reason)


def _duration(seconds: float) -> str:
    if seconds < 1:
        return "under a second"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
