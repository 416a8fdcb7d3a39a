"""The images, drawn again: weights for the bootstrap (Efron, 1979) of numbers that are sums."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

SEED = 0
"""The same images always have the same draws."""
_BLOCK = 64  # draws at a time: 10,000 images' weights then fit a core's cache


def weights(n: int, draws: int) -> Iterator[Float[Tensor, "n r"]]:
    """How often each of `n` images is in each draw, with replacement, some draws at a time."""
    generator = torch.Generator().manual_seed(SEED)
    for start in range(0, draws, _BLOCK):
        shape = (min(_BLOCK, draws - start), n)
        drawn = torch.randint(n, shape, generator=generator)
        ones = torch.ones(1, 1, dtype=torch.float64).expand(shape)
        yield torch.zeros(shape, dtype=torch.float64).scatter_add_(1, drawn, ones).T.contiguous()
