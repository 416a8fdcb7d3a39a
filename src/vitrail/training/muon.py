"""Muon: a matrix is moved by the nearest orthogonal matrix to its momentum.

Jordan et al., https://kellerjordan.github.io/posts/muon (2024); for one learning rate with AdamW,
Liu et al., "Muon is scalable for LLM training" (arXiv 2502.16982).
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.runs.machine import native_precision

STEPS = 5
_A, _B, _C = 3.4445, -4.7750, 2.0315
"""Of the quintic: steepest at zero, so that five steps bring small singular values near one too."""
_SMALLEST = 1e-7
_CACHED = 2**20
"""Numbers in a stack of matrices on a CPU."""


def orthogonalised(matrices: Float[Tensor, "k m n"], steps: int = STEPS) -> Float[Tensor, "k m n"]:
    """About `U V^T` of each matrix `U S V^T`, m <= n: singular values come to lie in 0.7..1.2.

    Newton-Schulz: `X <- a X + (b A + c A^2) X` with `A = X X^T`, from `X = M / |M|`. Overwrites
    `matrices`, whose number format is computed in: bfloat16 does.
    """
    lengths = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)
    x = matrices.div_(lengths.clamp(min=_SMALLEST))
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x


def directions(updates: Sequence[Tensor], parts: int) -> Iterator[Tensor]:
    """Each update orthogonalised, in its shape, times `0.2 sqrt(max(rows, columns))`.

    The factor gives a step the root mean square of AdamW's (2502.16982, equation 4). An update of
    more than two dimensions is a convolution's and taken as the matrix that is applied to every
    patch, `[out, in * kh * kw]`; one that holds several matrices under each other (q, k and v) is
    `parts` of them. Matrices of equal shape, or its transpose, are multiplied together: in bfloat16
    where the device has it, and in float32, three to five times as fast, where it is emulated.
    """
    dtype = getattr(torch, native_precision(updates[0].device))
    matrices = [update.reshape(parts, -1, update[0].numel()) for update in updates]
    tall = [m.shape[1] > m.shape[2] for m in matrices]
    wide = [m.mT if is_tall else m for m, is_tall in zip(matrices, tall, strict=True)]
    done: dict[int, Tensor] = {}
    for indices in _stacks([m.shape for m in wide], updates[0].device):
        found = orthogonalised(torch.cat([wide[i].to(dtype) for i in indices]))
        found.mul_(0.2 * found.shape[-1] ** 0.5)
        for i, its in zip(indices, found.split(parts), strict=True):
            done[i] = (its.mT if tall[i] else its).reshape(updates[i].shape)
    return (done[i] for i in range(len(updates)))


def _stacks(shapes: Sequence[torch.Size], device: torch.device) -> Iterator[list[int]]:
    """What is multiplied together: the indices of equal shapes.

    On a GPU all of them. On a CPU about as many as its cache holds: of a ViT-S/16 that takes a
    fifth less time than all at once, and reaches the rate of one large product.
    """
    for shape in dict.fromkeys(shapes):
        indices = [i for i, s in enumerate(shapes) if s == shape]
        fit = max(1, round(_CACHED / shape.numel())) if device.type == "cpu" else len(indices)
        for start in range(0, len(indices), fit):
            yield indices[start : start + fit]
