"""`vitrail train DATA`: a recipe's config, changed by a file and by flags, then the main job."""

import io
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from vitrail import job
from vitrail.cli.measure import numbers
from vitrail.cli.parse import parse, spell_flags
from vitrail.cli.plan import show_plan
from vitrail.cli.screen import TrainingScreen, clock, say
from vitrail.cli.told import told_by
from vitrail.data import open_data
from vitrail.data.sources.csvfile import Columns
from vitrail.data.sources.hub import STREAM_PREFIX, open_streams
from vitrail.data.sources.layout import FolderRules
from vitrail.data.sources.stream import StreamSettings
from vitrail.errors import DataError, UsageError, VitrailError, setting, unknown_name
from vitrail.models import ModelConfig, ViTConfig, model_config, with_tokens
from vitrail.planning.auto import ALL_GIVEN, AUTO, Auto
from vitrail.planning.cluster import Cluster
from vitrail.recipes import RECIPES, Facts, facts
from vitrail.runs import Run, TrainConfig
from vitrail.runs.config import known_fields, read_changes, with_changes
from vitrail.runs.join import check_layout
from vitrail.runs.notes import LINGER_SECONDS
from vitrail.runs.start import open_start
from vitrail.weights import Opened
from vitrail.weights.fit import check_structure

_ABOUT = """Train on DATA, measure on the held-out images, and write a report.

DATA comes first: a folder with one folder of images a class, a .csv or .txt that lists files
and labels, a .npz, a folder of IDX files, tar shards, samples:emoji or samples:fashion-mnist, or a
Hugging Face data set, hf:NAME, or hf-stream:NAME to read it while training. With --weights the
model starts from a published checkpoint. A recipe fits the defaults below to all that; a YAML file
(--config) changes them, and flags have the last word."""

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
        args = [_dashed(arg) for arg in args]
        default = _defaults(args)
        given = parse(TrainArgs, _without_auto(args), "train", _ABOUT, default=default, flags=True)
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
        return _find_lr(given)
    if given.plan:
        return _plan(given)
    if given.cluster != Cluster():
        raise UsageError(
            "--cluster.gpus and the like are what --plan plans for: give --plan as well"
        )
    if given.settings.devices > 1 and "WORLD_SIZE" not in os.environ:
        return _in_processes(args, given)
    with TrainingScreen() as screen:
        if given.resume is None:
            outcome = job.train(
                given.settings,
                given.out,
                auto=given.auto,
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
        **numbers(outcome.evaluation.metrics.to_dict()),
        "seconds": round(outcome.seconds, 1),
    }


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
        **numbers(evaluated),
    }


def _plan(given: TrainArgs) -> dict[str, Any]:
    if given.resume is not None or "WORLD_SIZE" in os.environ:
        raise UsageError("--plan is for a run that is not begun yet, and for one process")
    found = job.plan(given.settings, given.out, given.cluster, auto=given.auto, notify=say)
    return show_plan(found)


def _find_lr(given: TrainArgs) -> dict[str, Any]:
    config = given.settings
    found = job.find_lr(config, auto=given.auto, notify=say)
    print("learning rate    loss")
    for rate, loss in list(zip(found.rates, found.losses, strict=True))[::4]:
        print(f"{rate:13.1e}  {loss:6.3f}")
    if found.suggestion is None:
        print("suggested     none: the loss never rose for good")
    else:
        print(f"suggested     --optim.lr {found.suggestion:.1e}  (now {config.optim.lr:g})")
    return {"lr": found.rates, "losses": found.losses, "suggestion": found.suggestion}


