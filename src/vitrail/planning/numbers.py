"""Numbers of a run that are `auto`: found by trying it out, the same in all processes."""

import gc
import os
from collections.abc import Callable
from dataclasses import replace

import torch

from vitrail.data import Source, Splits
from vitrail.data.batches.loader import EvalLoader
from vitrail.data.batches.making import Loader
from vitrail.doctor.machine import memory
from vitrail.errors import UsageError, setting
from vitrail.nn import BatchNorm
from vitrail.planning.auto import Auto
from vitrail.planning.cluster import Cluster
from vitrail.planning.paper import teacher_on_paper
from vitrail.planning.plan import Room, kept_maps, make_plan
from vitrail.planning.tryout import Makers
from vitrail.runs import TrainConfig
from vitrail.runs.parts import (
    model_of,
    prepare,
    start,
    start_text,
    task_of,
    train_loader,
    val_loader,
)
from vitrail.runs.start import OpenedText
from vitrail.runs.world import World
from vitrail.tasks import Task, Teacher
from vitrail.units import bytes_text
from vitrail.weights import Opened

_SECONDS = 5.0
"""What finding a number may take, on top of making the model and of reading its first images."""

Notify = Callable[[str], None]


def with_numbers(
    auto: Auto,
    config: TrainConfig,
    splits: Splits,
    teacher: Teacher | None,
    weights: Opened | None,
    text: OpenedText | None,
    world: World,
    notify: Notify,
) -> TrainConfig:
    """The config with the numbers that are `auto`: the same in all processes, which must all have
    room for them. One of them tries it out.
    """
    if not any(auto):
        return config
    device = prepare(config, world)
    rooms = world.gather(room_for(device, int(os.environ.get("LOCAL_WORLD_SIZE", world.size))))
    if world.lead:
        room = Room(
            *(min(known) if None not in known else None for known in zip(*rooms, strict=True))
        )
        makers = makers_of(config, splits, teacher, weights, text, device)
        shared = replace(config, devices=world.size)
        tried = make_plan(
            shared, splits, makers, device, room, Cluster(), auto=auto, seconds=_SECONDS,
            notify=notify,
        )  # fmt: skip
        found = tried.config.data.batch_size, tried.config.micro_batch
        gc.collect()  # the model that was tried
    batch, at_once = world.lead_says(found if world.lead else None)
    return replace(config, data=replace(config.data, batch_size=batch), micro_batch=at_once)


def room_for(device: torch.device, processes: int) -> Room:
    """What is free for each of so many processes on this machine."""
    here = memory()
    return Room(
        memory=here and here.free // processes,
        device=torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None,
        disk=None,
    )


def check_kept_maps(
    config: TrainConfig, splits: Splits, teacher: Teacher | None, world: World
) -> None:
    """Raise `UsageError` where what is to be kept of all views (`tune.kept_views`) take
    more than half of the memory that is free for this process, and for processes that have to
    compute together.
    """
    if not config.tune.kept_views:
        return
    asked = setting("tune.kept_views", config.tune.kept_views)
    processes = max(world.size, config.devices)
    if config.parallel == "fsdp" and processes > 1:
        raise UsageError(
            f"{asked} lets each process compute what it does not know yet, and sharded ones have "
            f"to compute together: leave out {setting('parallel', 'fsdp')}"
        )
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    free = room_for(torch.device("cpu"), here).memory
    with torch.device("meta"):
        shadow = teacher and teacher_on_paper(teacher)
        task = task_of(model_of(config, splits), config, splits, shadow)
    needed = kept_maps(config, task, len(splits.train), world.device(config.device))
    if free is not None and needed > free // 2:
        raise UsageError(
            f"{asked} would keep {bytes_text(needed)} of {len(splits.train)} images, and "
            f"{bytes_text(free)} of memory are free: take fewer views, or smaller images "
            f"({setting('model.image_size')})"
        )


def makers_of(
    config: TrainConfig,
    splits: Splits,
    teacher: Teacher | None,
    weights: Opened | None,
    text: OpenedText | None,
    device: torch.device,
) -> Makers:
    """How a try-out of the run makes its parts; it keeps no maps, so its steps are the first."""
    config = replace(config, tune=replace(config.tune, kept_views=0))

    def on_paper() -> Task:
        with torch.device("meta"):
            shadow = teacher and teacher_on_paper(teacher)
            return _alone(task_of(model_of(config, splits), config, splits, shadow))

    def task() -> Task:
        model = model_of(config, splits)
        if weights:
            start(model, config, weights, splits.train.targets.names, lambda sentence: None)
        if text:
            start_text(model, text, splits.train.targets, lambda sentence: None)
        return _alone(task_of(model, config, splits, teacher)).to(device)

    def for_training(batch: int) -> Loader:
        changed = replace(config, data=replace(config.data, batch_size=batch))
        return train_loader(changed, splits, device)

    def for_measuring(source: Source, batch: int) -> EvalLoader:
        return val_loader(config, source, device, batch_size=batch)

    return Makers(on_paper, task, for_training, for_measuring)


def _alone(task: Task) -> Task:
    """The task, for one process of several to try: its batch norms wait for nobody."""
    for module in task.modules():
        if isinstance(module, BatchNorm):
            module.of_all = False
    return task
