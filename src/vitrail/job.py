"""The main job, whole: open the data, train, measure on the held-out images, write the report."""

import json
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vitrail import report
from vitrail.data import PartedSource, Splits, write_split
from vitrail.data.names import title_of
from vitrail.data.sources.source import refuse_inside
from vitrail.errors import UsageError, setting
from vitrail.evaluation import Evaluation, evaluate
from vitrail.planning.auto import ALL_GIVEN, Auto
from vitrail.planning.cluster import Cluster
from vitrail.planning.numbers import check_kept_maps, makers_of, room_for, with_numbers
from vitrail.planning.plan import Plan, make_plan
from vitrail.planning.sweep import Sweep
from vitrail.planning.sweep import find_lr as sweep
from vitrail.runs import Run, RunLock, TrainConfig
from vitrail.runs.data import open_data_of, settled, with_greys
from vitrail.runs.identity import IDENTITY, identity, read_identity, refuse_changes
from vitrail.runs.join import check_layout, join_world
from vitrail.runs.machine import left_as_found
from vitrail.runs.parts import (
    model_of,
    opened_start,
    opened_text,
    prepare,
    start,
    start_text,
    task_of,
    train_loader,
    val_loader,
)
from vitrail.runs.start import OpenedText
from vitrail.runs.teacher import RECORD as TEACHER
from vitrail.runs.teacher import FoundTeacher, open_teacher, reopen_teacher
from vitrail.runs.world import ALONE, World
from vitrail.tasks.table import FEW, TASKS
from vitrail.training import fit, fit_probe
from vitrail.training.board import board
from vitrail.training.measure import Measured
from vitrail.training.progress import Listener
from vitrail.training.tune import check_tuning, lr_warning
from vitrail.weights import Opened

Notify = Callable[[str], None]
"""Told of what a user should read while the job goes on."""


class Outcome(NamedTuple):
    """What the main job leaves behind."""

    run: Run
    checkpoint: Path
    evaluation: Evaluation
    """Its `metrics.summary` has the numbers: `top1` and others of classify, `miou` and others of
    segment, `rankme` of features (and `knn` and `probe`, where classes are known),
    `image_to_text_r1` and others of clip, siglip and lit.
    """
    report: Path
    skipped: dict[str, str]
    """Key and reason of every image, of training or held out, that could not be read."""
    seconds: float


def train(
    config: TrainConfig,
    out: Path | str | None = None,
    *,
    auto: Auto = ALL_GIVEN,
    source: PartedSource | None = None,
    weights: Opened | None = None,
    listen: Listener = lambda event: None,
    notify: Notify = lambda sentence: None,
) -> Outcome:
    """Train as `config` says, into the new run folder `out` (default: runs/NAME-N), and judge it on
    the images that it held out: an `Outcome`, the same for every task.

    The data decides the number of classes, and the free memory the numbers that are `auto`; the
    folder has them in its config. `source` and `weights` are the config's, where they are open
    already; the weights are used up. Raises `UsageError` and `DataError`, always before anything of
    the user's is touched.
    """
    with left_as_found(), join_world(config.device, config.stall_seconds) as world:
        config = auto.start(config, world.size)
        check_layout(config, world.size)
        world.device(config.device)  # raises for one that is not there
        begun = world.run
        folder = Path(world.lead_says(begun or str(out or free_folder(config.data.path))))
        # The lead decides: it would make the folder while another still asks whether it is there.
        if world.lead_says(begun is not None and world.lead and (folder / "config.yaml").is_file()):
            return _resume(Run(folder), world, listen=listen, notify=notify)
        refuse_inside(folder, Path(config.data.path).expanduser())
        named = config.distill.teacher
        if named and Path(named).expanduser().resolve() == folder.resolve():
            raise UsageError(
                f"{folder} cannot be the run to make and its teacher: choose another "
                f"{setting('out')}"
            )
        begun_with = _begin(config, source, weights, world, auto, notify)
        splits = begun_with.splits
        if world.lead:
            run = Run.create(folder, begun_with.config)
            world.run = str(folder.resolve())
            _note(run, splits, identity(begun_with.config, splits))
        world.gather("the run folder is there")
        run = Run(folder)
        begun_with = begun_with._replace(config=run.config())
        return _work(run, begun_with, world, resume=False, listen=listen, notify=notify)


