"""Boxes from queries: the decoder of LW-DETR (Chen et al., arXiv 2406.03459) and RF-DETR
(2511.09554).

A projector makes one map of a backbone's, or a few. Every cell of it says which class is there and
where (a first stage, Deformable DETR, 2010.04159, section 4.3); the boxes of the best are where
queries begin, and a query attends to a few points of the map around its box. In training there are
several groups of queries that do not see each other, each matched with all objects (Group DETR,
2207.13085): more that is learned from an image. Later there is the first group alone.

Boxes are (centre x, centre y, width, height), as shares of what the maps cover: width and height of
the image, where it is a whole number of their cells.

Letters: b batch, q queries of all groups, c classes, d width, n cells of all maps, k groups,
h w cells of one map, e width of a head.
"""

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vitrail.errors import UsageError, setting
from vitrail.nn import Mlp, attend, normal_
from vitrail.nn.boxes import Candidates

Maps = tuple[Float[Tensor, "b _c _h _w"], ...]

_PRIOR = 0.01
"""What a new head says of each class: nearly all of an image is none of them (RetinaNet)."""
_SIDE = 0.05
"""Of the box that a cell of the first map begins with; of each next map it is twice as long."""
_EDGE = 0.01
"""Cells whose centre is nearer to the image's edge propose nothing, as in the authors' code."""
_LARGEST = 10.0
"""Of the logarithm by which a side grows: beyond it there are no numbers any more."""

_MOST = {
    **dict.fromkeys(("queries", "width", "mlp"), 100_000),
    **dict.fromkeys(("groups", "layers", "heads", "cross_heads", "points", "bottlenecks"), 1_000),
}
"""Beyond that a config is damaged or hostile: it would take all memory."""


@dataclass(frozen=True, kw_only=True)
class QueryBoxesConfig:
    """The projector and the decoder, as in RF-DETR."""

    queries: int = 300
    """How many objects an image can have at most."""
    groups: int = 13
    """Of as many queries each, in training."""
    layers: int = 3
    width: int = 256
    heads: int = 8
    """Of the attention among queries."""
    cross_heads: int = 16
    """Of the attention to the maps."""
    points: int = 2
    """Of each map that each of these heads reads."""
    mlp: int = 2048
    scales: tuple[float, ...] = (1.0,)
    """Of the maps that queries read, finest first: so many times the cells of the backbone's, a
    side; 2, 1 or 0.5."""
    bottlenecks: int = 3
    """Of the projector."""
    projector_eps: float = 1e-6
    """Of its norms but the last: RF-DETR's own code. Transformers' has 1e-5."""
    taps: tuple[int, ...] = ()
    """Of a ViT: the blocks, counted from 0, after which the projector reads it. None: after each
    quarter of them, or of fewer than four after the last."""
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Raise `UsageError` for what no head could be."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and not 1 <= value <= _MOST[field.name]:
                raise UsageError(
                    f"{setting(field.name)} must be 1 to {_MOST[field.name]:,}, not {value}"
                )
        if not self.scales or not set(self.scales) <= {2.0, 1.0, 0.5}:
            raise UsageError(f"{setting('scales')} are of 2, 1 and 0.5, not {self.scales}")
        for name in ("heads", "cross_heads"):
            if self.width % getattr(self, name):
                raise UsageError(
                    f"{setting('width', self.width)} must be divisible by "
                    f"{setting(name, getattr(self, name))}"
                )
        if self.width % 4:
            raise UsageError(f"{setting('width')} must be divisible by 4, not {self.width}")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"{setting('dropout')} must be in [0, 1), not {self.dropout}")


class BoxPrediction(NamedTuple):
    """What each query says, after some layer."""

    logits: Float[Tensor, "b q c"]
    """Of each class apart: none of them is an object of none."""
    boxes: Float[Tensor, "b q 4"]
    """(centre x, centre y, width, height) in shares, float32; they may reach beyond the image."""


