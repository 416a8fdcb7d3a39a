"""DynamicViT: a ViT that learns which patches it can do without (Rao et al., arXiv 2106.02034).

- before blocks 3, 6 and 9 a small predictor scores the patch tokens; the lowest go no further
- all else is a ViT, with the same names: its weights load as they are, `predictors` are new
- inference really computes with fewer tokens, each image with its own; how many follows from the
  number of patches alone, so that shapes are static: of 196, 137, 96 and 67 at keep 0.7
- training drops as many as it wants to, which `vitrail.tasks.prune` pulls towards the wanted share.
  So that gradients reach the predictors and a batch has one shape, tokens then stay where they
  are, hidden from the others' attention

Letters: b batch, n patch tokens of an image, m of them left, k prefix tokens, t tokens of a
sequence, d width, h heads, e width of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitrail.errors import UsageError, setting
from vitrail.models.vit import ROWS as VIT_ROWS
from vitrail.models.vit import ViT, ViTConfig
from vitrail.nn import Block, Features, mean_of, take


@dataclass(frozen=True, kw_only=True)
class DynamicViTConfig(ViTConfig):
    """The shape of a ViT, and how many of its tokens go how far."""

    family: Literal["dynamicvit"] = "dynamicvit"  # type: ignore[assignment]  # tells them apart
    keep: float = 0.7
    """Share of the patch tokens that each stage leaves, in (0, 1]: its third power reaches the end
    of a model of three stages."""
    prune_before: tuple[int, ...] = (3, 6, 9)
    """The blocks, counted from 0, before which tokens are dropped: one stage each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.keep <= 1:
            raise UsageError(
                f"{setting('model.keep')} must be in (0, 1], not {self.keep}: the share of the "
                f"patch tokens that each stage leaves, 0.7 as published"
            )
        stages = self.prune_before
        if not stages or stages != tuple(sorted({i for i in stages if 0 < i < self.depth})):
            quarters = tuple(sorted({max(1, self.depth * i // 4) for i in (1, 2, 3)}))
            raise UsageError(
                f"{setting('prune_before', stages)}: give ascending numbers of blocks from 1 to "
                f"{self.depth - 1}, {quarters} for instance"
            )
        if self.width % 4:
            raise UsageError(f"a DynamicViT's width must be divisible by 4, not {self.width}")
        if self.cuts is not None or self.relative is not None:
            raise UsageError(
                f"{setting('window')}, {setting('windows')} and {setting('relative')} need whole "
                f"maps, which a DynamicViT does not keep"
            )
        if self.position == "peg":
            raise UsageError(
                f"{setting('position', 'peg')} needs whole maps, which a DynamicViT does not keep"
            )
        if self.pool == "first":
            raise UsageError(
                f"{setting('pool', 'first')} reads a patch which a DynamicViT may drop: use "
                f"{setting('pool', 'mean')}"
            )
        if self.scales != "one":
            raise UsageError(
                f"a DynamicViT has patches of one size: use {setting('scales', 'one')}"
            )
        if self.merge:
            raise UsageError(
                f"a DynamicViT drops tokens, it cannot merge them too: use {setting('merge', 0)}"
            )

    def kept(self, n: int) -> tuple[int, ...]:
        """How many of `n` patch tokens are left after each stage; at least one.

        >>> DynamicViTConfig().kept(196)
        (137, 96, 67)
        """
        return tuple(max(1, int(n * share)) for share in self.shares)

    @property
    def shape(self) -> str:
        """Its build in words."""
        blocks = ", ".join(map(str, self.prune_before))
        return f"{super().shape}, {self.keep:g} of the patches kept before each of {blocks}"

    @property
    def shares(self) -> tuple[float, ...]:
        """What share of all patch tokens each stage leaves."""
        return tuple(self.keep ** (stage + 1) for stage in range(len(self.prune_before)))


class Predictor(nn.Module):
    """Says of each token what speaks for keeping it, and what for dropping it (section 3.2).

    Half of the channels stay the token's own, half are averaged over all that are left.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)  # with torch's epsilon, unlike the ViT's own
        self.embed = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, width // 2)
        self.fc2 = nn.Linear(width // 2, width // 4)
        self.fc3 = nn.Linear(width // 4, 2)
        for layer in (self.embed, self.fc1, self.fc2, self.fc3):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(
        self, x: Float[Tensor, "b m d"], kept: Float[Tensor, "b m"] | None = None
    ) -> Float[Tensor, "b m 2"]:
        """Logits of (keep, drop). `kept`: 1 for those that are left, 0 for others; None is all."""
        own, shared = F.gelu(self.embed(self.norm(x))).chunk(2, dim=-1)
        mean = mean_of(shared, kept)[:, None].expand_as(shared)
        x = F.gelu(self.fc1(torch.cat([own, mean], dim=-1)))
        return self.fc3(F.gelu(self.fc2(x)))


class Reduced(NamedTuple):
    """What the model has found, and with which tokens."""

    features: Features
    """Of the tokens that are left; `valid` says which, and the others are zeros."""
    decisions: tuple[Float[Tensor, "b n"], ...]
    """After each stage, 1 for a patch that is left and 0 for another; in training, with the
    gradients of having decided otherwise."""


class DynamicViT(ViT):
    """A ViT with a predictor before some of its blocks.

    >>> config = DynamicViTConfig(depth=4, width=64, heads=2, mlp=128, prune_before=(1, 2))
    >>> reduced = DynamicViT(config).eval().reduced(torch.zeros(1, 3, 224, 224))
    >>> [int(left.sum()) for left in reduced.decisions]
    [137, 96]
    """

    config: DynamicViTConfig

    def __init__(self, config: DynamicViTConfig) -> None:
        super().__init__(config)
        self.predictors = nn.ModuleList(Predictor(config.width) for _ in config.prune_before)

    def features(
        self, x: Float[Tensor, "b c h w"], extent: Int[Tensor, "b 2"] | None = None
    ) -> Features:
        """Everything a head may want of images `x`, which must be of one size."""
        return self.reduced(x, extent).features

    def reduced(
        self, x: Float[Tensor, "b c h w"], extent: Int[Tensor, "b 2"] | None = None
    ) -> Reduced:
        """Features, and which patches are left: drawn in training, else those that score best."""
        self.check_images(x, extent)
        # With the published epsilon a hidden token still has a share of 1e-6 / t in attention,
        # which steadies training and moves logits by about as much.
        return self.masked(x, eps=1e-6) if self.training else self.gathered(x)

    def masked(
        self,
        x: Float[Tensor, "b c h w"],
        decisions: Sequence[Float[Tensor, "b n"]] = (),
        eps: float = 0.0,
    ) -> Reduced:
        """All tokens go to the end, hidden from the others once they are dropped (section 3.3).

        `decisions`: of each stage; without them they are drawn, by the straight-through Gumbel
        softmax of what the predictors say. With `eps` 0 hiding is exact: the features are those
        of `gathered` for the same decisions.
        """
        tokens, grid, maps = self.embed(x)
        assert isinstance(grid, tuple)  # one size of images, one of patches
        rotation = None if self.rotary is None else self.rotary(grid)
        prefix, patches = self.split(tokens)
        left = torch.ones(patches.shape[:2], device=x.device)
        made: list[Tensor] = []
        for i, block in enumerate(self.encoder.blocks):
            assert isinstance(block, Block)
            if i in self.config.prune_before:
                predictor = self.predictors[len(made)]
                left = decisions[len(made)] if decisions else _drawn(predictor, patches, left)
                made.append(left)
            if made:
                policy = torch.cat([left.new_ones(prefix.shape[:2]), left], dim=1)
                q, k, v = block.attn.apart(block.norm1(tokens), rotation)
                values = block.attn.joined(attend_left(q, k, v, policy, eps))
                tokens = block.fed_forward(tokens + block.drop_path(block.scale1(values)))
            else:
                tokens = block(tokens, rotation)
            patches = self.split(tokens)[1]
        prefix, patches = self.split(self.encoder.norm(tokens))
        shown = left > 0.5
        pooled = self.vector(prefix, patches, left if self.pool is None else shown)
        patches = patches * left[..., None].to(patches.dtype)
        return Reduced(self.laid_out(patches, prefix, grid, maps, pooled, shown), tuple(made))

    def gathered(self, x: Float[Tensor, "b c h w"]) -> Reduced:
        """Only the patches that score best go on: `config.kept(n)` of each image after each stage.

        They stay in the order of their places.
        """
        tokens, grid, maps = self.embed(x)
        assert isinstance(grid, tuple)  # one size of images, one of patches
        whole = None if self.rotary is None else self.rotary(grid)
        rotation = whole
        prefix, patches = self.split(tokens)
        (b, n), k = patches.shape[:2], prefix.shape[1]
        first = torch.arange(k, device=x.device).expand(b, -1)
        places = torch.arange(n, device=x.device).expand(b, -1)
        made: list[Tensor] = []
        for i, block in enumerate(self.encoder.blocks):
            if i in self.config.prune_before:
                count = self.config.kept(n)[len(made)]
                if count < places.shape[1]:
                    keep, drop = self.predictors[len(made)](self.split(tokens)[1]).unbind(dim=2)
                    best = (keep - drop).topk(count, sorted=False).indices.sort(dim=1).values
                    tokens = take(tokens, torch.cat([first, k + best], dim=1))
                    places = places.gather(1, best)
                    if whole is not None:
                        rotation = whole.at(places)
                made.append(tokens.new_zeros(b, n).scatter(1, places, 1.0))
            tokens = block(tokens, rotation)
        prefix, patches = self.split(self.encoder.norm(tokens))
        pooled = self.vector(prefix, patches)
        m = patches.shape[1]
        origin = torch.arange(m, device=x.device).expand(b, -1)
        origin = torch.full((b, n), m, device=x.device).scatter(1, places, origin)
        patches = take(F.pad(patches, (0, 0, 0, 1)), origin)  # the row added at the end is zeros
        features = self.laid_out(patches, prefix, grid, maps, pooled, origin < m)
        return Reduced(features, tuple(made))


def attend_left(
    q: Float[Tensor, "b h t e"],
    k: Float[Tensor, "b h t e"],
    v: Float[Tensor, "b h t e"],
    left: Float[Tensor, "b t"],
    eps: float,
) -> Float[Tensor, "b h t e"]:
    """Attention to the tokens that are `left`, and of each token to itself (equation 11).

    It has a gradient for every decision: what the outputs would be had a token stayed.
    """
    t = q.shape[2]
    logits = (q * q.shape[3] ** -0.5 @ k.transpose(2, 3)).float()
    seen = left.float()[:, None, :]
    seen = seen + (1 - seen) * torch.eye(t, device=q.device)
    weights = (logits - logits.detach().amax(dim=3, keepdim=True)).exp() * seen[:, None]
    weights = (weights + eps / t) / (weights.sum(dim=3, keepdim=True) + eps)
    return weights.to(v.dtype) @ v


def _drawn(
    predictor: nn.Module, patches: Float[Tensor, "b n d"], left: Float[Tensor, "b n"]
) -> Float[Tensor, "b n"]:
    """Which of the patches that are `left` stay: each with the probability that it is given.

    An image that would lose its last ones keeps what it has (there, the authors' code divides by
    zero): 196 patches never do, the 16 of a thumbnail may.
    """
    drawn = F.gumbel_softmax(predictor(patches, left).float(), hard=True)[..., 0] * left
    return torch.where(drawn.detach().sum(dim=1, keepdim=True) > 0, drawn, left)


def pruned(config: ViTConfig, **changes: Any) -> DynamicViTConfig:
    """The ViT `config` with stages that drop tokens; `changes` are fields of `DynamicViTConfig`.

    >>> pruned(VIT_ROWS["vit_b16"], keep=0.5).kept(196)
    (98, 49, 24)
    """
    same = {item.name: getattr(config, item.name) for item in fields(ViTConfig)}
    return DynamicViTConfig(**{**same, "family": "dynamicvit", **changes})


ROWS: dict[str, DynamicViTConfig] = {
    "dynamicvit_ti16": pruned(VIT_ROWS["deit_ti16"]),
    "dynamicvit_s16": pruned(VIT_ROWS["deit_s16"]),
    "dynamicvit_b16": pruned(VIT_ROWS["deit_b16"]),
}
"""Name -> shape: DeiT's. The share of tokens to keep is a change to a row, never a name."""