@left_as_found()
def find_lr(
    config: TrainConfig,
    *,
    auto: Auto = ALL_GIVEN,
    source: PartedSource | None = None,
    weights: Opened | None = None,
    notify: Notify = lambda sentence: None,
) -> Sweep:
    """Which learning rates the run that `config` describes could bear; nothing is written.

    Raises as `train` does.
    """
    if config.method == "probe":
        raise UsageError(
            f"{setting('method', 'probe')} has no learning rate to find: use "
            f"{setting('method', 'gradient')}"
        )
    config, splits, found, opened, text = _begin(config, source, weights, ALONE, auto, notify)
    device = prepare(config)
    model = model_of(config, splits)
    if opened:
        start(model, config, opened, splits.train.targets.names, notify)
    if text:
        start_text(model, text, splits.train.targets, notify)
    task = task_of(model, config, splits, found and found.teacher).to(device)
    return sweep(task, train_loader(config, splits, device), config)


@left_as_found()
def plan(
    config: TrainConfig,
    out: Path | str | None = None,
    cluster: Cluster | None = None,
    *,
    auto: Auto = ALL_GIVEN,
    source: PartedSource | None = None,
    weights: Opened | None = None,
    notify: Notify = lambda sentence: None,
) -> Plan:
    """What the run that `config` describes would take, here and on a `cluster`; nothing is written.

    `out` is where its folder would be. Raises as `train` does.
    """
    config, splits, found, opened, text = _begin(config, source, weights, ALONE, ALL_GIVEN, notify)
    for note in splits.notes:
        notify(note)
    device = prepare(config)
    place = Path(out or free_folder(config.data.path)).absolute()
    while not place.exists():
        place = place.parent
    makers = makers_of(config, splits, found and found.teacher, opened, text, device)
    room = room_for(device, config.devices)._replace(disk=shutil.disk_usage(place).free)
    return make_plan(
        config, splits, makers, device, room, cluster or Cluster(), auto=auto, notify=notify
    )


class _Begun(NamedTuple):
    """What a run begins with."""

    config: TrainConfig
    splits: Splits
    teacher: FoundTeacher | None
    weights: Opened | None = None
    text: OpenedText | None = None


def _begin(
    config: TrainConfig,
    source: PartedSource | None,
    weights: Opened | None,
    world: World,
    auto: Auto,
    notify: Notify,
) -> _Begun:
    """Open the data and the teacher, settle what follows from them, and refuse what could not be
    trained, before anything is made.
    """
    splits = open_data_of(config, source=source)
    config = settled(config, splits)
    # One looks, for an image that another cannot read would make theirs another run.
    looked = with_greys(config, splits, notify) if world.lead else config
    greys = world.lead_says(looked.data.grey_range)
    config = replace(config, data=replace(config.data, grey_range=greys and tuple(greys)))
    found = open_teacher(config, splits.train.targets, notify=notify)
    with torch.device("meta"):
        check_tuning(config, model_of(config, splits))
        task_of(model_of(config, splits), config, splits, found and found.teacher)
    check_kept_maps(config, splits, found and found.teacher, world)
    same = weights is not None and weights.source == config.weights
    opened = weights if same else opened_start(config, notify)
    text, teacher = opened_text(config, notify), found and found.teacher
    config = with_numbers(auto, config, splits, teacher, opened, text, world, notify)
    if opened is None and len(splits.train) < FEW and (advice := TASKS[config.task].few()):
        notify(
            f"{len(splits.train):,} images are few to learn features from nothing. What has been "
            f"seen to serve better, the best first: {advice}"
        )
    return _Begun(config, splits, found, opened, text)


def resume(
    run: Run,
    config: TrainConfig | None = None,
    *,
    accept_changes: bool = False,
    listen: Listener = lambda event: None,
    notify: Notify = lambda sentence: None,
) -> Outcome:
    """Go on with a run from its newest whole checkpoint, with the very same split and order; one
    that was stopped before its first starts again from its config.

    `config` may give the run another length; the default is the run's own. Where data or code are
    not what they were, that is a `UsageError` that says so, unless `accept_changes`.
    """
    config = config or run.config()
    with left_as_found(), join_world(config.device, config.stall_seconds) as world:
        check_layout(config, world.size)
        return _resume(
            run, world, config, accept_changes=accept_changes, listen=listen, notify=notify
        )


