"""What a loss that looks across images needs of those that other processes have."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def alone() -> bool:
    """Whether this process has all images of a step."""
    return not dist.is_initialized() or dist.get_world_size() == 1


def summed(x: Tensor) -> Tensor:
    """The sum over all processes; no gradient passes."""
    x = x.detach().clone()
    if not alone():
        dist.all_reduce(x)
    return x


@torch.no_grad()
def gathered(keys: Float[Tensor, "b o"]) -> tuple[Float[Tensor, "n o"], int]:
    """The keys of all processes, in the order of their ranks, and the place of this one's first.

    A process may have fewer than others. No gradient passes.
    """
    if alone():
        return keys, 0
    size, rank = dist.get_world_size(), dist.get_rank()
    counts = [torch.zeros(1, dtype=torch.int64, device=keys.device) for _ in range(size)]
    dist.all_gather(counts, torch.tensor([len(keys)], device=keys.device))
    numbers = [int(count) for count in counts]
    # Of one size each, as a collective wants them.
    padded = F.pad(keys, (0, 0, 0, max(numbers) - len(keys)))
    every = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(every, padded.contiguous())
    kept = [part[:count] for part, count in zip(every, numbers, strict=True)]
    return torch.cat(kept), sum(numbers[:rank])


def gathered_with_gradient(x: Float[Tensor, "b o"]) -> tuple[Float[Tensor, "n o"], int]:
    """As `gathered`; what all processes' losses say of this one's rows reaches them."""
    if alone():
        return x, 0
    every, first = _Gathered.apply(x)  # type: ignore[no-untyped-call]
    return every, first


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, int]:
        every, first = gathered(x)
        ctx.rows = slice(first, first + len(x))
        return every, first

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Tensor:
        return summed(grad)[ctx.rows]
