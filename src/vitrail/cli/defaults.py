"""What a run is unless its flags say otherwise: by the data, a recipe, weights and a file.

A few flags decide what the others' defaults are, so those are parsed first; then all together, with
the defaults that follow from them.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from vitrail.cli.parse import flags_among
from vitrail.cli.screen import say
from vitrail.cli.told import told_by
from vitrail.data import PartedSource, open_data
from vitrail.data.sources.csvfile import Columns
from vitrail.data.sources.hub import STREAM_PREFIX, open_streams
from vitrail.data.sources.layout import FolderRules
from vitrail.data.sources.mask_meaning import AS_THEY_SAY, MaskRules
from vitrail.data.sources.stream import StreamSettings
from vitrail.data.split import task_of
from vitrail.errors import DataError, UsageError, setting, unknown_name
from vitrail.models import ModelConfig, ViTConfig, model_config, with_tokens
from vitrail.planning.auto import AUTO, Auto
from vitrail.recipes import LOOKED_AT, RECIPES, Facts, facts, usual_recipe
from vitrail.runs import Run, TrainConfig
from vitrail.runs.config import read_changes, with_changes
from vitrail.runs.start import open_start, open_text_source
from vitrail.tasks import TASKS
from vitrail.text import text_config
from vitrail.weights import Opened
from vitrail.weights.fit import check_structure

_DECIDING = (
    *("model", "recipe", "config", "resume", "tokens", "weights", "devices"),
    *("text", "text_weights"),
    *("task", *(f"data.masks.{item.name}" for item in fields(MaskRules))),
    *("data.resize", "data.parts", "data.follow_links", "data.stream.classes", "data.stream.epoch"),
    *(f"data.{kind}_column" for kind in Columns._fields),
    *("model.channels", "model.image_size"),
)
_COARSEST = 32
"""Pixels: of so many images of every family but the ViTs are cut into whole ones."""
_TO_BE_FOUND = {"batch_size": "data.batch_size", "micro_batch": "micro_batch"}
"""A field of `Auto`, and the config's."""


class Defaults(NamedTuple):
    """What the arguments of `vitrail train` change."""

    settings: TrainConfig
    auto: Auto
    """Numbers that are not given, but to be found."""
    data: str | None = None
    recipe: str = "scratch"
    source: PartedSource | None = None
    """The data, opened; None of a stream."""
    start: Opened | None = None
    """The weights that the run starts from, read."""


_Said = Callable[[str], Any]
"""From a dotted name to what the flag says of it, as it is typed, or else the file."""


def defaults(args: Sequence[str]) -> Defaults:
    """The defaults for the arguments `args`, of which DATA and a few flags are looked at.

    Raises `UsageError` and `DataError` for what they name.
    """
    data = args[0] if args and not args[0].startswith("-") else None
    flags, _ = flags_among(_DECIDING, args, "train")
    asked = {path: "".join(flags.get(path, ())[:1]) or None for path in _DECIDING}
    changes = read_changes(Path(asked["config"])) if asked["config"] else {}
    auto = _auto(args, changes)
    if asked["resume"] is not None:
        return Defaults(Run(asked["resume"]).config(), auto)
    row = asked["model"] or changes.pop("model", changes.pop("model.name", None))
    data = data or changes.get("data.path")
    if data is None and not {"-h", "--help"} & set(args):
        raise UsageError(
            "train what? DATA comes first: vitrail train my_photos/ [options]; or --resume RUN"
        )

    def said(path: str) -> Any:
        return asked[path] or changes.get(path)

    weights = said("weights")
    masks = _masks(flags, changes)
    task = _task(said, data, masks)
    name = asked["recipe"] or changes.pop("recipe", usual_recipe(task, weights=weights is not None))
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    if RECIPES[name].task != task:
        raise UsageError(
            f"the recipe {name} is for {setting('task', RECIPES[name].task)}, not for {task}: "
            f"leave one of them out"
        )
    changes.pop("task", None)
    wanted = told_by(args, changes, "train")
    name, start = _start(name, weights, row, wanted)
    source = _opened(data, said, masks, task)
    found = _facts(data, source, said, start)
    channels = said("model.channels")
    if str(channels).isdecimal():
        found = found._replace(channels=int(str(channels)))
    if "WORLD_SIZE" in os.environ or str(said("devices") or 1) != "1":
        # Each process reads its arguments itself, and no two of them measure the same rate.
        found = found._replace(rate=math.inf)
    config = RECIPES[name].config(found)
    if row is not None:
        config = replace(config, model=_model(row, config, start), row=row)
    config = _with_text(config, asked["text"] or changes.get("text_row"), said("text_weights"))
    if asked["tokens"] is not None:
        config = replace(config, model=with_tokens(config.model, asked["tokens"]))
    if said("data.resize") in ("pad", "native"):
        # Images of different sizes are not mixed: no recipe's default should be in the way.
        config = replace(config, augment=replace(config.augment, mixup=0.0, cutmix=0.0))
    if said("data.resize") not in (None, "tiles"):  # nor is a tile that a recipe chose
        config = replace(config, data=replace(config.data, tile=None))
    if row is None and said("model.image_size") is None:
        _say_if_small(config, RECIPES[name].config(found._replace(rate=math.inf)), found)
    origin = asked["config"] or "the config"
    return Defaults(with_changes(config, changes, origin), auto, data, name, source, start)