def _resume(
    run: Run,
    world: World,
    config: TrainConfig | None = None,
    *,
    accept_changes: bool = False,
    listen: Listener,
    notify: Notify,
) -> Outcome:
    config = config or run.config()
    anew, before = world.lead_says(world.lead and run.fresh()), read_identity(run)
    split = run.split_file if before or not anew else None  # or it may not be whole: see _note
    splits = open_data_of(config, split, allow_missing=accept_changes)
    now = identity(config, splits)
    for sentence in refuse_changes(before, now, accept=accept_changes):
        notify(sentence)
    if anew:
        notify(f"{run.path} holds no checkpoint: it starts again from its config, and its log anew")
    if world.lead and (anew or (accept_changes and before)):
        _note(run, splits, now)  # without what is gone
    teacher = reopen_teacher(run, config, splits.train.targets, notify=notify)
    weights = opened_start(config, notify) if anew else None
    text = opened_text(config, notify) if anew else None
    begun = _Begun(config, splits, teacher, weights, text)
    return _work(run, begun, world, resume=not anew, listen=listen, notify=notify)


def _note(run: Run, splits: Splits, made_with: dict[str, Any]) -> None:
    """Write down what the run is made with; the last file says that the others are whole."""
    run.write_environment()
    write_split(splits, run.split_file)
    run.write(IDENTITY, json.dumps(made_with))


def _work(
    run: Run,
    begun: _Begun,
    world: World,
    *,
    resume: bool,
    listen: Listener,
    notify: Notify,
) -> Outcome:
    started = time.perf_counter()
    config, splits, found, weights, text = begun
    for note in splits.notes:
        notify(note)
    device = prepare(config, world)
    model = model_of(config, splits)
    if weights:
        record = start(model, config, weights, splits.train.targets.names, notify)
        weights.state.clear()  # the model has them, and whoever opened them holds on to this
        if world.lead:
            run.write("weights.json", record)
        if warning := lr_warning(config):
            notify(warning)
    if text:
        start_text(model, text, splits.train.targets, notify)
    if found and world.lead:
        run.write(TEACHER, json.dumps(found.record, indent=1))
    task = task_of(model, config, splits, found and found.teacher).to(device)
    if weights:
        for words in task.begin(weights):
            notify(f"weights   {words}")
    train_images = train_loader(config, splits, device, world, notify)
    held_out = val_loader(config, splits.val, device, world)
    with ExitStack() as stack:
        if world.lead:
            stack.enter_context(RunLock(run))
            if config.tensorboard:
                listen = _both(listen, stack.enter_context(board(run.path / "tensorboard")))
        known: Measured | None = None
        if config.method == "probe":
            fit_probe(task, train_images, held_out, config, run, resume=resume, listen=listen)
        else:
            known = fit(
                task, train_images, held_out, config, run,
                resume=resume, listen=listen, notify=notify, world=world,
            ).found  # fmt: skip
        skipped: dict[str, str] = {}
        for each in world.gather(train_images.skipped | held_out.skipped):
            skipped |= each
        if config.keep != "last" or splits.test is not None or not (known and len(known.indices)):
            known = None  # other images, or another checkpoint, than was measured last
        evaluation = evaluate(run, checkpoint=config.keep, world=world, known=known, splits=splits)
        if world.lead:
            run.write_skipped(skipped)
            report.write_report(run, evaluation)
        world.gather("the report is written")
    seconds = time.perf_counter() - started
    checkpoint = run.checkpoint(config.keep)
    return Outcome(run, checkpoint, evaluation, run.path / "report.html", skipped, seconds)


def _both(first: Listener, second: Listener) -> Listener:
    def listen(event: dict[str, Any]) -> None:
        first(event)
        second(event)

    return listen


def free_folder(data: str) -> Path:
    """runs/NAME-N with the first N that is free."""
    name = title_of(data)
    number = 1
    while (folder := Path("runs") / f"{name}-{number}").exists():
        number += 1
    return folder
