"""Boxes from every cell of every map: FCOS (Tian et al., arXiv 1904.01355, and 2006.09214).

Two towers of convolutions, shared by all maps: one says of each cell which classes are there, the
other how far it is from the cell's centre to the four sides of the object, and how near it is to
the object's own centre ("centre-ness"). Of heads whose points are assigned by what they say
(TOOD, 2108.07755) the classes' scores are to say that too, and there is no centre-ness.

Letters: b batch, c classes, p points (cells of all maps), h w cells, d channels.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vitrail.found import MOST_COMPARED
from vitrail.heads.maps import Stride
from vitrail.heads.pyramid import Maps, group_norm
from vitrail.nn import normal_
from vitrail.nn.boxes import Candidates

_PRIOR = 0.01
"""What a new head says of each class: nearly all of an image is none of them (RetinaNet)."""
_FARTHEST = 6.0
"""Of the logarithm of a side, in strides."""


class Dense(NamedTuple):
    """What a dense head says of images."""

    logits: Float[Tensor, "b p c"]
    sides: Float[Tensor, "b p 4"]
    """Pixels from the point to the object's left, top, right and bottom."""
    centred: Float[Tensor, "b p"] | None
    """Logit of how near the point is to the object's centre."""
    points: Float[Tensor, "p 2"]
    """(x, y) in the view's pixels: the centres of the cells."""
    strides: Float[Tensor, "p 2"]
    """(x, y): pixels of the point's cell."""
    levels: Int64[Tensor, " p"]
    """Which of the maps it is of, the finest is 0."""

    @property
    def boxes(self) -> Float[Tensor, "b p 4"]:
        """(left, top, right, bottom) in the view's pixels."""
        least, most = self.points - self.sides[..., :2], self.points + self.sides[..., 2:]
        return torch.cat([least, most], dim=-1)

    @property
    def scores(self) -> Float[Tensor, "b p c"]:
        """0 to 1: of the class, times how well the point is placed."""
        scores = self.logits.float().sigmoid()
        return (
            scores if self.centred is None else scores * self.centred.float().sigmoid()[..., None]
        )


class DenseHead(nn.Module):
    """Classes, sides and centre-ness of each cell of maps of `width` channels.

    >>> head = DenseHead(32, 3, levels=2, convs=1)
    >>> maps = torch.zeros(2, 32, 4, 6), torch.zeros(2, 32, 2, 3)
    >>> head(maps, ((8, 8), (16, 16))).boxes.shape
    torch.Size([2, 30, 4])
    """

    def __init__(
        self, width: int, classes: int, levels: int, convs: int = 4, centred: bool = True
    ) -> None:
        """`convs` in each tower; `centred`: whether centre-ness is said."""
        super().__init__()
        self.class_tower = _tower(width, convs)
        self.box_tower = _tower(width, convs)
        self.classes = nn.Conv2d(width, classes, 3, padding=1)
        self.sides = nn.Conv2d(width, 4, 3, padding=1)
        self.centre = nn.Conv2d(width, 1, 3, padding=1) if centred else None
        self.scales = nn.Parameter(torch.ones(levels))
        """Of each map, on the logarithms of the sides."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        assert self.classes.bias is not None
        nn.init.constant_(self.classes.bias, -math.log((1 - _PRIOR) / _PRIOR))

    def forward(self, maps: Maps, strides: tuple[Stride, ...]) -> Dense:
        """Of maps of these strides (vertical, horizontal), finest first."""
        logits, sides, centred, points, cells, levels = [], [], [], [], [], []
        for level, (x, stride) in enumerate(zip(maps, strides, strict=True)):
            of_class, of_box = self.class_tower(x), self.box_tower(x)
            step = x.new_tensor(stride[::-1], dtype=torch.float32)
            logits.append(_flat(self.classes(of_class)))
            # In float32: what bfloat16 rounds off of a side is pixels.
            far = (_flat(self.sides(of_box)).float() * self.scales[level]).clamp(max=_FARTHEST)
            sides.append(far.exp() * step.repeat(2))
            if self.centre is not None:
                centred.append(_flat(self.centre(of_box))[..., 0])
            points.append(_centres(x.shape[2], x.shape[3], step))
            cells.append(step.expand(len(points[-1]), 2))
            levels.append(torch.full((len(points[-1]),), level, device=x.device))
        return Dense(
            torch.cat(logits, dim=1),
            torch.cat(sides, dim=1),
            torch.cat(centred, dim=1) if centred else None,
            torch.cat(points),
            torch.cat(cells),
            torch.cat(levels),
        )


def decode(found: Dense, size: tuple[int, int], most: int) -> Candidates:
    """The likeliest pairs of point and class of each image, their boxes cut to views of `size`
    (height, width): as many as suppression compares, or `most`, where that is more.
    """
    edge = found.points.new_tensor([size[1], size[0]]).repeat(2)
    boxes = torch.minimum(found.boxes.clamp(min=0), edge)
    scores = found.scores
    flat = scores.flatten(1)
    best, at = flat.topk(min(max(MOST_COMPARED, most), flat.shape[1]), dim=1)
    points = (at // scores.shape[2])[..., None].expand(-1, -1, 4)
    return Candidates(boxes.gather(1, points), best, at % scores.shape[2])


def _tower(width: int, convs: int) -> nn.Sequential:
    tower = nn.Sequential()
    for _ in range(convs):
        tower.append(nn.Conv2d(width, width, 3, padding=1))
        tower.append(group_norm(width))
        tower.append(nn.ReLU())
    return tower


def _flat(x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b _n d"]:
    return x.flatten(2).transpose(1, 2)


def _centres(rows: int, columns: int, step: Float[Tensor, " 2"]) -> Float[Tensor, "_n 2"]:
    """(x, y) of the centres of cells, row by row."""
    x = (torch.arange(columns, device=step.device) + 0.5) * step[0]
    y = (torch.arange(rows, device=step.device) + 0.5) * step[1]
    return torch.stack([x.repeat(rows), y.repeat_interleave(columns)], dim=1)
