"""First values of weights that more than one family has."""

import math

from torch import nn


def lecun_normal_(module: nn.Linear | nn.Conv2d) -> None:
    """Flax's default: variance 1 / fan_in after the tails are cut at 2 sigma; biases of zero."""
    # What is left of a normal distribution cut at 2 sigma has this deviation.
    std = 1 / math.sqrt(module.weight[0].numel()) / 0.87962566103423978
    nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
