"""Images of different sizes in one batch: where each lies on the canvas, and its tokens in a row.

One rule: an image in a batch gets exactly what it would get alone. The images lie at the top left
of one canvas, `extent [b 2]` says how many rows and columns of patches show each. What the encoder
computes with are sequences: the tokens of each image in a row, padded to the longest, so that grids
of 4 x 16 and of 16 x 4 cost 64 tokens each and not the 256 of their canvas (NaViT, arXiv
2307.06304; NaFlex in SigLIP 2, 2502.14786).

Letters: b batch, n cells of the canvas, m tokens of the longest sequence, k prefix tokens, d width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vitrail.errors import UsageError

Table: TypeAlias = Callable[[tuple[int, int], float], Tensor]
"""What there is to know, `[n d]`, of the cells of a grid, row by row: of its rows and columns, and
of how many patches wide and high a cell is."""


class Grids:
    """The token grids of images that share a canvas.

    >>> grids = Grids(torch.tensor([[1, 4], [2, 1]]), canvas=(2, 4))
    >>> grids.valid.int().tolist()
    [[1, 1, 1, 1], [1, 1, 0, 0]]
    """

    def __init__(self, extent: Int[Tensor, "b 2"], canvas: tuple[int, int]) -> None:
        """`canvas`: its rows and columns of patches. Raises `UsageError` for a wrong extent."""
        self.canvas = canvas
        self.each: list[tuple[int, int]] = [(rows, columns) for rows, columns in extent.tolist()]
        for grid in self.each:
            if not (1 <= grid[0] <= canvas[0] and 1 <= grid[1] <= canvas[1]):
                raise UsageError(
                    f"extent says that {grid[0]} x {grid[1]} patches show an image, on a canvas of "
                    f"{canvas[0]} x {canvas[1]}: give (rows, columns) from 1 to the canvas's own"
                )
        lengths = [rows * columns for rows, columns in self.each]
        self.shortest, self.longest = min(lengths), max(lengths)
        self.shown: Bool[Tensor, "b n"] = on_canvas(extent, canvas).flatten(1)
        """Which cells of the canvas show an image."""
        places = torch.arange(self.longest, device=extent.device)
        self.valid: Bool[Tensor, "b m"] = places < extent.prod(dim=1, keepdim=True)
        """Which places of the sequences hold a token."""

    def gather(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b m d"]:
        """From the canvas to sequences, with zeros at their ends."""
        rows = tokens.new_zeros(*self.valid.shape, tokens.shape[-1])
        rows[self.valid] = tokens[self.shown]  # both go image by image, row by row
        return rows

    def scatter(self, tokens: Float[Tensor, "b m d"]) -> Float[Tensor, "b n d"]:
        """From sequences back to the canvas, with zeros where it shows nothing."""
        canvas = tokens.new_zeros(*self.shown.shape, tokens.shape[-1])
        canvas[self.shown] = tokens[self.valid]
        return canvas

    def stack(self, table: Table) -> Float[Tensor, "b m d"]:
        """What `table` gives for each image's own grid, with zeros at the ends."""
        tables = {grid: table(grid, 1.0) for grid in set(self.each)}
        return pad_sequence([tables[grid] for grid in self.each], batch_first=True)

    def keys(self, prefix: int = 0) -> Bool[Tensor, "b t"] | None:
        """What may be attended to, after `prefix` tokens that always may; None if all may."""
        if self.shortest == self.longest:
            return None  # a mask would cost the fastest attention kernels
        return torch.cat([self.valid.new_ones(len(self.each), prefix), self.valid], dim=1)


class TwoGrids(ABC):
    """Two grids over the same images, and how their cells make one sequence.

    The kinds there are stand in `vitrail.nn.multiscale`.
    """

    def __init__(self, grid: tuple[int, int], second: tuple[int, int]) -> None:
        """Rows and columns of the first, whose cells are patches, and of the second."""
        self.grid = grid
        self.second = second

    @property
    @abstractmethod
    def longest(self) -> int:
        """How many tokens the sequence has."""

    @abstractmethod
    def join(
        self, cells: Float[Tensor, "*b n d"], second: Float[Tensor, "*b m d"]
    ) -> Float[Tensor, "*c t d"]:
        """The sequence, of what the cells of both grids have, row by row."""

    @abstractmethod
    def cells(self, tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b n d"]:
        """The first grid, whole and row by row, of the sequence's tokens."""

    def stack(self, table: Table) -> Float[Tensor, "*b t d"]:
        """What `table` gives for the cells of both grids, in the sequence's order."""
        return self.join(table(self.grid, 1.0), table(self.second, self.grid[0] / self.second[0]))


Grid = tuple[int, int] | Grids | TwoGrids
"""The rows and columns of all images, or of each; or two grids in one sequence."""


def tokens_of(grid: Grid) -> int:
    """How many patch tokens a sequence has."""
    return grid[0] * grid[1] if isinstance(grid, tuple) else grid.longest


def table_of(table: Table, grid: Grid) -> Float[Tensor, "*b m d"]:
    """What `table` gives for the grid of all images, for each image's own, or for two grids."""
    return table(grid, 1.0) if isinstance(grid, tuple) else grid.stack(table)


def on_canvas(extent: Int[Tensor, "b 2"], size: tuple[int, int]) -> Bool[Tensor, "b h w"]:
    """The cells of a canvas of `size` that `extent`, counted in cells, says are shown."""
    rows, columns = (torch.arange(n, device=extent.device) for n in size)
    return (rows < extent[:, :1])[:, :, None] & (columns < extent[:, 1:])[:, None]
