"""`vitrail data`: look at a data set before hours are spent on it, convert its boxes, make shards,
fetch a sample.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import fill
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from vitrail.cli.dataset import ALL_AS_FOUND, AS_FOUND, OfAnyData, OfData
from vitrail.cli.parse import parse
from vitrail.cli.screen import CountingScreen
from vitrail.cli.words import Word, run_word
from vitrail.data import PARTS, SAMPLES, PartedSource, fetch, open_data
from vitrail.data.check import CheckReport, check
from vitrail.data.check_boxes import BoxReport, check_boxes
from vitrail.data.check_masks import Finding, MaskReport, check_masks
from vitrail.data.found import open_found
from vitrail.data.pixels.greys import cut_sentence
from vitrail.data.sources.shards import changed_shards
from vitrail.data.sources.write_boxes import write_boxes
from vitrail.data.sources.write_shards import write_shards
from vitrail.data.split import task_of
from vitrail.data.targets import Boxes, Masks, Texts
from vitrail.errors import DataError
from vitrail.units import bytes_text

_WIDTH = 80
_CLASSES = 50
"""Rows of a table."""
_EXAMPLES = 5
_SHOWN = 10
"""Lines of a long list that are printed; --json has them all."""


@dataclass(frozen=True)
class CheckArgs:
    """What `vitrail data check` takes."""

    data: Annotated[str, tyro.conf.Positional]
    """A folder, a .csv or .txt, a .npz, IDX files, shards, samples:NAME, or hf:NAME."""
    how: OfAnyData = ALL_AS_FOUND
    threads: int = os.cpu_count() or 1


@dataclass(frozen=True)
class ShardArgs:
    """What `vitrail data shard` takes."""

    data: Annotated[str, tyro.conf.Positional]
    """A folder, a .csv or .txt, a .npz, IDX files, samples:NAME, or hf:NAME."""
    out: Annotated[str, tyro.conf.Positional]
    """A new folder for the tar files."""
    images_per_shard: int | None = None
    """5,000, if no size is given."""
    megabytes: float | None = None
    """So large, instead."""
    how: OfData = AS_FOUND


@dataclass(frozen=True)
class ConvertArgs:
    """What `vitrail data convert` takes."""

    data: Annotated[str, tyro.conf.Positional]
    """A folder of images and their boxes, a file in it that tells them, or samples:NAME."""
    out: Annotated[str, tyro.conf.Positional]
    """A new folder; DATA is not changed."""
    to: Literal["coco", "yolo", "voc"]
    """How boxes are written."""
    how: OfData = AS_FOUND


@dataclass(frozen=True)
class FetchArgs:
    """What `vitrail data fetch` takes."""

    name: Annotated[str, tyro.conf.Positional]
    """A sample set: fashion-mnist."""


def data(args: Sequence[str]) -> dict[str, Any]:
    """Check, convert, shard, fetch or list."""
    words = {
        "check": Word(_check, "check DATA", "read every image, count, list what is wrong"),
        "convert": Word(_convert, "convert DATA OUT", "write images with boxes in another format"),
        "shard": Word(_shard, "shard DATA OUT", "write it as a few large tar files"),
        "fetch": Word(_fetch, "fetch NAME", "bring a sample set into the cache"),
        "list": Word(_list, "list", "the sample sets"),
    }
    return run_word("data", words, args)


def _check(args: Sequence[str]) -> dict[str, Any]:
    given = parse(CheckArgs, args, "data check", "Read every image; change nothing.")
    how = given.how
    source = open_found(given.data, how.columns(), how.rules(), how.masks)
    with CountingScreen("reading", len(source)) as screen:
        report = check(source, given.threads, screen.done)
    masks: MaskReport | None = None
    if isinstance(source.targets, Masks):
        with CountingScreen("masks", len(source)) as screen:
            masks = check_masks(source, given.threads, screen.done)
    boxes = check_boxes(source) if isinstance(source.targets, Boxes) else None
    changed = changed_shards(Path(given.data).expanduser())
    parts = {name: int((source.part == i).sum()) for i, name in enumerate(PARTS)}
    parts = {name: count for name, count in parts.items() if count}
    _print_report(report, parts, source)
    if masks is not None:
        _print_masks(masks)
    if boxes is not None:
        _print_boxes(boxes)
    unusable = (masks.unusable if masks else 0) + (boxes.unusable if boxes else 0)
    _print_list("shards are not as they were written", changed)
    return {
        "data": given.data,
        "images": report.images,
        "classes": report.counts,
        "parts": parts,
        "left_out": _left_out(source, report.unreadable),
        "unreadable": [{"key": key, "reason": why} for key, why in report.unreadable],
        "width": report.width and report.width._asdict(),
        "height": report.height and report.height._asdict(),
        "duplicates": [list(group) for group in report.duplicates],
        "conflicts": [list(group) for group in report.conflicts],
        "greys": report.greys and report.greys._asdict(),
        "deep_colours": report.deep_colours,
        "notes": list(source.notes),
        "masks": [asdict(finding) for finding in masks.findings] if masks else [],
        "mask_classes": [each._asdict() for each in masks.classes] if masks else [],
        "mask_pixels": {"ignored": masks.ignored, "unknown": masks.unknown} if masks else None,
        "boxes": [asdict(finding) for finding in boxes.findings] if boxes else [],
        "box_classes": [each._asdict() for each in boxes.classes] if boxes else [],
        "box_counts": _box_counts(boxes) if boxes else None,
        "texts": _texts(source.targets) if isinstance(source.targets, Texts) else None,
        "changed_shards": list(changed),
        "exit_code": 3 if report.unreadable or changed or unusable else 0,
    }


def _texts(texts: Texts) -> dict[str, int]:
    """How many there are, and how many images have one that another has as well."""
    counts = np.bincount(texts.own[texts.own >= 0], minlength=len(texts.table))
    shared = ((texts.own >= 0) & (counts[texts.own] > 1)).any(axis=1)
    return {
        "different": texts.different(),
        "most": texts.own.shape[1],
        "shared": int(shared.sum()),
    }


def _cut(name: str) -> str:
    """The name of a class, behind three numbers."""
    return name if len(name) <= _WIDTH - 29 else f"{name[: _WIDTH - 32]}..."


def _print_rest(classes: int) -> None:
    if classes > _CLASSES:
        print(f"{'':27}  and {classes - _CLASSES} more (--json has all)")


def _print_masks(report: MaskReport) -> None:
    """What the masks hold, in a table, and what is wrong with them."""
    print(f"{'pixels':>9}{'images':>9}{'without':>9}  class")
    seen = sorted((one for one in report.classes if one.images), key=lambda one: -one.share)
    for one in seen[:_CLASSES]:
        print(f"{one.share:>9.2%}{one.images:>9,}{one.images_without:>9,}  {_cut(one.name)}")
    _print_rest(len(seen))
    for name, share in (("ignored", report.ignored), ("unknown, ignored", report.unknown)):
        if share:
            print(f"{share:>9.2%}{'':18}  ({name})")
    _print_findings("masks", report.findings)


def _print_boxes(report: BoxReport) -> None:
    """How many objects of each class there are, in a table, and what is wrong with their boxes."""
    print(f"{'objects':>9}{'share':>9}{'images':>9}  class")
    seen = sorted((one for one in report.classes if one.objects), key=lambda one: -one.objects)
    for one in seen[:_CLASSES]:
        print(f"{one.objects:>9,}{one.share:>9.2%}{one.images:>9,}  {_cut(one.name)}")
    _print_rest(len(seen))
    sizes = ", ".join(f"{count:,} {name}" for name, count in report.sizes.items())
    print(f"objects   {sizes} (COCO's 32 and 96 pixels); median {report.median:.0f} pixels a side")
    print(f"images    {report.negatives:,} without an object; at most {report.most:,} in one")
    _print_findings("boxes", report.findings)


def _box_counts(report: BoxReport) -> dict[str, Any]:
    return {
        "objects": report.objects,
        "ignored": report.ignored,
        "negatives": report.negatives,
        "most": report.most,
        "median": report.median,
        **report.sizes,
    }


def _print_findings(what: str, findings: Sequence[Finding]) -> None:
    for finding in findings:
        text = f"{what}     {finding.name}, {finding.count:,}: {finding.sentence}"
        print(fill(text, _WIDTH, subsequent_indent=" " * 10, break_on_hyphens=False))
        names = [f"  {name}" for name in finding.examples[:_EXAMPLES]]
        more = len(finding.examples) - _EXAMPLES
        for line in (*names, *([f"  and {more:,} more (--json has all)"] if more > 0 else ())):
            print(
                fill(
                    line,
                    _WIDTH,
                    initial_indent=" " * 10,
                    subsequent_indent=" " * 14,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
            )


def _left_out(source: PartedSource, unreadable: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Everything that is not used, of a kind or by its key."""
    return [
        *map(asdict, source.left_out),
        *({"key": key, "count": 1, "reason": why} for key, why in unreadable),
    ]


