"""What a run was made with, and what of it is no longer so when the run is to go on.

A resumed run takes the steps that it would have taken only if data, code and libraries are what
they were. `identity` says what they are, in plain values that the run folder keeps as
identity.json; `differences` says in sentences what has changed since; `refuse_changes` decides.
Names, labels and stamps (`Source.stamp`) tell whether an image is the one it was: no image is
decoded, and a million of them take seconds and 0.2 MB.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from vitrail import __version__
from vitrail.data import Classes, Source, Splits
from vitrail.data.names import shortened
from vitrail.errors import DataError, UsageError, setting
from vitrail.runs.config import TrainConfig
from vitrail.runs.folder import Run, environment
from vitrail.runs.sketch import Record, Sketch

IDENTITY = "identity.json"
"""The file's name in the run folder."""

_FORMAT = "vitrail identity 1"
_LIBRARIES = ("torch", "numpy", "pillow", "simplejpeg")
"""What computes, and what decodes."""
_PARTS = {"train": "training", "val": "validation", "test": "test"}
_BLOCK = 2**16
_DECIDING = (
    "nn/",
    "models/",
    "heads/",
    "data/",
    "metrics/",
    "tasks/",
    "training/",
    "runs/parts.py",
)
"""Where in the package is the code that decides what a step gives, and which checkpoint is best."""
_BESIDE = (
    *("data/check.py", "data/check_boxes.py", "data/check_masks.py", "data/found.py"),
    *("data/sources/write_boxes.py", "data/sources/write_shards.py"),
)
"""What lies there, and has no part in a run."""


class Change(NamedTuple):
    """Something that is not what it was, as a sentence.

    `what` is `classes`, which no run outlives; `inexact`: the steps to come would be others; or
    `rounding`: they are the same but for the last bits of their numbers.
    """

    what: Literal["classes", "inexact", "rounding"]
    sentence: str


def identity(config: TrainConfig, splits: Splits) -> dict[str, Any]:
    """What this run is made with: data, code, libraries, machine. Plain values, for JSON."""
    data = {name: _part(source) for name, source in splits.parts.items()}
    if splits.stream is not None:  # not read for this: its keeper knows what its order follows from
        data["train"] = {"images": splits.stream.images, "order": splits.stream.order}
    here = environment()
    return {
        "format": _FORMAT,
        "classes": list(splits.train.targets.names),
        "data": data,
        "vitrail": __version__,
        "code": dict(_code()),
        "libraries": {name: found for name in _LIBRARIES if (found := _version(name))},
        "python": python_version(),
        "machine": {
            "processor": here["processor"],
            "threads": config.threads or here["threads"],
            "gpu": here["gpu"] if config.device != "cpu" else None,
        },
    }


def read_identity(run: Run) -> dict[str, Any]:
    """The identity that a run folder holds; empty for a run that was made before there was one.

    Raises `DataError` for a damaged file.
    """
    file = run.path / IDENTITY
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.get("format") != _FORMAT:
            raise ValueError(f"it is not of the format '{_FORMAT}'")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise _damaged(error, file) from error
    return found


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, ...]:
    """One sentence for each thing that is not what it was.

    Both are what `identity` gives; where `before` is empty there is nothing to compare with.
    Raises `DataError` where one of them is damaged.
    """
    return tuple(change.sentence for change in changes(before, now))


def refuse_changes(
    before: Mapping[str, Any], now: Mapping[str, Any], *, accept: bool = False
) -> tuple[str, ...]:
    """What has changed, for the user to read, where the run may go on all the same.

    Raises `UsageError`, which names the flag `--accept-changes`, where the steps to come would be
    others and `accept` is false; `DataError` where the classes are others: no flag can help then,
    for the head that the checkpoint holds has one output a class.
    """
    found = changes(before, now)
    sentences = tuple(change.sentence for change in found)
    if any(change.what == "classes" for change in found):
        raise DataError(
            f"this run cannot go on: its model has learned other classes. {_listed(sentences)}\n"
            f"Put the data back as it was, or start a new run from what this one has learned: "
            f"vitrail train DATA --weights RUN"
        )
    if not accept and any(change.what == "inexact" for change in found):
        raise UsageError(
            f"this run would not go on as if nothing had happened: {_listed(sentences)}\nPut that "
            f"back as it was; or go on with what there is: {setting('accept_changes', True)}"
        )
    return sentences


