"""What features are worth that learned from no labels, and what they say of an image.

It is measured and asked; what learns is a task of its own, which judges itself so (moco.py).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

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
    spread,
)
from vitrail.models import Model
from vitrail.tasks.answers import Embedding, Reading
from vitrail.tasks.task import Losses, Task

_COLLAPSED = 0.1
"""A spread of features that hardly tells images apart any more."""
_LOST = 0.02
"""One at which nothing is left to learn from."""


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """How features are judged where classes are known: k-NN as DINO measures it."""

    neighbours: int = 20
    """How many images vote on the class of one."""
    temperature: float = 0.07
    """What likenesses are divided by: with a small one the nearest have nearly all of the vote."""

    def __post_init__(self) -> None:
        if self.neighbours < 1:
            raise UsageError(
                f"{setting('embed.neighbours')} must be at least 1, not {self.neighbours}"
            )
        if self.temperature <= 0:
            raise UsageError(
                f"{setting('embed.temperature')} must be above 0, not {self.temperature}"
            )


_USUAL = EmbedConfig()


class Embed(Task):
    """A model without a head."""

    banked = True
    score_name = "features"
    model: Model

    def __init__(
        self,
        model: Model,
        targets: Targets,
        judged: EmbedConfig = _USUAL,
    ) -> None:
        """`targets`: what is said of images, by which features are judged where it is classes, and
        how that is `judged`. Raises `UsageError` for a model with a head.
        """
        super().__init__()
        if model.head is not None:
            raise UsageError(
                f"a model that learns features has no classes: build it with "
                f"{setting('model.classes', 0)}"
            )
        self.model = model
        self.targets = targets.rows(np.arange(0))
        self.judged = judged

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
        votes = leave_one_out(features, rows["classes"], **self._voting)
        return rights(votes, rows["classes"]).double().mean().item()

    @property
    def _voting(self) -> dict[str, Any]:
        return {"k": self.judged.neighbours, "temperature": self.judged.temperature}

    def collapsed(self, rows: Mapping[str, Tensor]) -> str | None:
        """The features have become one."""
        if len(rows.get("features", ())) < 2 or spread(rows["features"]) > _LOST:
            return None
        return (
            f"the features of all images have become one (spread "
            f"{spread(rows['features']).item():.4f} of 1): it has collapsed. {_remedy()}"
        )

    def with_bank(
        self, rows: Mapping[str, Tensor], bank: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """With `votes [n c]` of the training images, where classes are known, and `bank [n]`, how
        many vote.
        """
        if "classes" not in rows or "classes" not in bank:
            return dict(rows)
        votes = knn(rows["features"], bank["features"], bank["classes"], **self._voting)
        many = torch.full((len(votes),), len(bank["features"]))
        return {**rows, "votes": votes, "bank": many}

    def judge(self, rows: Mapping[str, Tensor]) -> FeatureMetrics:
        """See `vitrail.metrics.features`."""
        many = int(rows["bank"][0]) if "bank" in rows else None
        return judged(
            rows["features"],
            rows.get("classes"),
            **self._voting,
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
            who += f" (k {metrics.neighbours}, temperature {metrics.temperature:g})"
            lines += [
                f"{'k-NN':<10}{near.value:.1%} {interval}, {count} told by {who}",
                f"{'baseline':<10}{metrics.chance:.1%} for always saying the most common class",
            ]
        if linear := metrics.summary.get("probe"):
            interval = f"(95% interval {linear.low:.1%} to {linear.high:.1%})"
            lines.append(f"{'probe':<10}{linear.value:.1%} {interval}, by a linear map")
        if rank := metrics.summary["rankme"]:
            interval = f"(95% interval {rank.low:.1f} to {rank.high:.1f})"
            used = f"{rank.value:.1f} {interval} of {metrics.dimensions} directions are used"
            lines.append(f"{'RankMe':<10}{used}")
        if decay := metrics.summary["alpha_req"]:
            lines.append(f"{'spectrum':<10}falls with power {decay.value:.2f}; good near 1")
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
            f"collapsed. {_remedy()}"
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
        names, votes = self.targets.names, rows.get("votes")
        if votes is None:
            votes = leave_one_out(rows["features"], rows["classes"], **self._voting)
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


def freeze_pooling(model: Model) -> None:
    """Leave alone what makes an image's one vector, where a loss reads the patches and gives it no
    gradient: several processes would wait for that.
    """
    for name in model.pooling:
        if isinstance(part := getattr(model, name), nn.Module):
            part.requires_grad_(False)


def _remedy() -> str:
    return f"A smaller {setting('optim.lr')} or a larger {setting('data.batch_size')} may help"
