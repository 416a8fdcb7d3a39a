"""A few real steps of a run, timed and weighed; what they learn is thrown away."""

import ctypes
import gc
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from typing import NamedTuple

import numpy as np
import torch

from vitrail import proc
from vitrail.data import Splits
from vitrail.data.batches.batch import Batch
from vitrail.data.batches.loader import EvalLoader
from vitrail.data.batches.making import Loader
from vitrail.data.sources.source import Source, Subset
from vitrail.planning.paper import Line, Sizes, Step, Tally, held_by, tensors_of
from vitrail.runs import TrainConfig
from vitrail.runs.machine import matrix_rate
from vitrail.runs.parts import train_source
from vitrail.tasks import Task
from vitrail.training.grow import resized
from vitrail.training.step import Learner

_STEP_SECONDS = 3.0
"""A step is to take about so long; its batch is made smaller for it."""
_LIKELY_SHARE = 0.3
"""Of the matrix product's rate, before anything is known."""
_MOST_STEPS = 6
_READ_SHARE = 0.25
"""Of the seconds, for reading training images."""
_JUDGED = 64
_COUNTED = 4


class Makers(NamedTuple):
    """How the run's parts are made, each time anew."""

    on_paper: Callable[[], Task]
    """The task on the meta device."""
    task: Callable[[], Task]
    """The task as the run starts with it, on its device."""
    train: Callable[[int], Loader]
    """With batches of so many images, for one process."""
    val: Callable[[Source, int], EvalLoader]
    """Of a source, with batches of so many images."""


class Tryout(NamedTuple):
    """What a few steps took. Times are seconds of one image, but for `warm` and `update`."""

    images: int
    """Of each of its batches."""
    read: float
    """To read and augment a training image, the first time."""
    read_again: float
    """The same, from memory."""
    warm: float
    """Of the first steps, beyond what the others took: torch.compile compiles in them."""
    compute: float
    """Forward and backward."""
    update: float
    """Of a whole step: what does not depend on its images (clipping, optimiser, average)."""
    judge: float
    """To label a held-out image."""
    judge_read: float
    judge_read_again: float
    rate: float
    """FLOP/s of a matrix product in the run's number format."""
    activations: Line
    """Bytes by images at once, counted while a few were computed."""
    estimated: int
    """Bytes that these steps should have taken, weights and all, by what was counted."""
    measured: int | None
    """Bytes that it did take, from before there was a model to the peak; None: nobody says."""

    @property
    def error(self) -> float | None:
        """Of the estimate, as a share of what was measured."""
        return self.estimated / self.measured - 1 if self.measured else None


def try_out(
    config: TrainConfig,
    splits: Splits,
    makers: Makers,
    device: torch.device,
    sizes: Sizes,
    flops: float,
    seconds: float,
    most: int,
) -> Tryout:
    """Try a few steps of what `config` describes, for about so many `seconds`.

    `flops` are those of one image, forward and backward: they say how large a batch can be tried;
    and it has at most so many images.
    """
    ends = time.perf_counter() + seconds
    rate = _peak_rate(config, device, seconds / 40)
    likely = flops / (_LIKELY_SHARE * rate)
    size = min(
        config.data.batch_size,
        len(train_source(config, splits)),
        most,
        max(2, int(_STEP_SECONDS / likely)),
    )
    train = makers.train(size)
    batches, read = _read(train, seconds * _READ_SHARE / 2)
    _, read_again = _read(train, seconds * _READ_SHARE / 2, len(batches))
    if config.data.multiscale is not None:
        batches = list(resized(batches, config.train_sizes()[-1]))
    images = max(len(batch.indices) for batch in batches)
    meter = Meter(device)
    learner = Learner(makers.task(), config, device)
    learner.prepare()
    warm, compute, update = _steps(learner, batches, ends)
    measured = meter.grown()
    judge, judge_read, judge_read_again = _judge(
        learner, splits, makers, max(2, int(_STEP_SECONDS / compute))
    )
    at_once = min(learner.engine.micro or images, images)
    if config.compile:  # what a compiled block allocates cannot be counted
        learner = Learner(makers.task(), replace(config, compile=False), device)
        learner.prepare()
    activations = _activations(learner, batches[0])
    return Tryout(
        images=images,
        read=read,
        read_again=read_again,
        warm=warm,
        compute=compute,
        update=update,
        judge=judge,
        judge_read=judge_read,
        judge_read_again=judge_read_again,
        # Others may have been at work when it was measured first.
        rate=max(rate, _peak_rate(config, device, seconds / 40)),
        activations=activations,
        estimated=sizes.held.alone + activations.at(at_once, images),
        measured=measured,
    )


