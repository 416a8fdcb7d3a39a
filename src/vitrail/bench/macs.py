"""Multiply-accumulates of one forward pass, counted while the model runs, not taken from a formula.

The model runs on the meta device, where tensors have a shape and no values: even the largest takes
a moment. What counts are the products of linear layers, matrices, convolutions and attention.
Norms, activations and additions do not, as in the published tables, whose "GFLOPs" are these, not
twice these.
"""

from dataclasses import replace
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from vitrail.models import ModelConfig, build


@cache
def macs(config: ModelConfig, size: tuple[int, int] | None = None) -> int:
    """Multiply-accumulates for one image of `size` (height, width); None is the config's own.

    The model is in evaluation mode: what drops tokens then really has fewer of them. Raises
    `UsageError` for a size that the model does not take.

    >>> from vitrail.models import model_config
    >>> macs(model_config("vit_b16"))  # published as 17.56 billion
    17563828224
    """
    if size is not None:
        config = replace(config, image_size=size)
    with torch.device("meta"):
        # Without gradients: the counter would hook itself to tensors that have none.
        model = build(config).eval().requires_grad_(False)
        image = torch.empty(1, config.channels, *config.image_size)
        with FlopCounterMode(display=False) as counter:
            model(image)
    return counter.get_total_flops() // 2
