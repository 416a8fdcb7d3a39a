"""MoCo v3: features from images without labels (Chen et al., arXiv 2104.02057, algorithm 1).

Two views of an image are to be more alike than views of different images. With f the model and its
projector, g the predictor, t the teacher (a slow copy of f), x1 and x2 the views, everything of
length 1, n the images of all processes and T the temperature:

    q1 = g(f(x1))   k1 = t(x1)      (and q2, k2 likewise; no gradient reaches t)
    loss = C(q1, k2) + C(q2, k1)
    C(q, k) = -2 T mean_i log(exp(q_i k_i / T) / sum_j exp(q_i k_j / T)),   j over all n

How the teacher moves is said in momentum.py.

The patch projection of a ViT stays as it was drawn (section 4.3): learning it is what makes such
runs unstable.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.data.batches.batch import Batch
from vitrail.data.targets import Targets
from vitrail.data.views.canvas import Canvas
from vitrail.errors import UsageError, setting
from vitrail.heads.projector import Predictor, Projector
from vitrail.metrics.features import spread
from vitrail.models import FAMILIES, Model, ViT
from vitrail.nn import PatchEmbed, full_precision, normal_, precise
from vitrail.tasks.embed import Embed, EmbedConfig
from vitrail.tasks.gathering import gathered
from vitrail.tasks.momentum import MomentumTeacher
from vitrail.tasks.task import Losses


@dataclass(frozen=True, kw_only=True)
class MocoConfig:
    """MoCo v3's loss and what it needs beside the model; a value out of range is a `UsageError`."""

    temperature: float = 0.2
    """What likenesses are divided by: a small one is about the most alike images alone."""
    momentum: float = 0.99
    """How much of itself the teacher keeps in a step, at the start; at the end it is all."""
    hidden: int = 4096
    """Hidden width of projector and predictor: nearly all of their weights (19 million in a
    ViT-S's projector). Small models learn with less, as 1024."""
    out: int = 256
    """Length of the vectors that are compared."""
    freeze_patch: bool = True
    """A ViT's patch projection stays as it was drawn. Other stems learn: convolutions are a cure
    for the same (arXiv 2106.14881)."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise UsageError(
                f"{setting('moco.temperature')} must be above 0, not {self.temperature}"
            )
        if not 0 <= self.momentum <= 1:
            raise UsageError(f"{setting('moco.momentum')} must be in [0, 1], not {self.momentum}")
        for field in ("hidden", "out"):
            if getattr(self, field) < 1:
                raise UsageError(
                    f"{setting(f'moco.{field}')} must be at least 1, not {getattr(self, field)}"
                )


class Teacher(MomentumTeacher):
    """Makes the keys."""

    model: Model
    projector: Projector

    @torch.no_grad()
    def forward(self, view: Canvas) -> Float[Tensor, "b o"]:
        return self.projector(self.model(*view))


class Moco(Embed):
    """A model without a head, and how it learns features that tell images apart."""

    coupled = True

    def __init__(
        self,
        model: Model,
        config: MocoConfig,
        targets: Targets,
        judged: EmbedConfig,
    ) -> None:
        """As `Embed`: nothing learns from `targets`."""
        super().__init__(model, targets, judged)
        self.config = config
        self.projector = Projector(pooled_width(model), config.hidden, config.out)
        self.predictor = Predictor(config.out, config.hidden)
        self.teacher = Teacher(model=model, projector=self.projector)
        self._freeze_patch()

    def loss(self, batch: Batch) -> Losses:
        """C(q1, k2) + C(q2, k1), a mean over the batch.

        Its parts: `accuracy`, how often the other view of the image is the most alike of all, and
        `spread` of the keys, which is 0 where they have all become the same.
        """
        # Its norms are the batch's, even where what does not learn was put into evaluation mode.
        self.teacher.train(self.training)
        one, two = batch.views
        # A process without images is handed one of no weight, so that the others need not wait.
        n = len(batch.indices)
        q1, q2 = (self.predictor(self.projector(self.model(*view)))[:n] for view in (one, two))
        k1, k2 = (self.teacher(view)[:n] for view in (one, two))
        first, second = (
            contrast(queries, keys, self.config.temperature)
            for queries, keys in ((q1, k2), (q2, k1))
        )
        parts = {
            "accuracy": (first.accuracy + second.accuracy) / 2,
            "spread": (spread(k1) + spread(k2)) / 2,
        }
        return Losses(first.loss + second.loss, parts)

    def after_step(self, done: float) -> None:
        """The teacher moves. `done` (0 to 1) of the run is over, this step included."""
        self.teacher.follow(self, self.config.momentum, done)

    def _freeze_patch(self) -> None:
        if self.config.freeze_patch and isinstance(self.model, ViT):
            for stem in (self.model.stem, getattr(self.model.stem_second, "stem", None)):
                if isinstance(stem, PatchEmbed):
                    stem.requires_grad_(False)


class Contrast(NamedTuple):
    """How well queries find their keys."""

    loss: Float[Tensor, ""]
    accuracy: Float[Tensor, ""]
    """The share of queries that their own key is most like."""


def contrast(
    queries: Float[Tensor, "b o"], keys: Float[Tensor, "b o"], temperature: float
) -> Contrast:
    """C(q, k) of this process's queries among the keys of all: 0 where it has none."""
    queries, keys = (F.normalize(precise(each), dim=1) for each in (queries, keys))
    every, first = gathered(keys)
    with full_precision(queries.device):
        logits = queries @ every.T / temperature
    own = first + torch.arange(len(queries), device=queries.device)
    loss = F.cross_entropy(logits, own, reduction="sum")
    right = (logits.argmax(dim=1) == own).sum() if len(own) else loss.new_zeros(())
    count = max(len(queries), 1)
    return Contrast(2 * temperature * loss / count, right / count)


def pooled_width(model: Model) -> int:
    """The length of an image's one vector, in a model of any family."""
    with torch.device("meta"):
        config = replace(model.config, classes=1)
        head = FAMILIES[type(config)](config).head  # type: ignore[arg-type]  # its own config
    assert head is not None
    return head.in_features


@torch.no_grad()
def draw_as_moco(model: ViT) -> None:
    """Draw a fresh ViT's weights as the authors do, where that is another way than its own.

    Xavier's uniform for the patch projection, which never learns: its scale beside the positions'
    stays as it is drawn. A class token of deviation 1e-6. (Queries, keys and values are drawn as
    three matrices, and biases are zeros, in theirs as in ours; ours of the MLP are 1e-6.)
    """
    if isinstance(model.stem, PatchEmbed):
        weight = model.stem.proj.weight
        fan_in, fan_out = weight[0].numel(), weight.shape[0]
        bound = math.sqrt(6 / (fan_in + fan_out))
        nn.init.uniform_(weight, -bound, bound)
    if model.prefix is not None and model.config.class_token:
        normal_(model.prefix[:1], std=1e-6)
