"""`vitrail train DATA`: a recipe's config, changed by a file and by flags, then the main job."""

import io
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from vitrail import job
from vitrail.cli.defaults import defaults, without_auto
from vitrail.cli.measure import numbers, told
from vitrail.cli.parse import parse, spell_flags
from vitrail.cli.plan import show_plan
from vitrail.cli.screen import TrainingScreen, clock, say
from vitrail.data import PartedSource
from vitrail.errors import UsageError, VitrailError, setting
from vitrail.planning.auto import ALL_GIVEN, Auto
from vitrail.planning.cluster import Cluster
from vitrail.runs import Run, TrainConfig
from vitrail.runs.config import known_fields
from vitrail.runs.join import check_layout
from vitrail.runs.notes import LINGER_SECONDS
from vitrail.weights import Opened

_ABOUT = """Train on DATA, measure on the held-out images, and write a report.

DATA comes first: a folder with one folder of images a class, with images and their masks or their
boxes (COCO, VOC, YOLO, BDD100K, CSV), a .csv or .txt that lists files and labels, a .npz, a folder
of IDX files, tar shards, samples:emoji or another of `vitrail data list`, any images where --task
learns without labels, images and their texts with --task clip, siglip or lit; or a Hugging Face
data set, hf:NAME, or hf-stream:NAME to read it while training. With --weights the model starts
from a published checkpoint. A recipe fits the defaults below to all that; a YAML file (--config)
changes them, and flags have the last word."""

_OF_LENGTH = {"epochs", "minutes", "patience", "evaluations", "device", "threads", "data.workers"}
_OF_LENGTH |= {"distill.teacher"}  # the same one in another place, which is checked
_OF_LENGTH |= {"devices", "parallel", "stall_seconds", "micro_batch", "checkpointing", "compile"}
_OF_LENGTH |= {"data.decoders", "data.image_seconds", "data.cache"}
_OF_LENGTH |= {"checkpoint_minutes", "keep_checkpoints", "profile", "tensorboard"}
"""What a resumed run may change: its length and its machine, not what it computes."""


