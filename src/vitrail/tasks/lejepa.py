"""LeJEPA: features whose distribution is held to a Gaussian's (Balestriero & LeCun, 2511.08544).

All views of an image are to have one and the same vector, and the vectors of all images are to be
spread like an isotropic Gaussian: of all distributions the one from which a linear map or the
nearest neighbours learn an unknown task best (theorem 1). So nothing can collapse, and there is no
teacher, no stop of gradients and no schedule. With z_v [n d] the projections of view v of the n
images of all processes, G the global views, V all views, and w the share `weight`:

    c    = mean_{v in G} z_v
    near = mean_{v in V} mean (z_v - c)^2                   (over images and numbers)
    SIGReg(z) = mean_a n  int e^{-t^2/2} |phi_{z a}(t) - e^{-t^2/2}|^2 dt
    loss = (1 - w) near + w mean_{v in V} SIGReg(z_v)

The a are random directions of length 1; phi_x(t) = mean_i exp(i t x_i) is the characteristic
function of what is seen along one, and exp(-t^2/2) that of a standard normal: the integral is the
test of Epps and Pulley. With real and imaginary part apart it is

    |phi_x(t) - e^{-t^2/2}|^2 = (mean cos(t x) - e^{-t^2/2})^2 + (mean sin(t x))^2

which is even in t: it is summed by the trapezoid rule over 17 t from 0 to 3, and doubled. Several
processes add up their two means, with gradient; the directions, drawn for (seed, step), are the
same for all of them.
"""

from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.data.batches.batch import Batch
from vitrail.data.targets import Targets
from vitrail.data.views.augment import AugmentConfig
from vitrail.data.views.dino import small_size
from vitrail.errors import UsageError, setting
from vitrail.heads.projector import Projector
from vitrail.metrics.features import spread
from vitrail.nn import full_precision
from vitrail.tasks.embed import Embed, EmbedConfig
from vitrail.tasks.gathering import alone, summed
from vitrail.tasks.moco import pooled_width
from vitrail.tasks.task import Losses

_KNOTS, _REACH = 17, 3.0


