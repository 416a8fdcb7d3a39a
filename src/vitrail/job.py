"""The main job, whole: open the data, train, measure on the held-out images, write the report."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vitrail.data import Splits, write_split
from vitrail.data.loader import EvalLoader, TrainLoader, one_hot
from vitrail.errors import UsageError
from vitrail.evaluation import Evaluation, evaluate
from vitrail.models import build
from vitrail.report import write_report
from vitrail.runs import Run, RunLock, TrainConfig
from vitrail.runs.config import open_data_of
from vitrail.runs.device import pick_device
from vitrail.tasks import Classify
from vitrail.training import fit
from vitrail.training.board import board
from vitrail.training.loop import Listener

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
    run = Run.create(
        Path(out) if out else _free_folder(config.data.path),
        replace(
            config,
            model=replace(config.model, classes=len(splits.train.classes)),
            data=replace(config.data, path=_anywhere(config.data.path)),
        ),
    )
    write_split(splits, run.split_file)
    return _work(run, run.config(), splits, resume=False, listen=listen, notify=notify)


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
    return _work(run, config, splits, resume=True, listen=listen, notify=notify)


def _open(config: TrainConfig, assignment: Path | None = None) -> Splits:
    splits = open_data_of(config, assignment)
    if splits.val is None:
        raise UsageError("nothing would be held out to measure on: give data.val_fraction above 0")
    return splits


def _work(
    run: Run,
    config: TrainConfig,
    splits: Splits,
    *,
    resume: bool,
    listen: Listener,
    notify: Notify,
) -> Outcome:
    started = time.perf_counter()
    for note in splits.notes:
        notify(note)
    device = pick_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    counts = one_hot(splits.train.targets, len(splits.train.classes)).sum(axis=0)
    task = Classify(
        build(config.model),
        config.classify,
        splits.train.classes,
        torch.from_numpy(counts),
        multi_label=splits.train.targets.ndim == 2,
    ).to(device)
    preprocess, data = config.preprocess(), config.data
    train_loader = TrainLoader(
        splits.train,
        preprocess,
        config.augment,
        batch_size=data.batch_size,
        seed=config.seed,
        workers=data.workers,
        max_unreadable=data.max_unreadable,
        device=device,
    )
    val_loader = EvalLoader(splits.val, preprocess, workers=data.workers, device=device)
    with RunLock(run), ExitStack() as stack:
        if config.tensorboard:
            listen = _both(listen, stack.enter_context(board(run.path / "tensorboard")))
        fit(task, train_loader, val_loader, config, run, resume=resume, listen=listen)
        skipped = train_loader.skipped | val_loader.skipped
        run.write_skipped(skipped)
        evaluation = evaluate(run, checkpoint=config.keep)
        report = write_report(run, evaluation)
    seconds = time.perf_counter() - started
    checkpoint = run.checkpoint(config.keep)
    return Outcome(run, checkpoint, evaluation, report, skipped, seconds)


def _both(first: Listener, second: Listener) -> Listener:
    def listen(event: dict[str, Any]) -> None:
        first(event)
        second(event)

    return listen


def _anywhere(data: str) -> str:
    """The data's name as it can be found from any folder."""
    return data if data.startswith("samples:") else str(Path(data).expanduser().resolve())


def _free_folder(data: str) -> Path:
    """runs/NAME-N with the first N that is free."""
    name = Path(data.removeprefix("samples:")).stem or "data"
    number = 1
    while (folder := Path("runs") / f"{name}-{number}").exists():
        number += 1
    return folder