def _listed(sentences: Sequence[str]) -> str:
    return "".join(f"\n  {sentence}" for sentence in sentences)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[Change, ...]:
    """As `differences`, and what each of them means."""
    if not before:
        return ()
    try:
        return tuple(_changes(before, now))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise _damaged(error) from error


def _damaged(error: Exception, file: Path | str = f"the run's {IDENTITY}") -> DataError:
    reason = error.strerror if isinstance(error, OSError) else error
    return DataError(
        f"{file} is damaged ({reason}), so it does not say what this run was made with. Remove it "
        f"to go on without knowing what has changed"
    )


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    if sentence := _classes_changed(before["classes"], now["classes"]):
        yield Change("classes", sentence)
    for name in _PARTS:
        was, now_is = before["data"].get(name), now["data"].get(name)
        if was is None and now_is is None:
            continue
        if was is None or now_is is None:
            gone = "gone" if now_is is None else "new"
            yield Change("inexact", f"the {_PARTS[name]} images are {gone}")
        elif sentence := _images_changed(_PARTS[name], was, now_is, now["classes"]):
            yield Change("inexact", sentence)
    if before["vitrail"] != now["vitrail"]:
        yield Change("inexact", _was("vitrail", before["vitrail"], now["vitrail"]))
    if files := sorted(
        f for f in {*before["code"], *now["code"]} if _decides(f) and _differ(before, now, f)
    ):
        yield Change("inexact", f"vitrail's code changed: {shortened(files)}")
    for name in dict.fromkeys((*before["libraries"], *now["libraries"])):
        versions = before["libraries"].get(name), now["libraries"].get(name)
        if versions[0] != versions[1]:
            yield Change("inexact", _was(name, *versions))
    if before["python"] != now["python"]:
        yield Change("rounding", _was("Python", before["python"], now["python"]))
    for name in dict.fromkeys((*before["machine"], *now["machine"])):
        values = before["machine"].get(name), now["machine"].get(name)
        if values[0] != values[1]:
            verb = "were" if name == "threads" else "was"
            sentence = _was(name, *values, verb=verb)
            yield Change("rounding", f"{sentence}: sums may round differently")


def _decides(file: str) -> bool:
    return file.startswith(_DECIDING) and file not in _BESIDE


def _differ(before: Mapping[str, Any], now: Mapping[str, Any], file: str) -> bool:
    return before["code"].get(file) != now["code"].get(file)


def _was(what: str, before: object, now: object, verb: str = "was") -> str:
    return f"{what} {verb} {before or 'none'}, now {now or 'none'}"


def _classes_changed(before: Sequence[str], now: Sequence[str]) -> str:
    if before == now:
        return ""
    known, found = set(before), set(now)
    gone = [f"'{name}'" for name in before if name not in found]
    new = [f"'{name}'" for name in now if name not in known]
    if not gone and not new:
        return f"the classes are in another order: {shortened(before)}; now {shortened(now)}"
    told = [
        f"{shortened(names)} {'is' if len(names) == 1 else 'are'} {what}"
        for names, what in ((gone, "gone"), (new, "new"))
        if names
    ]
    return ("class " if max(len(gone), len(new)) == 1 else "classes ") + ", ".join(told)


def _images_changed(
    part: str, before: Mapping[str, Any], now: Mapping[str, Any], classes: Sequence[str]
) -> str:
    if "order" in before or "order" in now:
        same = before.get("order") == now.get("order")
        return "" if same else f"the {part} stream is another, or its order is"
    if all(before[key] == now[key] for key in ("names", "labels", "stamps")):
        return ""
    found = Sketch.parse(before["sketch"]).differences(Sketch.parse(now["sketch"]))
    if found is None:
        return _many_changed(part, before, now, classes)
    what = [(how, sorted(names)) for how, names in _paired(*found).items() if names]
    if not what:
        return f"the {part} images are in another order"
    (how, names), *others = what
    noun = "image was" if len(names) == 1 else "images were"
    sentence = f"{len(names):,} {part} {noun} {how} ({shortened(names)})"
    return sentence + "".join(f", {len(n):,} {how} ({shortened(n)})" for how, n in others)


