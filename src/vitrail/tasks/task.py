"""What every task is: a model, what it learns, and how good its answers are.

A task's file reads from top to bottom: config, loss, measure, judgement, answer. Loop, evaluation
and prediction know nothing else of it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.data.batches.batch import Batch
from vitrail.data.views.seen import Seen
from vitrail.metrics import Estimate


class Losses(NamedTuple):
    """What a step minimises, and the parts of it that are worth a line in the log."""

    total: Float[Tensor, ""]
    parts: dict[str, Float[Tensor, ""]]


class Metrics(Protocol):
    """How good the answers are, whatever was asked."""

    @property
    def images(self) -> int:
        """How many were measured."""
        ...

    @property
    def summary(self) -> Mapping[str, Estimate | None]:
        """Number by name, in the order in which a reader wants them."""
        ...

    @property
    def headline(self) -> str:
        """The name, in `summary`, of the one number that stands for all."""
        ...

    def values(self) -> dict[str, float | None]:
        """The summary without its intervals."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """What metrics.json holds: the summary's numbers on top, then the parts."""
        ...


class Task(nn.Module, ABC):
    """A model, its loss, and how its answers are judged.

    `model` is what is judged, averaged and exported; what else learns, or teaches, lies beside it.
    """

    model: nn.Module
    apart = ""
    """Of the loss what is no mean over images, in words: it depends on what is computed at once."""
    coupled: ClassVar[bool] = False
    """Whether the loss looks across images, so that a batch cannot be computed in parts."""
    score_name: ClassVar[str]
    """Of the number that `score` gives, in the log (`val_NAME`)."""

    @abstractmethod
    def loss(self, batch: Batch) -> Losses:
        """What a step minimises: the mean over the batch's `weight`."""

    def weight(self, batch: Batch) -> Float[Tensor, " b"]:
        """How much each image counts in a mean: the same, or by the pixels that have a class."""
        return torch.ones(len(batch.indices), device=batch.images.device)

    @abstractmethod
    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """What `score` and `judge` need to know of each image, by name: each `[b ...]`, as little
        as will do, for it is kept of all images.
        """

    @abstractmethod
    def score(self, rows: Mapping[str, Tensor]) -> float:
        """Of all measured images, the number by which checkpoints are compared; more is better."""

    @abstractmethod
    def judge(self, rows: Mapping[str, Tensor]) -> Metrics:
        """Of all measured images, every number with its interval."""

    @abstractmethod
    def answer(self, batch: Batch, seen: Sequence[Seen]) -> list[Any]:
        """What a user wants to know of each image, of which `seen` is how its view lies in it."""

    @abstractmethod
    def block_names(self) -> list[str]:
        """The model's blocks by their names in it, first to last: to compile, recompute, shard."""

    def enter(self, done: float) -> None:
        """Before a step, of a run of which `done` (0 to 1) is over."""

    def after_step(self, done: float) -> None:
        """After an optimiser's step: a teacher's average moves here."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What a checkpoint says of the task, beside its weights: plain values."""
