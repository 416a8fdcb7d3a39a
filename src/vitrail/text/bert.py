"""BERT (Devlin et al., arXiv 1810.04805) as a text tower: MiniLM's (2002.10957) and LiT's.

Tokens plus positions plus the table row of the first segment -> norm -> post-norm blocks, where
every token sees those that are the text's -> the mean of those, or the first one's vector -> a
projection with bias, where there is one. The pooler of the original is no part of it.

Letters: b texts, t tokens, d width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from vitrail.errors import UsageError, setting, unknown_name
from vitrail.nn import Attention, Mlp, SwiGLU, mean_of, normal_
from vitrail.nn.mlp import build_mlp
from vitrail.text.tower import Tower, TowerConfig, shorter

BertPool = Literal["mean", "class"]


@dataclass(frozen=True, kw_only=True)
class BertConfig(TowerConfig):
    """The shape of one BERT."""

    family: Literal["bert"] = "bert"
    vocabulary: int = 30522
    context: int = 512
    """Tokens of the longest text; at most `positions`."""
    positions: int = 512
    """Rows of the position table."""
    segments: int = 2
    """Rows of the table of segments, of which a text has the first."""
    width: int = 768
    heads: int = 12
    mlp: int = 3072
    norm_eps: float = 1e-12
    pool: BertPool = "mean"
    """What a text's vector is: the mean of its tokens, or its first token."""
    closed: bool = True
    """Whether its tokenizer ends a text with [SEP]: LiT's does not."""
    lower: bool = True
    """Whether its tokenizer takes off case and accents (an "uncased" vocabulary)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool not in get_args(BertPool):
            raise unknown_name("pool", str(self.pool), get_args(BertPool))
        if not self.context <= self.positions:
            raise UsageError(
                f"{setting('text.context', self.context)} is more than there are positions: "
                f"{setting('text.positions', self.positions)}"
            )
        if self.segments < 1:
            raise UsageError(f"{setting('text.segments')} must be at least 1, not {self.segments}")


class PostNormBlock(nn.Module):
    """Attention, then MLP, each added to its input; norms come after the sum (arXiv 1706.03762)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attn = Attention(config.width, config.heads)
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp: Mlp | SwiGLU = build_mlp(config.width, config.mlp, config.activation)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(
        self, x: Float[Tensor, "b t d"], keys: Bool[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b t d"]:
        """`keys`: which tokens may be attended to."""
        x = self.norm1(x + self.attn(x, keys=keys))
        return self.norm2(x + self.mlp(x))


class Bert(Tower):
    """One vector a text: the mean of its tokens, or its first one's."""

    config: BertConfig

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Parameter(torch.empty(config.positions, config.width))
        self.segments = nn.Parameter(torch.empty(config.segments, config.width))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.blocks = nn.ModuleList(PostNormBlock(config) for _ in range(config.depth))
        self.head = nn.Linear(config.width, config.out) if config.out else None
        for name, parameter in self.named_parameters():  # as Google's code
            if parameter.ndim > 1:
                normal_(parameter, 0.02)
            elif name.endswith("bias") and not parameter.is_meta:
                nn.init.zeros_(parameter)

    def block_names(self) -> list[str]:
        """The names of its blocks, first to last."""
        return [f"blocks.{i}" for i in range(self.config.depth)]

    def pooled(
        self, tokens: Int64[Tensor, "b t"], mask: Bool[Tensor, "b t"] | None
    ) -> Float[Tensor, "b d"]:
        """Of a text without a single token of its own, the vector of its padding."""
        if mask is not None:
            tokens, mask = shorter(tokens, mask)
            mask = mask | ~mask.any(dim=1, keepdim=True)  # a softmax over nothing is not a number
        x = self.norm(self.tokens(tokens) + self.position[: tokens.shape[1]] + self.segments[0])
        for block in self.blocks:
            x = block(x, mask)
        return x[:, 0] if self.config.pool == "class" else mean_of(x, mask)


_LARGE = {"depth": 24, "width": 1024, "heads": 16, "mlp": 4096}
_LIT = {"context": 16, "pool": "class", "activation": "gelu_tanh", "closed": False}

ROWS: Mapping[str, BertConfig] = {
    "minilm_l6": BertConfig(depth=6, width=384, mlp=1536, context=256),
    "minilm_l12": BertConfig(width=384, mlp=1536, context=128),
    "bert_base": BertConfig(pool="class"),
    "bert_large": BertConfig(pool="class", **_LARGE),  # type: ignore[arg-type]
    "lit_bert_base": BertConfig(out=768, **_LIT),  # type: ignore[arg-type]
    "lit_bert_large": BertConfig(out=1024, **_LARGE | _LIT),  # type: ignore[arg-type]
}
"""`lit_bert_base` is the text tower of LiT-B16B, `lit_bert_large` of LiT-L16L."""