def _defaults(args: Sequence[str]) -> TrainArgs:
    """The defaults that flags then change. They follow from DATA and a few arguments, so those
    are looked for first; tyro parses, checks and explains them all together afterwards.
    """
    data = args[0] if args and not args[0].startswith("-") else None
    names = ("model", "recipe", "config", "resume", "tokens")
    asked = {name: _value(args, f"--{name}") for name in names}
    changes = read_changes(Path(asked["config"])) if asked["config"] else {}
    auto = _auto(args, changes)
    if asked["resume"] is not None:
        return TrainArgs(Run(asked["resume"]).config(), auto=auto)
    row = asked["model"] or changes.pop("model", changes.pop("model.name", None))
    data = data or changes.get("data.path")
    if data is None and not {"-h", "--help"} & set(args):
        raise UsageError(
            "train what? DATA comes first: vitrail train my_photos/ [options]; or --resume RUN"
        )
    source = _value(args, "--weights") or changes.get("weights")
    name = asked["recipe"] or changes.pop("recipe", "finetune" if source else "scratch")
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    wanted = told_by(args, changes, "train")
    name, start = _start(name, source, row, wanted)
    found = _facts(data, args, changes, start)
    channels = _value(args, "--model.channels") or changes.get("model.channels")
    if str(channels).isdecimal():
        found = found._replace(channels=int(str(channels)))
    devices = _value(args, "--devices") or changes.get("devices") or 1
    if "WORLD_SIZE" in os.environ or str(devices) != "1":
        # Each process reads its arguments itself, and no two of them measure the same rate.
        found = found._replace(rate=math.inf)
    config = RECIPES[name].config(found)
    if row is not None:
        config = replace(config, model=_model(row, config, start), row=row)
    if asked["tokens"] is not None:
        config = replace(config, model=with_tokens(config.model, asked["tokens"]))
    if (_value(args, "--data.resize") or changes.get("data.resize")) in ("pad", "native"):
        # Images of different sizes are not mixed: no recipe's default should be in the way.
        config = replace(config, augment=replace(config.augment, mixup=0.0, cutmix=0.0))
    size = _value(args, "--model.image-size") or changes.get("model.image_size")
    if row is None and size is None:
        _say_if_small(config, RECIPES[name].config(found._replace(rate=math.inf)), found)
    origin = asked["config"] or "the config"
    return TrainArgs(with_changes(config, changes, origin), data=data, recipe=name, auto=auto)


def _say_if_small(config: TrainConfig, usual: TrainConfig, found: Facts) -> None:
    """Say that a recipe takes smaller images than `usual`, because the machine is slow."""
    sizes = ["x".join(map(str, each.model.image_size)) for each in (config, usual)]
    if sizes[0] != sizes[1]:
        say(
            f"images of {sizes[0]} pixels, not {sizes[1]}: too few of those would be seen at the "
            f"{found.rate / 1e9:.0f} GFLOP/s of this machine now ({setting('model.image_size')})"
        )


_TO_BE_FOUND = {"batch_size": "data.batch_size", "micro_batch": "micro_batch"}
"""A field of `Auto`, and the config's."""


def _auto(args: Sequence[str], changes: dict[str, Any]) -> Auto:
    """What is to be found: by the flags, or else by the file, whose `changes` lose it."""
    asked = {}
    for name, path in _TO_BE_FOUND.items():
        said = changes.pop(path) if changes.get(path) == AUTO else None
        asked[name] = (_value(args, _flag(path)) or said) == AUTO
    return Auto(**asked)


def _without_auto(args: Sequence[str]) -> list[str]:
    """The arguments but for flags whose value is `auto`, which is no number."""
    kept, flags = list(args), {_flag(path) for path in _TO_BE_FOUND.values()}
    for i in reversed(range(len(kept))):
        name, equals, value = kept[i].partition("=")
        if name in flags and (value if equals else "".join(kept[i + 1 : i + 2])) == AUTO:
            del kept[i : i + (1 if equals else 2)]
    return kept


def _flag(path: str) -> str:
    return f"--{path.replace('_', '-')}"


def _dashed(arg: str) -> str:
    """An argument with its flag spelt as we look for it: tyro takes `--data.batch_size` as well."""
    flag, equals, value = arg.partition("=")
    return flag.replace("_", "-") + equals + value if arg.startswith("--") else arg


