"""The patch projection of SigLIP 2's NaFlex models (arXiv 2502.14786): one matrix over the pixels
of a patch, in the order (row, column, channel), where a convolution has (channel, row, column).

Such a model takes images of any grid, several in one batch: what `ViT` does by itself.
"""

import math

from torch import Tensor

_CHANNELS = 3
COLOURS = (f"patches are square and of {_CHANNELS} channels, which one matrix does not show",)
"""What no shape of such a matrix shows, for `Layout.takes`."""


def kernel_of(matrix: Tensor) -> Tensor:
    """A matrix `[d, p * p * c]` as a kernel `[d, c, p, p]`; as it is, if it is none of 3 channels.

    >>> import torch
    >>> kernel_of(torch.zeros(24, 8 * 8 * 3)).shape
    torch.Size([24, 3, 8, 8])
    """
    side = math.isqrt(matrix.shape[-1] // _CHANNELS) if matrix.ndim == 2 else 0
    if not side or matrix.shape[-1] != side * side * _CHANNELS:
        return matrix
    return matrix.unflatten(1, (side, side, _CHANNELS)).permute(0, 3, 1, 2)


def matrix_of(kernel: Tensor) -> Tensor:
    """The inverse of `kernel_of`."""
    return kernel.permute(0, 2, 3, 1).flatten(1)