def _print_sentences(source: PartedSource) -> None:
    for one in source.left_out:
        print(f"note      {one.sentence()}")
    for note in source.notes:
        print(f"note      {note}")


def _print_report(report: CheckReport, parts: Mapping[str, int], source: PartedSource) -> None:
    if report.counts:
        print(f"{report.images} images in {len(report.counts)} classes")
    else:
        kind, names = source.targets.kind, source.targets.names
        said = f"with {kind} of {len(names)} classes" if names else f"with {kind}"
        print(f"{report.images} images {said}")
    if isinstance(source.targets, Texts):
        found = _texts(source.targets)
        print(
            f"texts     {found['different']:,} different ones, at most {found['most']} an image; "
            f"{found['shared']:,} images have one that another has as well"
        )
    for label, count in report.counts.items():
        print(f"  {count:>7}  {label}")
    if report.width and report.height:
        w, h = report.width, report.height
        print(f"width     {w.least} to {w.greatest} pixels, median {w.median}")
        print(f"height    {h.least} to {h.greatest} pixels, median {h.median}")
    print(f"parts     {', '.join(f'{name} {count:,}' for name, count in parts.items())}")
    if report.greys:
        print(f"greys     {report.greys.sentence()}")
    if report.deep_colours:
        print(f"colours   {cut_sentence(report.deep_colours)}")
    _print_sentences(source)
    _print_list("cannot be read", [f"{key}: {why}" for key, why in report.unreadable])
    _print_list("groups of equal images", [" = ".join(g) for g in report.duplicates])
    _print_list("of them with different labels", [" = ".join(g) for g in report.conflicts])
    if not report.unreadable:
        used = " that is used" if source.left_out else ""
        print(f"every image{used} can be read")


