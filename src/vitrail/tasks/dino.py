"""DINO: features from images without labels (Caron et al., arXiv 2104.14294), and what iBOT and
DINOv2 have added to it (2111.07832, 2304.07193).

A student looks at two large views of an image and at small ones of parts of it; a teacher, a slow
copy of it (momentum.py), at the large ones. Each says how alike a view is to each of K prototypes.
From every view the student is to say what the teacher says of another. With s and t the cosines, c
the teacher's mean over the images so far, T the temperatures, v and u views:

    p(v) = softmax((t(v) - c) / T_t)          q(u) = softmax(s(u) / T_s)
    loss = mean over v large, u any, u not v, and over images of -sum_k p_k(v) log q_k(u)

Two things keep all images from being told alike: c, without which one prototype would take all, and
a small T_t, without which all would be equal. In the place of c there may be three rounds of
Sinkhorn and Knopp: each prototype then has an equal share of the batch (SwAV, 2006.09882).

    iBOT     the same for single patches: the student has some of a large view's patches hidden, and
             is to say of these what the teacher says, which sees them
    KoLeo    -mean log of how far an image's features are from the nearest other image's: they
             spread (1806.03198)

DINOv2 is the sum of the three, with weights 1, 1 and 0.1, by Sinkhorn and Knopp. Everything that
looks across images does so across those of all processes.

Letters: b images, v views, n patches, m hidden ones, d width, k prototypes.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vitrail.data.batches.batch import Batch
from vitrail.data.targets import Targets
from vitrail.errors import UsageError, setting
from vitrail.heads.prototypes import PrototypeHead
from vitrail.metrics.features import spread
from vitrail.models import Model, ViT, ViTConfig
from vitrail.nn import ResNetStem, full_precision, normal_, patch_grid, precise
from vitrail.tasks.block_masks import block_masks
from vitrail.tasks.embed import Embed, EmbedConfig
from vitrail.tasks.gathering import gathered_with_gradient, summed
from vitrail.tasks.moco import pooled_width
from vitrail.tasks.momentum import MomentumTeacher
from vitrail.tasks.task import Losses

_ROUNDS = 3
"""Of Sinkhorn and Knopp."""
_SAME = 1e-6
"""Features that are no further apart are of one and the same picture: nothing is to part them."""
_REMEMBERED = 0.9
"""Of what the teacher says, for `collapsed`: how much of it stays from step to step."""
_EARLY = 0.2
"""The share of a run in which nothing has to have been learned."""


@dataclass(frozen=True, kw_only=True)
class DinoConfig:
    """The losses and what they need beside the model; a value out of range is a `UsageError`."""

    prototypes: int = 4096
    """What images are compared with: 65,536 in the paper; with few images 1,024 to 8,192."""
    hidden: int = 2048
    """Hidden width of the head."""
    out: int = 256
    """Length of the vectors that are compared."""
    small_views: int = 8
    """Beside the two large ones."""
    small_size: tuple[int, int] | None = None
    """Their (height, width); None: about 3/7 of the large ones', in whole patches."""
    small_scale: tuple[float, float] = (0.05, 0.4)
    """The part of the image's area that they show."""
    temperature: float = 0.1
    """What the student's cosines are divided by."""
    teacher_temperature: tuple[float, float] = (0.04, 0.07)
    """The teacher's, at the start and from `teacher_warmup` on. More than 0.07 is unstable."""
    teacher_warmup: float = 0.1
    """The share of the run in which it rises."""
    momentum: float = 0.996
    """How much of itself the teacher keeps in a step, at the start; at the end it is all. The
    paper: 0.9995 for batches of 256. It suits many thousand steps, and fewer want less."""
    centring: Literal["mean", "sinkhorn"] = "mean"
    """What keeps one prototype from taking all: DINO's mean, or Sinkhorn and Knopp's rounds."""
    centre_momentum: float = 0.9
    """How much of the mean stays from step to step."""
    freeze_last: float = 0.01
    """The share of the run in which prototypes stay as they were drawn: in the paper an epoch."""
    ibot: float = 0.0
    """The weight of the loss of hidden patches: 0 has none, iBOT and DINOv2 1."""
    own_patch_head: bool = False
    """Of hidden patches: whether they have prototypes of their own (DINOv2's largest)."""
    hidden_views: float = 0.5
    """Of large views: the share that has patches hidden."""
    hidden_share: tuple[float, float] = (0.1, 0.5)
    """Of those: the share of the patches that is."""
    koleo: float = 0.0
    """The weight of KoLeo: 0 has none, DINOv2 0.1."""

    def __post_init__(self) -> None:
        for field in ("prototypes", "hidden", "out"):
            if getattr(self, field) < 1:
                raise UsageError(
                    f"{setting(f'dino.{field}')} must be at least 1, not {getattr(self, field)}"
                )
        if self.prototypes < 2:
            raise UsageError(f"{setting('dino.prototypes', 1)} tells nothing apart: give 2 or more")
        for field in ("small_views", "ibot", "koleo"):
            if getattr(self, field) < 0:
                raise UsageError(
                    f"{setting(f'dino.{field}')} cannot be negative: {getattr(self, field)}"
                )
        for field in ("momentum", "centre_momentum", "freeze_last", "hidden_views"):
            if not 0 <= getattr(self, field) <= 1:
                raise UsageError(
                    f"{setting(f'dino.{field}')} must be in [0, 1], not {getattr(self, field)}"
                )
        if not 0 <= self.teacher_warmup < 1:
            raise UsageError(
                f"{setting('dino.teacher_warmup')} must be in [0, 1), not {self.teacher_warmup}"
            )
        if not min(self.temperature, *self.teacher_temperature) >= 0.01:
            raise UsageError(
                f"{setting('dino.temperature')} and {setting('dino.teacher_temperature')} must be "
                f"at least 0.01, not {self.temperature} and {self.teacher_temperature}"
            )
        for field in ("small_scale", "hidden_share"):
            least, most = getattr(self, field)
            if not 0 < least <= most <= 1:
                raise UsageError(
                    f"{setting(f'dino.{field}', (least, most))}: give 0 < least <= greatest <= 1"
                )


