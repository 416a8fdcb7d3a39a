"""Learning which patches to drop: DynamicViT's loss (Rao et al., arXiv 2106.02034, section 3.3).

    CE(Zs, y) + 2 L_ratio + 0.5 KL(softmax Zt, softmax Zs) + 0.5 L_tokens

- L_ratio: over stages and images, the mean of (share of patches left - wanted share)^2
- Zs, Zt: the logits of the model and of its teacher, the same ViT before it dropped anything
- L_tokens: the mean squared difference between the teacher's last patch tokens and the model's, of
  the patches that are left

Without a teacher only the first two remain. As published for DeiT: 30 epochs from a trained ViT, of
1024 images a batch; the predictors learn from the start with AdamW's rate of 1e-3, the ViT itself
with a hundredth of it and not at all for the first 5 epochs, the class token and the positions
never; weight decay 0.05, warm-up over 5 epochs, a moving average, and augmentation as DeiT has it.
DeiT-B has 5 instead of 2 for the ratio, and stochastic depth up to 0.2.
"""

from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vitrail.data.batches.batch import Batch
from vitrail.data.targets import Classes
from vitrail.errors import UsageError, setting
from vitrail.models import Model, ViT
from vitrail.models.dynamicvit import DynamicViT
from vitrail.tasks.classify import Classify, ClassifyConfig
from vitrail.tasks.distill import DistillConfig, Teacher, distillation
from vitrail.tasks.task import Losses


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """The weights of the parts of the loss beside the labels'; a negative one is a `UsageError`."""

    ratio: float = 2.0
    logits: float = 0.5
    """Of the teacher's logits."""
    tokens: float = 0.5
    """Of the teacher's tokens."""

    def __post_init__(self) -> None:
        for name in ("ratio", "logits", "tokens"):
            if getattr(self, name) < 0:
                raise UsageError(f"prune.{name} cannot be negative, and is {getattr(self, name)}")


class Prune(Classify):
    """A DynamicViT, perhaps a teacher, and the loss between them; predicts as `Classify` does."""

    def __init__(
        self,
        model: Model,
        config: ClassifyConfig,
        targets: Classes,
        prune: PruneConfig,
        teacher: Teacher | None = None,
    ) -> None:
        """As `Classify`, with a `teacher` that answers in the order of the targets' names.

        Raises `UsageError` for a model that drops no tokens, and for a teacher whose tokens are
        not to be compared with the model's.
        """
        super().__init__(model, config, targets)
        if not isinstance(model, DynamicViT):
            raise UsageError(
                f"the task 'prune' is for models that drop tokens, such as dynamicvit_s16, not for "
                f"the family '{model.config.family}'"
            )
        if teacher is not None and prune.tokens:
            _check_tokens(model, teacher)
            self.apart = "the loss of the tokens that are left"
        self.prune = prune
        self.teacher = teacher

    def loss(self, batch: Batch) -> Losses:
        """The parts, each times its weight, their sum, and what share of the patches is `left`."""
        model = cast(DynamicViT, self.model)
        features, decisions = model.reduced(batch.images, batch.extent)
        logits = model.logits(features).float().mean(dim=1)
        parts = {
            "labels": self.criterion(logits, batch.targets["classes"]),
            "ratio": self.prune.ratio * ratio_loss(decisions, model.config.shares),
        }
        if self.teacher is not None:
            seen = self.teacher.features(batch)
            soft = DistillConfig(kind="soft", temperature=1.0)
            apart = distillation(
                logits, self.teacher.logits(seen), soft, multi_label=self.multi_label
            )
            parts["teacher"] = self.prune.logits * apart
            if self.prune.tokens:
                left = decisions[-1].detach()
                between = token_loss(features.patches, seen.patches, left)
                parts["tokens"] = self.prune.tokens * between
        total = torch.stack(list(parts.values())).sum()
        return Losses(total, parts | {"left": decisions[-1].detach().float().mean()})


def ratio_loss(
    decisions: tuple[Float[Tensor, "b n"], ...], shares: tuple[float, ...]
) -> Float[Tensor, ""]:
    """How far each stage is from the share of patches that it is to leave."""
    apart = [
        (left.float().mean(dim=1) - share).square().mean()
        for left, share in zip(decisions, shares, strict=True)
    ]
    return torch.stack(apart).mean()


def token_loss(
    patches: Float[Tensor, "b n d"], teacher: Float[Tensor, "b n d"], left: Float[Tensor, "b n"]
) -> Float[Tensor, ""]:
    """The mean squared difference of the tokens that are `left` (1; the others 0)."""
    apart = F.mse_loss(patches.float(), teacher.float(), reduction="none").mean(dim=2)
    return (apart * left).sum() / left.sum().clamp(min=1)


def _check_tokens(model: DynamicViT, teacher: Teacher) -> None:
    """Of the images that each is shown in training, which may have other sizes than its own."""
    ours, theirs = replace(model.config, image_size=teacher.student.size), None
    if isinstance(teacher.model, ViT):
        theirs = replace(teacher.model.config, image_size=teacher.preprocess.size)
    if theirs is None or (theirs.grid, theirs.width) != (ours.grid, ours.width):
        here, there = (
            "none" if c is None else f"{c.grid[0]}x{c.grid[1]} of width {c.width}"
            for c in (ours, theirs)
        )
        raise UsageError(
            f"{setting('prune.tokens')} compares the patch tokens of model and teacher: {here} "
            f"here, {there} there. Give the ViT that the model starts from as the teacher, or "
            f"{setting('prune.tokens')} 0"
        )