def _start(
    name: str, source: str | None, row: str | None, wanted: Mapping[str, Any]
) -> tuple[str, Opened | None]:
    """The weights that a run starts from, and the recipe: another one where the network is not."""
    recipe = RECIPES[name]
    if source is not None:
        return name, open_start(source, row=row, wanted=wanted, notify=say)
    if recipe.weights is None:
        return name, None
    try:
        return name, open_start(recipe.weights, row=row, wanted=wanted, notify=say)
    except DataError as error:
        if recipe.offline is None:
            raise
        say(f"{error}\ntraining from scratch instead: recipe {recipe.offline}")
        return recipe.offline, None


def _value(args: Sequence[str], flag: str) -> str | None:
    """The value of `--flag VALUE` or `--flag=VALUE`; the last one counts, as for the parser."""
    for i in reversed(range(len(args))):
        if args[i] == flag and i + 1 < len(args):
            return args[i + 1]
        if args[i].startswith(f"{flag}="):
            return args[i].partition("=")[2]
    return None


def _facts(
    data: str | None, args: Sequence[str], changes: Mapping[str, Any], start: Opened | None
) -> Facts:
    if data is None:  # for --help
        return Facts("", 1000, 10, 3, 224, gpu=False, bfloat16=False, start=start)
    named = (
        _value(args, f"--data.{kind}-column") or changes.get(f"data.{kind}_column")
        for kind in Columns._fields
    )
    columns = Columns(*(str(name) if name is not None else None for name in named))
    if not data.startswith(STREAM_PREFIX):
        return facts(data, open_data(data, columns, _rules(args, changes)), start)
    classes, epoch = (
        _value(args, f"--data.stream.{name}") or changes.get(f"data.stream.{name}")
        for name in ("classes", "epoch")
    )
    settings = StreamSettings(
        classes=classes,
        epoch=int(str(epoch)) if str(epoch).isdecimal() else None,
        buffer=1,  # the order does not matter
    )
    name = data.removeprefix(STREAM_PREFIX)
    streams = open_streams(name, columns, seed=0, settings=settings).parts
    return facts(data, streams["train"], start)


def _rules(args: Sequence[str], changes: Mapping[str, Any]) -> FolderRules:
    """How a folder of images is to be understood; what is no such value, tyro tells later."""
    parts = _value(args, "--data.parts") or changes.get("data.parts") or "auto"
    links = _value(args, "--data.follow-links") or changes.get("data.follow_links")
    return FolderRules(parts=str(parts), follow_links=str(links).lower() == "true")


def _model(row: str, config: TrainConfig, start: Opened | None) -> ModelConfig:
    """A named model as the data needs it: at its own image size, or at that of its weights' start.

    What no row decides (which GELU, how positions are resampled) is as the weights were made.
    """
    model = model_config(row, channels=config.model.channels, classes=config.model.classes)
    drop_path = getattr(config.model, "drop_path", 0.0)
    if drop_path and getattr(model, "drop_path", None) == 0:  # the recipe's, if the row has none
        model = replace(model, drop_path=drop_path)
    if start is None:
        return model
    given = start.config
    if not (
        isinstance(model, ViTConfig)
        and isinstance(config.model, ViTConfig)
        and isinstance(given, ViTConfig)
    ):
        check_structure(given, model, start.source)
        return replace(model, image_size=config.model.image_size)
    kept = ["norm_eps", "resample", "heads"]
    kept += [] if "swiglu" in (model.activation, config.model.activation) else ["activation"]
    kept += ["pool"] if model.pool == given.pool else []
    (gh, gw), (p, q) = config.model.grid, model.patch
    wanted = replace(
        model, image_size=(gh * p, gw * q), **{name: getattr(config.model, name) for name in kept}
    )
    check_structure(given, wanted, start.source)
    return wanted


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
