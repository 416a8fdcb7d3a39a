"""A finished run as a model that is ready to use, with all that is needed to use it rightly."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from vitrail.data.preprocess import Preprocess
from vitrail.errors import DataError
from vitrail.models import Model, build, with_tokens
from vitrail.runs.checkpoint import read_checkpoint
from vitrail.runs.config import TrainConfig
from vitrail.runs.folder import Run


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
    """last or best."""


def load(
    run: Run | Path | str, checkpoint: str | None = None, tokens: str | None = None
) -> LoadedRun:
    """Read a run's model from its `checkpoint` (last, best; None: the one that the run keeps).

    `tokens` makes it work with fewer of them (`tome:r=13`); the default is as it was trained.

    Raises `DataError` where there is no such run or checkpoint, or it does not fit the config;
    `UsageError` for `tokens` that the model cannot do.
    """
    run = run if isinstance(run, Run) else Run(run)
    config = run.config()
    if tokens is not None:
        config = replace(config, model=with_tokens(config.model, tokens))
    name = checkpoint or config.keep
    tensors, state = read_checkpoint(run.checkpoint(name))
    model = build(config.model)
    try:
        model.load_state_dict(tensors["model"])
        classes, multi_label = tuple(map(str, state["classes"])), bool(state["multi_label"])
    except (KeyError, RuntimeError) as error:
        raise DataError(
            f"the checkpoint {run.checkpoint(name)} does not fit {run.config_file}: "
            f"{' '.join(str(error).split())}"
        ) from error
    if len(classes) != config.model.classes:
        raise DataError(
            f"the checkpoint {run.checkpoint(name)} names {len(classes)} classes, but the model "
            f"in {run.config_file} has {config.model.classes}"
        )
    preprocess = config.preprocess()
    return LoadedRun(model.eval(), classes, multi_label, preprocess, config, run, name)


def load_model(run: Run | Path | str, checkpoint: str | None = None) -> Model:
    """The run's model alone, in evaluation mode: what `vitrail.load` gives."""
    return load(run, checkpoint).model