def _auto(args: Sequence[str], changes: dict[str, Any]) -> Auto:
    """What is to be found: by the flags, or else by the file, whose `changes` lose it."""
    flags, _ = flags_among(tuple(_TO_BE_FOUND.values()), args, "train")
    asked = {}
    for name, path in _TO_BE_FOUND.items():
        filed = changes.pop(path) if changes.get(path) == AUTO else None
        asked[name] = (flags.get(path) or (filed,)) == (AUTO,)
    return Auto(**asked)


def without_auto(args: Sequence[str]) -> list[str]:
    """The arguments but for flags whose value is `auto`, which is no number."""
    flags, kept = flags_among(tuple(_TO_BE_FOUND.values()), args, "train")
    for path, words in flags.items():
        if words != (AUTO,):
            kept += [f"--{path}", *words]
    return kept


def _say_if_small(config: TrainConfig, usual: TrainConfig, found: Facts) -> None:
    """Say that a recipe takes smaller images than `usual`, because the machine is slow."""
    sizes = ["x".join(map(str, each.model.image_size)) for each in (config, usual)]
    if sizes[0] != sizes[1]:
        say(
            f"images of {sizes[0]} pixels, not {sizes[1]}: too few of those would be seen at the "
            f"{found.rate / 1e9:.0f} GFLOP/s of this machine now ({setting('model.image_size')})"
        )


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


def _opened(data: str | None, said: _Said, masks: MaskRules, task: str) -> PartedSource | None:
    """The data, but of a stream and for --help."""
    if data is None or data.startswith(STREAM_PREFIX):
        return None
    return open_data(data, _columns(said), _rules(said), masks=masks, targets=TASKS[task].targets)


def _with_text(config: TrainConfig, row: str | None, weights: str | None) -> TrainConfig:
    """With the text tower that is named, or that of the weights that are."""
    if config.text is None:
        for name, value in (("text", row), ("text_weights", weights)):
            if value:
                raise UsageError(
                    f"{setting(name, value)} is for images with texts: add {setting('task', 'lit')}"
                )
        return config
    if weights is not None:
        return replace(config, text=open_text_source(weights, say).config, text_row=row or "")
    if row:
        return replace(config, text=text_config(row), text_row=row)
    return config


def _columns(said: _Said) -> Columns:
    named = (said(f"data.{kind}_column") for kind in Columns._fields)
    return Columns(*(str(name) if name is not None else None for name in named))


def _facts(
    data: str | None, source: PartedSource | None, said: _Said, start: Opened | None
) -> Facts:
    if data is None:  # for --help
        return Facts("", 1000, 10, 3, 224, gpu=False, bfloat16=False, start=start)
    if source is not None:
        return facts(data, source, start)
    epoch = said("data.stream.epoch")
    settings = StreamSettings(
        classes=said("data.stream.classes"),
        epoch=int(str(epoch)) if str(epoch).isdecimal() else None,
        buffer=1,  # the order does not matter
    )
    name = data.removeprefix(STREAM_PREFIX)
    stream = open_streams(name, _columns(said), seed=0, settings=settings).parts["train"]
    return facts(data, stream.sample(LOOKED_AT), start, streamed=len(stream))


def _task(said: _Said, data: str | None, masks: MaskRules) -> str:
    """What is to be learned: as is said, as the recipe is for, or as the data decides."""
    asked, recipe = said("task"), said("recipe")
    if asked is None and recipe in RECIPES:
        return RECIPES[recipe].task
    if asked is None and data is not None:
        asked = task_of(data, masks)
        if asked != "classify":
            holds = TASKS[asked].targets.kind
            why = (
                f"{data} holds {holds}" if masks == AS_THEY_SAY else "it is said how masks are read"
            )
            say(f"{why}: {setting('task', asked)}")
    if asked is None:
        return "classify"
    if asked not in TASKS:
        raise unknown_name("task", str(asked), TASKS)
    return str(asked)


def _masks(flags: Mapping[str, tuple[str, ...]], changes: Mapping[str, Any]) -> MaskRules:
    """How masks are to be understood, by the flags or else the file; what is no such value is
    refused later, with its name.
    """
    told: dict[str, Any] = {}
    for item in fields(MaskRules):
        path = f"data.masks.{item.name}"
        words = flags.get(path)
        if words is None:
            told |= {item.name: changes[path]} if path in changes else {}
        else:
            one = None if words == ("None",) else "".join(words[:1])
            told[item.name] = words if item.name == "ignore" and one is not None else one
    try:
        return TypeAdapter(MaskRules).validate_python(told)
    except ValidationError:
        return AS_THEY_SAY


def _rules(said: _Said) -> FolderRules:
    """How a folder of images is to be understood; what is no such value, tyro tells later."""
    links = said("data.follow_links")
    return FolderRules(
        parts=str(said("data.parts") or "auto"), follow_links=str(links).lower() == "true"
    )


def _model(row: str, config: TrainConfig, start: Opened | None) -> ModelConfig:
    """A named model as the data needs it: at its own image size, or at that of its weights' start;
    a detector's is the recipe's, which goes by how large objects are.

    What no row decides (which GELU, how positions are resampled) is as the weights were made.
    """
    model = model_config(row, channels=config.model.channels, classes=config.model.classes)
    drop_path = getattr(config.model, "drop_path", 0.0)
    if drop_path and getattr(model, "drop_path", None) == 0:  # the recipe's, if the row has none
        model = replace(model, drop_path=drop_path)
    if start is None:
        if TASKS[config.task].targets.kind != "boxes":
            return model
        steps = model.coarsest if isinstance(model, ViTConfig) else (_COARSEST, _COARSEST)
        size = (n * -(-w // n) for w, n in zip(config.model.image_size, steps, strict=True))
        return replace(model, image_size=(next(size), next(size)))
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
