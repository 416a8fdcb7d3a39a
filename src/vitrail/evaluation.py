"""Measure a finished run on images that it never learned from, or on any others.

Writes metrics.json and predictions.csv into the run folder. What is measured on other images than
the run's own held-out ones, of another checkpoint, or with test-time augmentation, gets a name of
its own (metrics-NAME-1a2b3c4d.json), and replaces nothing but what was measured there before.
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from PIL import Image
from torch import Tensor

from vitrail.data import Classes, Source, Splits, Targets, open_data
from vitrail.data.batches.loader import EvalLoader
from vitrail.data.names import shortened, title_of
from vitrail.data.pixels.decode import Encoded
from vitrail.data.sources.csvfile import Columns, list_file
from vitrail.data.sources.hub import place_of
from vitrail.data.sources.layout import USUAL, FolderRules
from vitrail.data.sources.mask_meaning import AS_THEY_SAY, MaskRules
from vitrail.data.sources.mask_told import held as held_by
from vitrail.data.sources.source import PARTS, Joined, PartedSource, Subset, encoded
from vitrail.data.targets import Masks, Nothing, Texts
from vitrail.deploy.bundle import Bundle
from vitrail.deploy.engines import engine_of
from vitrail.deploy.exported import levels, measure, task_of
from vitrail.errors import DataError, UsageError, setting
from vitrail.metrics import FEW
from vitrail.runs import Run, TrainConfig
from vitrail.runs.config import from_dict
from vitrail.runs.data import open_data_of
from vitrail.runs.load import LoadedRun, load
from vitrail.runs.world import ALONE, World
from vitrail.tasks import TASKS, Metrics, Task
from vitrail.tasks.tta import looks
from vitrail.training.measure import Measured, measured
from vitrail.weights.files import read_json

Part = Literal["train", "val", "test", "all"]


@dataclass(frozen=True)
class Evaluation:
    """What a run said of some images, and how good that is."""

    loaded: LoadedRun
    data: str
    """What the user named."""
    part: Part
    held_out: bool
    """Whether these are the run's own held-out images."""
    own: bool
    """Whether they are of the run's own data, divided as it was; other data has a name of its own,
    even where it lies in the same place.
    """
    source: Source = field(repr=False)
    """All images of the part, labelled with the model's classes."""
    indices: Int64[np.ndarray, " n"] = field(repr=False)
    """Which of them could be read; `n` counts these."""
    rows: Mapping[str, Tensor] = field(repr=False)
    """What the task measured of these, each `[n ...]`: see its `measure`."""
    metrics: Any
    """What it makes of that: see its `judge`."""
    skipped: dict[str, str]
    """Key and reason of every image that could not be read."""
    images_per_second: float
    """From files to probabilities."""
    model_images_per_second: float
    """The model alone."""
    tta: str = "none"
    """How often, and how, the model looked at each image: a name in `vitrail.tasks.tta.LOOKS`."""
    tokens: str | None = None
    """With how many fewer tokens than the run's own model: `tome:r=13`."""
    learned_names: tuple[str, ...] = ()
    """Of the classes that the run itself knew, by which its log's scores are."""
    of_data: tuple[str, ...] = ()
    """What of the data was left out, and the like; of other data than the run's own."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The images' names."""
        return tuple(self.source.key(int(i)) for i in self.indices)

    @property
    def noun(self) -> str:
        """What to call these images in a sentence."""
        return noun_of(self.part, self.held_out)

    @property
    def suffix(self) -> str:
        """What sets this evaluation's file names apart: nothing for the run's held-out images, seen
        once each by the model that it keeps. Other data has its title, its part, and eight digits
        of the SHA-256 of where it lies, for many folders are called `test`.
        """
        loaded = self.loaded
        how = "" if self.tta == "none" else f"-tta-{self.tta}"
        how += "" if self.tokens is None else "-" + re.sub(r"[^\w.]+", "-", self.tokens)
        if loaded.folder != loaded.run.checkpoint(loaded.config.keep):
            how += f"-{loaded.folder.name}"
        if self.own:
            return how if self.held_out else f"-{self.part}{how}"
        prefix, path = place_of(self.data)
        place = f"{prefix}{path.resolve()}" if path.exists() else self.data
        digest = hashlib.sha256(place.encode("utf-8", "surrogateescape")).hexdigest()[:8]
        title = re.sub(r"[^\w.-]+", "_", title_of(self.data))[:_LONGEST_TITLE]
        return f"-{title}-{self.part}-{digest}{how}"

    def summary(self) -> list[str]:
        """A few lines for a terminal: how good, and compared with what."""
        return self.loaded.task.summary(self.metrics, self.noun)

    def notes(self) -> list[str]:
        """What a reader of the numbers has to know besides, a sentence each."""
        metrics, found = self.metrics, list(self.of_data)
        if metrics.images < FEW:
            found.append(
                f"measured on only {metrics.images} {self.noun}: the intervals are wide, and rough "
                f"themselves"
            )
        return found + self.loaded.task.notes(metrics, self.noun)


