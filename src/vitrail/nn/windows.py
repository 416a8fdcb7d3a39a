"""Attention in windows: what it costs grows with the image, not with its square (ViTDet, Li et al.,
"Exploring Plain Vision Transformer Backbones for Object Detection", arXiv 2203.16527, section 3).

The grid is cut into equal windows, and tokens attend to those of their own. A few blocks stay
global, and carry what is known from window to window. Windows that do not divide the grid reach
beyond it: as in ViTDet's code there are tokens of zeros there, after the norm, and no mask, so that
the patches at the right and below attend to them too (their keys and values are the biases). Each
costs as much as a patch: choose windows that divide the grid, or nearly.

Prefix tokens (class, registers) are in every window, a copy in each. What becomes of the copies
is the `Copies` of a model:

| name   | what it is                                                          | whose          |
|--------|---------------------------------------------------------------------|----------------|
| `mean` | after each block in windows they are one again, the copies' mean    | ours           |
| `own`  | each window keeps its own from first to last; global blocks see all | RF-DETR's code |

Letters: b batch, gh gw token grid, n = gh * gw patch tokens, w windows, r c rows and columns of a
window, m = r * c, k prefix tokens, d width.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vitrail.nn.attention import Attention
from vitrail.nn.position import Rotation

Copies = Literal["mean", "own"]


class Windows(NamedTuple):
    """How a model cuts its grids: windows of a size, or so many of them.

    >>> Windows(size=(14, 14)).cut((45, 80))
    Cut(grid=(45, 80), size=(14, 14), counts=(4, 6))
    >>> Windows(number=2).cut((45, 80))
    Cut(grid=(45, 80), size=(23, 40), counts=(2, 2))
    """

    size: tuple[int, int] | None = None
    """Rows and columns of tokens of a window."""
    number: int = 0
    """Else: as many windows side by side, and one below the other, as small as cover the grid."""

    @property
    def copies(self) -> Copies:
        return "own" if self.size is None else "mean"

    def cut(self, grid: tuple[int, int]) -> "Cut":
        """A grid of the given rows and columns, cut."""
        rows, columns = self.size or (-(-side // self.number) for side in grid)
        return Cut(grid, (rows, columns), (-(-grid[0] // rows), -(-grid[1] // columns)))


class Cut(NamedTuple):
    """A grid in windows."""

    grid: tuple[int, int]
    size: tuple[int, int]
    """Of a window."""
    counts: tuple[int, int]
    """How many there are one below the other, and side by side."""

    @property
    def windows(self) -> int:
        """How many there are in all."""
        return self.counts[0] * self.counts[1]

    @property
    def padding(self) -> tuple[int, int]:
        """Rows below and columns at the right that windows reach beyond the grid."""
        down, right = (c * s - g for c, s, g in zip(self.counts, self.size, self.grid, strict=True))
        return down, right

    def partition(
        self, x: Float[Tensor, "*b n d"], beyond: float = 0.0
    ) -> Float[Tensor, "*b w m d"]:
        """The windows, row by row, each row by row; `beyond` stands where the grid ends."""
        x = x.unflatten(-2, self.grid)
        if any(self.padding):
            down, right = self.padding
            x = F.pad(x, (0, 0, 0, right, 0, down), value=beyond)
        x = x.unflatten(-2, (self.counts[1], self.size[1]))
        x = x.unflatten(-4, (self.counts[0], self.size[0])).transpose(-4, -3)
        return x.flatten(-5, -4).flatten(-3, -2)

    def merge(self, x: Float[Tensor, "*b w m d"]) -> Float[Tensor, "*b n d"]:
        """The inverse: what lies beyond the grid is dropped."""
        x = x.unflatten(-2, self.size).unflatten(-4, self.counts).transpose(-4, -3)
        x = x.flatten(-3, -2).flatten(-4, -3)
        return x[..., : self.grid[0], : self.grid[1], :].flatten(-3, -2)


def attend_in_windows(
    attention: Attention,
    x: Float[Tensor, "b t d"],
    cut: Cut,
    rotation: Rotation | None = None,
    copies: Copies = "mean",
) -> Float[Tensor, "b t d"]:
    """`attention` over the tokens of each window and its copy of the prefix.

    `x`: the prefix tokens (of `copies="own"` each window's, one window after another), then the
    patches of the grid. Windows are a larger batch for the fused kernel; there is no mask.
    """
    b, t = x.shape[:2]
    k = t - cut.grid[0] * cut.grid[1]
    prefix, patches = x[:, :k], cut.partition(x[:, k:])
    w = cut.windows
    if k:
        each = prefix.unflatten(1, (w, k // w)) if copies == "own" else prefix[:, None]
        patches = torch.cat([each.expand(-1, w, -1, -1), patches], dim=2)
    found = attention(patches.flatten(0, 1), _of_windows(rotation, cut, b), grid=cut.size)
    found = found.unflatten(0, (b, w))
    if not k:
        return cut.merge(found)
    m = cut.size[0] * cut.size[1]
    prefix, patches = found[:, :, :-m], cut.merge(found[:, :, -m:])
    prefix = prefix.flatten(1, 2) if copies == "own" else prefix.mean(dim=1)
    return torch.cat([prefix, patches], dim=1)


def _of_windows(rotation: Rotation | None, cut: Cut, b: int) -> Rotation | None:
    """That of each window of `b` images: tokens are turned by where they lie in the image, and
    those beyond it are not.
    """
    if rotation is None:
        return None
    sin, cos = (
        cut.partition(table, beyond)[:, None].repeat(b, 1, 1, 1)
        for table, beyond in ((rotation.sin, 0.0), (rotation.cos, 1.0))
    )
    return Rotation(sin, cos, rotation.pairs)