@dataclass(frozen=True, kw_only=True)
class LejepaConfig:
    """LeJEPA's loss and what it needs beside the model; a value out of range is a `UsageError`."""

    weight: float = 0.02
    """The share of SIGReg in the loss; 0.02 to 0.05 are usual."""
    directions: int = 256
    """Along which the projections are compared with a Gaussian, drawn anew in each step."""
    hidden: int = 2048
    """Hidden width of the projector."""
    out: int = 16
    """Length of the projections; the authors' small runs have 16, the large ones more."""
    globals: int = 2
    """Views that show much of an image: those that `augment` says."""
    locals: int = 6
    """Views that show little of it, in fewer pixels."""
    local_scale: float = 0.05
    """The least part of an image's area that these show; the most is the least of a global one."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < 1:
            raise UsageError(f"{setting('lejepa.weight')} must be in (0, 1), not {self.weight}")
        if not 0 < self.local_scale <= 1:
            raise UsageError(
                f"{setting('lejepa.local_scale')} must be in (0, 1], not {self.local_scale}"
            )
        if self.locals < 0 or self.globals + self.locals < 2:
            raise UsageError(
                f"{setting('lejepa.globals')} and {setting('lejepa.locals')} are to be two views "
                f"of an image at least, not {self.globals} and {self.locals}"
            )
        for field in ("directions", "hidden", "out", "globals"):
            if getattr(self, field) < 1:
                raise UsageError(
                    f"{setting(f'lejepa.{field}')} must be at least 1, not {getattr(self, field)}"
                )


def lejepa_views(
    said: AugmentConfig, config: LejepaConfig, size: tuple[int, int], patch: tuple[int, int]
) -> tuple[AugmentConfig, ...]:
    """All views of training images of `size` pixels: the global ones as is `said`, and the local
    ones, which show at most what those show at least.
    """
    least = said.crop_scale[0]
    scale = (min(config.local_scale, least), least)
    local = replace(said, size=small_size(size, patch), crop_scale=scale)
    return (said,) * config.globals + (local,) * config.locals


class Lejepa(Embed):
    """A model without a head, and how it learns features that are spread like a Gaussian."""

    coupled = True

    def __init__(
        self,
        model: Any,
        config: LejepaConfig,
        targets: Targets,
        judged: EmbedConfig,
        seed: int,
    ) -> None:
        """As `Embed`, with the `seed` by which directions are drawn."""
        super().__init__(model, targets, judged)
        self.config = config
        self.seed = seed
        width = pooled_width(model)
        self.projector = Projector(width, config.hidden, config.out, last_norm=False)
        # A buffer, for a run that goes on draws what it would have drawn.
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.steps: Tensor

    def loss(self, batch: Batch) -> Losses:
        """A mean over the batch, for `near`; of the images of all processes, for `gaussian`."""
        n = len(batch.indices)
        # A process without images is handed one of no weight, so that the others need not wait.
        z = torch.stack([self.projector(self.model(*view))[:n] for view in batch.views]).float()
        near = nearness(z, z[: self.config.globals])
        gaussian = sigreg(z, self._directions(z))
        w = self.config.weight
        parts = {"near": near, "gaussian": gaussian, "spread": spread(z[0])}
        return Losses((1 - w) * near + w * gaussian, parts)

    def after_step(self, done: float) -> None:
        """The next step has other directions."""
        self.steps += 1

    def _directions(self, like: Tensor) -> Float[Tensor, "d a"]:
        size = (self.config.out, self.config.directions)
        if like.is_meta:
            return like.new_empty(size)
        key = f"{self.seed} {int(self.steps)} directions".encode()
        generator = torch.Generator().manual_seed(
            int.from_bytes(blake2b(key, digest_size=7).digest())
        )
        drawn = torch.randn(size, generator=generator, dtype=torch.float64)
        return (drawn / drawn.norm(dim=0)).to(like)


def nearness(views: Float[Tensor, "v n d"], central: Float[Tensor, "g n d"]) -> Float[Tensor, ""]:
    """The squared distance of each number of all views to the mean of the `central` ones; 0 where
    there are no images.
    """
    apart = (views - central.mean(dim=0)).square()
    return apart.sum() / max(apart.numel(), 1)


def sigreg(z: Float[Tensor, "v n d"], directions: Float[Tensor, "d a"]) -> Float[Tensor, ""]:
    """How far the images of all processes are from a Gaussian along `directions`, a mean over
    these and the views. Each view is a distribution of its own.
    """
    t = torch.linspace(0, _REACH, _KNOTS, device=z.device, dtype=z.dtype)
    normal = (-t.square() / 2).exp()
    step = torch.full_like(t, _REACH / (_KNOTS - 1))
    step[[0, -1]] /= 2
    with full_precision(z.device):
        seen = (z @ directions)[..., None] * t  # [v n a knots]
    sums = torch.stack([seen.cos().sum(dim=1), seen.sin().sum(dim=1)])
    sums, count = _of_all(sums, z.shape[1])
    real, imaginary = sums / max(count, 1)
    apart = (real - normal).square() + imaginary.square()
    return count * (2 * apart * normal * step).sum(dim=-1).mean()


def _of_all(sums: Tensor, images: int) -> tuple[Tensor, int]:
    """Sums over the images of all processes, with gradient, and how many these are."""
    if alone():
        return sums, images
    count = summed(torch.tensor(images, device=sums.device))
    return _AddedUp.apply(sums), int(count)  # type: ignore[no-untyped-call]


class _AddedUp(torch.autograd.Function):
    """The sum over processes. Each has the loss of all of them, so that what one adds to the sum
    matters to each of their losses: gradients are added up as well.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return summed(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return summed(grad)