def _steps(learner: Learner, batches: list[Batch], ends: float) -> tuple[float, float, float]:
    """Seconds that the first steps took beyond the others, of an image, and of an update.

    The first step makes the optimiser's states, and whatever a library makes once; the first two
    may compile, and then there are two more however long that took.
    """
    not_counted = 2 if learner.config.compile else 1
    fewest = 4 if learner.config.compile else 1
    compute: list[float] = []
    update: list[float] = []
    for step in range(not_counted + _MOST_STEPS):
        batch = batches[step % len(batches)]
        started = time.perf_counter()
        learner.enter(1.0)
        learner.gradients([batch])
        computed = time.perf_counter()
        learner.update(0.0, step + 1, 1.0)  # as the first of a warm-up: nothing can diverge
        _synchronise(learner.device)
        compute.append((computed - started) / len(batch.indices))
        update.append(time.perf_counter() - computed)
        longest = compute[-1] * len(batch.indices) + update[-1]
        if len(compute) >= fewest and time.perf_counter() + longest > ends:
            break
    usual = compute[not_counted:] or compute
    each, whole = float(np.median(usual)), float(np.median(update[not_counted:] or update))
    first = compute[: len(compute) - len(usual)]
    images = max(len(batch.indices) for batch in batches)
    return max(0.0, images * (sum(first) - len(first) * each)), each, whole


def _peak_rate(config: TrainConfig, device: torch.device, seconds: float) -> float:
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    return matrix_rate(dtype, device, seconds=seconds)


def _read(train: Loader, seconds: float, most: int = _MOST_STEPS) -> tuple[list[Batch], float]:
    """The first few batches, and the seconds that an image of them took."""
    batches: list[Batch] = []
    started = time.perf_counter()
    for batch in _epochs(train):
        if len(batch.indices):
            batches.append(batch)
        taken = time.perf_counter() - started
        if len(batches) == most or (batches and taken > seconds):
            break
    return batches, taken / sum(len(batch.indices) for batch in batches)


def _epochs(train: Loader) -> Iterator[Batch]:
    for epoch in count():
        yield from train.epoch(epoch)


def _activations(learner: Learner, batch: Batch) -> Line:
    """Bytes that a step allocates, counted as they are made: over a few images, and twice as many,
    all at once and cut in two.

    Unlike what autograd saves (`torch.autograd.graph.saved_tensors_hooks`), this has in it what
    checkpointing computes again, and what is only there for a moment.
    """
    engine = learner.engine
    learner.enter(1.0)
    held = held_by(engine)
    steps = []
    few = max(2, min(_COUNTED, len(batch.indices) // 4))  # of one, batch norms have no statistics
    for images, at_once in ((few, None), (2 * few, None), (2 * few, few)):
        engine.micro = at_once
        part = batch.rows(np.arange(images) % len(batch.indices))  # or the same ones again
        with Tally([*held, *tensors_of(part)]) as tally:
            engine.gradients([part], learner.task.weight(part))
        steps.append(Step(images, 0, tally.peak, tally.flops, 0))
    learner.optimizer.zero_grad(set_to_none=True)
    return Line.through(*steps)


@torch.inference_mode()
def _judge(
    learner: Learner, splits: Splits, makers: Makers, most: int
) -> tuple[float, float, float]:
    """Seconds to label a held-out image; to read it; to read it again."""
    assert splits.val is not None
    number = min(len(splits.val), _JUDGED, most)
    some = np.linspace(0, len(splits.val) - 1, number).astype(int)
    loader = makers.val(Subset(splits.val, some), number)
    started = time.perf_counter()
    batches = list(loader)
    read = time.perf_counter() - started
    started = time.perf_counter()
    list(loader)
    again = time.perf_counter() - started
    labelled = sum(len(batch.indices) for batch in batches)
    if not labelled:
        return 0.0, read / number, again / number
    learner.task.eval()
    taken = []
    with learner.engine.autocast():
        for _ in range(2):
            started = time.perf_counter()
            for batch in batches:
                for found in learner.task.measure(batch).values():
                    found.flatten()[:1].cpu()  # waits for it
            taken.append(time.perf_counter() - started)
    return min(taken) / labelled, read / number, again / number


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Meter:
    """How much more memory than now is taken at the most, from now on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.works = True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
            return
        _give_back()
        try:
            proc.forget_peak()
            self._before = proc.resident()
        except (OSError, ValueError):
            self.works = False
        self.works = self.works and device.type == "cpu"

    def grown(self) -> int | None:
        """Bytes; None where the system does not say."""
        if not self.works:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self._before
        return proc.peak_resident() - self._before


def _give_back() -> None:
    """Hand freed memory back to the system: taken again, it would not be seen."""
    gc.collect()
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
        if trim is not None:
            trim(0)
