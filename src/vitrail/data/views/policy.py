"""Which operations an image gets, and how strong: RandAugment, TrivialAugment, 3-Augment.

A policy draws, for each image, a row of operations of `ops` with their levels. What they do, and
in what order, is for `augment` to say.
"""

from collections.abc import Callable
from math import pi
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from vitrail.data.views.ops import MAX_BLUR

Policy = Literal["none", "randaugment", "trivial", "three"]

Draw = Callable[[str, int], Float[np.ndarray, "b n"]]
"""(purpose, n) to n numbers in [0, 1) for each image of a batch, as `keyed.uniform` makes them."""


class Plan(NamedTuple):
    """What each of b images gets, one operation after the other."""

    names: Shaped[np.ndarray, "b ops"]
    """Of `ops.PHOTOMETRIC`, of `ops.GEOMETRIC`, or "identity"."""
    levels: Float[np.ndarray, "b ops"]
    """In each operation's own unit."""


class Span(NamedTuple):
    """An operation's level at magnitude 0 and at magnitude 1."""

    start: float = 0.0
    end: float = 0.0
    signed: bool = False
    """Whether it goes to either side of `start`, by the toss of a coin."""


def randaugment(draw: Draw, ops: int, magnitude: float) -> Plan:
    """RandAugment (Cubuk et al., arXiv 1909.13719) as timm's "rand-mM-nN-mstd0.5-inc1" has it.

    That is the variant that DeiT and its successors were trained with: 15 operations of which each
    image draws `ops`; each is left out with probability 0.5; magnitudes are normal about
    `magnitude`, of 10, with deviation 0.5. One difference: posterize keeps one bit at least.
    """
    choice, left_out, side, radius, angle = np.split(draw("randaugment", 5 * ops), 5, axis=1)
    # Box and Muller's normal numbers; 1 - u is never 0.
    normal = np.sqrt(-2 * np.log(1 - radius)) * np.cos(2 * pi * angle)
    strength = np.clip((magnitude + 0.5 * normal) / 10, 0, 1)
    plan = _plan(_RANDAUGMENT, choice, strength, side)
    return plan._replace(names=np.where(left_out < 0.5, "identity", plan.names))


def trivial(draw: Draw, size: tuple[int, int]) -> Plan:
    """TrivialAugment Wide (Müller and Hutter, arXiv 2103.10158): one operation, any strength.

    `size` is the images' (height, width), for the paper moves them by up to 32 pixels.
    """
    choice, strength, side = np.split(draw("trivial", 3), 3, axis=1)
    moves = {
        "translate_x": Span(0, 32 / size[1], signed=True),
        "translate_y": Span(0, 32 / size[0], signed=True),
    }
    return _plan(_TRIVIAL | moves, choice, np.floor(31 * strength) / 30, side)


def three(draw: Draw) -> Plan:
    """3-Augment (DeiT-III, arXiv 2204.07118): grey, solarised or blurred, one of them always.

    The paper adds a colour jitter of 0.3, which is a field of its own.
    """
    choice, strength = np.split(draw("three", 2), 2, axis=1)
    return _plan(_THREE, choice, strength, strength)


def _plan(
    spans: dict[str, Span],
    choice: Float[np.ndarray, "b ops"],
    strength: Float[np.ndarray, "b ops"],
    side: Float[np.ndarray, "b ops"],
) -> Plan:
    chosen = (choice * len(spans)).astype(np.int64)
    start, end, signed = np.array(list(spans.values()), dtype=np.float64).T[..., chosen]
    sign = np.where((signed > 0) & (side < 0.5), -1, 1)
    return Plan(np.array(list(spans))[chosen], start + (end - start) * strength * sign)


# timm's tables for "inc1", in which an operation's effect grows with its magnitude.
_RANDAUGMENT = {
    "autocontrast": Span(),
    "equalize": Span(),
    "invert": Span(),
    "rotate": Span(0, 30, signed=True),
    "posterize": Span(4, 0),
    "solarize": Span(256, 0),
    "solarize_add": Span(0, 110),
    "color": Span(1, 1.9, signed=True),
    "contrast": Span(1, 1.9, signed=True),
    "brightness": Span(1, 1.9, signed=True),
    "sharpness": Span(1, 1.9, signed=True),
    "shear_x": Span(0, 0.3, signed=True),
    "shear_y": Span(0, 0.3, signed=True),
    "translate_x": Span(0, 0.45, signed=True),
    "translate_y": Span(0, 0.45, signed=True),
}

# The paper's table 1, "wide"; `trivial` adds the two that depend on the images' size.
_TRIVIAL = {
    "identity": Span(),
    "autocontrast": Span(),
    "equalize": Span(),
    "rotate": Span(0, 135, signed=True),
    "posterize": Span(8, 2),
    "solarize": Span(256, 0),
    "color": Span(1, 1.99, signed=True),
    "contrast": Span(1, 1.99, signed=True),
    "brightness": Span(1, 1.99, signed=True),
    "sharpness": Span(1, 1.99, signed=True),
    "shear_x": Span(0, 0.99, signed=True),
    "shear_y": Span(0, 0.99, signed=True),
}

_THREE = {
    "grayscale": Span(),
    "solarize": Span(128, 128),
    "blur": Span(0.1, MAX_BLUR),
}