class Said(NamedTuple):
    """Cosines with prototypes."""

    images: Float[Tensor, "b k"]
    patches: Float[Tensor, "m k"] | None
    """Of the patches that are asked about; None: none are."""


class Heads(nn.Module):
    """What student and teacher have above the model."""

    def __init__(self, width: int, patch_width: int | None, config: DinoConfig) -> None:
        """`patch_width`: that of patches with a head of their own; None: they share."""
        super().__init__()
        sizes = (config.hidden, config.out, config.prototypes)
        self.images = PrototypeHead(width, *sizes)
        self.patches = None if patch_width is None else PrototypeHead(patch_width, *sizes)

    def forward(self, pooled: Float[Tensor, "b d"], patches: Float[Tensor, "m e"] | None) -> Said:
        of_patches = self.patches or self.images
        return Said(self.images(pooled), None if patches is None else of_patches(patches))


class Teacher(MomentumTeacher):
    """Says what the student is to say."""

    model: Model
    heads: Heads

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "b c h w"], asked: Int64[Tensor, " m"] | None) -> Said:
        """`asked`: patches, numbered through all images; None: of no patch."""
        found = self.model.features(images)
        patches = None if asked is None else found.patches.flatten(0, 1)[asked]
        return self.heads(found.pooled, patches)


