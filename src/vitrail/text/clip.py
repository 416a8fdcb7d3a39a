"""CLIP's text tower (Radford et al., arXiv 2103.00020, section 2.4): a causal transformer.

Tokens plus positions -> pre-norm blocks, where a token sees those before it -> norm -> the vector
at the end-of-text token -> projection without bias. Padding comes after that token, so that no
vector that is used has seen it. OpenAI's models and those that open_clip calls `-quickgelu` have
QuickGELU, its others (LAION-2B, DataComp) the exact GELU: no tensor shows which.

Letters: b texts, t tokens, d width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from vitrail.nn import Activation, Block, normal_
from vitrail.text.tower import Tower, TowerConfig, encoded, plain_encoder, shorter


@dataclass(frozen=True, kw_only=True)
class ClipTextConfig(TowerConfig):
    """The shape of one of CLIP's text towers. The position table has `context` rows."""

    family: Literal["clip"] = "clip"
    vocabulary: int = 49408
    context: int = 77
    activation: Activation = "gelu_quick"
    out: int = 512


class ClipText(Tower):
    """One vector a text: that at its first token of the greatest id, which is the end of text."""

    config: ClipTextConfig

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Parameter(torch.empty(config.context, config.width))
        self.encoder = plain_encoder(config)
        self.head = nn.Linear(config.width, config.out, bias=False) if config.out else None
        self._initialise()

    def _initialise(self) -> None:
        """As OpenAI's code: deviations by width, and those of what is added by depth too."""
        width, depth = self.config.width, self.config.depth
        normal_(self.tokens.weight, 0.02)
        normal_(self.position, 0.01)
        for block in self.encoder.blocks:
            assert isinstance(block, Block)
            for linear, std in (
                (block.attn.qkv, width**-0.5),
                (block.attn.proj, (2 * width * depth) ** -0.5),
                (block.mlp.fc1, (2 * width) ** -0.5),
                (block.mlp.fc2, (2 * width * depth) ** -0.5),
            ):
                normal_(linear.weight, std)
                nn.init.zeros_(linear.bias)
        if self.head is not None:
            normal_(self.head.weight, width**-0.5)

    def pooled(
        self, tokens: Int64[Tensor, "b t"], mask: Bool[Tensor, "b t"] | None
    ) -> Float[Tensor, "b d"]:
        """`mask` says nothing that the end of text does not."""
        end = tokens.argmax(dim=1)
        place = torch.arange(tokens.shape[1], device=tokens.device)
        tokens, _ = shorter(tokens, place <= end[:, None])
        b, t = tokens.shape
        before = torch.ones(t, t, dtype=torch.bool, device=tokens.device).tril()
        x = self.tokens(tokens) + self.position[:t]
        x = encoded(self.encoder, x, before.expand(b, t, t))
        return x[torch.arange(b, device=x.device), end]


ROWS: Mapping[str, ClipTextConfig] = {
    "clip_s32_alt": ClipTextConfig(
        depth=10, width=256, heads=4, mlp=1024, activation="gelu", out=256
    ),
    "clip_b32": ClipTextConfig(),
    "clip_b16": ClipTextConfig(),
    "clip_l14": ClipTextConfig(width=768, heads=12, mlp=3072, out=768),
    "clip_h14": ClipTextConfig(
        depth=24, width=1024, heads=16, mlp=4096, activation="gelu", out=1024
    ),
    "clip_bigg14": ClipTextConfig(
        depth=32, width=1280, heads=20, mlp=5120, activation="gelu", out=1280
    ),
}
"""Of OpenAI's sizes with OpenAI's activation, of LAION's with LAION's."""
