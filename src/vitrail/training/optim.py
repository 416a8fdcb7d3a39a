"""Optimisers, the schedule, and the running average of the weights."""

import copy
import math
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from vitrail.runs import OptimConfig

M = TypeVar("M", bound=nn.Module)

_NO_DECAY = ("prefix", "position.table", "peg.conv.weight", "probe", "gamma")
"""Tokens, positions and scales: pulling them to zero would pull a meaning to zero (DeiT, Twins)."""


Scale = Callable[[str], float]
"""A parameter's name to its learning rate, as a share of the schedule's."""


def parameter_groups(
    module: nn.Module, weight_decay: float, scale: Scale = lambda name: 1.0
) -> list[dict[str, Any]]:
    """What learns, by the `scale` of its learning rate, highest first; of each scale those with
    decay (matrices and convolution kernels), then those without.
    """
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim >= 2 and not name.endswith(_NO_DECAY)
            groups.setdefault((scale(name), decayed), []).append(parameter)
    return [
        {
            "params": groups[share, decayed],
            "weight_decay": weight_decay if decayed else 0.0,
            "scale": share,
        }
        for share, decayed in sorted(groups, reverse=True)
    ]


def build_optimizer(
    module: nn.Module, config: OptimConfig, scale: Scale = lambda name: 1.0
) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101), or SGD with momentum as the ViT paper fine-tunes.

    Each of its groups has a `scale`, which the schedule's learning rate is to be multiplied with.
    """
    groups = parameter_groups(module, config.weight_decay, scale)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.beta1)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(config: OptimConfig, progress: float) -> float:
    """The learning rate when `progress` (0 to 1) of the run is done: warm-up, then the schedule.

    >>> learning_rate(OptimConfig(lr=1.0, warmup=0.1), 0.05)
    0.5
    """
    if progress < config.warmup:
        return config.lr * progress / config.warmup
    done = min((progress - config.warmup) / (1 - config.warmup), 1.0)
    left = {
        "cosine": (1 + math.cos(math.pi * done)) / 2,
        "linear": 1 - done,
        "constant": 1.0,
    }[config.schedule]
    return config.lr * (config.final_lr + (1 - config.final_lr) * left)


class Average(Generic[M]):
    """An exponential moving average of a module's weights (Polyak and Juditsky, 1992).

    Early on the decay is `(1 + steps) / (10 + steps)`, so that a short run's average does not
    remember the random start.
    """

    def __init__(self, module: M, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: M, step: int) -> None:
        """Move the average towards `module` after optimiser step `step` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages: list[Tensor] = list(self.module.parameters())
        values: list[Tensor] = list(module.parameters())
        torch._foreach_lerp_(averages, values, 1 - decay)
        for average, value in zip(self.module.buffers(), module.buffers(), strict=True):
            average.copy_(value)
