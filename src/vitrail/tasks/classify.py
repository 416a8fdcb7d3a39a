"""Image classification: one label an image (softmax), or any number (sigmoid)."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.data.batches.loader import Batch
from vitrail.models import Model
from vitrail.tasks.tta import probabilities


class Losses(NamedTuple):
    """What a step minimises, and the parts of it that are worth a line in the log."""

    total: Float[Tensor, ""]
    parts: dict[str, Float[Tensor, ""]]


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig:
    """The classification task's loss."""

    label_smoothing: float = 0.0
    """Share of each target spread over all classes (arXiv 1512.00567, section 7)."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: a rare class counts as much as a common one."""


class Classify(nn.Module):
    """A model, its loss, and what it predicts."""

    apart = ""
    """Of the loss what is no mean over images, in words: it depends on what is computed at once."""

    def __init__(
        self,
        model: Model,
        config: ClassifyConfig,
        classes: tuple[str, ...],
        counts: Float[Tensor, " c"],
        multi_label: bool,
    ) -> None:
        """`counts`: images of each class in the training data."""
        super().__init__()
        self.model = model
        self.config = config
        self.classes = classes
        self.multi_label = multi_label
        weights = torch.ones_like(counts)
        if config.class_weights == "balanced":
            weights = counts.sum() / (len(counts) * counts.clamp(min=1))
        self.register_buffer("class_weights", weights, persistent=False)
        self.class_weights: Tensor

    def loss(self, batch: Batch) -> Losses:
        """Cross-entropy with soft targets, or binary cross-entropy averaged over classes."""
        logits = self.model(batch.images, batch.extent).float()
        return Losses(self.criterion(logits, batch.targets), {})

    def criterion(self, logits: Float[Tensor, "b c"], targets: Float[Tensor, "b c"]) -> Tensor:
        """The mean loss of these logits, in their precision and on their device."""
        smoothing, weights = self.config.label_smoothing, self.class_weights.to(logits)
        if self.multi_label:
            targets = targets * (1 - smoothing) + smoothing / 2
            return F.binary_cross_entropy_with_logits(logits, targets, weight=weights)
        return F.cross_entropy(logits, targets, weight=weights, label_smoothing=smoothing)

    def predict(self, batch: Batch, tta: str = "none") -> Float[Tensor, "b c"]:
        """The probability of each class; `tta` is a name in `vitrail.tasks.tta.LOOKS`."""
        return probabilities(
            self.model, batch.images, batch.extent, multi_label=self.multi_label, tta=tta
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint says of the task, beside its weights."""
        return {"classes": list(self.classes), "multi_label": self.multi_label}

    def after_step(self, step: int) -> None:
        """Nothing moves between steps (a teacher's average would)."""
