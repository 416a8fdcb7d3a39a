"""Held-out images measured: the same code for a run on its way, at its end, and long after it."""

import time
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from vitrail.data.batches.loader import EvalLoader
from vitrail.runs.world import World
from vitrail.tasks import Task


class Measured(NamedTuple):
    """What a task measured of all images that can be read, of all processes, in their order."""

    rows: dict[str, Tensor]
    """Each `[n ...]`, on the CPU; empty where no image can be read."""
    indices: Int64[np.ndarray, " n"]
    """Which images of the source these are."""
    seconds: float
    """From files to rows."""
    model_seconds: float
    """The model alone."""
    skipped: dict[str, str]
    """Key and reason of every image that this process could not read."""


@torch.inference_mode()
def measured(task: Task, loader: EvalLoader, world: World, *, half: bool) -> Measured:
    """What `task`, in evaluation mode, measures of the images of `loader`; `half`: in bfloat16,
    as far as autocast takes it.
    """
    found: list[dict[str, Tensor]] = []
    indices = [np.empty(0, np.int64)]
    model_seconds, started = 0.0, time.perf_counter()
    with torch.autocast(loader.device.type, torch.bfloat16, enabled=half):
        for batch in loader:
            if world.pulse:
                world.pulse.at(world.pulse.step)
            asked = time.perf_counter()
            if len(batch.indices) or not found:
                found.append(task.measure(batch))
            model_seconds += time.perf_counter() - asked
            indices.append(batch.indices)
    seconds = time.perf_counter() - started
    mine = torch.from_numpy(np.concatenate(indices)).to(loader.device)
    places = world.rows(mine).cpu()
    order = places.argsort()
    rows = {
        name: world.rows(torch.cat([each[name] for each in found])).cpu()[order]
        for name in (found[0] if found else {})
    }
    return Measured(rows, places[order].numpy(), seconds, model_seconds, dict(loader.skipped))