class MaskToken(nn.Module):
    """What stands in the place of a hidden patch, before positions are added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(width))
        normal_(self.token.data, std=0.02)

    def forward(
        self, tokens: Float[Tensor, "b n d"], hidden: Int64[Tensor, " m"]
    ) -> Float[Tensor, "b n d"]:
        token = self.token.to(tokens.dtype).expand(len(hidden), -1)
        return tokens.flatten(0, 1).index_copy(0, hidden, token).view_as(tokens)


class Dino(Embed):
    """A model without a head, and how it learns that views of an image are of one kind."""

    coupled = True

    def __init__(
        self, model: Model, config: DinoConfig, targets: Targets, judged: EmbedConfig, seed: int
    ) -> None:
        """As `Embed`: nothing learns from `targets`. `seed` is that of the hidden patches."""
        super().__init__(model, targets, judged)
        self.config = config
        self.seed = seed
        own = patch_width(model) if config.ibot and config.own_patch_head else None
        self.heads = Heads(pooled_width(model), own, config)
        self.mask = MaskToken(patch_width(model)) if config.ibot else None
        self.teacher = Teacher(model=model, heads=self.heads)
        k = config.prototypes
        self.register_buffer("centre", torch.zeros(k))
        self.register_buffer("patch_centre", torch.zeros(k) if config.ibot else None)
        self.register_buffer("usual", torch.tensor([math.log(k) / 2, math.log(k)]))
        """What the teacher says, over the last steps: the entropy of an image's chances, and that
        of the mean of all images'."""
        # Buffers, for what computes may be a copy: see training/engine.py.
        start = config.teacher_temperature[0]
        self.register_buffer("sharpness", torch.tensor(start), persistent=False)
        self.register_buffer("done", torch.tensor(0.0), persistent=False)
        self.centre: Tensor
        self.patch_centre: Tensor | None
        self.usual: Tensor
        self.sharpness: Tensor
        self.done: Tensor

    def enter(self, done: float) -> None:
        """Prototypes learn from `freeze_last` of the run on, and the teacher grows less sure."""
        config = self.config
        for head in (self.heads.images, self.heads.patches):
            if head is not None:
                head.last.requires_grad_(done >= config.freeze_last)
        start, end = config.teacher_temperature
        risen = min(done / config.teacher_warmup, 1.0) if config.teacher_warmup else 1.0
        self.sharpness.fill_(start + (end - start) * risen)
        self.done.fill_(done)

    def loss(self, batch: Batch) -> Losses:
        """The mean over the batch. Its parts: each of the losses; `entropy`, of what the teacher
        says of an image, in nats; `variety`, of what it says of all, which is more by what it tells
        of them; `spread` of the student's features.
        """
        self.teacher.train(self.training)
        # A process without images is handed one of no weight, so that the others need not wait.
        n, here = len(batch.indices), len(batch.images)
        large = torch.cat([view.images for view in batch.views[:2]])
        masks = self._hidden(batch) if self.mask is not None else None
        with self._hiding(masks):
            seen = self.model.features(large)
        small = [view.images for view in batch.views[2:]]
        pooled = [seen.pooled]
        if small:
            pooled.append(self.model.features(torch.cat(small)).pooled)
        hidden = None if masks is None else seen.patches.flatten(0, 1)[masks.places]
        student = self.heads(torch.cat(pooled), hidden)
        teacher = self.teacher(large, None if masks is None else masks.places)

        said = [each[:n] for each in student.images.split(here)]
        told = torch.stack([each[:n] for each in teacher.images.split(here)])
        chances = self._chances(told.flatten(0, 1), self.centre).view_as(told)
        found = {"dino": agreement(said, chances, self.config.temperature)}
        total = found["dino"]
        if masks is not None:
            assert student.patches is not None and teacher.patches is not None
            found["ibot"] = self._of_patches(student.patches, teacher.patches, masks, n)
            total = total + self.config.ibot * found["ibot"]
        features = [each[:n] for each in seen.pooled.split(here)]
        if self.config.koleo:
            found["koleo"] = koleo(features[0]) + koleo(features[1])
            total = total + self.config.koleo * found["koleo"]
        told_of = self._remember(told, chances)
        parts = {
            **{name: value.detach() for name, value in found.items()},
            **dict(zip(("entropy", "variety"), told_of, strict=True)),
            "spread": spread(features[0]).to(total.dtype) if n else total.detach() * 0,
        }
        return Losses(total, parts)

    def after_step(self, done: float) -> None:
        """The teacher moves. `done` (0 to 1) of the run is over, this step included."""
        self.teacher.follow(self, self.config.momentum, done)

    def collapsed(self, rows: Mapping[str, Tensor]) -> str | None:
        """All images are of all prototypes alike, or all of one; or as `Embed`."""
        entropy, variety = self.usual.tolist()
        most = math.log(self.config.prototypes)
        if self.done < _EARLY:
            return super().collapsed(rows)
        if entropy > 0.99 * most:
            return (
                f"the teacher finds every image as like to each of the {self.config.prototypes} "
                f"prototypes (its entropy is {entropy:.2f}, and ln of their number {most:.2f}): it "
                f"has collapsed. Fewer ({setting('dino.prototypes')}), a smaller "
                f"{setting('dino.teacher_temperature')} or {setting('optim.lr')} may help"
            )
        if variety < 0.01 * most:
            return (
                f"the teacher finds all images to be of one prototype (the entropy of all is "
                f"{variety:.3f}): it has collapsed. {setting('dino.centring', 'sinkhorn')}, a "
                f"greater {setting('dino.teacher_temperature')} or smaller {setting('optim.lr')} "
                f"may help"
            )
        return super().collapsed(rows)

    def _chances(self, told: Float[Tensor, "b k"], centre: Tensor) -> Float[Tensor, "b k"]:
        """p, of the teacher's cosines."""
        if self.config.centring == "sinkhorn":
            return sinkhorn(told, self.sharpness)
        return ((told - centre) / self.sharpness).softmax(dim=-1)

    def _of_patches(
        self,
        said: Float[Tensor, "m k"],
        told: Float[Tensor, "m k"],
        masks: "_Masks",
        images: int,
    ) -> Float[Tensor, ""]:
        """Of hidden patches, a mean over those of a view, then over all large views."""
        assert self.patch_centre is not None
        chances = self._chances(told, self.patch_centre)
        each = cross_entropy(chances, said / self.config.temperature)
        self._move(self.patch_centre, told)
        return (each * masks.weights.to(each)).sum() / max(2 * images, 1)

    @torch.no_grad()
    def _remember(
        self, told: Float[Tensor, "v b k"], chances: Float[Tensor, "v b k"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Move the centre; the entropies of `usual`, of this step."""
        entropy, mean = entropy_of(chances).sum()[None], chances.sum(dim=(0, 1))
        count = entropy.new_tensor([float(chances[..., 0].numel())])
        *means, counted = summed(torch.cat([mean, entropy, count])).split([len(mean), 1, 1])
        of_all, of_each = (x / counted.clamp(min=1) for x in means)
        now = torch.stack([of_each[0], entropy_of(of_all)])
        if self.training:
            self._move(self.centre, told.flatten(0, 1))
            self.usual.lerp_(now.to(self.usual), 1 - _REMEMBERED)
        return now[0], now[1]

    @torch.no_grad()
    def _move(self, centre: Tensor, told: Float[Tensor, "b k"]) -> None:
        """A centre moves by the mean of what was told to all processes, after it was used."""
        if self.training and self.config.centring == "mean":
            all_ = summed(torch.cat([told.sum(dim=0), told.new_tensor([float(len(told))])]))
            mean, count = all_[:-1].to(centre), all_[-1].to(centre)
            share = (1 - self.config.centre_momentum) * (count > 0)
            centre.lerp_(mean / count.clamp(min=1), share)

    def _hidden(self, batch: Batch) -> "_Masks":
        n, (here, _, height, width) = len(batch.indices), batch.images.shape
        config = self.model.config
        assert isinstance(config, ViTConfig)
        grid = patch_grid((height, width), config.patch, config.indivisible)
        masks = np.zeros((2, here, grid[0] * grid[1]), bool)
        for view, mask in enumerate(masks):
            mask[:n] = block_masks(
                grid,
                batch.indices,
                seed=self.seed,
                epoch=batch.epoch,
                view=view,
                chance=self.config.hidden_views,
                shares=self.config.hidden_share,
            )
        return _Masks.of(masks.reshape(2 * here, -1), batch.images.device)

    @contextmanager
    def _hiding(self, masks: "_Masks | None") -> Iterator[None]:
        """Within, the student's model sees the mask token where patches are hidden."""
        if masks is None or self.mask is None:
            yield
            return
        mask = self.mask

        def hide(module: nn.Module, given: Any, tokens: Any) -> Any:
            return mask(tokens[0], masks.places), *tokens[1:]

        handle = self.model.stem.register_forward_hook(hide)
        try:
            yield
        finally:
            handle.remove()


class _Masks(NamedTuple):
    """Which patches are hidden, numbered through all views of a batch."""

    places: Int64[Tensor, " m"]
    weights: Float[Tensor, " m"]
    """Of each, one over how many are hidden of its view."""

    @classmethod
    def of(cls, masks: np.ndarray, device: torch.device) -> "_Masks":
        """`masks [v n]`: of each view which patches are."""
        places = np.flatnonzero(masks)
        weights = 1 / masks.sum(axis=1).clip(1)[places // masks.shape[1]]
        return cls(
            torch.from_numpy(places).to(device),
            torch.from_numpy(weights.astype(np.float32)).to(device),
        )


def agreement(
    said: list[Float[Tensor, "b k"]], chances: Float[Tensor, "t b k"], temperature: float
) -> Float[Tensor, ""]:
    """The mean of the cross entropy of each of the student's views with each of the teacher's, its
    first ones, but for a view with itself; 0 of no image.
    """
    total, pairs = said[0].new_zeros(()), 0
    whole = chances.sum(dim=0)
    for view, cosines in enumerate(said):
        own = view < len(chances)
        # Of several teachers at once: their sum is no share, and counts as many times.
        of = whole - chances[view] if own else whole
        total = total + cross_entropy(of, cosines / temperature, len(chances) - own).sum()
        pairs += len(chances) - own
    return total / (max(len(said[0]), 1) * max(pairs, 1))


def cross_entropy(
    chances: Float[Tensor, "b k"], logits: Float[Tensor, "b k"], shares: int = 1
) -> Float[Tensor, " b"]:
    """-sum p log softmax(logits), of each row; the chances of a row are `shares` in all."""
    return shares * logits.logsumexp(dim=-1) - (chances * logits).sum(dim=-1)


@torch.no_grad()
def sinkhorn(
    cosines: Float[Tensor, "b k"], temperature: float | Tensor, rounds: int = _ROUNDS
) -> Float[Tensor, "b k"]:
    """Chances, of which each row is 1 and each column nearly b / k, for the rows of all processes:
    in turn columns and rows of exp(cosine / temperature) are scaled to that (Cuturi, 1306.0895).
    """
    # At most 1: cosines are, and a factor of all is one of none.
    q = ((cosines - 1) / temperature).exp()
    rows = summed(cosines.new_tensor(float(len(cosines))))
    for _ in range(rounds):
        q = q / summed(q.sum(dim=0)).clamp(min=torch.finfo(q.dtype).tiny) * rows / q.shape[1]
        q = q / q.sum(dim=1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)
    return q


def koleo(features: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """-mean log of the distance from the nearest other image's, of features of length 1, among
    those of all processes; 0 where there is no other.
    """
    with full_precision(features.device):
        x = F.normalize(precise(features), dim=1)
        every, first = gathered_with_gradient(x)
        if len(every) < 2:
            return x.sum() * 0
        with torch.no_grad():
            alike = x @ every.T
            alike.diagonal(first)[: len(x)].fill_(-1)
            nearest = alike.argmax(dim=1)
        apart = torch.linalg.vector_norm(x - every[nearest], dim=1)
        return -apart.clamp(min=_SAME).log().sum() / max(len(x), 1)


def entropy_of(chances: Float[Tensor, "*b k"]) -> Float[Tensor, "*b"]:
    """In nats."""
    return torch.special.entr(chances).sum(dim=-1)


def patch_width(model: Model) -> int:
    """The length of a patch's vector. Raises `UsageError` for a model whose patches cannot be
    hidden one by one.
    """
    if (
        not isinstance(model, ViT)
        or isinstance(model.stem, ResNetStem)
        or model.config.merge
        or model.config.scales != "one"
        or model.config.coarsest != model.config.patch
    ):
        raise UsageError(
            f"{setting('dino.ibot')} hides single patches, which only a ViT has, of one size and "
            f"with a stem other than a ResNet: use {setting('dino.ibot', 0)}"
        )
    return model.config.width
