"""What every task is: a model, what it learns, and how good its answers are.

A task's file reads from top to bottom: config, loss, measure, judgement, answer. Loop, evaluation
and prediction know nothing else of it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vitrail.data.batches.batch import Batch
from vitrail.data.targets import Targets
from vitrail.data.views.seen import Seen
from vitrail.metrics import Estimate
from vitrail.tasks.answers import Reading

if TYPE_CHECKING:
    from vitrail.weights import Opened


class Losses(NamedTuple):
    """What a step minimises, and the parts of it that are worth a line in the log."""

    total: Float[Tensor, ""]
    parts: dict[str, Float[Tensor, ""]]


@runtime_checkable
class ByVectors(Protocol):
    """A task whose loss looks across images, but only at vectors of each: so a batch of it can be
    computed in parts. `loss` is `of_vectors(batch, vectors(batch))`.
    """

    def vectors(self, batch: Batch) -> tuple[Tensor, ...]:
        """Of a part of a batch: rows `[b ...]`, or `[1]` for what the parts have in common."""
        ...

    def of_vectors(self, batch: Batch, vectors: Any) -> Losses:
        """The loss of a batch, of whose parts these are the rows one after another."""
        ...


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

    model: Any
    """A module that names its blocks (`block_names`)."""
    targets: Targets
    """What is said of images, of no image: names and kind."""
    apart = ""
    """Of the loss what is no mean over images, in words: it depends on what is computed at once."""
    coupled: ClassVar[bool] = False
    """Whether the loss looks across images, so that a batch cannot be computed in parts."""
    banked: ClassVar[bool] = False
    """Whether a finished run is judged by rows of its training images too: see `with_bank`."""
    score_name: ClassVar[str]
    """Of the number that `score` gives, in the log (`val_NAME`)."""

    def begin(self, opened: "Opened") -> list[str]:
        """Take what the weights that a run starts from hold beside the model, which has its own
        already; what became of it, a sentence each.
        """
        return []

    @abstractmethod
    def loss(self, batch: Batch) -> Losses:
        """What a step minimises: the mean over the batch, by its `weight`."""

    def fixed(self, batch: Batch) -> tuple[Tensor, ...]:
        """What a part of it that never learns says of a batch, a row an image in each tensor: it
        is kept where views come again (`tune.kept_views`).
        """
        return ()

    def weight(self, batch: Batch) -> float:
        """How much a batch counts in a mean: its images, or its pixels that have a class."""
        return float(len(batch.indices))

    @abstractmethod
    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """What `score` and `judge` need to know of each image, by name: each `[b ...]`, as little
        as will do, for it is kept of all images.
        """

    @abstractmethod
    def score(self, rows: Mapping[str, Tensor]) -> float:
        """Of all measured images, the number by which checkpoints are compared; more is better."""

    def collapsed(self, rows: Mapping[str, Tensor]) -> str | None:
        """Why a run of which these rows were measured should stop here, for it learns nothing any
        more; None: no reason.
        """
        return None

    @abstractmethod
    def judge(self, rows: Mapping[str, Tensor]) -> Metrics:
        """Of all measured images, every number with its interval."""

    def with_bank(
        self, rows: Mapping[str, Tensor], bank: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The rows of measured images, with what those of training images say of them."""
        return dict(rows)

    @abstractmethod
    def summary(self, metrics: Any, noun: str) -> list[str]:
        """A few lines for a terminal: how good, and compared with what. `noun`: what to call the
        images.
        """

    def notes(self, metrics: Any, noun: str) -> list[str]:
        """What a reader of the numbers has to know besides, a sentence each."""
        return []

    @abstractmethod
    def table(self, rows: Mapping[str, Tensor]) -> Iterable[Sequence[str]]:
        """What was said of each measured image, in columns; the first line names them."""

    @abstractmethod
    def outputs(
        self, images: Float[Tensor, "b c h w"], extent: Int64[Tensor, "b 2"] | None = None
    ) -> dict[str, Tensor]:
        """What the model says of normalised views, in tensors by name: all that an export carries.
        `extent` is the model's, for views of several sizes.
        """

    @property
    @abstractmethod
    def reading(self) -> Reading:
        """How these tensors become what a user wants to know."""

    @abstractmethod
    def answer(self, batch: Batch, seen: Sequence[Seen]) -> list[Any]:
        """What a user wants to know of each image, of which `seen` is how its view lies in it."""

    def prepare(
        self, device: torch.device, notify: Callable[[str], None] = lambda sentence: None
    ) -> dict[str, str]:
        """Before the first step, and before time is counted: what is computed once, on this device.
        Key and reason of images that it has found unreadable.
        """
        return {}

    def enter(self, done: float) -> None:
        """Before a step, of a run of which `done` (0 to 1) is over."""

    def after_step(self, done: float) -> None:
        """After an optimiser's step: a teacher's average moves here."""

    def named_beside(self) -> list[tuple[str, nn.Parameter]]:
        """What lies beside the model and may learn, by name."""
        return [
            (name, parameter)
            for name, parameter in self.named_parameters()
            if not name.startswith("model.")
        ]

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What a checkpoint says of the task, beside its weights: plain values."""