_LONGEST_TITLE = 80
"""Of data, in a file's name."""


def evaluate(
    run: Run | Path | str,
    *,
    data: str | None = None,
    columns: Columns | None = None,
    rules: FolderRules = USUAL,
    masks: MaskRules = AS_THEY_SAY,
    split: Part | None = None,
    checkpoint: str | None = None,
    device: str | None = None,
    batch_size: int = 64,
    tta: str = "none",
    tokens: str | None = None,
    world: World = ALONE,
    known: Measured | None = None,
    splits: Splits | None = None,
) -> Evaluation:
    """Measure `run`, and write metrics.json and predictions.csv into its folder.

    What is measured is the task's: accuracy and the like of a classifier, the IoU of masks, k-NN
    and RankMe of features (`vitrail.metrics`).

    `data` is other images than the run's own, in classes that the model knows, or in any where it
    learned features alone; `columns` names its columns and `masks` say how masks are understood,
    by default as the run's (what of `masks` is its default is the run's, too), and `rules` are for
    a folder. `split` is the part that is measured; the default is the test part, else the
    validation part, else (of other data) all. `checkpoint` is last or best, by default the one that
    the run keeps; `device` the run's.

    `tta` averages several looks at each image (test-time augmentation: flip, scales, flip+scales);
    the files then have a name of their own, metrics-tta-flip.json. `tokens` (tome:r=13) merges or
    drops tokens, and has its own files as well. The processes of a `world` share the images, each
    once; all of them get the whole result, and the first writes it. `known`: what the run has just
    measured of these very images with this very checkpoint; `splits`: its data, opened.

    Raises `DataError` for a run, a checkpoint or images that are not as they must be, `UsageError`
    for an unknown `tta`, or `tokens` that the model cannot do.
    """
    looks(tta)  # so that a wrong name is told at once
    loaded = load(run, checkpoint, tokens, tta)
    named, learned_names = data or loaded.config.data.path, loaded.names
    chosen = (
        _open_other(data, columns, rules, masks, loaded.config, split)
        if data
        else _choose_own(loaded.run, loaded.config, splits, split, told=(columns, rules, masks))
    )
    texts = isinstance(chosen.source.targets, Texts)
    if texts or (data and loaded.task.banked):  # no label was learned from: only to measure by
        judge = TASKS[loaded.config.task].judge
        task = judge(loaded.model, loaded.config, chosen.source.targets, tta).eval()
        loaded = loaded._replace(task=task)
    who = _Who(loaded.task.targets, str(loaded.run.path))
    source = _Matched(chosen.source, who, named)
    place = world.device(device or loaded.config.device)

    def look(images: Source) -> Measured:
        loader = EvalLoader(
            images,
            loaded.preprocess,
            batch_size=1 if loaded.preprocess.alone else batch_size,
            workers=loaded.config.data.workers,
            device=place,
            part=world.part,
            reading=loaded.config.data.reading(),
        )
        return _measured(loaded, loader, named, world)

    found = known or look(source)
    n, rows = len(found.indices), found.rows
    if loaded.task.banked and chosen.others is not None:
        bank = look(_spread(_Matched(chosen.others, who, named)))
        rows = loaded.task.with_bank(rows, bank.rows)
    evaluation = Evaluation(
        loaded=loaded,
        data=named,
        part=chosen.part,
        held_out=chosen.held_out,
        own=data is None,
        source=source,
        indices=found.indices,
        rows=rows,
        metrics=loaded.task.judge(rows),
        skipped={key: why for each in world.gather(found.skipped) for key, why in each.items()},
        images_per_second=n / found.seconds,
        model_images_per_second=n / found.model_seconds,
        tta=tta,
        tokens=tokens,
        learned_names=learned_names,
        of_data=chosen.notes,
    )
    if world.lead:
        _write(evaluation)
    return evaluation


class _Chosen(NamedTuple):
    part: Part
    source: Source
    held_out: bool
    others: Source | None = None
    """The training images, where these are none of them."""
    notes: tuple[str, ...] = ()


class Bundled(NamedTuple):
    """How good an exported model is, by the same code."""

    bundle: Bundle
    task: Task
    metrics: Metrics
    noun: str
    """What to call the images in a sentence."""
    skipped: dict[str, str]
    images_per_second: float
    model_images_per_second: float
    of_data: tuple[str, ...]

    def summary(self) -> list[str]:
        """A few lines for a terminal."""
        return self.task.summary(self.metrics, self.noun)

    def notes(self) -> list[str]:
        """What a reader of the numbers has to know besides."""
        return [*self.of_data, *self.task.notes(self.metrics, self.noun)]


