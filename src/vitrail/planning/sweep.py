"""The learning-rate range test (Smith, arXiv 1506.01186): which rates this model can bear.

The rate climbs exponentially, step by step, on a copy of the model. Where it is too low the loss
stays; then it falls; then it rises for good. A tenth of the rate from which it rises is a sound
highest rate for a schedule with warm-up: the test is short, and a run must bear its rate for long.
"""

import copy
import math
import time
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float64

from vitrail.data.batches.batch import Batch
from vitrail.data.batches.making import Loader
from vitrail.runs import TrainConfig
from vitrail.tasks import Task
from vitrail.training.probe import solve_head
from vitrail.training.step import Learner

_STEPS = 60
_FEWEST_STEPS = 20
_DECADES = {
    "adamw": (-6.0, 0.0),
    "muon": (-6.0, 0.0),
    "adafactor": (-6.0, 0.0),
    "lamb": (-5.0, 1.0),
    "sgd": (-5.0, 1.0),
}
"""log10 of the lowest and the highest rate."""
_HALF = 2
"""Steps each way that the smoothed loss is the median of."""
_DIVERGED = 4.0
"""Times its lowest value so far, a loss is beyond doubt."""


class Sweep(NamedTuple):
    """What a sweep saw."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    """Of each step's batch, before the step; smoothed."""
    suggestion: float | None
    """For `optim.lr`; None where the loss never rose for good."""


def find_lr(task: Task, train: Loader, config: TrainConfig, *, seconds: float = 60.0) -> Sweep:
    """Try rising learning rates on a copy of `task`, in about so many `seconds`.

    The steps are the run's own, in its precision and its pieces; it starts as the run would
    (`tune.head_init`, freezing, layer-wise rates), but for the head's warm-up, which is left out.
    `task` itself stays what it is.
    """
    task = copy.deepcopy(task)
    if config.tune.head_init == "probe":
        solve_head(task, train, config)
    learner = Learner(task, config, torch.device(train.device))
    learner.prepare()
    low, high = _DECADES[config.optim.name]
    rates: list[float] = []
    losses: list[float] = []
    steps, started = _STEPS, time.perf_counter()
    for group in _groups(train, config.accumulate):
        rate = 10 ** (low + (high - low) * len(rates) / (steps - 1))
        learner.enter(1.0)
        told = learner.gradients(group)
        if not told.finite:
            break
        learner.update(rate, len(rates) + 1, 1.0)
        rates.append(rate)
        losses.append(told.loss.total)
        if len(rates) == 1:
            # One step at the lowest rate says how many there is time for.
            per_step = time.perf_counter() - started
            steps = max(_FEWEST_STEPS, min(_STEPS, int(seconds / per_step)))
        if len(rates) == steps or losses[-1] > _DIVERGED * min(losses):
            break
    smooth = _smoothed(losses)
    return Sweep(tuple(rates), tuple(smooth.tolist()), suggest(rates, losses))


def suggest(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """A tenth of the rate from which the smoothed loss is above its lowest value, and stays so.

    Above is by more than three times the noise that the smoothing leaves. None where there is no
    such rate: the loss never rose, or there are too few steps to say.

    >>> rates = [1e-4, 2e-4, 4e-4, 1e-3, 2e-3, 4e-3, 1e-2, 2e-2, 4e-2]
    >>> suggest(rates, [2.3, 2.3, 2.2, 2.1, 1.9, 1.8, 4.0, 6.0, 9.0])
    0.001
    """
    if len(losses) <= 2 * _HALF:
        return None
    smooth = _smoothed(losses)
    lowest = int(smooth.argmin())
    # The noise of one batch, whatever single ones are like: a median absolute deviation.
    calm = np.subtract(losses, smooth)[: max(lowest, len(losses) // 2)]
    noise = 1.48 * np.median(np.abs(calm))
    above = smooth > smooth[lowest] + 3 * noise / math.sqrt(2 * _HALF + 1)
    if not above[-1]:
        return None
    return rates[int(np.flatnonzero(~above)[-1]) + 1] / 10


def _smoothed(losses: Sequence[float]) -> Float64[np.ndarray, " n"]:
    """The median of each and its neighbours, as many on either side as there are on both."""
    values = np.asarray(losses, np.float64)
    halves = [min(_HALF, i, len(values) - 1 - i) for i in range(len(values))]
    return np.array([np.median(values[i - half : i + half + 1]) for i, half in enumerate(halves)])


def _groups(train: Loader, size: int) -> Iterator[list[Batch]]:
    """What steps are made of: batches `size` at a time, without end."""
    batches = (b for epoch in count() for b in train.epoch(epoch) if len(b.indices))
    while True:
        yield list(islice(batches, size))
