"""Multi-head self-attention on torch's fused kernel (Vaswani et al., arXiv 1706.03762, eq. 1)."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from vitrail.nn.position import RelativePosition, Rotation, rotate


class Attention(nn.Module):
    """Self-attention of `heads` heads over tokens `[b n d]`.

    `qk_norm` normalises each head's queries and keys (ViT-22B, arXiv 2302.05442), which keeps the
    logits of large models bounded. `dropout` acts on the output, not on the attention weights:
    Google's configs keep those whole.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        norm: bool = False,
        relative: tuple[int, int] | None = None,
    ) -> None:
        """`norm`: what the heads have found is normalised before the projection (sub-LN, Wang et
        al., arXiv 2210.06423). `relative`: rows and columns of the grid that tables of relative
        positions are for; None has none.
        """
        super().__init__()
        self.heads = heads
        # One matrix for the three, rows in the order q, k, v: one large product is faster than
        # three, and timm's checkpoints are laid out so.
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(width // heads, eps=norm_eps) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads, eps=norm_eps) if qk_norm else nn.Identity()
        self.norm = nn.LayerNorm(width, eps=norm_eps) if norm else nn.Identity()
        self.relative = None if relative is None else RelativePosition(relative, width // heads)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        rotation: Rotation | None = None,
        keys: Shaped[Tensor, "b *_ t"] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """Attend; `rotation` turns the queries and keys of the patch tokens (rotary positions).

        `keys`: which tokens may be attended to, by all or by each token apart, or how many each
        stands for, as for `attend`. `grid`: the rows and columns that the tokens are, which
        relative positions need.
        """
        q, k, v = self.apart(x, rotation)
        if self.relative is None:
            return self.joined(attend(q, k, v, keys))
        assert grid is not None, "relative positions need the grid of the tokens"
        found = attend(*self.relative.join(q, k, v, grid), keys)
        return self.joined(found[..., : v.shape[-1]])

    def apart(
        self, x: Float[Tensor, "b t d"], rotation: Rotation | None = None
    ) -> tuple[Float[Tensor, "b h t e"], Float[Tensor, "b h t e"], Float[Tensor, "b h t e"]]:
        """Each head's queries, keys and values."""
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return q, k, v

    def joined(self, x: Float[Tensor, "b h t e"]) -> Float[Tensor, "b t d"]:
        """What the heads have found, side by side, projected."""
        return self.proj_drop(self.proj(self.norm(x.transpose(1, 2).flatten(2))))


def attend(
    q: Float[Tensor, "b h m e"],
    k: Float[Tensor, "b h n e"],
    v: Float[Tensor, "b h n e"],
    keys: Shaped[Tensor, "b *_ n"] | None = None,
) -> Float[Tensor, "b h m e"]:
    """`softmax(q k^T / sqrt(e)) v` by torch's fused kernel, where that is the fast way.

    In bfloat16 on a CPU it is not: it takes twice as long as the three operations one by one, and
    its backward pass 3 to 13 times (benchmarks/results/attention.md, token_reduction.md).

    `keys`: of booleans, which of them the softmax is over, at least one an image; of numbers, how
    many equal keys each stands for (ToMe, arXiv 2210.09461: `+ log keys`). None is all of them.
    Booleans of `[b m n]` are those of each query apart.
    """
    mask = keys
    if keys is not None and keys.dtype != torch.bool:
        mask = keys.log().to(q.dtype)
    if torch.compiler.is_exporting() and (mask is None or mask.dtype != torch.bool):
        # Five nodes, which runtimes fuse; torch's own spelling of the kernel has 14.
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return (logits if mask is None else logits + _of_heads(mask)).softmax(dim=-1) @ v
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        if mask is None and not torch.compiler.is_compiling():
            return _ThreeProducts.apply(q, k, v)  # type: ignore[no-untyped-call]
        q = q * q.shape[-1] ** -0.5
        if mask is not None and mask.dtype != torch.bool:
            # As one more channel it costs nothing; added to all logits, a tenth of the whole.
            q = F.pad(q, (0, 1), value=1.0)
            k = torch.cat([k, mask[:, None, :, None].expand(-1, k.shape[1], -1, -1)], dim=-1)
        logits = q @ k.transpose(-2, -1)
        if mask is not None and mask.dtype == torch.bool:
            logits = logits.masked_fill(~_of_heads(mask), -torch.inf)
        return logits.softmax(dim=-1) @ v
    mask = None if mask is None else _of_heads(mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _of_heads(mask: Shaped[Tensor, "b *_ n"]) -> Shaped[Tensor, "b 1 _m n"]:
    """The same for all heads and, where it has one row an image, for all queries."""
    return mask[:, None, None] if mask.ndim == 2 else mask[:, None]


class _ThreeProducts(torch.autograd.Function):
    """Attention by plain products. For its backward pass it keeps q, k and v, once each and in the
    layout that the products take, and computes the weights again: they are `n` numbers a token.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = q.shape[:2]
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        ctx.save_for_backward(q, k, v)
        return (_weights(q, k) @ v).unflatten(0, heads)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v = ctx.saved_tensors
        heads, grad = grad.shape[:2], grad.flatten(0, 1)
        weights = _weights(q, k)
        to_v = weights.mT @ grad
        inner = torch.ops.aten._softmax_backward_data(grad @ v.mT, weights, -1, weights.dtype)
        scale = q.shape[-1] ** -0.5
        to_q = torch.baddbmm(q, inner, k, beta=0, alpha=scale)
        to_k = torch.baddbmm(k, inner.mT, q, beta=0, alpha=scale)
        return to_q.unflatten(0, heads), to_k.unflatten(0, heads), to_v.unflatten(0, heads)


def _weights(q: Float[Tensor, "k m e"], k: Float[Tensor, "k n e"]) -> Float[Tensor, "k m n"]:
    logits = q.new_empty(len(q), q.shape[1], k.shape[1])
    scale = q.shape[-1] ** -0.5
    return torch.baddbmm(logits, q, k.mT, beta=0, alpha=scale).softmax(dim=-1)
