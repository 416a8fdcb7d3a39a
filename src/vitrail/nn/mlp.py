"""The position-wise part of a block: two linear maps with a nonlinearity between."""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Activation = Literal["gelu", "gelu_tanh", "swiglu"]


class Mlp(nn.Module):
    """`fc2(gelu(fc1(x)))` (ViT, arXiv 2010.11929, section 3.1).

    Google's JAX code uses the tanh approximation of GELU, timm and Hugging Face the exact one:
    published weights know the difference (up to 5e-4 in each activation).
    """

    def __init__(self, width: int, hidden: int, tanh: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate="tanh" if tanh else "none")
        self.drop = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class SwiGLU(nn.Module):
    """`fc2(silu(a) * g)` with `a, g = fc1(x)` (Shazeer, arXiv 2002.05202), as in DINOv2's giant.

    `hidden` is the width after gating, so `fc1` has `2 * hidden` rows.
    """

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * hidden)
        self.drop = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        a, gate = self.fc1(x).chunk(2, dim=-1)
        return self.drop(self.fc2(self.drop(F.silu(a) * gate)))


def build_mlp(
    width: int, hidden: int, activation: Activation, dropout: float = 0.0
) -> Mlp | SwiGLU:
    """The MLP that `activation` names."""
    if activation == "swiglu":
        return SwiGLU(width, hidden, dropout)
    return Mlp(width, hidden, tanh=activation == "gelu_tanh", dropout=dropout)
