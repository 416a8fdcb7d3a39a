"""Distillation: a student learns from labels, and from what a trained teacher says of each image.

DeiT (Touvron et al., arXiv 2012.12877). With a the share `alpha`, Zs and Zt the logits of student
and teacher, y the labels, t the temperature:

    soft (equation 2):   (1 - a) CE(Zs, y) + a t^2 KL(softmax(Zt / t), softmax(Zs / t))
    hard (equation 3):   (1 - a) CE(Zs, y) + a CE(Zs, argmax Zt)

where KL(p, q) = sum p log(p / q): the student is to cover the teacher (Hinton et al., 1503.02531).
The paper writes the arguments the other way round; its code computes this, divided by the number of
classes besides. A student with two heads (`distilled`) reads labels with its class head and the
teacher with the distilled one, and averages the two where it is used; one with a single head, of
any family, learns both with that. Where an image may have several labels, each class is a problem
of its own: sigmoids instead of softmax, `Zt > 0` instead of argmax, means over classes.

Label smoothing and class weights are about the labels; what the teacher says is taken as it is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vitrail.data.batches.batch import Batch
from vitrail.data.targets import Classes
from vitrail.data.views.canvas import Canvas, collate
from vitrail.data.views.preprocess import Preprocess
from vitrail.errors import UsageError, setting
from vitrail.models import Model, ViT
from vitrail.nn import Features
from vitrail.tasks.classify import Classify, ClassifyConfig
from vitrail.tasks.task import Losses


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Learning from a teacher; a value out of range is a `UsageError`."""

    teacher: str | None = None
    """A run folder, a name that `vitrail weights` lists, or a file of weights. None: no teacher."""
    kind: Literal["hard", "soft"] = "hard"
    """hard: the teacher's answer is one more label; soft: its probabilities are to be matched."""
    alpha: float = 0.5
    """The teacher's share of the loss; the labels have the rest."""
    temperature: float = 3.0
    """Of soft: both sides' logits are divided by it, which shows what the teacher finds similar."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"{setting('distill.alpha')} must be in [0, 1], not {self.alpha}")
        if not 0 < self.temperature < math.inf:
            raise UsageError(
                f"{setting('distill.temperature')} must be above 0, not {self.temperature}"
            )


class Teacher:
    """A trained model that answers for a student's images. It never learns.

    It is no module: a task that holds it neither trains, averages nor saves it, and all copies of
    a task ask the same one. It goes to whatever device the images are on.
    """

    def __init__(
        self,
        model: Model,
        preprocess: Preprocess,
        student: Preprocess,
        order: Sequence[int] | None = None,
    ) -> None:
        """`preprocess` is what the teacher was taught to see, `student` what made the images that
        it will be given. `order`: the place, among the teacher's classes, of each of the student's.

        Raises `UsageError` for images of other channels.
        """
        channels = model.config.channels
        if channels != student.channels:
            raise UsageError(
                f"the teacher takes images of {channels} channels, the student of "
                f"{student.channels}: give a teacher that was trained on such images, or the "
                f"student {setting('model.channels', channels)}"
            )
        self.model = model.eval().requires_grad_(False)
        self.preprocess = preprocess
        self.student = student
        self.order = None if order is None else torch.tensor(order)

    def __deepcopy__(self, memo: object) -> "Teacher":
        return self

    @torch.no_grad()
    def features(self, batch: Batch) -> Features:
        """Everything that it sees in a student's images."""
        self.model.to(batch.images.device)
        return self.model.features(*self.shown(batch))

    @torch.no_grad()
    def taps(self, batch: Batch, blocks: int) -> tuple[Float[Tensor, "b d gh gw"], ...]:
        """Of a ViT, the maps of its last so many blocks, each through the final norm."""
        assert isinstance(self.model, ViT)
        self.model.to(batch.images.device)
        depth = self.model.config.depth
        return self.model.taps(self.shown(batch).images, range(depth - blocks, depth))

    @torch.no_grad()
    def logits(self, features: Features) -> Float[Tensor, "b c"]:
        """What it makes of them, in float32 and in the order of the student's classes."""
        logits = self.model.logits(features).float().mean(dim=1)
        return logits if self.order is None else logits[:, self.order.to(logits.device)]

    def __call__(self, batch: Batch) -> Float[Tensor, "b c"]:
        """The logits for a student's images, in float32 and in the order of its classes."""
        return self.logits(self.features(batch))

    def shown(self, batch: Batch) -> Canvas:
        """A student's images, augmented as they are, at the size and the scale of the teacher's.

        What shows a whole training view of the student fills the whole of the teacher's input, as
        a training view of its own would. Images that keep their shape keep it if the teacher was
        taught such images; otherwise they are squashed.
        """
        images, extent = batch.images, batch.extent
        if extent is None:
            return Canvas(self._converted(images), None)
        p, q = self.student.patch
        views = [
            self._converted(image[None, :, : rows * p, : columns * q])[0]
            for image, (rows, columns) in zip(images, extent.tolist(), strict=True)
        ]
        return collate(views, self._patch or (1, 1))

    def _converted(self, images: Float[Tensor, "b c _h _w"]) -> Float[Tensor, "b c h w"]:
        """Whole views of one size, as the teacher is to see them."""
        ours, theirs = self.student, self.preprocess
        size = self._size(images.shape[2], images.shape[3])
        resized = size != images.shape[2:]
        if not resized and (ours.mean, ours.std) == (theirs.mean, theirs.std):
            return images
        mean, std, to_mean, to_std = (
            images.new_tensor(values)[:, None, None]
            for values in (ours.mean, ours.std, theirs.mean, theirs.std)
        )
        pixels = images * std + mean
        if resized:
            # Pillow, which made what the teacher knows, cuts off what a bicubic kernel overshoots.
            pixels = _resampled(pixels, size, theirs.interpolation).clamp(0, 1)
        return (pixels - to_mean) / to_std

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """Of a student's view, as the teacher is to see it."""
        theirs = self.preprocess.size
        if self._patch is None or self.student.one_size:
            return theirs
        # As much larger, in area, as the teacher's images are than the student's.
        scale = math.sqrt(math.prod(theirs) / math.prod(self.student.size))
        p, q = self._patch
        return max(1, round(scale * height / p)) * p, max(1, round(scale * width / q)) * q

    @property
    def _patch(self) -> tuple[int, int] | None:
        """Of a teacher that was taught images of any shape; None: it knows one size."""
        config = self.model.config
        shaped = config.family == "vit" and not self.preprocess.one_size
        return config.stride if shaped else None


