"""Multi-head self-attention on torch's fused kernel (Vaswani et al., arXiv 1706.03762, eq. 1)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.nn.position import Rotation, rotate


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
    ) -> None:
        super().__init__()
        self.heads = heads
        # One matrix for the three, rows in the order q, k, v: one large product is faster than
        # three, and timm's checkpoints are laid out so.
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(width // heads, eps=norm_eps) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads, eps=norm_eps) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "b t d"], rotation: Rotation | None = None
    ) -> Float[Tensor, "b t d"]:
        """Attend; `rotation` turns the queries and keys of the patch tokens (rotary positions)."""
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        x = attend(q, k, v)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(b, n, d)))


def attend(
    q: Float[Tensor, "b h m e"],
    k: Float[Tensor, "b h n e"],
    v: Float[Tensor, "b h n e"],
) -> Float[Tensor, "b h m e"]:
    """`softmax(q k^T / sqrt(e)) v` by torch's fused kernel, where that is the fast way.

    In bfloat16 on a CPU it is not: its backward pass takes 3 to 13 times as long as the three
    operations one by one, which use the matrix units (benchmarks/results/attention.md).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)
