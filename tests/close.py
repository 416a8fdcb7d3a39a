"""Equal, but for the order in which float32 was added up."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def largest(tensors: Iterable[Tensor]) -> float:
    """Of all values of tensors that came out of the same sums, as the gradients of a step."""
    return max(tensor.detach().abs().max().item() if tensor.numel() else 0.0 for tensor in tensors)


def close(
    found: Tensor | np.ndarray,
    expected: Tensor | np.ndarray,
    tol: float = 1e-5,
    *,
    size: float | None = None,
    msg: Any = None,
) -> None:
    """Equal shapes and types, and values within `tol` of the largest expected one, or of `size`.

    Another BLAS, other instructions, more threads or a larger batch add in another order, and a
    sum is then off by a share of what was added, not of what came out: so it is the size of the
    whole that counts, and where the whole is a difference or zero, `size`, that of its terms.
    """
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    if size is None:
        size = largest([expected])
    torch.testing.assert_close(found, expected, atol=tol * size, rtol=0, msg=msg)