_MODES = {"nearest": "nearest-exact", "lanczos": "bicubic"}
"""torch's nearest to Pillow's, where they have other names."""


def _resampled(
    images: Float[Tensor, "b c _h _w"], size: tuple[int, int], interpolation: str
) -> Float[Tensor, "b c h w"]:
    mode = _MODES.get(interpolation, interpolation)
    return F.interpolate(images, size=size, mode=mode, antialias=mode != "nearest-exact")


class Distill(Classify):
    """A student, its teacher, and the loss between them; it predicts as `Classify` does."""

    def __init__(
        self,
        model: Model,
        config: ClassifyConfig,
        targets: Classes,
        teacher: Teacher,
        distill: DistillConfig,
    ) -> None:
        """As `Classify`, with a `teacher` that answers in the order of the targets' names."""
        super().__init__(model, config, targets)
        self.teacher = teacher
        self.distill = distill

    def loss(self, batch: Batch) -> Losses:
        """Both parts, each times its share, and their sum."""
        heads = self.model.logits(self.model.features(batch.images, batch.extent)).float()
        alpha = self.distill.alpha
        labels = (1 - alpha) * self.criterion(heads[:, 0], batch.targets["classes"])
        # The last head is the distilled one, or the only one.
        teacher = alpha * distillation(
            heads[:, -1], self.teacher(batch), self.distill, multi_label=self.multi_label
        )
        return Losses(labels + teacher, {"labels": labels, "teacher": teacher})


def distillation(
    student: Float[Tensor, "b c"],
    teacher: Float[Tensor, "b c"],
    config: DistillConfig,
    *,
    multi_label: bool,
) -> Float[Tensor, ""]:
    """How far the student's logits are from what the teacher's say: a mean over images.

    Before the factor `alpha`; see the top of this file.
    """
    if config.kind == "hard":
        if multi_label:
            return F.binary_cross_entropy_with_logits(student, (teacher > 0).to(student))
        return F.cross_entropy(student, teacher.argmax(dim=1))
    t = config.temperature
    apart = F.kl_div(
        _log_probabilities(student / t, multi_label),
        _log_probabilities(teacher / t, multi_label),
        reduction="none",
        log_target=True,
    )
    return t**2 * apart.sum(dim=1).mean()


def _log_probabilities(
    logits: Float[Tensor, "b c"], multi_label: bool
) -> Float[Tensor, "b outcomes *c"]:
    """Of the classes, or of each class's yes and no."""
    if multi_label:
        return F.logsigmoid(torch.stack([logits, -logits], dim=1))
    return logits.log_softmax(dim=1)
