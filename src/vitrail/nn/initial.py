"""First values of weights that more than one family has."""

import math

from torch import Tensor, nn


def normal_(tensor: Tensor, std: float) -> None:
    """A normal distribution around zero.

    Nothing on the meta device: there torch would import its compiler, which takes longer than
    torch itself, and draw no number.
    """
    if not tensor.is_meta:
        nn.init.normal_(tensor, std=std)


def he_normal_(module: nn.Conv2d) -> None:
    """He's for kernels before a ReLU, over the outputs of all groups: variance 2 / fan_out."""
    normal_(module.weight, std=math.sqrt(2 / module.weight[:, 0].numel()))


def lecun_normal_(module: nn.Linear | nn.Conv2d) -> None:
    """Flax's default: variance 1 / fan_in after the tails are cut at 2 sigma; biases of zero."""
    # What is left of a normal distribution cut at 2 sigma has this deviation.
    std = 1 / math.sqrt(module.weight[0].numel()) / 0.87962566103423978
    nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
