"""The main job, whole: open the data, train, measure on the held-out images, write the report."""

import gc
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vitrail.data import Source, Splits, write_split
from vitrail.data.batches.loader import EvalLoader, TrainLoader
from vitrail.data.batches.making import Loader
from vitrail.data.batches.stream_loader import StreamLoader
from vitrail.data.names import title_of
from vitrail.data.sources.hub import place_of
from vitrail.data.sources.source import refuse_inside
from vitrail.data.sources.stream import StreamSource
from vitrail.doctor.machine import memory
from vitrail.errors import UsageError, setting
from vitrail.evaluation import Evaluation, evaluate
from vitrail.nn import BatchNorm
from vitrail.planning.auto import ALL_GIVEN, Auto
from vitrail.planning.cluster import Cluster
from vitrail.planning.paper import teacher_on_paper
from vitrail.planning.plan import Plan, Room, make_plan
from vitrail.planning.sweep import Sweep
from vitrail.planning.sweep import find_lr as sweep
from vitrail.planning.tryout import Makers
from vitrail.report import write_report
from vitrail.runs import Run, RunLock, TrainConfig
from vitrail.runs.config import open_data_of, with_greys
from vitrail.runs.identity import IDENTITY, identity, read_identity, refuse_changes
from vitrail.runs.join import check_layout, join_world
from vitrail.runs.machine import keep_freed_memory, left_as_found
from vitrail.runs.start import open_start
from vitrail.runs.teacher import RECORD as TEACHER
from vitrail.runs.teacher import FoundTeacher, open_teacher, reopen_teacher
from vitrail.runs.world import ALONE, World
from vitrail.tasks import TASKS, Task, Teacher, backbone_of
from vitrail.training import fit, fit_probe
from vitrail.training.board import board
from vitrail.training.measure import Measured
from vitrail.training.progress import Listener
from vitrail.training.tune import check_tuning, lr_warning
from vitrail.weights import load_into

_AUTO_SECONDS = 5.0
"""What finding a number may take, on top of making the model and of reading its first images."""

Notify = Callable[[str], None]
"""Told of what a user should read while the job goes on."""


class Outcome(NamedTuple):
    """What the main job leaves behind."""

    run: Run
    checkpoint: Path
    evaluation: Evaluation
    report: Path
    skipped: dict[str, str]
    """Key and reason of every image, of training or held out, that could not be read."""
    seconds: float


