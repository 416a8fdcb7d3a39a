"""Coarse and fine patches of one image in one sequence.

| `scales`       | the sequence                                                       | tokens    |
|----------------|--------------------------------------------------------------------|-----------|
| `hierarchical` | all patches, then all patches of twice their sides                 | n + n / 4 |
| `adaptive`     | all patches, but the k that need it most cut in four: a quadtree   | n + 3 k   |

The second is of the kind of MSViT (arXiv 2307.02321) and of mixed-resolution tokens (2304.14381).
Both here keep one whole grid, that of `patch`: `TwoGrids.cells` gives its tokens for dense heads.

Each grid has a stem of its own. One kernel resized by pseudo-inverse would serve both (FlexiViT,
2212.08013), but only where the stem is one kernel, and it would show a large patch shrunk: the
coarse tokens would not see the detail that their patches have.

Both grids lie in one plane: places count in cells of the first, and every position is a function of
the place of a cell's centre. So a coarse cell lies amid its four fine ones, and the other scale
needs no table. What tells scales apart is a learned vector, added to the second's tokens.

Letters: b batch, n cells of the first grid, m of the second, t tokens of the sequence, d width.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitrail.nn.grids import TwoGrids
from vitrail.nn.initial import normal_

Scales = Literal["one", "hierarchical", "adaptive"]
Saliency = Literal["variance", "learned"]


class WholeGrids(TwoGrids):
    """A grid, and one of cells twice as wide and high, both whole.

    >>> grids = WholeGrids((2, 4))
    >>> grids.second, grids.longest
    ((1, 2), 10)
    """

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__(grid, (grid[0] // 2, grid[1] // 2))

    @property
    def longest(self) -> int:
        return self.grid[0] * self.grid[1] + self.second[0] * self.second[1]

    def join(
        self, cells: Float[Tensor, "*b n d"], second: Float[Tensor, "*b m d"]
    ) -> Float[Tensor, "*c t d"]:
        return torch.cat([cells, second], dim=-2)

    def cells(self, tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b n d"]:
        """The fine tokens; what the coarse ones have found has reached them by attention."""
        return tokens[:, : self.grid[0] * self.grid[1]]


class CutGrid(TwoGrids):
    """A grid, `cut` of whose cells are cut in four, of each image its own.

    The sequence has first the cells that stay, then the fours.

    >>> grid = CutGrid((1, 3), torch.tensor([[2, 0, 1]]), cut=1)
    >>> grid.stack(lambda grid, step: torch.arange(grid[0] * grid[1])[:, None].float())[..., 0]
    tensor([[ 0.,  1.,  4.,  5., 10., 11.]])
    """

    def __init__(self, grid: tuple[int, int], order: Int[Tensor, "b n"], cut: int) -> None:
        """`order`: of each image, the indices of its cells; those to be cut come first."""
        super().__init__(grid, (2 * grid[0], 2 * grid[1]))
        self.order = order
        self.cut = cut

    @property
    def longest(self) -> int:
        return self.grid[0] * self.grid[1] + 3 * self.cut

    def join(
        self, cells: Float[Tensor, "*b n d"], second: Float[Tensor, "*b m d"]
    ) -> Float[Tensor, "*c t d"]:
        b = self.order.shape[0]  # not len: a batch stays of any size when exported
        fours = in_fours(second, self.grid).flatten(-2)
        whole = _picked(cells.expand(b, -1, -1), self.order[:, self.cut :])
        fine = _picked(fours.expand(b, -1, -1), self.order[:, : self.cut])
        return torch.cat([whole, fine.reshape(b, 4 * self.cut, -1)], dim=1)

    def cells(self, tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b n d"]:
        """The token of a cell that stayed, the mean of the four of one that was cut."""
        whole, fine = tokens.split([tokens.shape[1] - 4 * self.cut, 4 * self.cut], dim=1)
        means = fine.unflatten(1, (self.cut, 4)).mean(dim=2)
        cells = torch.cat([means, whole], dim=1)
        return torch.zeros_like(cells).scatter(1, self.order[..., None].expand_as(cells), cells)


def in_fours(fine: Float[Tensor, "*b m d"], grid: tuple[int, int]) -> Float[Tensor, "*b n 4 d"]:
    """The cells of a grid of twice the rows and columns, by the cell of `grid` that each is in."""
    rows = fine.unflatten(-2, (grid[0], 2, grid[1], 2)).transpose(-4, -3)
    return rows.flatten(-3, -2).flatten(-4, -3)


def _picked(cells: Float[Tensor, "b n d"], indices: Int[Tensor, "b _k"]) -> Float[Tensor, "b _k d"]:
    return cells.gather(1, indices[..., None].expand(-1, -1, cells.shape[2]))


def cells_cut(share: float, cells: int) -> int:
    """How many of so many `cells` are cut: the number nearest to the `share`, at least one.

    >>> cells_cut(0.25, 196), cells_cut(0.25, 1)
    (49, 1)
    """
    return max(1, round(share * cells))


class Hierarchical(nn.Module):
    """A second grid, of patches of twice the sides, beside the whole first one."""

    def __init__(self, stem: nn.Module, width: int) -> None:
        """`stem`: from images to the coarse grid's tokens."""
        super().__init__()
        self.stem = stem
        self.scale = nn.Parameter(torch.empty(width))
        normal_(self.scale, std=0.02)

    def forward(
        self, x: Float[Tensor, "b c h w"], cells: Float[Tensor, "b n d"], grid: tuple[int, int]
    ) -> tuple[Float[Tensor, "b t d"], WholeGrids]:
        """The sequence, without positions, of images `x` and of their tokens on the fine grid."""
        coarse, _ = self.stem(x)
        grids = WholeGrids(grid)
        return grids.join(cells, coarse + self.scale), grids