def evaluate_bundle(
    folder: Path | str,
    *,
    data: str | None = None,
    columns: Columns | None = None,
    rules: FolderRules = USUAL,
    masks: MaskRules = AS_THEY_SAY,
    split: Part | None = None,
) -> Bundled:
    """Measure an exported model; a bundle is as it was made, and nothing is written into it.

    Without `data`, on the held-out images of the run that it was made from, where that still lies
    where it did. Raises `DataError` where it does not, and as `evaluate` does.
    """
    bundle = Bundle.open(folder)
    config = from_dict(bundle.learned, str(folder))
    if data:
        chosen = _open_other(data, columns, rules, masks, config, split)
    else:
        place = bundle.folder / str(bundle.made.get("run"))
        if not (place / "config.yaml").is_file():
            raise DataError(
                f"the run that {folder} was made from is not at {place} any more: name labelled "
                f"images with {setting('data')}"
            )
        run = Run(place)
        chosen = _choose_own(run, run.config(), None, split, told=(columns, rules, masks))
    engine = engine_of(bundle)
    known = TASKS[config.task].stated(
        {"classes": bundle.reading.names, "multi_label": bundle.reading.several}
    )
    own = chosen.source.targets if isinstance(known, Nothing) else known
    task = task_of(engine, bundle.reading, config, own)
    who = _Who(known if task.banked else task.targets, str(folder))
    named = data or "the run's data"

    def look(images: Source) -> Measured:
        return _held(measure(task, images, levels(bundle.preprocess), config), named)

    source = chosen.source if task.banked else _Matched(chosen.source, who, named)
    found = look(source)
    rows = found.rows
    if task.banked and chosen.others is not None:
        rows = task.with_bank(rows, look(_spread(chosen.others)).rows)
    return Bundled(
        bundle,
        task,
        task.judge(rows),
        noun_of(chosen.part, chosen.held_out),
        found.skipped,
        len(found.indices) / found.seconds,
        len(found.indices) / found.model_seconds,
        chosen.notes,
    )


def noun_of(part: Part, held_out: bool) -> str:
    """What to call these images in a sentence."""
    if held_out:
        return "held-out images"
    return {"train": "training images", "val": "validation images", "test": "test images"}.get(
        part, "images"
    )


def _choose_own(
    run: Run,
    config: TrainConfig,
    splits: Splits | None,
    split: Part | None,
    *,
    told: tuple[Columns | None, FolderRules, MaskRules],
) -> _Chosen:
    """A part of the run's own images, divided as they were for training. `told` is of others."""
    columns, rules, masks = told
    if any(columns or ()):
        raise UsageError(f"columns are those of other images: name them with {setting('data')}")
    if rules != USUAL or masks != AS_THEY_SAY:
        raise UsageError(
            f"{setting('data.parts')}, {setting('data.follow_links')} and {setting('data.masks')} "
            f"go with {setting('data')}: the run has its own"
        )
    if splits is None:
        file = run.split_file
        splits = open_data_of(config, file if file.is_file() else None)
    parts = splits.parts
    if split == "all":
        return _Chosen("all", Joined(parts), False)
    held_out: Part = "test" if splits.test is not None else "val"
    part = split or held_out
    if part not in parts:
        raise UsageError(f"the data of {run.path} has no part '{part}': {_list(parts)}")
    others = parts.get("train") if part != "train" else None
    return _Chosen(part, parts[part], part == held_out, others)


def _open_other(
    data: str,
    columns: Columns | None,
    rules: FolderRules,
    masks: MaskRules,
    config: TrainConfig,
    split: Part | None,
) -> _Chosen:
    """Other images: the part that their maker has set apart for tests, or all."""
    if not any(columns or ()) and list_file(Path(data).expanduser()):
        own = config.data
        columns = Columns(own.image_column, own.label_column, own.split_column, own.caption_column)
    changed = {name: x for name, x in vars(masks).items() if x != getattr(AS_THEY_SAY, name)}
    source: PartedSource = open_data(
        data,
        columns,
        rules,
        masks=replace(config.data.masks, **changed),
        targets=TASKS[config.task].targets,
    )
    notes = (*(one.sentence() for one in source.left_out), *source.notes)
    if isinstance(source.targets, Masks):
        notes += held_by(source.targets)
    there = [name for number, name in enumerate(PARTS) if (source.part == number).any()]
    part = split or _set_apart(there)
    if part == "all":
        return _Chosen(part, source, False, notes=notes)
    if part not in there:
        raise UsageError(f"{data} has no part '{part}': {_list(there)}")

    def of(part: str) -> Subset:
        return Subset(source, np.flatnonzero(source.part == PARTS.index(part)))

    others = of("train") if "train" in there and part != "train" else None
    return _Chosen(part, of(part), False, others, notes)