def train(
    config: TrainConfig,
    out: Path | str | None = None,
    *,
    auto: Auto = ALL_GIVEN,
    listen: Listener = lambda event: None,
    notify: Notify = lambda sentence: None,
) -> Outcome:
    """Train as `config` says, into the new run folder `out` (default: runs/NAME-N), and judge it.

    The data decides the number of classes, and the free memory the numbers that are `auto`; the
    folder has them in its config. Raises `UsageError` and `DataError`, always before anything of
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
        splits = _open(config)
        config = _settled(config, splits)
        # One looks, for an image that another cannot read would make theirs another run.
        looked = with_greys(config, splits, notify) if world.lead else config
        greys = world.lead_says(looked.data.grey_range)
        config = replace(config, data=replace(config.data, grey_range=greys and tuple(greys)))
        with torch.device("meta"):
            check_tuning(config, _model(config, splits))
        if config.distill.teacher == str(folder.resolve()):
            raise UsageError(
                f"{folder} cannot be the run to make and its teacher: choose another "
                f"{setting('out')}"
            )
        teacher = open_teacher(config, splits.train.targets, notify=notify)
        with torch.device("meta"):  # what the task would refuse, before anything is made
            _task(_model(config, splits), config, splits, teacher and teacher.teacher)
        config = _found(auto, config, splits, teacher and teacher.teacher, world, notify)
        if world.lead:
            run = Run.create(folder, config)
            world.run = str(folder.resolve())
            _note(run, splits, identity(config, splits))
        world.gather("the run folder is there")
        run = Run(folder)
        return _work(
            run, run.config(), splits, teacher, world, resume=False, listen=listen, notify=notify
        )


@left_as_found()
def find_lr(
    config: TrainConfig, *, auto: Auto = ALL_GIVEN, notify: Notify = lambda sentence: None
) -> Sweep:
    """Which learning rates the run that `config` describes could bear; nothing is written.

    Raises as `train` does.
    """
    if config.method == "probe":
        raise UsageError(
            f"{setting('method', 'probe')} has no learning rate to find: use "
            f"{setting('method', 'gradient')}"
        )
    splits = _open(config)
    config = with_greys(_settled(config, splits), splits, notify)
    with torch.device("meta"):
        check_tuning(config, _model(config, splits))
    found = open_teacher(config, splits.train.targets, notify=notify)
    config = _found(auto, config, splits, found and found.teacher, ALONE, notify)
    device = _prepare(config)
    model = _model(config, splits)
    if config.weights:
        _start(model, config, splits.train.targets.names, notify)
    task = _task(model, config, splits, found and found.teacher).to(device)
    return sweep(task, _train_loader(config, splits.train, device), config)


@left_as_found()
def plan(
    config: TrainConfig,
    out: Path | str | None = None,
    cluster: Cluster | None = None,
    *,
    auto: Auto = ALL_GIVEN,
    notify: Notify = lambda sentence: None,
) -> Plan:
    """What the run that `config` describes would take, here and on a `cluster`; nothing is written.

    `out` is where its folder would be. Raises as `train` does.
    """
    splits = _open(config)
    config = with_greys(_settled(config, splits), splits, notify)
    with torch.device("meta"):
        check_tuning(config, _model(config, splits))
    found = open_teacher(config, splits.train.targets, notify=notify)
    for note in splits.notes:
        notify(note)
    device = _prepare(config)
    place = Path(out or free_folder(config.data.path)).absolute()
    while not place.exists():
        place = place.parent
    makers = _makers(config, splits, found and found.teacher, device)
    room = _room(device, config.devices)._replace(disk=shutil.disk_usage(place).free)
    return make_plan(
        config, splits, makers, device, room, cluster or Cluster(), auto=auto, notify=notify
    )


def _found(
    auto: Auto,
    config: TrainConfig,
    splits: Splits,
    teacher: Teacher | None,
    world: World,
    notify: Notify,
) -> TrainConfig:
    """The config with the numbers that are `auto`: the same in all processes, which must all have
    room for them. One of them tries it out.
    """
    if not any(auto):
        return config
    device = _prepare(config, world)
    rooms = world.gather(_room(device, int(os.environ.get("LOCAL_WORLD_SIZE", world.size))))
    if world.lead:
        room = Room(
            *(min(known) if None not in known else None for known in zip(*rooms, strict=True))
        )
        makers = _makers(config, splits, teacher, device)
        shared = replace(config, devices=world.size)
        tried = make_plan(
            shared, splits, makers, device, room, Cluster(), auto=auto, seconds=_AUTO_SECONDS,
            notify=notify,
        )  # fmt: skip
        found = tried.config.data.batch_size, tried.config.micro_batch
        gc.collect()  # the model that was tried
    batch, at_once = world.lead_says(found if world.lead else None)
    return replace(config, data=replace(config.data, batch_size=batch), micro_batch=at_once)


def _room(device: torch.device, processes: int) -> Room:
    """What is free for each of so many processes on this machine."""
    here = memory()
    return Room(
        memory=here and here.free // processes,
        device=torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None,
        disk=None,
    )


def _makers(
    config: TrainConfig, splits: Splits, teacher: Teacher | None, device: torch.device
) -> Makers:
    """How a try-out of the run makes its parts."""

    def on_paper() -> Task:
        with torch.device("meta"):
            shadow = teacher and teacher_on_paper(teacher)
            return _alone(_task(_model(config, splits), config, splits, shadow))

    def task() -> Task:
        model = _model(config, splits)
        if config.weights:
            _start(model, config, splits.train.targets.names, lambda sentence: None)
        return _alone(_task(model, config, splits, teacher)).to(device)

    def train_loader(batch: int) -> Loader:
        changed = replace(config, data=replace(config.data, batch_size=batch))
        return _train_loader(changed, splits.train, device)

    def val_loader(source: Source, batch: int) -> EvalLoader:
        return EvalLoader(
            source,
            config.preprocess(),
            batch_size=batch,
            workers=config.data.workers,
            device=device,
            reading=config.data.reading(),
        )

    return Makers(on_paper, task, train_loader, val_loader)


def _alone(task: Task) -> Task:
    """The task, for one process of several to try: its batch norms wait for nobody."""
    for module in task.modules():
        if isinstance(module, BatchNorm):
            module.of_all = False
    return task


def _settled(config: TrainConfig, splits: Splits) -> TrainConfig:
    """The config as the data decides it, with names that hold from any folder."""
    prefix, place = place_of(config.data.path)
    classes = config.data.stream.classes
    stream = replace(config.data.stream, classes=classes and _anywhere(classes))
    if isinstance(splits.train, StreamSource):  # how many images there are is not always known
        held_out = len(splits.train.left_out) or stream.held_out
        stream = replace(stream, epoch=len(splits.train), held_out=held_out)
    return replace(
        config,
        model=replace(
            config.model,
            classes=len(splits.train.targets.names) if TASKS[config.task].classifies else 0,
        ),
        data=replace(
            config.data,
            path=f"{prefix}{place.resolve()}" if place.exists() else config.data.path,
            stream=stream,
        ),
        weights=config.weights and _anywhere(config.weights),
        distill=replace(
            config.distill, teacher=config.distill.teacher and _anywhere(config.distill.teacher)
        ),
    )


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
    splits = _open(config, assignment=split, allow_missing=accept_changes)
    now = identity(config, splits)
    for sentence in refuse_changes(before, now, accept=accept_changes):
        notify(sentence)
    if anew:
        notify(f"{run.path} holds no checkpoint: it starts again from its config, and its log anew")
    if world.lead and (anew or (accept_changes and before)):
        _note(run, splits, now)  # without what is gone
    teacher = reopen_teacher(run, config, splits.train.targets, notify=notify)
    return _work(run, config, splits, teacher, world, resume=not anew, listen=listen, notify=notify)


def _note(run: Run, splits: Splits, made_with: dict[str, Any]) -> None:
    """Write down what the run is made with; the last file says that the others are whole."""
    run.write_environment()
    write_split(splits, run.split_file)
    run.write(IDENTITY, json.dumps(made_with))


def _open(
    config: TrainConfig, assignment: Path | None = None, *, allow_missing: bool = False
) -> Splits:
    splits = open_data_of(config, assignment, allow_missing=allow_missing)
    if splits.val is None:
        raise UsageError(
            f"nothing would be held out to measure on: give {setting('data.val_fraction')} above 0"
        )
    return splits


def _work(
    run: Run,
    config: TrainConfig,
    splits: Splits,
    found: FoundTeacher | None,
    world: World,
    *,
    resume: bool,
    listen: Listener,
    notify: Notify,
) -> Outcome:
    started = time.perf_counter()
    for note in splits.notes:
        notify(note)
    device = _prepare(config, world)
    model = _model(config, splits)
    if config.weights and not resume:
        record = _start(model, config, splits.train.targets.names, notify)
        if world.lead:
            run.write("weights.json", record)
        if warning := lr_warning(config):
            notify(warning)
    if found and world.lead:
        run.write(TEACHER, json.dumps(found.record, indent=1))
    task = _task(model, config, splits, found and found.teacher).to(device)
    train_loader = _train_loader(config, splits.train, device, world, notify)
    val_loader = EvalLoader(
        splits.val,
        config.preprocess(),
        workers=config.data.workers,
        device=device,
        part=world.part,
        reading=config.data.reading(),
    )
    with ExitStack() as stack:
        if world.lead:
            stack.enter_context(RunLock(run))
            if config.tensorboard:
                listen = _both(listen, stack.enter_context(board(run.path / "tensorboard")))
        known: Measured | None = None
        if config.method == "probe":
            fit_probe(task, train_loader, val_loader, config, run, resume=resume, listen=listen)
        else:
            known = fit(
                task, train_loader, val_loader, config, run,
                resume=resume, listen=listen, notify=notify, world=world,
            )  # fmt: skip
        skipped: dict[str, str] = {}
        for each in world.gather(train_loader.skipped | val_loader.skipped):
            skipped |= each
        if config.keep != "last" or splits.test is not None or not (known and len(known.indices)):
            known = None  # other images, or another checkpoint, than was measured last
        evaluation = evaluate(run, checkpoint=config.keep, world=world, known=known)
        if world.lead:
            run.write_skipped(skipped)
            write_report(run, evaluation)
        world.gather("the report is written")
    seconds = time.perf_counter() - started
    checkpoint = run.checkpoint(config.keep)
    return Outcome(run, checkpoint, evaluation, run.path / "report.html", skipped, seconds)


def _prepare(config: TrainConfig, world: World = ALONE) -> torch.device:
    """Set the threads, the memory and the seed; the device."""
    device = world.device(config.device)
    if device.type == "cpu":
        keep_freed_memory(lean=config.checkpointing)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    return device


def _model(config: TrainConfig, splits: Splits) -> Any:
    return TASKS[config.task].model(config, splits.train.targets)


def _task(model: Any, config: TrainConfig, splits: Splits, teacher: Teacher | None = None) -> Task:
    return TASKS[config.task].learn(model, config, splits.train.targets, teacher)


def _train_loader(
    config: TrainConfig,
    source: Source | StreamSource,
    device: torch.device,
    world: World = ALONE,
    notify: Notify = lambda sentence: None,
) -> Loader:
    kind: Any = StreamLoader if isinstance(source, StreamSource) else TrainLoader
    loader: Loader = kind(
        source,
        config.train_preprocess(),
        config.views(),
        batch_size=config.data.batch_size,
        seed=config.seed,
        workers=config.data.workers,
        max_unreadable=config.data.max_unreadable,
        device=device,
        part=world.part,
        reading=config.data.reading(),
        notify=notify,
    )
    return loader


def _start(model: Any, config: TrainConfig, classes: tuple[str, ...], notify: Notify) -> str:
    """Give the model its published weights; what they were and what became of them, as JSON."""
    assert config.weights is not None
    opened = open_start(config.weights, wanted=asdict(config.model), notify=notify)
    kept = classes if TASKS[config.task].classifies else ()
    fitted = load_into(backbone_of(model), opened, kept)
    notes = [*opened.notes, *fitted.notes]
    if "probe" in (config.method, config.tune.head_init):
        notes.append("head: to begin with, it is solved as a linear probe of the data")
    for words in (*(f"assumed: {each}" for each in opened.assumed), *notes):
        notify(f"weights   {words}")
    return json.dumps(
        {
            "source": opened.source,
            "sha256": opened.sha256,
            "layout": opened.layout,
            "assumed": opened.assumed,
            "unseen": [one._asdict() for one in opened.unseen],
            "notes": notes,
            "new": fitted.new,
            "left_out": [*opened.left_out, *fitted.left_out],
        },
        indent=1,
    )


def _both(first: Listener, second: Listener) -> Listener:
    def listen(event: dict[str, Any]) -> None:
        first(event)
        second(event)

    return listen


def _anywhere(name: str) -> str:
    """The name of a file, of weights or of a run as it can be found from any folder."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def free_folder(data: str) -> Path:
    """runs/NAME-N with the first N that is free."""
    name = title_of(data)
    number = 1
    while (folder := Path("runs") / f"{name}-{number}").exists():
        number += 1
    return folder
