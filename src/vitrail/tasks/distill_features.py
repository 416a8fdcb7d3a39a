"""Features of a large frozen model for a small one, from images without labels.

Teacher and student are shown one and the same augmented view, each at its own size, and the student
is to say what the teacher says. There are no negatives and nothing to collapse to, so that a few
thousand images and small batches do. Views are mixed in pairs, all of a step by one share, drawn
from U(0, 1): mixed images are new images, of which the teacher's features are as true.

The three forms are those that LightlyTrain describes in its documentation, written here from that
description alone. With s, t the student's and the teacher's vector of an image, S_i, T_i those of
their patches, L and L' linear maps from the student's width to the teacher's, everything in angles
and Q of length 1, T the temperature, p_T(x) = softmax(x / T):

    v1   KL(p_T(Q <t>) | p_T(Q <L s>)), a mean over images; Q: the teacher's vectors of the last
         images, these included, as pseudo-classes
    v2   mean (L' S_i - [T_i, T'_i])^2, of the teacher's last two blocks, each through its norm;
         the student's map is resized to the teacher's grid
    v3   v1 + KL(p_T(<T_i> <T_j>) | p_T(<L' S_i> <L' S_j>)) over the patches j of the same image, a
         mean over images and i

v1 is for whole images, v2 for dense tasks, v3 for both.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.data import keyed
from vitrail.data.batches.batch import Batch
from vitrail.data.targets import Targets
from vitrail.data.views.canvas import Canvas
from vitrail.errors import UsageError, setting
from vitrail.heads.backbone import Backbone, shapes_of
from vitrail.models import ViT
from vitrail.nn import Features, full_precision, normal_, tokens_to_map
from vitrail.tasks.distill import Teacher
from vitrail.tasks.embed import Embed, EmbedConfig, freeze_pooling
from vitrail.tasks.gathering import gathered
from vitrail.tasks.kept import KeptMaps
from vitrail.tasks.task import Losses

_QUEUES = {
    50: 16, 100: 32, 250: 64, 500: 128, 1_000: 256, 2_000: 512, 4_000: 1024, 10_000: 2048,
    20_000: 4096,
}  # fmt: skip
"""Of up to so many images: how many vectors of the teacher's are pseudo-classes."""
_LARGEST = 8192


