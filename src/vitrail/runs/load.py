"""A finished run as a model that is ready to use, with all that is needed to use it rightly."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from vitrail.data.views.preprocess import Preprocess
from vitrail.errors import DataError, setting
from vitrail.models import Model, build, with_tokens
from vitrail.runs.checkpoint import Checkpoint, check_checkpoint, model_sha256, read_checkpoint
from vitrail.runs.config import TrainConfig
from vitrail.runs.folder import Run, best_of, step_of


class LoadedRun(NamedTuple):
    """What a checkpoint of a run holds."""

    model: Model
    """In evaluation mode, on the CPU; it gives logits `[b c]`."""
    classes: tuple[str, ...]
    """The names of the logits, in order."""
    multi_label: bool
    """Whether an image may have several labels: each logit then has a sigmoid of its own."""
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


def load(
    run: Run | Path | str, checkpoint: str | None = None, tokens: str | None = None
) -> LoadedRun:
    """Read a run's model from its `checkpoint`: last, best, step-NUMBER; None: what the run keeps.

    `tokens` makes it work with fewer of them (`tome:r=13`); the default is as it was trained.

    Raises `DataError` where there is no such run or checkpoint, it is damaged or does not fit the
    config; `UsageError` for `tokens` that the model cannot do.
    """
    run = run if isinstance(run, Run) else Run(run)
    config = run.config()
    if tokens is not None:
        config = replace(config, model=with_tokens(config.model, tokens))
    name = checkpoint or config.keep
    tensors, state, folder = _read(run, name)
    model = build(config.model)
    try:
        model.load_state_dict(tensors["model"])
        classes, multi_label = tuple(map(str, state["classes"])), bool(state["multi_label"])
    except (KeyError, RuntimeError) as error:
        raise DataError(
            f"the checkpoint {folder} does not fit {run.config_file}: "
            f"{' '.join(str(error).split())}"
        ) from error
    if len(classes) != config.model.classes:
        raise DataError(
            f"the checkpoint {folder} names {len(classes)} classes, but the model "
            f"in {run.config_file} has {config.model.classes}"
        )
    preprocess = config.preprocess()
    sha256 = model_sha256(folder)
    return LoadedRun(
        model.eval(), classes, multi_label, preprocess, config, run, name, folder, sha256
    )


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