def _set_apart(parts: Sequence[str]) -> Part:
    """What the maker of a data set meant for measuring."""
    if "test" in parts:
        return "test"
    return "val" if "val" in parts else "all"


class _Matched:
    """A source with the model's classes, found by their names."""

    def __init__(self, source: Source, who: "_Who", data: str) -> None:
        self._source = source
        self.targets: Targets = _matched(source.targets, who, data)

    def __len__(self) -> int:
        return len(self._source)

    def key(self, i: int) -> str:
        return self._source.key(i)

    def load(self, i: int) -> Image.Image:
        return self._source.load(i)

    def encoded(self, i: int) -> Encoded | None:
        """Image `i` as its file, or a part of one; None if it lies in memory as pixels."""
        return encoded(self._source, i)

    def stamp(self, i: int) -> str:
        return self._source.stamp(i)


class _Who(NamedTuple):
    """A model that is to be measured."""

    targets: Targets
    """What it knows."""
    name: str


def _matched(targets: Targets, who: _Who, data: str) -> Targets:
    """The source's targets in the model's numbering."""
    known = who.targets
    if targets.kind != known.kind:
        raise DataError(
            f"{data} comes with {targets.kind}, but {who.name} was trained on "
            f"{known.kind}: measure it on such data"
        )
    if isinstance(known, Classes) and isinstance(targets, Classes):
        if targets.several and not known.several:
            raise DataError(
                f"the images of {data} have several labels, but {who.name} was trained to "
                f"give one: train a run on such images"
            )
        if known.several and not targets.several:
            targets = Classes(targets.names, targets.shares(np.arange(len(targets))) > 0)
    unknown = [name for name in targets.present() if name not in known.names]
    if unknown:
        near = get_close_matches(unknown[0], known.names, n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise DataError(
            f"{data} has images of '{unknown[0]}'{hint}, a class that {who.name} does not "
            f"know; its classes: {_list(known.names)}. Rename or remove the class, or train a "
            f"run with it"
        )
    return targets.renumbered(known.names)


def _spread(train: Source) -> Subset:
    """Training images, evenly spread where there are very many."""
    some = np.linspace(0, len(train) - 1, min(len(train), _MOST_BANKED)).astype(int)
    return Subset(train, some)


_MOST_BANKED = 10_000


def _measured(loaded: LoadedRun, loader: EvalLoader, data: str, world: World) -> Measured:
    task, preprocess = loaded.task.to(loader.device).eval(), loaded.preprocess
    half = loaded.config.precision == "bfloat16"
    with torch.inference_mode(), torch.autocast(loader.device.type, torch.bfloat16, enabled=half):
        # The first call sets up more than it computes.
        task.model(torch.zeros(1, preprocess.channels, *preprocess.size, device=loader.device))
    return _held(measured(task, loader, world, half=half), data)


def _held(found: Measured, data: str) -> Measured:
    """What was measured. Raises `DataError` where that is nothing."""
    if not len(found.indices):
        first = next(iter(found.skipped.items()), ("", "there are none"))
        raise DataError(f"no image of {data} can be read: {first[0]}: {first[1]}")
    return found


def _write(evaluation: Evaluation) -> None:
    run, name = evaluation.loaded.run, f"metrics{evaluation.suffix}.json"
    if evaluation.own and evaluation.suffix and (run.path / name).is_file():
        # Before places were part of names, other data that is called `train` could be in there.
        before = read_json(run.path / name).get("data")
        if before not in (None, evaluation.data):
            raise DataError(
                f"{run.path / name} holds what was measured on {before}: move it away, and measure "
                f"again"
            )
    run.write(name, _as_json(evaluation))
    run.write(f"predictions{evaluation.suffix}.csv", _as_csv(evaluation))


def _as_json(evaluation: Evaluation) -> str:
    names = evaluation.loaded.names
    content: dict[str, Any] = {
        "data": evaluation.data,
        "part": evaluation.part,
        "checkpoint": evaluation.loaded.checkpoint,
        "tta": evaluation.tta,
        "tokens": evaluation.tokens,
        "images_per_second": round(evaluation.images_per_second, 1),
        "model_images_per_second": round(evaluation.model_images_per_second, 1),
        "unreadable": evaluation.skipped,
        "classes": names,
        "absent": [names[k] for k in getattr(evaluation.metrics, "absent", ())],
        **evaluation.metrics.to_dict(),
    }
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _as_csv(evaluation: Evaluation) -> str:
    """Each image's key, and what the task says of it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header, *lines = evaluation.loaded.task.table(evaluation.rows)
    writer.writerow(("key", *header))
    writer.writerows((key, *line) for key, line in zip(evaluation.keys, lines, strict=True))
    return text.getvalue()


def _list(names: Iterable[str]) -> str:
    return shortened(names, 20)
