"""The main job, whole: open the data, train, measure on the held-out images, write the report."""

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vitrail.data import Source, Splits, write_split
from vitrail.data.loader import EvalLoader, TrainLoader, one_hot
from vitrail.errors import UsageError
from vitrail.evaluation import Evaluation, evaluate
from vitrail.models import Model, ViTConfig, build
from vitrail.report import write_report
from vitrail.runs import Run, RunLock, TrainConfig
from vitrail.runs.config import open_data_of
from vitrail.runs.device import pick_device
from vitrail.runs.start import open_start
from vitrail.runs.teacher import RECORD as TEACHER
from vitrail.runs.teacher import FoundTeacher, open_teacher, reopen_teacher
from vitrail.tasks import Classify, Distill, Prune, Teacher
from vitrail.training import fit, fit_probe
from vitrail.training.board import board
from vitrail.training.progress import Listener
from vitrail.training.sweep import Sweep
from vitrail.training.sweep import find_lr as sweep
from vitrail.training.tune import check_tuning, lr_warning
from vitrail.weights import load_into

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
    listen: Listener = lambda event: None,
    notify: Notify = lambda sentence: None,
) -> Outcome:
    """Train as `config` says, into the new run folder `out` (default: runs/NAME-N), and judge it.

    The data decides the number of classes. Raises `UsageError` and `DataError`, always before
    anything of the user's is touched.
    """
    splits = _open(config)
    config = _settled(config, splits)
    check_tuning(config)
    folder = Path(out) if out else _free_folder(config.data.path)
    if config.distill.teacher == str(folder.resolve()):
        raise UsageError(
            f"{folder} cannot be the run to make and its teacher: choose another --out"
        )
    teacher = open_teacher(
        config, splits.train.classes, multi_label=_several(splits), notify=notify
    )
    with torch.device("meta"):  # what the task would refuse, before anything is made
        _task(build(config.model), config, splits, teacher and teacher.teacher)
    run = Run.create(folder, config)
    write_split(splits, run.split_file)
    return _work(run, run.config(), splits, teacher, resume=False, listen=listen, notify=notify)


def find_lr(config: TrainConfig, *, notify: Notify = lambda sentence: None) -> Sweep:
    """Which learning rates the run that `config` describes could bear; nothing is written.

    Raises as `train` does.
    """
    if config.method == "probe":
        raise UsageError("method 'probe' has no learning rate to find: use method 'gradient'")
    splits = _open(config)
    config = _settled(config, splits)
    check_tuning(config)
    found = open_teacher(config, splits.train.classes, multi_label=_several(splits), notify=notify)
    device = _prepare(config)
    model = build(config.model)
    if config.weights:
        _start(model, config, splits.train.classes, notify)
    task = _task(model, config, splits, found and found.teacher).to(device)
    return sweep(task, _train_loader(config, splits.train, device), config)


def _settled(config: TrainConfig, splits: Splits) -> TrainConfig:
    """The config as the data decides it, with names that hold from any folder."""
    return replace(
        config,
        model=replace(config.model, classes=len(splits.train.classes)),
        data=replace(config.data, path=_anywhere(config.data.path)),
        weights=config.weights and _anywhere(config.weights),
        distill=replace(
            config.distill, teacher=config.distill.teacher and _anywhere(config.distill.teacher)
        ),
    )


def resume(
    run: Run,
    config: TrainConfig | None = None,
    *,
    listen: Listener = lambda event: None,
    notify: Notify = lambda sentence: None,
) -> Outcome:
    """Go on with a run from its last checkpoint, with the very same split and order.

    `config` may give the run another length; the default is the run's own.
    """
    config = config or run.config()
    splits = _open(config, assignment=run.split_file)
    teacher = reopen_teacher(
        run, config, splits.train.classes, multi_label=_several(splits), notify=notify
    )
    return _work(run, config, splits, teacher, resume=True, listen=listen, notify=notify)


