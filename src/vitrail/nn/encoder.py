"""The transformer encoder: a stack of pre-norm blocks (ViT, arXiv 2010.11929, eqs. 2 and 3)."""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from vitrail.nn.attention import Attention
from vitrail.nn.grids import Grid, Grids, tokens_of
from vitrail.nn.mlp import Activation, build_mlp
from vitrail.nn.position import Peg, Rotation
from vitrail.nn.windows import Windows, attend_in_windows


class LayerScale(nn.Module):
    """A learned factor for each channel of a branch (CaiT, arXiv 2103.17239, eq. 6)."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth: leave a sample's branch out with probability `rate`, and scale the others
    up by `1 / (1 - rate)` so that the mean stays (Huang et al., arXiv 1603.09382).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "b *_"]) -> Float[Tensor, "b *_"]:
        if self.rate == 0 or not self.training:
            return x
        keep = 1 - self.rate
        mask = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(keep)
        return x * (mask / keep)


class Block(nn.Module):
    """Attention, then MLP, each on the normalised input and added to it."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp: int,
        activation: Activation = "gelu",
        qkv_bias: bool = True,
        qk_norm: bool = False,
        layer_scale: float | None = None,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        attn_norm: bool = False,
        mlp_norm: bool = False,
        windows: Windows | None = None,
        relative: tuple[int, int] | None = None,
    ) -> None:
        """`attn_norm` and `mlp_norm`: norms within the two, before their last linear map.
        `windows`: within which tokens attend; None is the whole image. `relative`: as for
        `Attention`.
        """
        super().__init__()
        self.windows = windows
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = Attention(
            width, heads, qkv_bias, qk_norm, norm_eps, dropout, attn_norm, relative
        )
        self.scale1 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        inner_eps = norm_eps if mlp_norm else None
        self.mlp = build_mlp(width, mlp, activation, dropout, inner_eps)
        self.scale2 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        rotation: Rotation | None = None,
        keys: Shaped[Tensor, "b *_ t"] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """`rotation` and `keys` as for `Attention`; `grid`: the patches', which windows need."""
        if self.windows is None:
            found = self.attn(self.norm1(x), rotation, keys, grid)
        else:
            assert grid is not None and keys is None, "windows are of images of one size"
            cut = self.windows.cut(grid)
            found = attend_in_windows(self.attn, self.norm1(x), cut, rotation, self.windows.copies)
        x = x + self.drop_path(self.scale1(found))
        return self.fed_forward(x)

    def fed_forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """The block's second half alone."""
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Stochastic depth grows linearly from 0 in the first block to `last` (arXiv 1603.09382).

    >>> drop_path_rates(0.2, 3)
    [0.0, 0.1, 0.2]
    """
    return [last * i / max(depth - 1, 1) for i in range(depth)]


class Encoder(nn.Module):
    """Blocks in turn, then the final norm; with a PEG, positions come in after the first block."""

    def __init__(
        self, blocks: Iterable[Block], width: int, norm_eps: float | None, peg: bool = False
    ) -> None:
        """`norm_eps`: of the final norm; None leaves that to what comes after."""
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.peg = Peg(width) if peg else None
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(width, eps=norm_eps)

    def forward(
        self, x: Float[Tensor, "b t d"], grid: Grid, rotation: Rotation | None = None
    ) -> Float[Tensor, "b t d"]:
        """`x` holds the prefix tokens, then the patch tokens of `grid`."""
        keys = grid.keys(x.shape[1] - tokens_of(grid)) if isinstance(grid, Grids) else None
        for i in range(len(self.blocks)):
            x = self.step(i, x, grid, rotation, keys)
        return self.norm(x)

    def step(
        self,
        i: int,
        x: Float[Tensor, "b t d"],
        grid: Grid,
        rotation: Rotation | None = None,
        keys: Shaped[Tensor, "b *_ t"] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """The tokens after block `i`, of those before it; `keys` as for `Attention`."""
        x = self.blocks[i](x, rotation, keys, grid if isinstance(grid, tuple) else None)
        if i == 0 and self.peg is not None:
            k = x.shape[1] - tokens_of(grid)
            prefix, patches = x[:, :k], x[:, k:]
            x = torch.cat([prefix, self.peg(patches, grid)], dim=1)
        return x
