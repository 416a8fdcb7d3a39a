"""Boxes (left, top, right, bottom): how far they overlap, and those that may be objects.

Letters: b images, k candidates, m n boxes.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

_LEAST = 1e-9
"""Of an area that something is divided by."""


class Candidates(NamedTuple):
    """What may be an object in views, of each the likeliest first."""

    boxes: Float[Tensor, "b k 4"]
    """(left, top, right, bottom) in the view's pixels."""
    scores: Float[Tensor, "b k"]
    """0 to 1."""
    labels: Int64[Tensor, "b k"]
    """Class indices."""


def area(boxes: Float[Tensor, "*m 4"]) -> Float[Tensor, "*m"]:
    """Width times height; 0 of what has no inside."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1)


def overlap(
    first: Float[Tensor, "*#m 4"], second: Float[Tensor, "*#m 4"]
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """The areas that two boxes share, and that either has; shapes are broadcast."""
    least = torch.maximum(first[..., :2], second[..., :2])
    most = torch.minimum(first[..., 2:], second[..., 2:])
    shared = (most - least).clamp(min=0).prod(dim=-1)
    return shared, area(first) + area(second) - shared


def iou(first: Float[Tensor, "*#m 4"], second: Float[Tensor, "*#m 4"]) -> Float[Tensor, "..."]:
    """Intersection over union, 0 to 1.

    >>> iou(torch.tensor([0.0, 0, 2, 2]), torch.tensor([1.0, 0, 3, 2]))
    tensor(0.3333)
    """
    shared, either = overlap(first, second)
    return shared / either.clamp(min=_LEAST)


def giou(first: Float[Tensor, "*#m 4"], second: Float[Tensor, "*#m 4"]) -> Float[Tensor, "..."]:
    """IoU, less the share of the box around both that neither has: -1 to 1 (arXiv 1902.09630)."""
    shared, either = overlap(first, second)
    least = torch.minimum(first[..., :2], second[..., :2])
    most = torch.maximum(first[..., 2:], second[..., 2:])
    around = (most - least).clamp(min=0).prod(dim=-1).clamp(min=_LEAST)
    return shared / either.clamp(min=_LEAST) - (around - either) / around