@dataclass(frozen=True, kw_only=True)
class DistillFeaturesConfig:
    """How features are learned from a teacher's; a value out of range is a `UsageError`. The
    teacher itself is `distill.teacher`.
    """

    form: Literal["v1", "v2", "v3"] = "v3"
    """v1: the image's vector; v2: the map of patches; v3: the vector, and how patches lie to each
    other."""
    temperature: float = 0.07
    """What likenesses are divided by."""
    local: float = 1.0
    """Of v3: how much the patches count beside the vector."""
    queue: int | None = None
    """How many of the teacher's last vectors are pseudo-classes; None: by the size of the data."""
    mixup: bool = True
    """Views are mixed in pairs."""
    teacher_size: tuple[int, int] | None = None
    """(height, width) of what the teacher is shown; None: as many patches as the student has."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise UsageError(
                f"{setting('distill_features.temperature')} must be above 0, not {self.temperature}"
            )
        if self.local < 0:
            raise UsageError(
                f"{setting('distill_features.local')} cannot be negative: {self.local}"
            )
        if self.queue is not None and self.queue < 1:
            raise UsageError(
                f"{setting('distill_features.queue')} must be at least 1, not {self.queue}"
            )


def queue_for(images: int) -> int:
    """How many pseudo-classes suit so many images.

    >>> queue_for(1455), queue_for(10**6)
    (512, 8192)
    """
    return next((size for most, size in _QUEUES.items() if images <= most), _LARGEST)


class DistillFeatures(Embed):
    """A model without a head, what it is taught through, and its teacher."""

    coupled = True

    def __init__(
        self,
        model: Any,
        config: DistillFeaturesConfig,
        targets: Targets,
        judged: EmbedConfig,
        teacher: Teacher,
        seed: int,
        kept: KeptMaps | None = None,
    ) -> None:
        """As `Embed`; `targets` are of all training images, whose number is the queue's measure.
        `kept`: what the teacher said of views that come again.
        Raises `UsageError` for a teacher of another kind than a form needs.
        """
        super().__init__(model, targets, judged)
        self.config = config
        self.teacher = teacher
        self.seed = seed
        self.kept = kept
        sides: tuple[Backbone, Backbone] = (model, teacher.model)
        own, theirs = (shapes_of(type(each), each.config) for each in sides)
        image, patch = theirs.pooled.shape[1], theirs.patches.shape[2]
        self.image: nn.Linear | None = None
        self.patches: nn.Linear | None = None
        if config.form == "v2":
            if type(teacher.model) is not ViT:
                raise UsageError(
                    f"{setting('distill_features.form', 'v2')} learns from a ViT's last two "
                    f"blocks, and the teacher is of the family '{teacher.model.config.family}': "
                    f"take v1 or v3"
                )
            teacher.model.check_whole("taps")
            freeze_pooling(model)
            self.patches = _linear(own.patches.shape[2], 2 * patch)
        else:
            self.image = _linear(own.pooled.shape[1], image)
            size = config.queue or queue_for(len(targets))
            self.register_buffer("queue", torch.zeros(size, image))
            self.queue: Tensor
        if config.form == "v3":
            self.patches = _linear(own.patches.shape[2], patch)
        # A buffer, for a run that goes on mixes by the shares that it would have mixed by.
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.steps: Tensor

    def loss(self, batch: Batch) -> Losses:
        """What the form says, a mean over the batch; its parts where it has two."""
        if self.config.mixup and self.training:
            images, extent = batch.views[0]
            batch = batch._replace(views=(Canvas(mixed(images, self._share(images)), extent),))
        student = self.model.features(*batch.views[0])
        said = self.fixed(batch) if self.kept is None else self.kept.of(self.fixed, batch)
        if self.config.form == "v2":
            return Losses(self._maps(student, *said), {})
        image = self._image(student.pooled, said[0], len(batch.indices))
        if self.config.form == "v1":
            return Losses(image, {})
        local = self._local(student, said[1])
        return Losses(image + self.config.local * local, {"image": image, "patches": local})

    def fixed(self, batch: Batch) -> tuple[Tensor, ...]:
        """What the form needs of the teacher: vectors `[b e]`, and patches as a map
        `[b e gh gw]`.
        """
        if self.config.form == "v2":
            return (torch.cat(self.teacher.taps(batch, 2), dim=1),)
        found = self.teacher.features(batch)
        if self.config.form == "v1":
            return (found.pooled,)
        return found.pooled, tokens_to_map(found.patches, found.grid)

    def after_step(self, done: float) -> None:
        """The next step mixes by another share."""
        self.steps += 1

    def _image(
        self, student: Float[Tensor, "b d"], teacher: Float[Tensor, "b e"], n: int
    ) -> Float[Tensor, ""]:
        """v1, of the first `n` images; a blank one counts for nothing."""
        assert self.image is not None
        said, wanted = (
            F.normalize(each[:n].float(), dim=1) for each in (self.image(student), teacher)
        )
        every = torch.cat([gathered(wanted)[0], self.queue])[: len(self.queue)]
        if self.training:
            self.queue.copy_(every)
        return divergence(said, wanted, every, self.config.temperature)

    def _local(self, student: Features, teacher: Float[Tensor, "b e gh gw"]) -> Float[Tensor, ""]:
        """v3's second term."""
        said, wanted = self._patches(student, teacher)
        said, wanted = (F.normalize(each, dim=2) for each in (said, wanted))
        return divergence(said, wanted, None, self.config.temperature)

    def _maps(self, student: Features, teacher: Float[Tensor, "b e gh gw"]) -> Float[Tensor, ""]:
        """v2."""
        return F.mse_loss(*self._patches(student, teacher))

    def _patches(
        self, student: Features, teacher: Float[Tensor, "b e gh gw"]
    ) -> tuple[Float[Tensor, "b n e"], Float[Tensor, "b n e"]]:
        """What the student says of the teacher's patches, and what that says."""
        assert self.patches is not None
        grid = (teacher.shape[2], teacher.shape[3])
        said = at_grid(self.patches(student.patches), student.grid, grid)
        return said.float(), teacher.flatten(2).transpose(1, 2).float()

    def _share(self, like: Tensor) -> float:
        """How much of its partner each image takes in this step."""
        if like.is_meta:
            return 0.5
        step = np.array([int(self.steps)])
        return float(keyed.uniform(self.seed, 0, step, "share", 1)[0, 0])


def mixed(images: Float[Tensor, "b c h w"], share: float) -> Float[Tensor, "b c h w"]:
    """Images 2i and 2i + 1, each with a `share` of the other; an odd last one stays as it is."""
    pairs = len(images) // 2
    both = images[: 2 * pairs].unflatten(0, (pairs, 2))
    return torch.cat([both.lerp(both.flip(1), share).flatten(0, 1), images[2 * pairs :]])


def divergence(
    student: Float[Tensor, "*b d"],
    teacher: Float[Tensor, "*b d"],
    queue: Float[Tensor, "k d"] | None,
    temperature: float,
) -> Float[Tensor, ""]:
    """KL(teacher | student) of how alike each vector is to those of the queue, or, without one, to
    the others of its own image: a mean over vectors, all of length 1. 0 where there are none.
    """
    with full_precision(student.device):
        said, wanted = (
            (x @ (x.mT if queue is None else queue.T) / temperature).log_softmax(dim=-1)
            for x in (student, teacher)
        )
    apart = F.kl_div(said, wanted, reduction="sum", log_target=True)
    return apart / max(math.prod(said.shape[:-1]), 1)


def at_grid(
    patches: Float[Tensor, "b n d"], grid: tuple[int, int], other: tuple[int, int]
) -> Float[Tensor, "b m d"]:
    """The patches of a grid, bilinearly between them at the places of another's."""
    if grid == other:
        return patches
    resized = F.interpolate(tokens_to_map(patches, grid), other, mode="bilinear")
    return resized.flatten(2).transpose(1, 2)


def _linear(width: int, out: int) -> nn.Linear:
    layer = nn.Linear(width, out)
    normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer
