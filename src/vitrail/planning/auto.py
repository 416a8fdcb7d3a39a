"""`auto`: numbers of a config that follow from the memory that is free.

A config is what a run is, so it holds numbers alone. What is to be found is asked beside it, and
found once, before the run has a folder: whoever sees the config later sees the number.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

from vitrail.data.views.mix import share_unit
from vitrail.errors import DataError, setting
from vitrail.runs import TrainConfig
from vitrail.units import bytes_text

AUTO = "auto"
"""What stands for such a number in a file or behind a flag."""

_MOST = {"cpu": 64}
_MOST_ELSEWHERE = 1024
"""Images of a process's batch, if the recipe has no more: what more would gain in speed is lost in
steps (measured on a CPU, docs/decisions.md; elsewhere it is the step of DeiT).
"""
_FEWEST_STEPS = 8
"""An epoch keeps so many, as with the recipes' own numbers, if the images suffice."""
_LEAST = 4


class Auto(NamedTuple):
    """Which numbers are to be found."""

    batch_size: bool = False
    """`data.batch_size`: what a step sees, and so what is learned."""
    micro_batch: bool = False
    """`micro_batch`: what is computed at once, of a batch that stays as it is."""

    def start(self, config: TrainConfig, processes: int) -> TrainConfig:
        """`config`, until the number is found, with a batch that so many processes can share.

        Raises `UsageError` where a batch cannot be cut, as the config says it.
        """
        if self.micro_batch:
            replace(config, micro_batch=1)
        if not self.batch_size:
            return config
        unit = share_unit(config.augment, processes)
        return _with_batch(config, max(1, config.data.batch_size // unit) * unit)


ALL_GIVEN = Auto()


class Chosen(NamedTuple):
    """A config with its numbers, and a sentence about each."""

    config: TrainConfig
    notes: tuple[str, ...]


def choose(
    auto: Auto,
    config: TrainConfig,
    needed: Callable[[TrainConfig], int],
    room: int,
    *,
    images: int,
    unit: int,
    device: str,
) -> Chosen:
    """The largest numbers with which `config` needs no more than `room` bytes.

    `needed` says what a process takes with a config; `images` are those to train on; `device` is
    the kind (cpu, cuda). A batch is a power of two times `unit`, and leaves an epoch a few steps.

    Raises `DataError` where there is not even room for the least.
    """
    notes = []
    if auto.batch_size:
        before, rate = config.data.batch_size, config.optim.lr
        few = min(images, max(_LEAST, images // (_FEWEST_STEPS * config.accumulate)))
        enough = max(_MOST.get(device, _MOST_ELSEWHERE) * config.devices, before)
        ladder = {n: _with_batch(config, n) for n in _ladder(min(few, enough), unit)}
        top = (
            f"with more an epoch of {images:,} images would have fewer than {_FEWEST_STEPS} steps"
            if few <= enough
            else "more would be no faster"
        )
        config, note = _largest("batch size", ladder, needed, room, top)
        if config.data.batch_size != before:
            note += f". The learning rate stays {rate:g}, which was for {before}"
        notes.append(note)
    if auto.micro_batch:
        share = max(1, min(config.data.batch_size, images) // config.devices)
        numbers = (share, *(n for n in _ladder(share, 1) if n < share))
        ladder = {n: replace(config, micro_batch=n) for n in numbers}
        config, note = _largest("micro-batch", ladder, needed, room, "these are all of a batch")
        notes.append(note)
    return Chosen(config, tuple(notes))


def _largest(
    name: str,
    ladder: Mapping[int, TrainConfig],
    needed: Callable[[TrainConfig], int],
    room: int,
    top: str,
) -> tuple[TrainConfig, str]:
    """The first config of a falling ladder that fits, and why it is that: `top`, if it is the top
    one.
    """
    why = top
    for number, config in ladder.items():
        taken = f"{number} would take {bytes_text(needed(config))}"
        if needed(config) <= room:
            return config, f"{name} {number} (auto): of {bytes_text(room)} {taken}, and {why}"
        why = taken
    raise DataError(
        f"{name} auto: {why}, and {bytes_text(room)} can be had. Take "
        f"{setting('checkpointing', True)}, or a smaller {setting('model')} or "
        f"{setting('model.image_size')}"
    )


def _ladder(most: int, unit: int) -> list[int]:
    """`unit` times each power of two, the largest up to `most` first; `unit` is always there.

    >>> _ladder(100, 1), _ladder(100, 6), _ladder(4, 6)
    ([64, 32, 16, 8, 4, 2, 1], [96, 48, 24, 12, 6], [6])
    """
    steps = range(max(1, most // unit).bit_length())
    return [unit * 2**power for power in reversed(steps)]


def _with_batch(config: TrainConfig, images: int) -> TrainConfig:
    return replace(config, data=replace(config.data, batch_size=images))