def _paired(before: Sequence[Record], now: Sequence[Record]) -> dict[str, list[str]]:
    """Names of the images by what has happened to them."""
    pairs: dict[str, tuple[list[Record], list[Record]]] = defaultdict(lambda: ([], []))
    for side, records in enumerate((before, now)):
        for record in records:
            pairs[record.name][side].append(record)
    what: dict[str, list[str]] = {"added": [], "removed": [], "changed": [], "relabelled": []}
    for name, (was, now_is) in pairs.items():
        for old, new in zip(was, now_is, strict=False):
            what["relabelled" if old.content == new.content else "changed"].append(name)
        what["removed"] += [name] * (len(was) - len(now_is))
        what["added"] += [name] * (len(now_is) - len(was))
    return what


def _many_changed(
    part: str, before: Mapping[str, Any], now: Mapping[str, Any], classes: Sequence[str]
) -> str:
    if before["names"] == now["names"]:
        if before["labels"] != now["labels"]:
            return f"many of the {now['images']:,} {part} images were relabelled"
        return (
            f"many of the {now['images']:,} {part} images have another size or time of change, "
            f"though their names and labels are as they were: copies made with `cp -a` or "
            f"`rsync -a` keep the time"
        )
    sentence = f"many {part} images are others: {before['images']:,} were, {now['images']:,} are"
    counts = zip(classes, before["counts"], now["counts"], strict=False)
    moved = sorted(((b, n, name) for name, b, n in counts if b != n), key=_least_moved)
    told = [f"'{name}' had {b:,}, now {n:,}" for b, n, name in reversed(moved)]
    return f"{sentence} ({shortened(told, 3)})" if told else sentence


def _least_moved(moved: tuple[int, int, str]) -> int:
    before, now, _ = moved
    return abs(now - before)


def _part(source: Source) -> dict[str, Any]:
    """Digests in the source's order, which is what a run draws from, and a sketch in none."""
    digests = {name: hashlib.blake2b(digest_size=16) for name in ("names", "labels", "stamps")}
    sketch = Sketch()
    labels = source.targets.hashes()
    for start in range(0, len(source), _BLOCK):
        indices = range(start, min(start + _BLOCK, len(source)))
        keys = [source.key(i) for i in indices]
        stamps = [source.stamp(i) for i in indices]
        hashed = [
            hashlib.blake2b(f"{key}\0{stamp}".encode("utf-8", "surrogateescape"), digest_size=8)
            for key, stamp in zip(keys, stamps, strict=True)
        ]
        digests["names"].update("".join(f"{k}\0" for k in keys).encode("utf-8", "surrogateescape"))
        digests["labels"].update(labels[indices.start : indices.stop].tobytes())
        contents = b"".join(each.digest() for each in hashed)
        digests["stamps"].update(contents)
        sketch.add(keys, labels[indices.start : indices.stop], np.frombuffer(contents, "<u8"))
    return {
        "images": len(source),
        "counts": targets.counts().tolist()
        if isinstance(targets := source.targets, Classes)
        else [],
        **{name: digest.hexdigest() for name, digest in digests.items()},
        "sketch": sketch.text(),
    }


@cache
def _code() -> Mapping[str, str]:
    """A digest of each of the package's own source files that decide what a step gives, by its name
    within the package: not of those that write a report, plan, serve or parse arguments.

    Read once: what is written into them later is not what this process runs.
    """
    root = Path(__file__).parents[1]
    files = {file.relative_to(root).as_posix(): file for file in sorted(root.rglob("*.py"))}
    return {
        name: hashlib.blake2b(file.read_bytes(), digest_size=6).hexdigest()
        for name, file in files.items()
        if _decides(name)
    }


def _version(name: str) -> str | None:
    if name == "torch":
        return torch.__version__
    try:
        return version(name)
    except PackageNotFoundError:
        return None
