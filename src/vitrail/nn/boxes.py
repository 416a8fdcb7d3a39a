"""Boxes (left, top, right, bottom): how far they overlap, and which of many say the same.

Letters: m n boxes, b images.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

_LEAST = 1e-9
"""Of an area that something is divided by."""


class Found(NamedTuple):
    """What was found in one image or view, the best first."""

    boxes: Float[Tensor, "m 4"]
    """(left, top, right, bottom) in its pixels."""
    scores: Float[Tensor, " m"]
    """0 to 1."""
    labels: Int64[Tensor, " m"]
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


def suppress(
    boxes: Float[Tensor, "m 4"],
    scores: Float[Tensor, " m"],
    labels: Int64[Tensor, " m"],
    most_alike: float,
) -> Int64[Tensor, " k"]:
    """Non-maximum suppression: which boxes to keep, the best first.

    A box goes where a better one of its class, that is kept, overlaps it by an IoU above
    `most_alike`. Of equal scores the earlier one is better. All pairs are compared at once, `m * m`
    numbers: the caller bounds `m`.

    >>> boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 10, 10], [20, 0, 30, 10]])
    >>> suppress(boxes, torch.tensor([0.5, 0.9, 0.7]), torch.zeros(3, dtype=torch.int64), 0.6)
    tensor([1, 2])
    """
    order = scores.argsort(descending=True, stable=True)
    boxes, labels = boxes[order], labels[order]
    alike = iou(boxes[:, None], boxes[None]) > most_alike
    alike &= labels[:, None] == labels[None]
    above = alike.float().tril(diagonal=-1)  # [m m]: whether the better, column, is alike
    # Who is kept depends on better ones alone. So each pass settles at least one more of a chain of
    # boxes that suppress each other, and what no longer changes is what one by one would give.
    kept = torch.ones(len(boxes), device=boxes.device)
    for _ in range(len(boxes)):
        found = (above @ kept == 0).float()
        if torch.equal(found, kept):
            break
        kept = found
    return order[kept.bool()]