class ConvNorm(nn.Module):
    """A convolution without a bias, a norm of each cell, and a nonlinearity."""

    def __init__(
        self, c_in: int, c_out: int, kernel: int, eps: float, act: nn.Module, stride: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.LayerNorm(c_out, eps=eps)
        self.act = act

    def forward(self, x: Float[Tensor, "b _c h w"]) -> Float[Tensor, "b d _h _w"]:
        return self.act(_cell_norm(self.conv(x), self.norm))


class Projector(nn.Module):
    """One map out of several: each enlarged or reduced, all side by side, and a C2f block of
    YOLOv8, whose bottlenecks add nothing to what they are given.
    """

    def __init__(self, widths: Sequence[int], scale: float, config: QueryBoxesConfig) -> None:
        """`widths` of the backbone's maps."""
        super().__init__()
        half, eps = config.width // 2, config.projector_eps
        self.resize = nn.ModuleList(_resized(width, scale, eps) for width in widths)
        inner = sum(width // 2 if scale == 2 else width for width in widths)
        self.conv1 = ConvNorm(inner, 2 * half, 1, eps, nn.SiLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(*(ConvNorm(half, half, 3, eps, nn.SiLU()) for _ in range(2)))
            for _ in range(config.bottlenecks)
        )
        parts = 2 + config.bottlenecks
        self.conv2 = ConvNorm(parts * half, config.width, 1, eps, nn.SiLU())
        self.norm = nn.LayerNorm(config.width, eps=1e-6)

    def forward(self, maps: Maps) -> Float[Tensor, "b d h w"]:
        x = [resize(each) for resize, each in zip(self.resize, maps, strict=True)]
        parts = list(self.conv1(torch.cat(x, dim=1)).chunk(2, dim=1))
        for block in self.blocks:
            parts.append(block(parts[-1]))
        return _cell_norm(self.conv2(torch.cat(parts, dim=1)), self.norm)


def deformable_attention(
    values: Sequence[Float[Tensor, "b heads e _h _w"]],
    places: Float[Tensor, "b q heads levels points 2"],
    weights: Float[Tensor, "b q heads levels points"],
) -> Float[Tensor, "b q d"]:
    """The weighted sum of what each head reads at a few points of each map, bilinearly (Deformable
    DETR, arXiv 2010.04159, eq. 3), all heads side by side.

    `places` are (x, y) from 0 to 1, the map's edges; beyond them lie zeros.
    """
    b, heads = values[0].shape[:2]
    grids = (2 * places - 1).transpose(1, 2).flatten(0, 1).unbind(2)
    read = [
        F.grid_sample(value.flatten(0, 1), grid, align_corners=False)
        for value, grid in zip(values, grids, strict=True)
    ]
    weights = weights.transpose(1, 2).flatten(0, 1)[:, None]
    found = (torch.stack(read, dim=3) * weights).sum(dim=(3, 4))
    return found.unflatten(0, (b, heads)).flatten(1, 2).transpose(1, 2)


class DeformableAttention(nn.Module):
    """From queries to points of the maps, around their boxes."""

    def __init__(self, config: QueryBoxesConfig) -> None:
        super().__init__()
        width = config.width
        self.shape = (config.cross_heads, len(config.scales), config.points)
        self.offsets = nn.Linear(width, 2 * math.prod(self.shape))
        self.weights = nn.Linear(width, math.prod(self.shape))
        self.value = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        self._start()

    def forward(
        self,
        x: Float[Tensor, "b q d"],
        maps: tuple[Float[Tensor, "b d _h _w"], ...],
        boxes: Float[Tensor, "b q 4"],
    ) -> Float[Tensor, "b q d"]:
        heads, levels, points = self.shape
        # In float32: a place of bfloat16 is off by cells.
        offsets = self.offsets(x).float().unflatten(2, (*self.shape, 2))
        weights = self.weights(x).float().unflatten(2, (heads, levels * points)).softmax(dim=-1)
        centres, sides = boxes[:, :, None, None, None].chunk(2, dim=-1)
        places = centres + offsets / points * sides / 2
        values = []
        for each in maps:
            value = self.value(each.flatten(2).transpose(1, 2)).float().transpose(1, 2)
            values.append(value.unflatten(1, (heads, -1)).unflatten(3, each.shape[2:]))
        read = deformable_attention(values, places, weights.unflatten(3, (levels, points)))
        return self.proj(read.to(x.dtype))

    def _start(self) -> None:
        """Each head looks in a direction of its own, its points one after another."""
        heads, levels, points = self.shape
        if self.offsets.weight.is_meta:
            return
        for layer in (self.offsets, self.weights):
            nn.init.zeros_(layer.weight)
        turn = torch.arange(heads) * (2 * math.pi / heads)
        way = torch.stack([turn.cos(), turn.sin()], dim=1)
        way = way / way.abs().amax(dim=1, keepdim=True)
        steps = torch.arange(1, points + 1)[:, None] * way[:, None, None]
        with torch.no_grad():
            self.offsets.bias.copy_(steps.expand(heads, levels, points, 2).flatten())
        nn.init.zeros_(self.weights.bias)
        for layer in (self.value, self.proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


class QueryAttention(nn.Module):
    """Among the queries of each group; where a query is goes into what it asks and answers to, not
    into what it says.
    """

    def __init__(self, config: QueryBoxesConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qk = nn.Linear(config.width, 2 * config.width)
        self.v = nn.Linear(config.width, config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(
        self, x: Float[Tensor, "b q d"], place: Float[Tensor, "b q d"], groups: int
    ) -> Float[Tensor, "b q d"]:
        q, k = self.qk(x + place).chunk(2, dim=-1)
        q, k, v = (
            t.unflatten(1, (groups, -1))
            .flatten(0, 1)
            .unflatten(2, (self.heads, -1))
            .transpose(1, 2)
            for t in (q, k, self.v(x))
        )
        found = attend(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(found.unflatten(0, (-1, groups)).flatten(1, 2))


class DecoderLayer(nn.Module):
    """Queries among themselves, to the maps, and each by itself; a norm after each of the three."""

    def __init__(self, config: QueryBoxesConfig) -> None:
        super().__init__()
        width = config.width
        self.attn = QueryAttention(config)
        self.norm1 = nn.LayerNorm(width)
        self.cross = DeformableAttention(config)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, config.mlp, nn.ReLU(), config.dropout)
        self.norm3 = nn.LayerNorm(width)
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "b q d"],
        place: Float[Tensor, "b q d"],
        maps: tuple[Float[Tensor, "b d _h _w"], ...],
        boxes: Float[Tensor, "b q 4"],
        groups: int,
    ) -> Float[Tensor, "b q d"]:
        x = self.norm1(x + self.drop(self.attn(x, place, groups)))
        x = self.norm2(x + self.drop(self.cross(x + place, maps, boxes)))
        return self.norm3(x + self.mlp(x))


class Layers(nn.Sequential):
    """Linear maps of these widths, with a ReLU between two."""

    def __init__(self, *widths: int) -> None:
        super().__init__(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))

    def forward(self, x: Float[Tensor, "*b _d"]) -> Float[Tensor, "*b _e"]:
        first, *others = self
        x = first(x)
        for layer in others:
            x = layer(F.relu(x))
        return x


class Proposals(nn.Module):
    """The first stage: what each cell says, and the best of it."""

    def __init__(self, width: int, classifier: nn.Linear, box: Layers) -> None:
        """It begins as copies of what says classes and boxes in the end."""
        super().__init__()
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.classifier = copy.deepcopy(classifier)
        self.box = copy.deepcopy(box)

    def forward(
        self, cells: Float[Tensor, "b n d"], anchors: Float[Tensor, "n 4"], most: int
    ) -> BoxPrediction:
        """Of the `most` cells that are surest of some class."""
        x = self.norm(self.proj(cells))
        logits = self.classifier(x)
        best = logits.amax(dim=2).topk(most, dim=1).indices[:, :, None]
        boxes = refined(anchors.expand(x.shape[0], -1, -1), self.box(x))
        return BoxPrediction(
            logits.gather(1, best.expand(-1, -1, logits.shape[2])),
            boxes.gather(1, best.expand(-1, -1, 4)),
        )


class QueryBoxes(nn.Module):
    """Projector, first stage and decoder.

    >>> head = QueryBoxes((64, 64), 3, QueryBoxesConfig(queries=5, groups=2, layers=2)).eval()
    >>> found = head((torch.zeros(2, 64, 4, 6), torch.zeros(2, 64, 4, 6)))
    >>> found.logits.shape, found.boxes.shape
    (torch.Size([2, 5, 3]), torch.Size([2, 5, 4]))
    """

    def __init__(self, widths: Sequence[int], classes: int, config: QueryBoxesConfig) -> None:
        """`widths` of the backbone's maps, which all have the same cells."""
        super().__init__()
        self.config = config
        width = config.width
        self.projectors = nn.ModuleList(Projector(widths, s, config) for s in config.scales)
        self.classifier = nn.Linear(width, classes)
        self.box = Layers(width, width, width, 4)
        if not self.classifier.weight.is_meta:
            nn.init.constant_(self.classifier.bias, -math.log((1 - _PRIOR) / _PRIOR))
            for tensor in self.box[-1].parameters():
                nn.init.zeros_(tensor)
        self.proposals = nn.ModuleList(
            Proposals(width, self.classifier, self.box) for _ in range(config.groups)
        )
        self.queries = nn.Parameter(torch.empty(config.groups, config.queries, width))
        normal_(self.queries, std=1.0)
        self.references = nn.Parameter(torch.zeros(config.groups, config.queries, 4))
        """By how much each query's box begins elsewhere than the cell's that it got."""
        self.place = Layers(2 * width, width, width)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)

    @property
    def groups(self) -> int:
        """Of the queries of its predictions: one, but in training."""
        return self.config.groups if self.training else 1

    def forward(self, maps: Maps) -> BoxPrediction:
        """What the queries say in the end, of a backbone's maps."""
        return self.predictions(maps)[-1]

    def predictions(self, maps: Maps) -> tuple[BoxPrediction, ...]:
        """What a loss is of: what the first stage says, and queries after each layer; in training
        those of all groups, one group after another.

        A map with fewer cells than queries has as many queries as cells.
        """
        return self.decoded(tuple(projector(maps) for projector in self.projectors))

    def decoded(self, levels: Maps) -> tuple[BoxPrediction, ...]:
        """The same of the maps that queries read, finest first."""
        cells = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
        anchors, kept = anchors_of([(x.shape[2], x.shape[3]) for x in levels], cells.device)
        if len(kept) < cells.shape[1]:
            cells = cells[:, kept]
        most = min(self.config.queries, len(kept))
        parts = [self.proposals[k](cells, anchors, most) for k in range(self.groups)]
        first = BoxPrediction(*(torch.cat(part, dim=1) for part in zip(*parts, strict=True)))
        moved = self.references[: self.groups, :most].flatten(0, 1)
        boxes = refined(first.boxes.detach(), moved)
        place = self.place(_waves(boxes, self.config.width // 2).to(cells.dtype))
        x = self.queries[: self.groups, :most].flatten(0, 1).expand(cells.shape[0], -1, -1)
        found = [first]
        for layer in self.layers:
            x = layer(x, place, levels, boxes, self.groups)
            said = self.norm(x)
            found.append(BoxPrediction(self.classifier(said), refined(boxes, self.box(said))))
        return tuple(found)


def refined(
    boxes: Float[Tensor, "*b q 4"], by: Float[Tensor, "*#b q 4"]
) -> Float[Tensor, "*b q 4"]:
    """Boxes moved by shares of their sides, which grow by factors `exp(by)`: float32.

    >>> refined(torch.tensor([[0.5, 0.5, 0.2, 0.4]]), torch.tensor([[0.5, 0.0, 0.0, 0.0]]))
    tensor([[0.6000, 0.5000, 0.2000, 0.4000]])
    """
    boxes, by = boxes.float(), by.float()
    centres, sides = boxes.chunk(2, dim=-1)
    shift, growth = by.chunk(2, dim=-1)
    return torch.cat([shift * sides + centres, growth.clamp(max=_LARGEST).exp() * sides], dim=-1)


def anchors_of(
    sizes: Sequence[tuple[int, int]], device: torch.device | None = None
) -> tuple[Float[Tensor, "m 4"], Int64[Tensor, " m"]]:
    """The boxes that the cells of maps of these rows and columns begin with, and which cells these
    are: those at the edge of large maps have none.

    >>> anchors_of([(1, 2)])[0]
    tensor([[0.2500, 0.5000, 0.0500, 0.0500],
            [0.7500, 0.5000, 0.0500, 0.0500]])
    """
    found = []
    for level, (rows, columns) in enumerate(sizes):
        # Not in torch: on paper it has no values, and in a graph which cells are kept is settled.
        x = np.tile((np.arange(columns, dtype=np.float32) + 0.5) / np.float32(columns), rows)
        y = np.repeat((np.arange(rows, dtype=np.float32) + 0.5) / np.float32(rows), columns)
        side = np.full_like(x, _SIDE * 2**level)
        found.append(np.stack([x, y, side, side], axis=1))
    anchors = np.concatenate(found)
    kept = np.flatnonzero(((anchors > _EDGE) & (anchors < 1 - _EDGE)).all(axis=1))
    return torch.from_numpy(anchors[kept]).to(device), torch.from_numpy(kept).to(device)


def decode(found: BoxPrediction, size: tuple[int, int], most: int) -> Candidates:
    """At most `most` boxes of each image, in pixels of views whose maps cover `size` (height,
    width), and cut to that.

    The best pairs of a query and a class: a query may be of two. No two need be compared, for
    queries know of each other.
    """
    edge = found.boxes.new_tensor([size[1], size[0]]).repeat(2)
    boxes = torch.minimum((corners(found.boxes) * edge).clamp(min=0), edge)
    queries, classes = found.logits.shape[1:]
    best, at = found.logits.float().sigmoid().flatten(1).topk(min(most, queries * classes), dim=1)
    own = (at // classes)[..., None].expand(-1, -1, 4)
    return Candidates(boxes.gather(1, own), best, at % classes)


def corners(boxes: Float[Tensor, "*b 4"]) -> Float[Tensor, "*b 4"]:
    """(left, top, right, bottom) of (centre x, centre y, width, height)."""
    centres, sides = boxes.chunk(2, dim=-1)
    return torch.cat([centres - sides / 2, centres + sides / 2], dim=-1)


def _waves(boxes: Float[Tensor, "b q 4"], width: int) -> Float[Tensor, "b q d"]:
    """`width` sines and cosines, in turn, of each of y, x, width and height."""
    power = torch.arange(width // 2, device=boxes.device) * (2 / width)
    angle = boxes[..., [1, 0, 2, 3], None] * (2 * math.pi) / 10_000**power
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(2)


def _cell_norm(x: Float[Tensor, "b d h w"], norm: nn.LayerNorm) -> Float[Tensor, "b d h w"]:
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _resized(width: int, scale: float, eps: float) -> nn.Module:
    """Of a map: twice the cells of half the channels, half the cells, or the map itself."""
    if scale == 2:
        return nn.ConvTranspose2d(width, width // 2, 2, 2)
    if scale == 0.5:
        return ConvNorm(width, width, 3, eps, nn.ReLU(), stride=2)
    return nn.Identity()
