"""The parts of a run, as its config describes them: model, task, loaders, what it starts from."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from vitrail.data import Source, Splits
from vitrail.data.batches.loader import EvalLoader, TrainLoader
from vitrail.data.batches.making import Loader
from vitrail.data.batches.stream_loader import StreamLoader
from vitrail.data.names import shortened
from vitrail.data.sources.blank import Blank
from vitrail.data.sources.tiled import Tiled
from vitrail.data.targets import Targets, Texts
from vitrail.errors import UsageError, setting
from vitrail.heads import Detector, Segmenter
from vitrail.runs.config import TrainConfig
from vitrail.runs.machine import keep_freed_memory
from vitrail.runs.start import OpenedText, open_start, open_text
from vitrail.runs.world import ALONE, World
from vitrail.tasks import TASKS, Pair, Task, Teacher, backbone_of
from vitrail.text.two_towers import TwoTowers
from vitrail.weights import Opened, load_into
from vitrail.weights.box_heads import load_box_head
from vitrail.weights.heads import load_head

Notify = Callable[[str], None]


def silent(sentence: str) -> None:
    """Tells nobody."""


def prepare(config: TrainConfig, world: World = ALONE) -> torch.device:
    """Set the threads, the memory and the seed; the device."""
    device = world.device(config.device)
    if device.type == "cpu":
        keep_freed_memory(lean=config.checkpointing)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    return device


def model_of(config: TrainConfig, splits: Splits) -> Any:
    """What the task judges, before it has learned."""
    return TASKS[config.task].model(config, splits.train.targets)


def task_of(
    model: Any, config: TrainConfig, splits: Splits, teacher: Teacher | None = None
) -> Task:
    """The task as it is trained."""
    task = TASKS[config.task].learn(model, config, splits.train.targets, teacher)
    if isinstance(task, Pair) and config.locked:
        task.keep(lambda device: val_loader(config, splits.parts["train"], device))
    return task


def train_source(config: TrainConfig, splits: Splits) -> Any:
    """What an epoch shows: the training images, or their tiles; a `Source` or a `StreamSource`.
    Of images that are looked at once, and before, nothing is to be seen.
    """
    if config.locked:
        return Blank(splits.parts["train"])
    if config.data.resize == "tiles":
        return Tiled(splits.parts["train"], config.tile)
    return splits.train


def train_loader(
    config: TrainConfig,
    splits: Splits,
    device: torch.device,
    world: World = ALONE,
    notify: Notify = silent,
) -> Loader:
    """Batches to learn from, of this process."""
    preprocess, views, kept = config.train_preprocess(), config.views(), config.tune.kept_views
    how: Any = {
        "batch_size": config.data.batch_size,
        "seed": config.seed,
        "workers": config.data.workers,
        "max_unreadable": config.data.max_unreadable,
        "device": device,
        "part": world.part,
        "reading": config.data.reading(),
        "notify": notify,
    }
    source = train_source(config, splits)
    if splits.stream is None:
        if config.data.batch_size > len(source):
            notify(
                f"{setting('data.batch_size', config.data.batch_size)} is more than there is to "
                f"learn from: a batch has all {len(source):,} images"
            )
        return TrainLoader(source, preprocess, views, kept_views=kept, **how)
    if kept:
        raise UsageError(
            f"{setting('tune.kept_views', kept)} needs images that come again, "
            f"and a stream is read from front to back: leave it out"
        )
    return StreamLoader(splits.stream, preprocess, views, **how)


def val_loader(
    config: TrainConfig,
    source: Source,
    device: torch.device,
    world: World = ALONE,
    batch_size: int = 64,
) -> EvalLoader:
    """Batches to be measured on, of this process; of views as large as their images, of one."""
    preprocess = config.preprocess()
    return EvalLoader(
        source,
        preprocess,
        batch_size=1 if preprocess.alone else batch_size,
        workers=config.data.workers,
        device=device,
        part=world.part,
        reading=config.data.reading(),
    )


def opened_start(config: TrainConfig, notify: Notify) -> Opened | None:
    """The weights that a run of this config starts from, read."""
    if config.weights is None:
        return None
    return open_start(config.weights, wanted=asdict(config.model), notify=notify)


def opened_text(config: TrainConfig, notify: Notify) -> OpenedText | None:
    """What the text tower of a run starts from; None of a run without texts."""
    return None if config.text is None else open_text(config, notify)


def start_text(model: Any, opened: OpenedText, targets: Targets, notify: Notify) -> None:
    """Give the text tower its tokenizer, and its weights if there are any; say what becomes of the
    texts that it will read.
    """
    assert isinstance(model, TwoTowers) and isinstance(targets, Texts)
    model.words.keep(opened.tokenizer)
    if opened.state is not None:
        own, kept = model.text.state_dict(), opened.state
        fitting = {k: x for k, x in kept.items() if k in own and own[k].shape == x.shape}
        model.text.load_state_dict(own | fitting)
        if new := sorted({*own} - {*fitting}):
            notify(f"text      new: {shortened(new)}")
    for number, value in (
        (model.scale, opened.scale and math.log(opened.scale)),
        (model.bias, opened.bias),
    ):
        if number is not None and value is not None:
            nn.init.constant_(number, value)
    some = targets.table[:: max(1, len(targets.table) // _TEXTS_READ)]
    if cut := opened.tokenizer(some).cut if some else 0:
        context = opened.tokenizer.context
        notify(
            f"text      {cut:,} of {len(some):,} texts are longer than {context} tokens, and cut"
        )


_TEXTS_READ = 10_000
"""Texts that are looked at to say how many are too long."""


def start(
    model: Any, config: TrainConfig, opened: Opened, classes: tuple[str, ...], notify: Notify
) -> str:
    """Give the model its published weights; what they were and what became of them, as JSON."""
    kept = classes if TASKS[config.task].classifies else ()
    fitted = load_into(backbone_of(model), opened, kept)
    notes = [*opened.notes, *fitted.notes]
    if opened.head and isinstance(model, Segmenter):
        notes += load_head(model, opened.head, classes)
    elif opened.head:
        notes.append(f"the head of segmentation is left out: {opened.head.line}")
    if opened.boxes and isinstance(model, Detector):
        notes += load_box_head(model, opened.boxes, classes)
    elif opened.boxes:
        notes.append(f"the head of detection is left out: {opened.boxes.line}")
    if isinstance(model, TwoTowers) and model.projection is not None:
        head = opened.state.get("head.weight")
        if head is not None and head.shape == model.projection.weight.shape:
            model.projection.load_state_dict({"weight": head})
            notes.append("projection: that of the weights, to what texts are compared with")
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
