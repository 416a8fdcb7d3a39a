"""The running average of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vitrail.training.shards import held


class Average:
    """An exponential moving average of a module's weights (Polyak and Juditsky, 1992).

    Early on the decay is `(1 + steps) / (10 + steps)`, so that a short run's average does not
    remember the random start. Buffers (a batch norm's statistics) are the module's own, not
    averaged.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values: dict[str, Tensor] = {
            name: value.detach().clone() for name, value in module.named_parameters()
        }

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move the average towards `module` after optimiser step `step` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        values = held(list(module.parameters()))
        torch._foreach_lerp_(held(list(self.values.values())), values, 1 - decay)

    @contextmanager
    def in_place_of(self, module: nn.Module) -> Iterator[None]:
        """While this lasts, the module's weights are their average."""
        parameters = held([p.data for p in module.parameters()])
        own = [p.clone() for p in parameters]
        torch._foreach_copy_(parameters, held(list(self.values.values())))
        try:
            yield
        finally:
            torch._foreach_copy_(parameters, own)
