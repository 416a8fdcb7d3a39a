"""Image classification: one label an image (softmax), or any number (sigmoid)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from vitrail.data.batches.batch import Batch
from vitrail.data.names import shortened
from vitrail.data.targets import Classes
from vitrail.data.views.seen import Seen
from vitrail.metrics import Metrics, classification, multi_label
from vitrail.models import Model
from vitrail.tasks.answers import Prediction, Reading, read_classes
from vitrail.tasks.task import Losses, Task
from vitrail.tasks.tta import probabilities


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig:
    """The classification task's loss."""

    label_smoothing: float = 0.0
    """Share of each target spread over all classes (arXiv 1512.00567, section 7)."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: a rare class counts as much as a common one."""


class Classify(Task):
    """A model, its loss, and what it predicts."""

    score_name = "accuracy"
    model: Model

    def __init__(
        self, model: Model, config: ClassifyConfig, targets: Classes, tta: str = "none"
    ) -> None:
        """`targets`: the training data's, of whose images each class counts as many as it has;
        `tta`: how often a model looks at what it measures, a name in `vitrail.tasks.tta.LOOKS`.
        """
        super().__init__()
        self.model = model
        self.config = config
        self.targets = targets.rows(np.arange(0))
        self.multi_label = targets.several
        self.tta = tta
        weights = torch.ones(len(targets.names))
        if config.class_weights == "balanced":
            counts = torch.from_numpy(targets.counts().astype(np.float32))
            weights = counts.sum() / (len(counts) * counts.clamp(min=1))
        self.register_buffer("class_weights", weights, persistent=False)
        self.class_weights: Tensor

    def loss(self, batch: Batch) -> Losses:
        """Cross-entropy with soft targets, or binary cross-entropy averaged over classes."""
        logits = self.model(batch.images, batch.extent).float()
        return Losses(self.criterion(logits, batch.targets["classes"]), {})

    def criterion(self, logits: Float[Tensor, "b c"], targets: Float[Tensor, "b c"]) -> Tensor:
        """The mean loss of these logits, in their precision and on their device."""
        smoothing, weights = self.config.label_smoothing, self.class_weights.to(logits)
        if self.multi_label:
            targets = targets * (1 - smoothing) + smoothing / 2
            return F.binary_cross_entropy_with_logits(logits, targets, weight=weights)
        return F.cross_entropy(logits, targets, weight=weights, label_smoothing=smoothing)

    def predict(self, batch: Batch) -> Float[Tensor, "b c"]:
        """The probability of each class."""
        return probabilities(
            self.model, batch.images, batch.extent, multi_label=self.multi_label, tta=self.tta
        )

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """`probabilities [b c]`, and `targets`: `[b]`, or where there may be several `[b c]`."""
        truth = batch.targets["classes"]
        targets = (truth > 0.5).long() if self.multi_label else truth.argmax(dim=1)
        return {"probabilities": self.predict(batch).float(), "targets": targets}

    def score(self, rows: Mapping[str, Tensor]) -> float:
        """The share of images right: the likeliest class, or each label on its side of a half."""
        p, targets = rows["probabilities"], rows["targets"]
        right = (p > 0.5) == (targets > 0) if self.multi_label else p.argmax(dim=1) == targets
        return int(right.sum()) / max(right.numel(), 1)

    def judge(self, rows: Mapping[str, Tensor]) -> Metrics:
        """See `vitrail.metrics`."""
        how = multi_label if self.multi_label else classification
        return how(rows["probabilities"], rows["targets"])

    def summary(self, metrics: Metrics, noun: str) -> list[str]:
        """Two lines: how many are right, and what the most common class alone would give."""
        value, name = metrics.summary[metrics.headline], _NAMES[metrics.headline]
        count = f"{right(metrics)} of {metrics.images} {noun}"
        if value is None:
            return [f"{name:<10}not defined: no image has a label"]
        interval = f"(95% interval {value.low:.1%} to {value.high:.1%})"
        if metrics.multi_label:
            return [
                f"{name:<10}{value.value:.1%} {interval}",
                f"{'exact':<10}every label right for {count}",
            ]
        top, share = most_common(metrics)
        return [
            f"{name:<10}{value.value:.1%} {interval}, {count} right",
            f"{'baseline':<10}{share:.1%} for always saying '{self.targets.names[top]}'",
        ]

    def notes(self, metrics: Metrics, noun: str) -> list[str]:
        """The classes of which there is no image, and what that does to the means."""
        if not metrics.absent:
            return []
        names = shortened(self.targets.names[k] for k in metrics.absent)
        count, of = len(metrics.absent), len(metrics.per_class)
        said = f"{count} of {of} classes {'has' if count == 1 else 'have'} no image here: {names}"
        others = [
            f"{_NAMES.get(name, name)} {each.value:.1%} instead of {before.value:.1%}"
            for name, each in metrics.over_all_classes.items()
            if (before := metrics.summary[name]) and before.value != each.value
        ]
        if others:
            said += f". Counted as 0, they would make it {', '.join(others)}"
        return [said]

    def table(self, rows: Mapping[str, Tensor]) -> Iterable[Sequence[str]]:
        """label,predicted,probability, then `p:NAME` for each class. Several labels are a|b."""
        names = self.targets.names
        yield ("label", "predicted", "probability", *(f"p:{name}" for name in names))
        for target, row in zip(
            rows["targets"].tolist(), rows["probabilities"].tolist(), strict=True
        ):
            best = max(range(len(row)), key=row.__getitem__)
            if self.multi_label:
                label = "|".join(names[k] for k, there in enumerate(target) if there)
                predicted = "|".join(names[k] for k, p in enumerate(row) if p >= 0.5)
            else:
                label, predicted = names[target], names[best]
            yield (label, predicted, f"{row[best]:.6f}", *(f"{p:.6f}" for p in row))

    def outputs(
        self, images: Float[Tensor, "b c h w"], extent: Int64[Tensor, "b 2"] | None = None
    ) -> dict[str, Tensor]:
        """`logits` and `probabilities`, both `[b c]`."""
        logits = self.model(images, extent).float()
        said = logits.sigmoid() if self.multi_label else logits.softmax(dim=-1)
        return {"logits": logits, "probabilities": said}

    @property
    def reading(self) -> Reading:
        """How these become labels."""
        return Reading(kind="classify", names=self.targets.names, several=self.multi_label)

    def answer(self, batch: Batch, seen: Sequence[Seen]) -> list[Prediction]:
        """Of each image, all classes and the likeliest, over all looks at it."""
        return [read_classes(row, self.targets.names) for row in self.predict(batch).cpu().numpy()]

    def state(self) -> dict[str, Any]:
        """The names, and whether an image may have several."""
        return {"classes": list(self.targets.names), "multi_label": self.multi_label}


_NAMES = {"top1": "top-1", "map": "mAP", "f1": "F1", "auroc": "AUROC"}


def right(metrics: Metrics) -> int:
    """Images whose label, or whose every label, was predicted."""
    if metrics.confusion is None:
        exact = metrics.summary["exact_match"]
        return round(exact.value * metrics.images) if exact else 0
    return sum(row[k] for k, row in enumerate(metrics.confusion))


def most_common(metrics: Metrics) -> tuple[int, float]:
    """The most frequent class, and the share of images that always saying it gets right."""
    support = [each.support for each in metrics.per_class]
    top = int(np.argmax(support))
    return top, support[top] / metrics.images
