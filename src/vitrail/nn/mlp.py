"""The position-wise part of a block: two linear maps with a nonlinearity between."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Activation = Literal["gelu", "gelu_tanh", "gelu_quick", "silu", "swiglu"]


class Mlp(nn.Module):
    """`fc2(gelu(fc1(x)))` (ViT, arXiv 2010.11929, section 3.1).

    Google's JAX code uses the tanh approximation of GELU, timm and Hugging Face the exact one,
    OpenAI's CLIP a sigmoid: published weights know the difference (up to 5e-4, and 2e-2, in each
    activation).
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        act: nn.Module,
        dropout: float = 0.0,
        norm_eps: float | None = None,
    ) -> None:
        """`norm_eps`: of a norm of the hidden channels; None leaves it out."""
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = act
        self.drop = nn.Dropout(dropout)
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(hidden, eps=norm_eps)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        x = self.fc1(x)
        if (
            isinstance(self.act, nn.GELU)
            and isinstance(self.norm, nn.Identity)
            and type(self.fc2) is nn.Linear
            and x.dtype == self.fc2.weight.dtype == torch.bfloat16
            and x.device.type == "cpu"
            and not (self.training and self.drop.p)
            and not torch.compiler.is_compiling()
        ):
            return _GeluLinear.apply(  # type: ignore[no-untyped-call]
                x, self.fc2.weight, self.fc2.bias, self.act.approximate
            )
        return self.drop(self.fc2(self.norm(self.drop(self.act(x)))))


class _GeluLinear(torch.autograd.Function):
    """`fc2(gelu(x))` that computes the GELU again in its backward pass, instead of keeping it: of
    all that a block keeps it is a fifth, and costs a hundredth of a step. A compiler does so too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, approximate: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.approximate = approximate
        return F.linear(F.gelu(x, approximate=approximate), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_x = to_weight = to_bias = None
        rows = grad.flatten(0, -2)
        if ctx.needs_input_grad[1]:
            to_weight = rows.mT @ F.gelu(x, approximate=ctx.approximate).flatten(0, -2)
        if ctx.needs_input_grad[2]:
            to_bias = rows.sum(dim=0)
        if ctx.needs_input_grad[0]:
            inner = grad @ weight
            to_x = torch.ops.aten.gelu_backward(inner, x, approximate=ctx.approximate)
        return to_x, to_weight, to_bias, None


class QuickGELU(nn.Module):
    """`x sigmoid(1.702 x)` (Hendrycks and Gimpel, arXiv 1606.08415, section 2), as in CLIP."""

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return x * torch.sigmoid(1.702 * x)


class SwiGLU(nn.Module):
    """`fc2(silu(a) * g)` with `a, g = fc1(x)` (Shazeer, arXiv 2002.05202), as in DINOv2's giant.

    `hidden` is the width after gating, so `fc1` has `2 * hidden` rows.
    """

    def __init__(
        self, width: int, hidden: int, dropout: float = 0.0, norm_eps: float | None = None
    ) -> None:
        """`norm_eps`: of a norm of the gated channels (EVA-02); None leaves it out."""
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * hidden)
        self.drop = nn.Dropout(dropout)
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(hidden, eps=norm_eps)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        a, gate = self.fc1(x).chunk(2, dim=-1)
        return self.drop(self.fc2(self.norm(self.drop(F.silu(a) * gate))))


def build_mlp(
    width: int,
    hidden: int,
    activation: Activation,
    dropout: float = 0.0,
    norm_eps: float | None = None,
) -> Mlp | SwiGLU:
    """The MLP that `activation` names; `norm_eps` as for `Mlp`."""
    if activation == "swiglu":
        return SwiGLU(width, hidden, dropout, norm_eps)
    if activation == "gelu_quick":
        return Mlp(width, hidden, QuickGELU(), dropout, norm_eps)
    if activation == "silu":
        return Mlp(width, hidden, nn.SiLU(), dropout, norm_eps)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return Mlp(width, hidden, nn.GELU(approximate), dropout, norm_eps)
