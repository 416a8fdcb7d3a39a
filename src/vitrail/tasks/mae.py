"""MAE: features from images most of which are hidden (He et al., arXiv 2111.06377).

Of the patches of an image the encoder sees a random quarter, with their positions, and a small
decoder is to tell the pixels of the others. With x_i the pixels of patch i, y_i what the decoder
says of it, M the hidden patches:

    t_i  = (x_i - mean x_i) / sqrt(var x_i + 1e-6)        (`norm_pixels`; else t_i = x_i)
    loss = mean over images of mean_{i in M} mean (y_i - t_i)^2

where var is the unbiased variance of the patch. A patch is seen if its number, drawn for (seed,
epoch, image), is among the int((1 - mask) n) smallest; so who was hidden does not depend on the
batch, nor on where a run was resumed, and a batch can be computed in parts.

Features of MAE are to be fine-tuned: frozen they tell less than others' (section 4.3; a k-NN on
them still less), and the mean of the patches tells more than the class token.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vitrail.data import keyed
from vitrail.data.batches.batch import Batch
from vitrail.data.targets import Targets
from vitrail.errors import UsageError, setting
from vitrail.heads.masked import DecoderConfig, PatchDecoder, patch_pixels
from vitrail.models import ViT
from vitrail.nn import pad_to_patches, patch_grid
from vitrail.tasks.embed import Embed, EmbedConfig, freeze_pooling
from vitrail.tasks.task import Losses
from vitrail.weights import Opened


@dataclass(frozen=True, kw_only=True)
class MaeConfig:
    """What is hidden, and who guesses it; a value out of range is a `UsageError`."""

    mask: float = 0.75
    """The share of the patches that is hidden."""
    norm_pixels: bool = True
    """What is guessed are a patch's pixels less their mean, over their deviation (table 1d)."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """It is not kept: 26 million weights on a ViT-S, where 256 wide and 4 deep has 3.5."""

    def __post_init__(self) -> None:
        if not 0 < self.mask < 1:
            raise UsageError(f"{setting('mae.mask')} must be in (0, 1), not {self.mask}")


class Masks(NamedTuple):
    """Which patches of each image are seen, and which are not."""

    seen: Int64[Tensor, "b m"]
    """Their places, in the order in which the encoder has them."""
    hidden: Float[Tensor, "b n"]
    """One for each that is hidden, else zero."""


class Mae(Embed):
    """A ViT without a head, and the decoder by which it learns."""

    model: ViT

    def __init__(
        self, model: Any, config: MaeConfig, targets: Targets, judged: EmbedConfig, seed: int
    ) -> None:
        """As `Embed`, with the `seed` by which patches are hidden. Raises `UsageError` for a model
        that cannot leave patches out, or has too few.
        """
        super().__init__(model, targets, judged)
        if type(model) is not ViT:
            raise UsageError(
                f"{setting('task', 'mae')} is for ViTs, which can leave patches out, not for the "
                f"family '{model.config.family}'"
            )
        model.check_whole("some patches")
        freeze_pooling(model)
        self.config = config
        self.seed = seed
        shape = model.config
        n = shape.grid[0] * shape.grid[1]
        if not 0 < kept(n, config.mask) < n:
            raise UsageError(
                f"{setting('mae.mask', config.mask)} of {n} patches leaves none to see, or none to "
                f"guess: use larger images, or smaller patches"
            )
        out = shape.patch[0] * shape.patch[1] * shape.channels
        self.decoder = PatchDecoder(config.decoder, shape.width, shape.grid, out, shape.norm_eps)

    def begin(self, opened: Opened) -> list[str]:
        """With the decoder of the weights that the run starts from, where they have one."""
        old = opened.decoder
        if old is None:
            return ["decoder: a new one, for the weights have none"]
        own = self.decoder.state_dict()
        if {k: t.shape for k, t in old.state.items()} != {k: t.shape for k, t in own.items()}:
            return [f"decoder: a new one: that of the weights is of another shape ({old.line})"]
        self.decoder.load_state_dict(old.state)
        return ["decoder: kept"]

    def loss(self, batch: Batch) -> Losses:
        """The squared error of the hidden patches' pixels, a mean over the batch."""
        images = batch.images
        noise = np.zeros((len(images), self.patches(images)), np.float32)
        if len(batch.indices):  # else a blank one, of no weight
            noise = keyed.uniform(self.seed, batch.epoch, batch.indices, "mask", noise.shape[1])
        return Losses(self.reconstruction(images, masks(noise, self.config.mask)), {})

    def patches(self, images: Float[Tensor, "b c h w"]) -> int:
        """How many an image has."""
        gh, gw = self._grid(images)
        return gh * gw

    def reconstruction(self, images: Float[Tensor, "b c h w"], masks: Masks) -> Float[Tensor, ""]:
        """The loss for these masks."""
        shape = self.model.config
        seen, hidden = (each.to(images.device) for each in masks)
        tokens = self.model.shown(images, seen)
        guess = self.decoder(tokens, seen, self._grid(images)).float()
        whole, _ = pad_to_patches(images, shape.patch, shape.indivisible)
        wanted = patch_pixels(whole.float(), shape.patch)
        if self.config.norm_pixels:
            variance, mean = torch.var_mean(wanted, dim=2, keepdim=True)
            wanted = (wanted - mean) / (variance + 1e-6).sqrt()
        return ((guess - wanted).square().mean(dim=2) * hidden).sum() / hidden.sum()

    def _grid(self, images: Tensor) -> tuple[int, int]:
        shape = self.model.config
        return patch_grid((images.shape[2], images.shape[3]), shape.patch, shape.indivisible)


def masks(noise: Float[np.ndarray, "b n"], share: float) -> Masks:
    """Hide `share` of the patches: those with the largest numbers.

    >>> masks(np.array([[0.7, 0.1, 0.9, 0.2]]), 0.5)
    Masks(seen=tensor([[1, 3]]), hidden=tensor([[1., 0., 1., 0.]]))
    """
    order = np.argsort(noise, axis=1, kind="stable")[:, : kept(noise.shape[1], share)]
    hidden = np.ones(noise.shape, np.float32)
    np.put_along_axis(hidden, order, 0.0, axis=1)
    return Masks(torch.from_numpy(np.ascontiguousarray(order)), torch.from_numpy(hidden))


def kept(patches: int, share: float) -> int:
    """How many of so many patches are seen where a `share` is hidden."""
    return int((1 - share) * patches)