def _print_list(what: str, lines: Sequence[str]) -> None:
    if lines:
        print(f"{len(lines)} {what}")
        for line in lines[:_SHOWN]:
            print(f"  {line}")
        if len(lines) > _SHOWN:
            print(f"  and {len(lines) - _SHOWN} more (--json lists all)")


def _shard(args: Sequence[str]) -> dict[str, Any]:
    given = parse(ShardArgs, args, "data shard", "Write a data set as tar files (WebDataset).")
    if (task := task_of(given.data)) != "classify":
        kind = {"segment": "masks", "detect": "boxes", "clip": "texts"}[task]
        raise DataError(
            f"{given.data} holds images with {kind}, and shards hold classes: train on it as it is"
        )
    source = open_data(given.data, given.how.columns(), given.how.rules())
    with CountingScreen("writing", len(source)) as screen:
        written = write_shards(
            source,
            Path(given.out).expanduser(),
            data=Path(given.data).expanduser(),
            images=given.images_per_shard,
            megabytes=given.megabytes,
            on_done=screen.done,
        )
    _print_sentences(source)
    print(
        f"{written.images} images in {len(written.shards)} shards, {bytes_text(written.size)}; "
        f"train on them with: vitrail train {given.out}"
    )
    left_out = written.left_out
    _print_list("cannot be read and are left out", [f"{key}: {why}" for key, why in left_out])
    return {
        "data": given.data,
        "folder": given.out,
        "images": written.images,
        "shards": list(written.shards),
        "bytes": written.size,
        "left_out": _left_out(source, left_out),
        "notes": list(source.notes),
        "exit_code": 3 if left_out else 0,
    }


def _convert(args: Sequence[str]) -> dict[str, Any]:
    given = parse(ConvertArgs, args, "data convert", "Write images with boxes in another format.")
    how = given.how
    source = open_data(given.data, how.columns(), how.rules(), targets=Boxes)
    out = Path(given.out).expanduser()
    with CountingScreen("writing", len(source)) as screen:
        written = write_boxes(
            source,
            out,
            to=given.to,
            data=Path(given.data).expanduser(),
            on_done=screen.done,
        )
    _print_sentences(source)
    for note in written.notes:
        print(f"note      {note}")
    print(
        f"{written.boxes:,} boxes in {written.images:,} images, {bytes_text(written.size)}; "
        f"look at them with: vitrail data check {given.out}"
    )
    _print_list(
        "cannot be read and are left out", [f"{key}: {why}" for key, why in written.left_out]
    )
    return {
        "data": given.data,
        "folder": given.out,
        "format": given.to,
        "images": written.images,
        "boxes": written.boxes,
        "bytes": written.size,
        "left_out": _left_out(source, written.left_out),
        "notes": [*source.notes, *written.notes],
        "exit_code": 3 if written.left_out else 0,
    }


def _fetch(args: Sequence[str]) -> dict[str, Any]:
    given = parse(FetchArgs, args, "data fetch", "Bring a sample set into the cache.")
    folder = fetch(given.name, lambda sentence: print(sentence, flush=True))
    print(f"{given.name} is in {folder}; train on it with: vitrail train samples:{given.name}")
    return {"name": given.name, "folder": str(folder)}


def _list(args: Sequence[str]) -> dict[str, Any]:
    for name in SAMPLES:
        print(f"samples:{name}")
    return {"samples": list(SAMPLES)}
