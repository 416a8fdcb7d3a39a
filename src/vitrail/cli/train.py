"""`vitrail train DATA`: a recipe's config, changed by a file and by flags, then the main job."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from vitrail import job
from vitrail.cli.parse import parse
from vitrail.cli.screen import TrainingScreen, clock
from vitrail.data import open_data
from vitrail.data.csvfile import Columns
from vitrail.errors import UsageError, unknown_name
from vitrail.models import model_config
from vitrail.recipes import RECIPES, Facts, facts
from vitrail.runs import Run, TrainConfig
from vitrail.runs.config import known_fields, read_changes, with_changes

_ABOUT = """Train on DATA, measure on the held-out images, and write a report.

DATA comes first: a folder with one folder of images a class, a .csv with a file and a label
column, a .npz, a folder of IDX files, samples:emoji or samples:fashion-mnist. A recipe fits the
defaults below to it; a YAML file (--config) changes them, and flags have the last word."""

_OF_LENGTH = {"epochs", "minutes", "patience", "evaluations", "device", "threads", "data.workers"}
"""What a resumed run may change: its length and its machine, not what it computes."""


@dataclass(frozen=True)
class TrainArgs:
    """What `vitrail train` takes."""

    settings: Annotated[TrainConfig, tyro.conf.arg(name="")]
    data: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")] = None
    """The images."""
    model: str | None = None
    """A name that `vitrail models` lists. Default: the recipe's choice."""
    recipe: str = "scratch"
    """A function of vitrail.recipes."""
    config: Path | None = None
    """A YAML file of fields to change, such as the config.yaml of a run."""
    out: Path | None = None
    """The run folder to make. Default: runs/NAME-N."""
    resume: Path | None = None
    """Go on with this run; only its length may be changed."""


def train(args: Sequence[str]) -> dict[str, Any]:
    """Train, judge and report; or go on with a run."""
    given = parse(TrainArgs, args, "train", _ABOUT, default=_defaults(args))
    with TrainingScreen() as screen:
        if given.resume is None:
            outcome = job.train(
                given.settings, given.out, listen=screen.listen, notify=screen.notify
            )
        else:
            run = Run(given.resume)
            _refuse_another_run(run.config(), given.settings)
            outcome = job.resume(run, given.settings, listen=screen.listen, notify=screen.notify)
    _print_summary(outcome)
    return {
        "run": str(outcome.run.path),
        "checkpoint": str(outcome.checkpoint),
        "report": str(outcome.report),
        "metrics": outcome.evaluation.metrics.values(),
        "seconds": round(outcome.seconds, 1),
    }


def _defaults(args: Sequence[str]) -> TrainArgs:
    """The defaults that flags then change. They follow from DATA and a few arguments, so those
    are looked for first; tyro parses, checks and explains them all together afterwards.
    """
    data = args[0] if args and not args[0].startswith("-") else None
    asked = {name: _value(args, f"--{name}") for name in ("model", "recipe", "config", "resume")}
    if asked["resume"] is not None:
        return TrainArgs(Run(asked["resume"]).config())
    changes = read_changes(Path(asked["config"])) if asked["config"] else {}
    row = asked["model"] or changes.pop("model", changes.pop("model.name", None))
    data = data or changes.get("data.path")
    if data is None and not {"-h", "--help"} & set(args):
        raise UsageError("train what? DATA comes first: vitrail train my_photos/ [options]")
    recipe = asked["recipe"] or changes.pop("recipe", "scratch")
    if recipe not in RECIPES:
        raise unknown_name("recipe", recipe, RECIPES)
    config = RECIPES[recipe](_facts(data, args, changes))
    if row is not None:
        config = replace(config, model=_model(row, config), row=row)
    origin = asked["config"] or "the config"
    return TrainArgs(with_changes(config, changes, origin), data=data, recipe=recipe)


def _value(args: Sequence[str], flag: str) -> str | None:
    """The value of `--flag VALUE` or `--flag=VALUE`."""
    for i, arg in enumerate(args):
        if arg == flag and i + 1 < len(args):
            return args[i + 1]
        if arg.startswith(f"{flag}="):
            return arg.partition("=")[2]
    return None


def _facts(data: str | None, args: Sequence[str], changes: Mapping[str, Any]) -> Facts:
    if data is None:  # for --help
        return Facts("", 1000, 10, 3, 224, gpu=False, bfloat16=False)
    names = ("image", "label", "split")
    columns = (
        _value(args, f"--data.{name}-column") or changes.get(f"data.{name}_column")
        for name in names
    )
    return facts(data, open_data(data, Columns(*columns)))


def _model(row: str, config: TrainConfig) -> Any:
    """A named model as the data needs it; its own image size, where it can have that."""
    return model_config(row, channels=config.model.channels, classes=config.model.classes)


def _refuse_another_run(before: TrainConfig, now: TrainConfig) -> None:
    old, new = known_fields(before), known_fields(now)
    changed = [f for f in old if old[f] != new.get(f) and f not in _OF_LENGTH]
    if changed:
        shown = ", ".join(f"{f} was {old[f]}, now {new.get(f)}" for f in changed)
        raise UsageError(
            f"a resumed run must stay the run it was, but {shown}. "
            f"Leave that out, or start a new run"
        )


def _print_summary(outcome: job.Outcome) -> None:
    """Five lines: how good, compared with what, how long, where, and what to do next."""
    evaluation, run = outcome.evaluation, outcome.run
    for line in evaluation.summary():
        print(line)
    unread = f"; {len(outcome.skipped)} images unreadable (skipped.csv)" if outcome.skipped else ""
    print(f"took      {clock(outcome.seconds)} in all{unread}")
    print(f"next      vitrail predict {shlex.quote(str(run.path))} IMAGE")
    print(f"report    {outcome.report}")