class Adaptive(nn.Module):
    """The cells that need it cut in four, each part with a token.

    How many is fixed: every image costs the same, so that batches stay whole. Which is a cell's
    rank: by the variance of its pixels, or by a learned linear score of its token.

    A rank has no gradient. The learned score's is that of a gate `g = sigmoid(score)` between a
    cell's token and each of its four, `(1 - g) coarse + g fine`, taken straight through: forward,
    `g` is 1 where the cell is cut and 0 where not. So a score grows where going from coarse to fine
    would lower the loss, of cells that were cut and of those that were not.
    """

    def __init__(self, stem: nn.Module, width: int, share: float, saliency: Saliency) -> None:
        """`stem`: from images to the fine grid's tokens; `share`: of the cells, in (0, 1]."""
        super().__init__()
        self.stem = stem
        self.share = share
        self.scale = nn.Parameter(torch.empty(width))
        normal_(self.scale, std=0.02)
        # Ranks do not care for a bias.
        self.score = nn.Linear(width, 1, bias=False) if saliency == "learned" else None

    def forward(
        self, x: Float[Tensor, "b c h w"], cells: Float[Tensor, "b n d"], grid: tuple[int, int]
    ) -> tuple[Float[Tensor, "b t d"], CutGrid]:
        """The sequence, without positions, of images `x` and of their tokens on the coarse grid.

        The fine stem sees the whole image, though most of its tokens are left: stems of several
        convolutions look beyond a cell, and what it costs is little beside an encoder.
        """
        fine, _ = self.stem(x)
        fine = fine + self.scale
        if self.score is None:
            score = variance(x, grid).sqrt()  # about as large as a learned one
        else:
            score = self.score(cells)[..., 0].float()
        order = ranked(score)
        if self.score is not None:
            gate = score.sigmoid()
            zero = (gate - gate.detach()).to(cells.dtype)
            change = zero[..., None, None] * (in_fours(fine, grid) - cells[:, :, None])
            cells, fine = cells + change.mean(dim=2), fine + _in_rows(change, grid)
        grids = CutGrid(grid, order, cells_cut(self.share, cells.shape[1]))
        return grids.join(cells, fine), grids


def _in_rows(fours: Float[Tensor, "*b n 4 d"], grid: tuple[int, int]) -> Float[Tensor, "*b m d"]:
    """The inverse of `in_fours`."""
    rows = fours.unflatten(-3, grid).unflatten(-2, (2, 2)).transpose(-4, -3)
    return rows.flatten(-5, -2)


def ranked(score: Float[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """Indices from the highest score to the lowest; of cells as good as equal, the first is higher.

    Images have cells of one colour, and what rounding makes of those must not decide: it is
    another in every runtime. A stable sort would not help there, nor can ONNX express it.
    """
    step = 1e-6 * torch.arange(score.shape[1], device=score.device)
    return (score.detach() - step).sort(dim=1, descending=True).indices


def variance(x: Float[Tensor, "b c h w"], grid: tuple[int, int]) -> Float[Tensor, "b n"]:
    """Of the pixels of each cell of `grid`, the mean over the channels: how much a cell shows.

    >>> x = torch.zeros(1, 3, 4, 8)
    >>> x[..., :2, 4:] = 1
    >>> variance(x, (1, 2))
    tensor([[0.0000, 0.2500]])
    """
    b, c, h, w = x.shape
    pixels = x.detach().float().reshape(b, c, grid[0], h // grid[0], grid[1], w // grid[1])
    return pixels.var(dim=(3, 5), correction=0).mean(dim=1).flatten(1)
