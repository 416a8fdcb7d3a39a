"""Where a token lies: every published way to tell a ViT, each able to change grid.

| name               | what it is                                          | source              |
|--------------------|-----------------------------------------------------|---------------------|
| `none`             | nothing: the encoder sees a set                     |                     |
| `learned`          | a table, one row a token, resampled to another grid | ViT, 2010.11929     |
| `sincos_moco`      | fixed 2-D sine-cosine                               | MoCo v3, 2104.02057 |
| `sincos_mae`       | the same, with the axes and layout of MAE's code    | MAE, 2111.06377     |
| `sincos_bigvision` | the same, last frequency exactly 1/10000            | 2205.01580          |
| `sincos_1d`        | the transformer's own, over the row-major index     | 1706.03762          |
| `rope`             | queries and keys turned by their place in the plane | RoFormer 2104.09864 |
| `learned_rope`     | both at once: a table, and queries and keys turned  | EVA-02, 2303.11331  |
| `peg`              | a depth-wise convolution over the tokens            | CPVT, 2102.10882    |

The four tables look alike and are not interchangeable: a checkpoint trained with one gives wrong
answers, silently, with another. So are the angles of rotary positions: `ROPES` has each maker's.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitrail.nn.features import tokens_to_map
from vitrail.nn.grids import Grid, Grids, TwoGrids, table_of
from vitrail.nn.initial import normal_
from vitrail.nn.resample import Resample, resample_table

SinCos = Literal["sincos_moco", "sincos_mae", "sincos_bigvision", "sincos_1d"]
Position = Literal["none", "learned", SinCos, "rope", "learned_rope", "peg"]


class LearnedPosition(nn.Module):
    """A learned row for every patch and, in the original ViT and DeiT, for every prefix token."""

    def __init__(
        self,
        grid: tuple[int, int],
        width: int,
        prefix: int,
        resample: Resample = "bicubic_antialias",
    ) -> None:
        """`prefix`: how many prefix tokens have a row of their own, before the patches'."""
        super().__init__()
        self.grid = grid
        self.prefix = prefix
        self.resample = resample
        self.table = nn.Parameter(torch.empty(prefix + grid[0] * grid[1], width))
        normal_(self.table, std=0.02)

    def rows(self, grid: tuple[int, int], step: float = 1.0) -> Float[Tensor, "n d"]:
        """The rows of the cells of `grid`, each `step` patches wide and high.

        Those of another step lie between the patches' own: what a bilinear interpolation has at
        their centres. Of a step of 2 that is the mean of the four patches below.
        """
        patches = (round(grid[0] * step), round(grid[1] * step))
        rows = resample_table(self.table[self.prefix :], self.grid, patches, self.resample)
        return resample_table(rows, patches, grid, "bilinear")

    def forward(
        self,
        patches: Float[Tensor, "b n d"],
        prefix: Float[Tensor, "b k d"],
        grid: Grid,
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b k d"]]:
        """Add the rows; prefix tokens beyond the table's (registers) stay as they are."""
        patches = patches + table_of(self.rows, grid)
        if self.prefix:
            with_row, without = prefix[:, : self.prefix], prefix[:, self.prefix :]
            prefix = torch.cat([with_row + self.table[: self.prefix], without], dim=1)
        return patches, prefix


class SinCosPosition(nn.Module):
    """A fixed table, computed for whatever grid comes. Prefix tokens get nothing (zeros)."""

    def __init__(self, grid: tuple[int, int], width: int, kind: SinCos) -> None:
        super().__init__()
        self.grid = grid
        self.kind = kind
        self.register_buffer("table", sincos_table(grid, width, kind), persistent=False)
        self.table: Tensor

    def rows(self, grid: tuple[int, int], step: float = 1.0) -> Float[Tensor, "n d"]:
        """The rows of the cells of `grid`, each `step` patches wide and high."""
        if grid == self.grid and step == 1:
            return self.table
        return sincos_table(grid, self.table.shape[1], self.kind, step).to(self.table)

    def forward(
        self,
        patches: Float[Tensor, "b n d"],
        prefix: Float[Tensor, "b k d"],
        grid: Grid,
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b k d"]]:
        """Add the rows of `grid`."""
        return patches + table_of(self.rows, grid).to(patches.dtype), prefix


def sincos_table(
    grid: tuple[int, int], width: int, kind: SinCos, step: float = 1.0
) -> Float[Tensor, "n d"]:
    """The fixed sine-cosine table of `grid = (gh, gw)`, tokens row by row, in float32.

    Cells are `step` patches wide and high, and lie where their centres do, counted in patches. The
    order of `sincos_1d` has no such places: its `step` is 1.

    `width` must be divisible by 4 (by 2 for `sincos_1d`). Computed in float64: the definitions
    differ in the last frequency by less than float32 would show at large grids.

    >>> sincos_table((14, 14), 384, "sincos_mae").shape
    torch.Size([196, 384])
    """
    rows, columns = torch.meshgrid(
        *((torch.arange(n, dtype=torch.float64) + 0.5) * step - 0.5 for n in grid),
        indexing="ij",
    )
    y, x = rows.reshape(-1, 1), columns.reshape(-1, 1)
    if kind == "sincos_1d":
        # Interleaved: even channels sine, odd cosine (arXiv 1706.03762, section 3.5).
        angle = (y * grid[1] + x) * _frequencies(width // 2, width // 2)
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).float()
    quarter = width // 4
    last = quarter - 1 if kind == "sincos_bigvision" else quarter
    # MoCo v3 names its first axis w but lays its mesh out 'ij', so that it runs along the rows;
    # MAE names its first axis h but feeds it the columns.
    first, second = (y, x) if kind == "sincos_moco" else (x, y)
    omega = _frequencies(quarter, last)
    parts = [(first * omega).sin(), (first * omega).cos()]
    parts += [(second * omega).sin(), (second * omega).cos()]
    return torch.cat(parts, dim=1).float()


def _frequencies(count: int, last: int) -> Float[Tensor, " f"]:
    """`10000^(-k / last)` for k = 0 .. count - 1."""
    return 10_000.0 ** (-torch.arange(count, dtype=torch.float64) / max(last, 1))


Rope = Literal["dinov3", "eva", "pe", "axial"]
"""Whose rotary positions: a row of `ROPES`."""
Pairs = Literal["halves", "neighbours"]
"""Which two channels of a head are turned into each other: `i` and `e / 2 + i`, or `2 i` and
`2 i + 1`."""


class Turns(NamedTuple):
    """By which angles a model turns the channels of its queries and keys.

    Pair `k` of the quarter of a head's channels that belongs to an axis is turned by
    `place / base ** (k / quarter)` radians, `place` being where the token lies on that axis.
    """

    base: float
    axes: Literal["yx", "xy"]
    """Which axis has the first pairs, and which the others."""
    pairs: Pairs
    first: int | None
    """The number of the first row and of the first column, from which on places are counted. It
    cancels between patches, but not between a patch and a prefix token, whose place is 0. None: a
    place is where the cell's centre lies between the borders, from -2 pi to 2 pi."""


ROPES: dict[Rope, Turns] = {
    "dinov3": Turns(100.0, "yx", "halves", None),  # 2508.10104
    "eva": Turns(10_000.0, "yx", "neighbours", 0),  # EVA-02, 2303.11331, and timm's own ViTs
    "pe": Turns(10_000.0, "xy", "neighbours", 1),  # Perception Encoder, 2504.13181
    "axial": Turns(100.0, "xy", "neighbours", 0),  # RoPE-ViT, 2403.13298
}
"""Name -> angles. One trained with one gives wrong answers with another."""


class Rotation(NamedTuple):
    """What turns the patch tokens of all images `[n e]`, or of each image, for all its heads,
    `[b 1 n e]`; `e` is the width of one head.
    """

    sin: Float[Tensor, "*b n e"]
    cos: Float[Tensor, "*b n e"]
    pairs: Pairs

    def at(self, places: Int[Tensor, "b m"]) -> "Rotation":
        """That of some tokens of each image: those with these numbers of the `n`."""
        return Rotation(self.sin[places][:, None], self.cos[places][:, None], self.pairs)


class RotaryPosition(nn.Module):
    """Rotary positions in the plane: of each head's channels, one half turns with the row, the
    other with the column (RoFormer, arXiv 2104.09864, for two axes; `ROPES` has whose).
    """

    def __init__(
        self, head_width: int, rope: Rope = "dinov3", reference: tuple[int, int] | None = None
    ) -> None:
        """`head_width` must be divisible by 4.

        `reference`: rows and columns of the grid to whose places those of another are scaled, so
        that it is a finer sampling of the same plane (EVA-02); None counts the cells that come.
        """
        super().__init__()
        self.turns = ROPES[rope]
        self.reference = reference
        quarter = head_width // 4
        periods = self.turns.base ** (torch.arange(quarter, dtype=torch.float32) / quarter)
        self.register_buffer("periods", periods, persistent=False)
        self.periods: Tensor

    def forward(self, grid: Grid) -> Rotation:
        """The rotation of every patch token of `grid`."""
        angles = table_of(self.angles, grid)
        if angles.ndim == 3:
            angles = angles[:, None]
        return Rotation(angles.sin(), angles.cos(), self.turns.pairs)

    def angles(self, grid: tuple[int, int], step: float = 1.0) -> Float[Tensor, "n e"]:
        """What every patch token of `grid` is turned by, in radians; cells are `step` patches wide
        and high, and lie where their centres do.
        """
        y, x = (self._places(axis, size, step) for axis, size in enumerate(grid))
        places = torch.cartesian_prod(y, x)
        if self.turns.axes == "xy":
            places = places.flip(1)
        angles = (places[:, :, None] / self.periods).flatten(1)
        if self.turns.pairs == "halves":
            return angles.tile(2)
        return angles.repeat_interleave(2, dim=1)

    def _places(self, axis: int, size: int, step: float) -> Float[Tensor, " n"]:
        """Where the cells lie on one axis."""
        centres = torch.arange(size, device=self.periods.device) + 0.5
        if self.turns.first is None:
            return 2 * math.pi * (centres / size * 2 - 1)
        places = centres * step - 0.5 + self.turns.first
        if self.reference is None:
            return places
        return places / (size * step) * self.reference[axis]


def rotate(x: Float[Tensor, "b h t e"], rotation: Rotation) -> Float[Tensor, "b h t e"]:
    """Turn the last `n` of the `t` tokens; the first `t - n` are the prefix and have no place."""
    sin, cos = rotation.sin.to(x.dtype), rotation.cos.to(x.dtype)
    n = sin.shape[-2]
    prefix, patches = x[:, :, :-n], x[:, :, -n:]
    if rotation.pairs == "halves":
        first, second = patches.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    else:
        first, second = patches[..., 0::2], patches[..., 1::2]
        turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return torch.cat([prefix, patches * cos + turned * sin], dim=2)


class RelativePosition(nn.Module):
    """How far a key lies from a query, by rows and by columns apart, told to attention: a row of a
    table for each distance, whose product with the query is added to its logit (MViTv2, arXiv
    2112.01526, section 4.1; ViTDet, 2203.16527).
    """

    def __init__(self, grid: tuple[int, int], head_width: int) -> None:
        """`grid`: rows and columns that the tables are for; they are interpolated to others."""
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(2 * grid[0] - 1, head_width))
        self.columns = nn.Parameter(torch.zeros(2 * grid[1] - 1, head_width))

    def join(
        self,
        q: Float[Tensor, "b h n e"],
        k: Float[Tensor, "b h n e"],
        v: Float[Tensor, "b h n e"],
        grid: tuple[int, int],
    ) -> tuple[Float[Tensor, "b h n f"], Float[Tensor, "b h n f"], Float[Tensor, "b h n f"]]:
        """Queries, keys and values with so many channels more that attention over them has these
        positions in its logits; `v` has zeros there.

        A query has its product with each distance, a key a one where it lies. So the fused kernels
        do it, and no `n x n` sums are kept, as adding them to the logits would.
        """
        (gh, gw), e = grid, q.shape[-1]
        places = q.unflatten(2, grid)
        by_row = torch.einsum("bhywe,yze->bhywz", places, _distances(self.rows, gh).to(q.dtype))
        by_column = torch.einsum(
            "bhywe,wze->bhywz", places, _distances(self.columns, gw).to(q.dtype)
        )
        told = torch.cat([by_row, by_column], dim=-1).flatten(2, 3)
        f = e + gh + gw
        ones = [torch.eye(size, dtype=k.dtype, device=k.device) for size in grid]
        where = torch.cat(
            [ones[0].repeat_interleave(gw, dim=0), ones[1].repeat(gh, 1)], dim=-1
        ).expand(*k.shape[:2], -1, -1)
        # Attention divides all products by the root of f, and these positions are added undivided.
        q = torch.cat([q * (f / e) ** 0.5, told * f**0.5], dim=-1)
        return q, torch.cat([k, where], dim=-1), F.pad(v, (0, gh + gw))


def _distances(table: Float[Tensor, "l e"], size: int) -> Float[Tensor, "n n e"]:
    """The row of `table` for each query and each key along an axis of `size` cells."""
    if len(table) != 2 * size - 1:
        table = F.interpolate(table.float().T[None], 2 * size - 1, mode="linear")[0].T
    places = torch.arange(size, device=table.device)
    return table[places[:, None] - places + size - 1]


class Peg(nn.Module):
    """Conditional position: a depth-wise 3x3 convolution over the token map, plus the input.

    CPVT (arXiv 2102.10882), as Twins uses it: once, after the first block. Zero padding is what
    tells a token how far the border is, so that any grid works.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width)

    def forward(self, patches: Float[Tensor, "b n d"], grid: Grid) -> Float[Tensor, "b n d"]:
        """`x + conv(x)` on the token map."""
        if isinstance(grid, Grids):
            # The canvas has zeros around each image, as the convolution's padding has.
            return grid.gather(self(grid.scatter(patches), grid.canvas))
        assert not isinstance(grid, TwoGrids), "two grids are no map"
        return patches + self.conv(tokens_to_map(patches, grid)).flatten(2).transpose(1, 2)
