"""How fast models are on this machine: they take turns, and the median of the turns counts.

A machine has slow moments. If each model were measured after another, such a moment would be one
model's misfortune; in turns it meets all of them, and the median passes it over. Before the clock
starts each has had `_WARM` calls. The time is that of the model alone, from normalised pixels in
memory to logits: reading and scaling images costs the same for all.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from vitrail.deploy.bundle import Bundle
from vitrail.deploy.engines import engine_of
from vitrail.deploy.tuning import tuned
from vitrail.models import ModelConfig, build

BATCH = 16
"""Images of the batch whose speed is measured."""
_WARM = 2
_MOST = 60
"""Turns of a fast model; a slow one has as many as `seconds` allow, but at least so many:"""
_LEAST_SINGLE, _LEAST_BATCH, _LEAST_MEDIAN = 20, 5, 7

Precision = Literal["float32", "bfloat16"]

Labeller = Callable[[int], None]
"""Labels so many images, and is done when it returns."""


class Place(NamedTuple):
    """Where and how the models compute."""

    device: str
    precision: Precision
    threads: int


class Speed(NamedTuple):
    """What a model needs for images. Times are seconds."""

    images_per_second: float
    """At a batch of `BATCH`, or as many as were asked for, the median."""
    latency: float
    """Of one image alone, the median."""
    latency_p95: float
    """What 95 of 100 single images do not exceed."""


def model_labeller(config: ModelConfig, device: str, most: int = BATCH) -> Labeller:
    """The model, freshly initialised: its speed does not depend on what it has learned. It takes
    batches of up to `most`.
    """
    return labeller(build(config), (config.channels, *config.image_size), device, most)


def labeller(model: Any, shape: tuple[int, int, int], device: str, most: int = BATCH) -> Labeller:
    """A model of images of a shape (channels, height, width)."""
    model = model.eval().to(device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(most, *shape, generator=generator).to(device)

    def label(batch: int) -> None:
        model(images[:batch])
        if images.is_cuda:
            torch.cuda.synchronize(images.device)

    return label


def engine_labeller(bundle: Bundle, threads: int, most: int = BATCH) -> Labeller:
    """An exported model in its runtime, from pixels of the model's size on; by the setting that is
    best for one image, and for many.
    """
    settings = tuned(bundle)
    alone = engine_of(bundle, settings.alone._replace(threads=threads))
    many = engine_of(bundle, settings.many._replace(threads=threads))
    shape = most, bundle.preprocess.channels, *bundle.preprocess.size
    views = [*np.random.default_rng(0).integers(0, 256, shape, np.uint8)]

    def label(batch: int) -> None:
        (alone if batch == 1 else many).run(views[:batch])

    return label


@contextmanager
def computing(place: Place) -> Iterator[None]:
    """Compute as inference does at this place, as long as the `with` block runs.

    It is one autocast context: the weights are cast once, not at each call.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(place.threads)
    mixed = place.precision == "bfloat16"
    device = torch.device(place.device).type
    try:
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=mixed):
            yield
    finally:
        torch.set_num_threads(before)


def speeds(
    labellers: Mapping[str, Labeller], place: Place, seconds: float = 3.0, batch: int = BATCH
) -> dict[str, Speed]:
    """Measure each of them, in turns, for about `seconds` apiece and never for too few turns."""
    with computing(place):
        single = _in_turns(labellers, 1, _LEAST_SINGLE, seconds / 2)
        batches = _in_turns(labellers, batch, _LEAST_BATCH, seconds / 2)
    return {
        name: Speed(
            images_per_second=batch / float(np.median(batches[name])),
            latency=float(np.median(single[name])),
            latency_p95=float(np.quantile(single[name], 0.95)),
        )
        for name in labellers
    }


def latencies(
    labellers: Mapping[str, Labeller], place: Place, seconds: float = 3.0
) -> dict[str, float]:
    """Seconds that one image takes, in turns: the median alone, which takes fewer of them."""
    with computing(place):
        times = _in_turns(labellers, 1, _LEAST_MEDIAN, seconds)
    return {name: float(np.median(taken)) for name, taken in times.items()}


def _in_turns(
    labellers: Mapping[str, Labeller], batch: int, least: int, seconds: float
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in labellers}
    for label in labellers.values():
        for _ in range(_WARM):
            label(batch)
    started = time.perf_counter()
    for turn in range(_MOST):
        if turn >= least and time.perf_counter() - started > seconds * len(labellers):
            break
        for name, label in labellers.items():
            asked = time.perf_counter()
            label(batch)
            times[name].append(time.perf_counter() - asked)
    return times