def _open(config: TrainConfig, assignment: Path | None = None) -> Splits:
    splits = open_data_of(config, assignment)
    if splits.val is None:
        raise UsageError("nothing would be held out to measure on: give data.val_fraction above 0")
    return splits


def _work(
    run: Run,
    config: TrainConfig,
    splits: Splits,
    found: FoundTeacher | None,
    *,
    resume: bool,
    listen: Listener,
    notify: Notify,
) -> Outcome:
    started = time.perf_counter()
    for note in splits.notes:
        notify(note)
    device = _prepare(config)
    model = build(config.model)
    if config.weights and not resume:
        run.write("weights.json", _start(model, config, splits.train.classes, notify))
        if warning := lr_warning(config):
            notify(warning)
    if found:
        run.write(TEACHER, json.dumps(found.record, indent=1))
    task = _task(model, config, splits, found and found.teacher).to(device)
    train_loader = _train_loader(config, splits.train, device)
    val_loader = EvalLoader(
        splits.val, config.preprocess(), workers=config.data.workers, device=device
    )
    with RunLock(run), ExitStack() as stack:
        if config.tensorboard:
            listen = _both(listen, stack.enter_context(board(run.path / "tensorboard")))
        learn = fit_probe if config.method == "probe" else fit
        learn(task, train_loader, val_loader, config, run, resume=resume, listen=listen)
        skipped = train_loader.skipped | val_loader.skipped
        run.write_skipped(skipped)
        evaluation = evaluate(run, checkpoint=config.keep)
        report = write_report(run, evaluation)
    seconds = time.perf_counter() - started
    checkpoint = run.checkpoint(config.keep)
    return Outcome(run, checkpoint, evaluation, report, skipped, seconds)


def _prepare(config: TrainConfig) -> torch.device:
    """Set the threads and the seed; the device."""
    device = pick_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    return device


def _task(
    model: Model, config: TrainConfig, splits: Splits, teacher: Teacher | None = None
) -> Classify:
    classes = splits.train.classes
    counts = torch.from_numpy(one_hot(splits.train.targets, len(classes)).sum(axis=0))
    several = _several(splits)
    if config.model.family == "dynamicvit":
        return Prune(model, config.classify, classes, counts, several, config.prune, teacher)
    if teacher:
        return Distill(model, config.classify, classes, counts, several, teacher, config.distill)
    return Classify(model, config.classify, classes, counts, several)


def _several(splits: Splits) -> bool:
    """Whether an image may have several labels."""
    return splits.train.targets.ndim == 2


def _train_loader(config: TrainConfig, source: Source, device: torch.device) -> TrainLoader:
    return TrainLoader(
        source,
        config.train_preprocess(),
        config.augment,
        batch_size=config.data.batch_size,
        seed=config.seed,
        workers=config.data.workers,
        max_unreadable=config.data.max_unreadable,
        device=device,
    )


def _start(model: Model, config: TrainConfig, classes: tuple[str, ...], notify: Notify) -> str:
    """Give the model its published weights; what they were and what became of them, as JSON."""
    told: dict[str, Any] = {}
    if isinstance(config.model, ViTConfig):
        told = {"heads": config.model.heads, "norm_eps": config.model.norm_eps}
        if config.model.activation != "swiglu":
            told["activation"] = config.model.activation
    assert config.weights is not None
    opened = open_start(config.weights, told, notify=notify)
    fitted = load_into(model, opened, classes)
    for note in (*opened.notes, *fitted.notes):
        notify(f"weights   {note}")
    return json.dumps(
        {
            "source": opened.source,
            "sha256": opened.sha256,
            "layout": opened.layout,
            "notes": [*opened.notes, *fitted.notes],
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
    """The name of data or weights as it can be found from any folder."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def _free_folder(data: str) -> Path:
    """runs/NAME-N with the first N that is free."""
    name = Path(data.removeprefix("samples:")).stem or "data"
    number = 1
    while (folder := Path("runs") / f"{name}-{number}").exists():
        number += 1
    return folder
