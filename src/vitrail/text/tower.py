"""What every text tower has in common: a config that checks itself, and one vector a text.

A tower is given tokens `[b t]` and which of them count `[b t]`, as its tokenizer makes them, and
gives one vector a text, not normalised. A family's file says what is its own.

Letters: b texts, t tokens, d width, e width of what comes out.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from vitrail.errors import UsageError, setting, unknown_name
from vitrail.nn import Activation, Block, Encoder

ACTIVATIONS: Sequence[Activation] = ("gelu", "gelu_tanh", "gelu_quick")


@dataclass(frozen=True, kw_only=True)
class TowerConfig(ABC):
    """The fields of every family's config."""

    family: str = ""
    """Which family this is, where configs of several are read from a file."""
    vocabulary: int
    """Rows of the token table."""
    context: int
    """Tokens of the longest text, those at its beginning and end included."""
    depth: int = 12
    width: int = 512
    heads: int = 8
    mlp: int = 2048
    """Hidden width of the MLPs."""
    activation: Activation = "gelu"
    norm_eps: float = 1e-5
    out: int = 0
    """Width of what comes out, by a projection; 0 has none, and `width` comes out."""

    def __post_init__(self) -> None:
        """Raise `UsageError` for what no tower of the family could be; a family adds its own."""
        own = type(self).family
        if self.family != own:
            raise UsageError(
                f"a {type(self).__name__} is of the family '{own}', not '{self.family}'"
            )
        if self.activation not in ACTIVATIONS:
            raise unknown_name("activation", str(self.activation), ACTIVATIONS)
        for field in ("vocabulary", "context", "depth", "width", "heads", "mlp"):
            if getattr(self, field) < 1:
                name = setting(f"text.{field}")
                raise UsageError(f"{name} must be at least 1, not {getattr(self, field)}")
        if self.out < 0:
            raise UsageError(f"{setting('text.out')} cannot be negative")
        if not 0 < self.norm_eps < 1:
            raise UsageError(f"{setting('text.norm_eps')} must be in (0, 1), not {self.norm_eps}")
        if self.width % self.heads:
            raise UsageError(f"width {self.width} is not divisible by {self.heads} heads")

    @property
    def shape(self) -> str:
        """Its build in words."""
        return (
            f"{self.depth} blocks, width {self.width}, {self.vocabulary} words, "
            f"{self.context} tokens"
        )


class Tower(nn.Module, ABC):
    """From tokens to one vector a text."""

    config: TowerConfig
    head: nn.Linear | None

    @property
    def width(self) -> int:
        """Of what comes out."""
        return self.config.out or self.config.width

    @abstractmethod
    def pooled(
        self, tokens: Int64[Tensor, "b t"], mask: Bool[Tensor, "b t"] | None
    ) -> Float[Tensor, "b d"]:
        """One vector a text, before the projection."""

    def block_names(self) -> list[str]:
        """The names of its blocks, first to last."""
        return [f"encoder.blocks.{i}" for i in range(self.config.depth)]

    def forward(
        self, tokens: Int64[Tensor, "b t"], mask: Bool[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b e"]:
        """One vector a text, not normalised. `mask`: which tokens are the text's, as the tower's
        tokenizer says; None is all of them. Raises `UsageError` for texts that are too long.
        """
        if tokens.shape[1] > self.config.context:
            raise UsageError(
                f"texts of {tokens.shape[1]} tokens are too long for a tower of "
                f"{setting('text.context', self.config.context)}: its own tokenizer cuts them"
            )
        found = self.pooled(tokens, mask)
        return found if self.head is None else self.head(found)


def shorter(
    tokens: Int64[Tensor, "b t"], used: Bool[Tensor, "b t"]
) -> tuple[Int64[Tensor, "b s"], Bool[Tensor, "b s"]]:
    """Both without the last columns, which no text of the batch uses: captions are mostly short.

    A graph that is traced keeps them all, for its shapes must not depend on values.
    """
    if torch.compiler.is_compiling() or torch.compiler.is_exporting() or tokens.is_meta:
        return tokens, used
    longest = int(used.any(dim=0).nonzero().max()) + 1 if bool(used.any()) else 1
    return tokens[:, :longest], used[:, :longest]


def plain_encoder(config: TowerConfig) -> Encoder:
    """The blocks of CLIP and SigLIP, and the norm behind them: a ViT's."""
    blocks = (
        Block(config.width, config.heads, config.mlp, config.activation, norm_eps=config.norm_eps)
        for _ in range(config.depth)
    )
    return Encoder(blocks, config.width, config.norm_eps)


def encoded(
    encoder: Encoder, x: Float[Tensor, "b t d"], seen: Bool[Tensor, "b t t"] | None = None
) -> Float[Tensor, "b t d"]:
    """Tokens through all blocks and the norm; `seen`: which tokens each may attend to."""
    for i in range(len(encoder.blocks)):
        x = encoder.step(i, x, (1, x.shape[1]), keys=seen)
    return encoder.norm(x)
