"""Maps of one stride at another, cell by cell where the image has them.

A map of stride `s` has `ceil(size / s)` cells, laid from the image's top left; the last may reach
beyond the image. So a map is not stretched to the size of a finer one, as it is usually done: where
the image is no whole number of cells, that moves everything by a share of a cell. It is read at the
finer cells' centres instead, and what lies beyond the image is left out.

Letters: b batch, c channels, h w cells, p q pixels of one.
"""

import math

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Stride = tuple[int | float, int | float]
"""Pixels of the image per cell, (vertical, horizontal): of patches of 14 enlarged by 4, 3.5."""


def cells(size: tuple[int, int], stride: tuple[int, int]) -> tuple[int, int]:
    """The rows and columns of a map of `stride` of images of `size` pixels (height, width).

    >>> cells((50, 75), (16, 16))
    (4, 5)
    """
    return math.ceil(size[0] / stride[0]), math.ceil(size[1] / stride[1])


def at_stride(
    x: Float[Tensor, "b c h w"], old: Stride, new: tuple[int, int], size: tuple[int, int]
) -> Float[Tensor, "b c _h _w"]:
    """The map of stride `old` at stride `new`, bilinearly, of images of `size` pixels.

    Of the size that `cells(size, new)` says. Where the image is a whole number of cells of both, it
    is torch's own, `F.interpolate(x, cells(size, new), mode="bilinear")`.

    >>> import torch
    >>> at_stride(torch.zeros(1, 2, 4, 5), (16, 16), (4, 4), (50, 75)).shape
    torch.Size([1, 2, 13, 19])
    """
    rows, columns = cells(size, new)
    if old == new:
        return x[:, :, :rows, :columns]
    scale = [o / n for o, n in zip(old, new, strict=True)]
    if all(share >= 1 and share == int(share) for share in scale):
        x = F.interpolate(x, scale_factor=scale, mode="bilinear")
    else:
        # Torch rounds the number of cells down. With more of the last, it has enough.
        more = [math.ceil(n / o) for o, n in zip(old, new, strict=True)]
        x = F.pad(x, (0, more[1], 0, more[0]), mode="replicate")
        x = F.interpolate(x, scale_factor=scale, mode="bilinear", recompute_scale_factor=False)
    return x[:, :, :rows, :columns]
