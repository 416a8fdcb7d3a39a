"""What features are worth that learned from no labels, and what they say of an image.

It is measured and asked; what learns is a task of its own, which judges itself so (moco.py).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from vitrail.data.batches.batch import Batch
from vitrail.data.targets import Classes, Targets
from vitrail.data.views.seen import Seen
from vitrail.errors import UsageError, setting
from vitrail.metrics.features import (
    FeatureMetrics,
    judged,
    knn,
    leave_one_out,
    nearest,
    rankme,
    rights,
)
from vitrail.models import Model
from vitrail.tasks.answers import Embedding, Reading
from vitrail.tasks.task import Losses, Task

_COLLAPSED = 0.1
"""A spread of features that tells no images apart any more."""


class Embed(Task):
    """A model without a head."""

    banked = True
    score_name = "features"
    model: Model

    def __init__(self, model: Model, targets: Targets, neighbours: int = 20) -> None:
        """`targets`: what is said of images, by which features are judged where it is classes;
        `neighbours`: how many vote. Raises `UsageError` for a model with a head.
        """
        super().__init__()
        if model.head is not None:
            raise UsageError(
                f"a model that learns features has no classes: build it with "
                f"{setting('model.classes', 0)}"
            )
        self.model = model
        self.targets = targets.rows(np.arange(0))
        self.neighbours = neighbours

    def loss(self, batch: Batch) -> Losses:
        """Nothing learns here: that is a mistake of the caller's."""
        raise TypeError("features are measured here; a task that learns has its own loss")

    def features(self, batch: Batch) -> Float[Tensor, "b d"]:
        """What the model makes of the first view, in float32 and of length 1."""
        return self.outputs(*batch.views[0])["features"]

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """`features [b d]`, and `classes [b c]` where they are known."""
        known = {name: batch.targets[name] for name in ("classes",) if name in batch.targets}
        return {"features": self.features(batch), **known}

    def score(self, rows: Mapping[str, Tensor]) -> float:
        """The share of images whose class their neighbours tell; without classes, the share of
        the features' directions that images use (RankMe).
        """
        features = rows["features"]
        if "classes" not in rows:
            return rankme(features) / features.shape[1]
        votes = leave_one_out(features, rows["classes"], k=self.neighbours)
        return rights(votes, rows["classes"]).double().mean().item()

    def with_bank(
        self, rows: Mapping[str, Tensor], bank: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """With `votes [n c]` of the training images, where classes are known, and `bank [n]`, how
        many vote.
        """
        if "classes" not in rows or "classes" not in bank:
            return dict(rows)
        votes = knn(rows["features"], bank["features"], bank["classes"], k=self.neighbours)
        many = torch.full((len(votes),), len(bank["features"]))
        return {**rows, "votes": votes, "bank": many}

    def judge(self, rows: Mapping[str, Tensor]) -> FeatureMetrics:
        """See `vitrail.metrics.features`."""
        many = int(rows["bank"][0]) if "bank" in rows else None
        return judged(
            rows["features"],
            rows.get("classes"),
            k=self.neighbours,
            votes=rows.get("votes"),
            bank=many,
        )

    def summary(self, metrics: FeatureMetrics, noun: str) -> list[str]:
        """How many images their neighbours tell, or how many directions the features use; and how
        far they spread.
        """
        lines = []
        if near := metrics.summary.get("knn"):
            interval = f"(95% interval {near.low:.1%} to {near.high:.1%})"
            count = f"{round(near.value * metrics.images)} of {metrics.images} {noun}"
            who = f"{metrics.bank:,} training images" if metrics.bank else "the others"
            lines += [
                f"{'k-NN':<10}{near.value:.1%} {interval}, {count} told by {who}",
                f"{'baseline':<10}{metrics.chance:.1%} for always saying the most common class",
            ]
        if rank := metrics.summary["rankme"]:
            interval = f"(95% interval {rank.low:.1f} to {rank.high:.1f})"
            used = f"{rank.value:.1f} {interval} of {metrics.dimensions} directions are used"
            lines.append(f"{'RankMe':<10}{used}")
        if std := metrics.summary["std"]:
            lines.append(f"{'spread':<10}{std.value:.2f} of 1; 0 is that all images look the same")
        return lines

    def notes(self, metrics: FeatureMetrics, noun: str) -> list[str]:
        """Whether the features have become one."""
        std = metrics.summary["std"]
        if metrics.images == 1 or std is None or std.value > _COLLAPSED:
            return []
        return [
            f"the features of all {noun} are nearly the same (spread {std.value:.3f}): the run has "
            f"collapsed; a smaller {setting('optim.lr')} or a larger {setting('data.batch_size')} "
            f"may help"
        ]

    def table(self, rows: Mapping[str, Tensor]) -> Iterable[Sequence[str]]:
        """label,predicted (where classes are known), then nearest,likeness: the row of the image
        that is most alike, from 0, and the cosine. Several labels are a|b.
        """
        near = nearest(rows["features"])
        pairs = zip(near.which.tolist(), near.likeness.tolist(), strict=True)
        others = [(str(which), f"{alike:.6f}") for which, alike in pairs]
        if "classes" not in rows:
            yield ("nearest", "likeness")
            yield from others
            return
        yield ("label", "predicted", "nearest", "likeness")
        names, k = self.targets.names, self.neighbours
        votes = rows.get("votes")
        if votes is None:
            votes = leave_one_out(rows["features"], rows["classes"], k=k)
        predicted = votes.argmax(dim=1)
        for row, best, other in zip(
            rows["classes"].tolist(), predicted.tolist(), others, strict=True
        ):
            label = "|".join(names[i] for i, there in enumerate(row) if there)
            yield (label, names[best], *other)

    def outputs(
        self, images: Float[Tensor, "b c h w"], extent: Int64[Tensor, "b 2"] | None = None
    ) -> dict[str, Tensor]:
        """`features [b d]`, of length 1."""
        return {"features": F.normalize(self.model(images, extent).float(), dim=1)}

    @property
    def reading(self) -> Reading:
        """How these become answers: as they are."""
        return Reading(kind="features", names=self.targets.names)

    def answer(self, batch: Batch, seen: Sequence[Seen]) -> list[Embedding]:
        """Of each image its features."""
        return [Embedding(row) for row in self.features(batch).cpu().numpy()]

    def state(self) -> dict[str, Any]:
        """What features are judged by."""
        several = isinstance(self.targets, Classes) and self.targets.several
        return {"classes": list(self.targets.names), "multi_label": several}
