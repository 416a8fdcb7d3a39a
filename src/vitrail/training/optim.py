"""Optimisers from a config, and the schedule of the learning rate."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.errors import UsageError, setting
from vitrail.runs import OptimConfig
from vitrail.training.features import HEADS
from vitrail.training.rules import RuleOptimizer

_NO_DECAY = ("prefix", "position.table", "peg.conv.weight", "probe", "gamma")
"""Tokens, positions and scales: pulling them to zero would pull a meaning to zero (DeiT, Twins)."""
_ENDS = ("stem", "stem_second", "predictors", *HEADS)
"""The parts of a model whose matrices have pixels, classes or decisions on one of their sides."""


Scale = Callable[[str], float]
"""A parameter's name to its learning rate, as a share of the schedule's."""


def parameter_groups(
    module: nn.Module,
    weight_decay: float,
    scale: Scale = lambda name: 1.0,
    matrices: Callable[[str, Tensor], int] = lambda name, parameter: 0,
    beside: Iterable[tuple[str, nn.Parameter]] = (),
) -> list[dict[str, Any]]:
    """What of `module` and `beside` it learns, by the `scale` of its learning rate, highest first;
    of each scale those with decay (matrices and convolution kernels), then those without.

    `matrices` says of how many matrices under each other a parameter consists, for an optimiser to
    whom that matters: a group has `parts` of one number.
    """
    groups: dict[tuple[float, bool, int], list[Tensor]] = {}
    for name, parameter in (*module.named_parameters(), *beside):
        if parameter.requires_grad:
            decayed = parameter.ndim >= 2 and not name.endswith(_NO_DECAY)
            parts = matrices(name, parameter)
            groups.setdefault((scale(name), decayed, parts), []).append(parameter)
    return [
        {
            "params": groups[share, decayed, parts],
            "weight_decay": weight_decay if decayed else 0.0,
            "decayed": decayed,
            "scale": share,
            "parts": parts,
        }
        for share, decayed, parts in sorted(groups, reverse=True)
    ]


def hidden_matrices(name: str, parameter: Tensor) -> int:
    """How many matrices between stem and head a parameter holds: what Muon is for.

    Queries, keys and values are three functions in one matrix, and orthogonalised one by one. A
    convolution is the matrix that it applies to every patch, as Jordan et al. take it; not a
    depth-wise one, whose filters have nothing to do with each other. The stem, like a table of
    positions, sees inputs and not features, and the head's rows are classes: those are AdamW's, as
    embeddings and heads are in both papers. So are LoRA's factors, of which only the product is a
    map from features to features.
    """
    path = name.removeprefix("backbone.").split(".")
    if path[-1] != "weight" or path[0] in _ENDS or name.endswith(_NO_DECAY):
        return 0
    if parameter.ndim < 2 or parameter.shape[1] == 1:
        return 0
    return {"qkv": 3, "kv": 2}.get(path[-2] if path[1:] else "", 1)


def build_optimizer(
    module: nn.Module,
    config: OptimConfig,
    scale: Scale = lambda name: 1.0,
    beside: Iterable[tuple[str, nn.Parameter]] = (),
) -> torch.optim.Optimizer:
    """The optimiser that `config.name` names, over what of `module` learns, and beside it.

    Each of its groups has a `scale`, which the schedule's learning rate is to be multiplied with.
    Raises `UsageError` for Muon where it has nothing to do.
    """
    muon = config.name == "muon"
    of = hidden_matrices if muon else lambda name, parameter: 0
    groups = parameter_groups(module, config.weight_decay, scale, of, beside)
    if config.state == "float32":
        if config.name == "sgd":
            return torch.optim.SGD(groups, lr=config.lr, momentum=config.beta1)
        if config.name == "adamw":
            betas = (config.beta1, config.beta2)
            return torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)
    if muon and not any(group["parts"] for group in groups):
        raise UsageError(
            f"{setting('optim.name')} muon is for the matrices between stem and head, and nothing "
            f"of the kind learns here: use adamw"
        )
    for group in groups:
        group["rule"] = config.name if not muon or group["parts"] else "adamw"
    defaults = {
        "lr": config.lr,
        "beta1": config.beta1,
        "beta2": config.beta2,
        "momentum": config.muon_momentum,
        "state": config.state,
    }
    return RuleOptimizer(groups, defaults)


def weight_decay(config: OptimConfig, progress: float) -> float:
    """The weight decay when `progress` (0 to 1) of the run is done.

    >>> weight_decay(OptimConfig(weight_decay=0.04, final_weight_decay=0.4), 0.5)
    0.22
    """
    start, end = config.weight_decay, config.final_weight_decay
    if end is None:
        return start
    return end + (start - end) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


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
        "trapezoid": min((1 - progress) / config.cooldown, 1.0) if progress < 1 else 0.0,
    }[config.schedule]
    return config.lr * (config.final_lr + (1 - config.final_lr) * left)
