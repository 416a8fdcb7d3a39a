"""Many tokens to one vector.

| `pool`       | what it is                                   | source                          |
|--------------|----------------------------------------------|---------------------------------|
| `class`      | the class token                              | ViT, 2010.11929                 |
| `mean`       | the patches' mean                            | big_vision's "gap"              |
| `class_mean` | both side by side                            | DINOv2's evaluation, 2304.07193 |
| `map`        | attention with a learned query               | Set Transformer, 1810.00825     |
| `first`      | the first patch, where no token is a class's | big_vision's "0"                |
"""

from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from vitrail.nn.attention import attend
from vitrail.nn.mlp import Activation, build_mlp

Pool = Literal["class", "mean", "class_mean", "map", "first"]


class AttentionPool(nn.Module):
    """Multi-head attention pooling, MAP (Set Transformer, arXiv 1810.00825; big_vision's MAPHead):
    a learned probe attends to all tokens, then a residual MLP.
    """

    def __init__(
        self, width: int, heads: int, mlp: int, activation: Activation, norm_eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.heads = heads
        self.probe = nn.Parameter(torch.empty(1, 1, width))
        nn.init.xavier_uniform_(self.probe)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = build_mlp(width, mlp, activation)

    def forward(
        self, x: Float[Tensor, "b n d"], keys: Shaped[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b d"]:
        """The images' vectors; `keys` as for `attend`."""
        b, n, d = x.shape
        q = self.q(self.probe.expand(b, -1, -1)).view(b, 1, self.heads, -1).transpose(1, 2)
        k, v = self.kv(x).view(b, n, 2, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = attend(q, k, v, keys).transpose(1, 2).reshape(b, d)
        x = self.proj(x)
        return x + self.mlp(self.norm(x))


def mean_of(
    tokens: Float[Tensor, "b n d"], keys: Shaped[Tensor, "b n"] | None = None
) -> Float[Tensor, "b d"]:
    """The mean of the tokens that `keys` says count, or each counted so many times; None is all."""
    if keys is None:
        return tokens.mean(dim=1)
    weights = (keys / keys.sum(dim=1, keepdim=True)).to(tokens.dtype)
    return (tokens * weights[..., None]).sum(dim=1)
