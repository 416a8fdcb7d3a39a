"""The teacher of a run that distils: found, checked against the student, and put on record."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from vitrail.data.pixels.greys import range_text
from vitrail.data.targets import Targets, classes_of
from vitrail.data.views.preprocess import Preprocess
from vitrail.errors import DataError, UsageError, VitrailError, setting
from vitrail.models import Model, build
from vitrail.runs.config import TrainConfig
from vitrail.runs.folder import Run
from vitrail.runs.load import load
from vitrail.tasks import TASKS, DistillConfig, PruneConfig, Teacher, backbone_of
from vitrail.weights import OURS, WEIGHTS, open_weights
from vitrail.weights.classes import match
from vitrail.weights.files import read_json

RECORD = "teacher.json"
"""What a run folder calls its record of the teacher."""
_SUITS = "train a teacher on the student's data, or the student on the classes of the teacher"


class FoundTeacher(NamedTuple):
    """A teacher that suits a run, and what the run folder is to say of it."""

    teacher: Teacher
    record: dict[str, Any]


class _Opened(NamedTuple):
    model: Model
    preprocess: Preprocess | None
    classes: tuple[str, ...]
    multi_label: bool | None
    """None: the file does not say."""
    sha256: str
    layout: str


def open_teacher(
    config: TrainConfig,
    targets: Targets,
    *,
    notify: Callable[[str], None] = lambda sentence: None,
) -> FoundTeacher | None:
    """The teacher that `config.distill` names, for a student of these targets; None: it names none.

    Raises `DataError` where there is no such teacher, `UsageError` for one that does not suit.
    """
    return _open_teacher(config, targets, named=True, notify=notify)


def _open_teacher(
    config: TrainConfig,
    targets: Targets,
    *,
    named: bool,
    notify: Callable[[str], None],
) -> FoundTeacher | None:
    _check_asked(config)
    source = config.distill.teacher
    if source is None:
        return None
    if TASKS[config.task].teacher == "features":
        return _of_features(config, source, notify)
    said = classes_of(targets, "a teacher")
    classes, multi_label = said.names, said.several
    if source in WEIGHTS:  # known before anything is fetched: what is published names no classes
        _order(source, WEIGHTS[source].config.classes, (), classes, named)
    opened = _open(source, notify)
    order = _order(source, opened.model.config.classes, opened.classes, classes, named)
    if opened.multi_label is not None and opened.multi_label != multi_label:
        kinds = {True: "any number of labels an image", False: "one label an image"}
        raise UsageError(
            f"the teacher {source} was trained for {kinds[opened.multi_label]}, the student is to "
            f"learn {kinds[multi_label]}: train a teacher on the student's data"
        )
    notes = []
    if order is not None:
        notes.append("its logits are put in the order of the student's classes")
    if not opened.classes:
        notes.append(
            f"the file names no classes: its {len(classes)} logits are taken for the student's, "
            f"in the same order"
        )
    return _found(source, opened, config, _sees(opened, config), notes, notify, order)


def _of_features(config: TrainConfig, source: str, notify: Callable[[str], None]) -> FoundTeacher:
    """One that is asked for features, whatever it was trained for, at a size that it takes."""
    opened = _open(source, notify, features=True)
    theirs = opened.model.config
    grid = _cells(config.train_preprocess().size, config.model.stride)
    as_many = grid[0] * theirs.stride[0], grid[1] * theirs.stride[1]
    size = config.distill_features.teacher_size or as_many
    try:
        theirs.check_size(size)
    except UsageError as error:
        raise UsageError(
            f"the teacher {source} cannot be shown images of {size[0]}x{size[1]} pixels: {error}. "
            f"Give {setting('distill_features.teacher_size', theirs.image_size)}, which it knows, "
            f"or another teacher"
        ) from error
    gh, gw = _cells(size, theirs.stride)
    of = f"{gh}x{gw} patches of {theirs.stride[0]}x{theirs.stride[1]}"
    notes = [f"it sees {of} where the student sees {grid[0]}x{grid[1]}"]
    return _found(source, opened, config, replace(_sees(opened, config), size=size), notes, notify)


def _cells(size: tuple[int, int], stride: tuple[int, int]) -> tuple[int, int]:
    return -(-size[0] // stride[0]), -(-size[1] // stride[1])


def _sees(opened: _Opened, config: TrainConfig) -> Preprocess:
    """What a teacher was taught to see; normalised as for the student, if nobody says how."""
    student = config.train_preprocess()
    size = opened.model.config.image_size
    return opened.preprocess or Preprocess(size=size, mean=student.mean, std=student.std)


def _found(
    source: str,
    opened: _Opened,
    config: TrainConfig,
    preprocess: Preprocess,
    notes: list[str],
    notify: Callable[[str], None],
    order: list[int] | None = None,
) -> FoundTeacher:
    """The teacher and its record, `notes` and what else there is to say of it."""
    student = config.train_preprocess()
    teacher = Teacher(opened.model, preprocess, student, order)
    if opened.preprocess is None:
        notes.append("how its makers normalised images is not known: as for the student, then")
    if preprocess.grey_range not in (None, student.grey_range):
        notes.append(
            f"deep greys of {range_text(preprocess.grey_range)} were its black to white, and are "
            f"now the student's: {setting('data.grey_range')} gives the student the same"
        )
    if preprocess.size != student.size:
        height, width = preprocess.size
        notes.append(f"it is shown the student's images at {height}x{width} pixels")
    for note in notes:
        notify(f"teacher   {note}")
    return FoundTeacher(
        teacher,
        {
            "source": source,
            "sha256": opened.sha256,
            "layout": opened.layout,
            "classes": list(opened.classes),
            "order": order,
            "preprocess": preprocess.to_dict(),
            "notes": notes,
        },
    )


def reopen_teacher(
    run: Run,
    config: TrainConfig,
    targets: Targets,
    *,
    notify: Callable[[str], None] = lambda sentence: None,
) -> FoundTeacher | None:
    """As `open_teacher`, for a run that goes on: the very teacher that it has learnt from so far.

    `config` may name another place for it.
    """
    if (config.distill.teacher is None) != (run.config().distill.teacher is None):
        raise UsageError(f"{run.path} cannot go on with a teacher if it had none, or without")
    try:
        # One that names no classes was taken at its number once.
        named = (before := read_json(run.path / RECORD)).get("classes") != []
        found = _open_teacher(config, targets, named=named, notify=notify)
    except DataError as error:
        raise DataError(
            f"{run.path} needs its teacher to go on. {error}. If it has moved, say where it is: "
            f"{setting('distill.teacher')} PLACE"
        ) from error
    if found and before and found.record["sha256"] != before["sha256"]:
        raise UsageError(
            f"{run.path} has learnt from another teacher than {found.record['source']} is now "
            f"(SHA-256 {before['sha256'][:12]}... then, {found.record['sha256'][:12]}... now): "
            f"put that one back, or start a new run"
        )
    return found


def _check_asked(config: TrainConfig) -> None:
    """Refuse what a run would have to ignore although it was asked for."""
    distill, prunes = config.distill, config.model.family == "dynamicvit"
    how = replace(distill, teacher=None) != DistillConfig()
    if how and distill.teacher is None:
        raise UsageError(
            f"{setting('distill.kind')}, alpha and temperature are about a teacher, but there is "
            f"none: give {setting('distill.teacher')} RUN_OR_WEIGHTS, or leave them out"
        )
    if how and prunes:
        raise UsageError(
            "a model that drops tokens learns from its teacher in a way of its own: leave out "
            f"{setting('distill.kind')}, alpha and temperature, and set {setting('prune.logits')} "
            f"and {setting('prune.tokens')}"
        )
    if config.prune != PruneConfig() and not prunes:
        raise UsageError(
            f"prune is for models that drop tokens, such as dynamicvit_s16, not for the family "
            f"'{config.model.family}': leave it out"
        )


def _open(source: str, notify: Callable[[str], None], *, features: bool = False) -> _Opened:
    """With `features` a run of any task will do, and without them one that has learned classes."""
    folder = Path(source).expanduser()
    try:
        if (folder / "config.yaml").is_file():
            loaded = load(Run(folder))
            several = not features and classes_of(loaded.task.targets, "a teacher").several
            return _Opened(
                backbone_of(loaded.model),
                loaded.preprocess,
                loaded.names,
                several,
                loaded.sha256,
                OURS,
            )
        opened = open_weights(source, notify=notify)
    except VitrailError as error:
        kind = UsageError if isinstance(error, UsageError) else DataError
        raise kind(
            f"{setting('distill.teacher')}: {error}. A teacher is the folder of a finished run, a "
            f"name that `vitrail weights` lists, or a file of weights"
        ) from error
    model = build(opened.config)
    model.load_state_dict(opened.state)
    return _Opened(model, opened.preprocess, opened.classes, None, opened.sha256, opened.layout)


def _order(
    source: str,
    logits: int,
    named: tuple[str, ...],
    classes: tuple[str, ...],
    must_be_named: bool,
) -> list[int] | None:
    """The place of each of the student's classes among the teacher's; None: the same.

    Raises `UsageError` where they are not the same classes, or are not known to be.
    """
    if not logits:
        raise UsageError(f"the teacher {source} has no head, and so no answers: {_SUITS}")
    if named and len(named) != logits:
        raise DataError(f"the teacher {source} names {len(named)} classes, but has {logits} logits")
    if not named and logits != len(classes):
        raise UsageError(
            f"the teacher {source} tells {logits} classes apart, the student is to learn "
            f"{len(classes)}: {_SUITS}"
        )
    if not named and not must_be_named:
        return None
    found = match(named, classes)
    if found.order is None:
        raise UsageError(
            f"the teacher {source} is not known to tell the student's classes apart: {found.why}. "
            f"What works: {_SUITS}; or, if only the names differ or lack, write a file with the "
            f"right ones, one a line in the order of its logits: vitrail weights convert FILE OUT "
            f"--to vitrail --classes NAMES.txt"
        )
    return None if found.order == tuple(range(logits)) else list(found.order)
