"""A finished run as a model that is ready to use, with all that is needed to use it rightly."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vitrail.data.views.preprocess import Preprocess
from vitrail.errors import DataError, setting
from vitrail.models import Model, with_tokens
from vitrail.runs.checkpoint import Checkpoint, check_checkpoint, model_sha256, read_checkpoint
from vitrail.runs.config import TrainConfig
from vitrail.runs.folder import Run, best_of, step_of
from vitrail.tasks import TASKS, Task


class LoadedRun(NamedTuple):
    """What a checkpoint of a run holds."""

    task: Task
    """In evaluation mode, on the CPU; without what only training needs."""
    preprocess: Preprocess
    """What the model has to be shown."""
    config: TrainConfig
    run: Run
    checkpoint: str
    """By which name it was asked for: last, best or step-NUMBER."""
    folder: Path
    """Where that was: which checkpoint is the last may change while a run goes on."""
    sha256: str
    """What identifies the model."""

    @property
    def model(self) -> Any:
        """What the task judges; of classification it gives logits `[b c]`."""
        return self.task.model

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes, in the model's order."""
        return self.task.targets.names


def load(
    run: Run | Path | str,
    checkpoint: str | None = None,
    tokens: str | None = None,
    tta: str = "none",
) -> LoadedRun:
    """Read a run's model from its `checkpoint`: last, best, step-NUMBER; None: what the run keeps.

    `tokens` makes it work with fewer of them (`tome:r=13`); the default is as it was trained.
    `tta`: how often it looks at an image, a name in `vitrail.tasks.tta.LOOKS`.

    Raises `DataError` where there is no such run or checkpoint, it is damaged or does not fit the
    config; `UsageError` for `tokens` that the model cannot do.
    """
    run = run if isinstance(run, Run) else Run(run)
    config = run.config()
    if tokens is not None:
        config = replace(config, model=with_tokens(config.model, tokens))
    name = checkpoint or config.keep
    tensors, state, folder = _read(run, name)
    kind = TASKS[config.task]
    try:
        targets = kind.stated(state)
        with torch.random.fork_rng(devices=[]):  # what is drawn for it is replaced at once
            model = kind.model(config, targets)
        model.load_state_dict(tensors["model"])
    except (KeyError, RuntimeError, DataError) as error:
        raise DataError(
            f"the checkpoint {folder} does not fit {run.config_file}: "
            f"{' '.join(str(error).split())}"
        ) from error
    task = kind.judge(model, config, targets, tta).eval()
    return LoadedRun(task, config.preprocess(), config, run, name, folder, model_sha256(folder))


def _read(run: Run, name: str) -> Checkpoint:
    """A checkpoint by its name. Raises `DataError`, with the names of those that can be read."""
    folder = run.checkpoint(name)
    try:
        return read_checkpoint(folder)
    except DataError as error:
        if (moved := run.checkpoint(name)) != folder:
            return read_checkpoint(moved)  # the run goes on, and has put another in its place
        raise DataError(f"{error}. {_instead(run, folder)}") from error


def _instead(run: Run, folder: Path) -> str:
    """Which whole checkpoints of a run there are besides `folder`, in words."""
    whole = []
    for other in run.checkpoints():
        if other != folder:
            with suppress(DataError):
                check_checkpoint(other)
                whole.append(other)
    if not whole:
        return f"{run.path} has no other checkpoint that is whole"
    best = best_of(whole)
    names = [
        (f"step-{step_of(other)}" if step_of(other) >= 0 else other.name)
        + (" (the best of them)" if other == best else "")
        for other in whole
    ]
    return f"What can be used instead: {setting('checkpoint')} {' or '.join(names)}"


def load_model(run: Run | Path | str, checkpoint: str | None = None) -> Model:
    """The run's model alone, in evaluation mode: what `vitrail.load` gives."""
    return load(run, checkpoint).model