@dataclass(frozen=True)
class TrainArgs:
    """What `vitrail train` takes."""

    settings: Annotated[TrainConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    data: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")] = None
    """The images."""
    model: str | None = None
    """A name that `vitrail models` lists. Default: the weights' own, or the recipe's choice."""
    text: str | None = None
    """A name of a text tower, for --task clip, siglip and lit (`vitrail.text.TEXTS`). Default: that
    of --text-weights, or the recipe's choice."""
    recipe: str = "scratch"
    """A name in vitrail.recipes. With --weights the default is finetune; others are probe,
    last-blocks, lora and vit-sgd."""
    config: Path | None = None
    """A YAML file of fields to change, such as the config.yaml of a run."""
    out: Path | None = None
    """The run folder to make. Default: runs/NAME-N."""
    resume: Path | None = None
    """Go on with this run; only its length may be changed."""
    tokens: str | None = None
    """Train with fewer tokens: tome:r=13 merges so many in each block of any ViT."""
    accept_changes: bool = False
    """Resume although data or code are not what they were."""
    restarts: int = 0
    """With --devices: how often to start again, from the last checkpoint, when a process dies."""
    find_lr: bool = False
    """Only try rising learning rates for about a minute, and say which to use."""
    plan: bool = False
    """Only say what the run would take, here and on paper, in about half a minute."""
    cluster: Cluster = field(default_factory=Cluster)
    """GPUs that are not here, for --plan."""
    auto: tyro.conf.Suppress[Auto] = ALL_GIVEN
    """Numbers that are not given, but to be found."""


def train(args: Sequence[str]) -> dict[str, Any]:
    """Train, judge and report; or go on with a run."""
    spell_flags(TrainArgs, flags=True)
    with _one_of_a_machine():
        found = read(args)
    given = found.args
    if any(given.auto) and given.resume is not None:
        raise UsageError(
            "a resumed run keeps the numbers that it has found: leave out auto, or give "
            "--micro-batch a number"
        )
    if given.restarts < 0 or (given.restarts and given.settings.devices == 1):
        raise UsageError(
            f"--restarts {given.restarts}: it is how often several processes start again when one "
            f"dies, so it is 0 or more, and goes with --devices 2 or more"
        )
    if given.find_lr:
        return _find_lr(found)
    if given.plan:
        return _plan(found)
    if given.cluster != Cluster():
        raise UsageError(
            "--cluster.gpus and the like are what --plan plans for: give --plan as well"
        )
    if given.settings.devices > 1 and "WORLD_SIZE" not in os.environ:
        del found  # each process opens data and weights itself
        return _in_processes(args, given)
    with TrainingScreen() as screen:
        if given.resume is None:
            outcome = job.train(
                given.settings,
                given.out,
                auto=given.auto,
                source=found.source,
                weights=found.weights,
                listen=screen.listen,
                notify=screen.notify,
            )
        else:
            run = Run(given.resume)
            _refuse_another_run(run.config(), given.settings)
            outcome = job.resume(
                run,
                given.settings,
                accept_changes=given.accept_changes,
                listen=screen.listen,
                notify=screen.notify,
            )
    _print_summary(outcome)
    return {
        "run": str(outcome.run.path),
        "checkpoint": str(outcome.checkpoint),
        "report": str(outcome.report),
        **numbers(outcome.evaluation),
        "seconds": round(outcome.seconds, 1),
    }


class Given(NamedTuple):
    """What the arguments ask for, and what was opened to find their defaults."""

    args: TrainArgs
    source: PartedSource | None
    weights: Opened | None


def read(args: Sequence[str]) -> Given:
    """What the arguments ask for, over the defaults that follow from DATA and some of them."""
    found = defaults(args)
    default = TrainArgs(found.settings, data=found.data, recipe=found.recipe, auto=found.auto)
    given = parse(TrainArgs, without_auto(args), "train", _ABOUT, default=default, flags=True)
    return Given(given, found.source, found.start)


@contextmanager
def _one_of_a_machine() -> Iterator[None]:
    """Before processes have met, all of a machine find the same wrong: the first of them tells."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        yield
        return
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            yield
    except (VitrailError, SystemExit):
        time.sleep(LINGER_SECONDS)  # and the launcher ends this one
        print(said.getvalue(), end="", file=sys.stderr)
        raise


def _in_processes(args: Sequence[str], given: TrainArgs) -> dict[str, Any]:
    """The same command again in several processes; the first of them says what there is to say."""
    from vitrail.cli.launch import launch

    started = time.perf_counter()
    processes = given.settings.devices
    check_layout(given.auto.start(given.settings, processes), processes)
    run = given.resume or given.out
    if run is None:
        run = job.free_folder(given.settings.data.path)
        args = [*args, "--out", str(run)]
    launch(args, processes, given.restarts, run, notify=say)
    evaluated = json.loads((run / "metrics.json").read_text())
    return {
        "run": str(run),
        "checkpoint": str(Run(run).checkpoint(given.settings.keep)),
        "report": str(run / "report.html"),
        **told(Run(run).config().task, evaluated["tta"], evaluated),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _plan(read: Given) -> dict[str, Any]:
    given = read.args
    if given.resume is not None or "WORLD_SIZE" in os.environ:
        raise UsageError("--plan is for a run that is not begun yet, and for one process")
    found = job.plan(
        given.settings, given.out, given.cluster,
        auto=given.auto, source=read.source, weights=read.weights, notify=say,
    )  # fmt: skip
    return show_plan(found)


def _find_lr(read: Given) -> dict[str, Any]:
    config = read.args.settings
    found = job.find_lr(
        config, auto=read.args.auto, source=read.source, weights=read.weights, notify=say
    )
    print("learning rate    loss")
    for rate, loss in list(zip(found.rates, found.losses, strict=True))[::4]:
        print(f"{rate:13.1e}  {loss:6.3f}")
    if found.suggestion is None:
        print("suggested     none: the loss never rose for good")
    else:
        print(f"suggested     --optim.lr {found.suggestion:.1e}  (now {config.optim.lr:g})")
    return {"lr": found.rates, "losses": found.losses, "suggestion": found.suggestion}


def _refuse_another_run(before: TrainConfig, now: TrainConfig) -> None:
    old, new = known_fields(before), known_fields(now)
    changed = [f for f in old if old[f] != new.get(f) and f not in _OF_LENGTH]
    if changed:
        shown = ", ".join(f"{setting(f)} was {old[f]}, now {new.get(f)}" for f in changed)
        raise UsageError(
            f"a resumed run must stay the run it was, but {shown}. "
            f"Leave that out, or start a new run"
        )


def _print_summary(outcome: job.Outcome) -> None:
    """How good, compared with what, what to know of that; how long, where, what to do next."""
    evaluation, run = outcome.evaluation, outcome.run
    for line in evaluation.summary():
        print(line)
    for note in evaluation.notes():
        print(f"note      {note}")
    unread = f"; {len(outcome.skipped)} images unreadable (skipped.csv)" if outcome.skipped else ""
    print(f"took      {clock(outcome.seconds)} in all{unread}")
    print(f"next      vitrail predict {shlex.quote(str(run.path))} IMAGE")
    print(f"report    {outcome.report}")
