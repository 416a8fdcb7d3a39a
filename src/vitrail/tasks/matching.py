"""Sets against sets: which query is to say which object, and how wrong it is then.

The loss of Mask2Former (Cheng et al., arXiv 2112.01527, section 3.2) and EoMT (2503.19108): every
object gets the one query that is nearest to it by class and mask, all in all (DETR, 2005.12872,
eq. 1); the others are to say that they have none. Masks are compared at some points, most of them
where a query is least sure (PointRend, 1912.08193, section 3.1).

Letters: b batch, q queries, c classes, m objects of an image or of all, h w cells of predicted
masks, H W pixels of the objects', p points, r k rows and columns of costs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.data.keyed import uniform
from vitrail.errors import UsageError, setting
from vitrail.heads import Prediction

Draw = Callable[[int, tuple[int, ...]], Float[Tensor, "..."]]
"""Numbers in [0, 1) of a shape, for the image of that place in the batch."""


@dataclass(frozen=True, kw_only=True)
class SetLossConfig:
    """How much each part of the loss counts, in the matching too, and where masks are compared."""

    class_weight: float = 2.0
    mask_weight: float = 5.0
    """Of the cross entropy of each point."""
    dice_weight: float = 5.0
    no_object: float = 0.1
    """How much a query without an object counts in the class's cross entropy."""
    points: int | None = 12544
    """At how many points masks are compared; None: at the centres of all pixels."""
    oversample: float = 3.0
    """How many times as many points are drawn, for the least sure of them to be taken."""
    importance: float = 0.75
    """Which share of the points are those; the others are drawn alike everywhere."""

    def __post_init__(self) -> None:
        """Raise `UsageError` for what makes no sense."""
        for field in ("class_weight", "mask_weight", "dice_weight", "no_object"):
            if getattr(self, field) < 0:
                raise UsageError(f"{setting(field)} cannot be negative")
        if self.points is not None and self.points < 1:
            raise UsageError(f"{setting('points')} must be at least 1, not {self.points}")
        if self.oversample < 1:
            raise UsageError(f"{setting('oversample')} must be at least 1, not {self.oversample}")
        if not 0 <= self.importance <= 1:
            raise UsageError(f"{setting('importance')} must be in [0, 1], not {self.importance}")


class Objects(NamedTuple):
    """What there is in an image."""

    classes: Int[Tensor, " m"]
    masks: Bool[Tensor, "m H W"]
    """They cover the image as the predicted masks do: where its size is no whole number of their
    cells, pad it to one."""


class SetLosses(NamedTuple):
    """The parts, each with its weight and summed over all predictions, and their sum."""

    total: Float[Tensor, ""]
    classes: Float[Tensor, ""]
    masks: Float[Tensor, ""]
    dice: Float[Tensor, ""]


def objects_of(labels: Int[Tensor, "H W"], ignored: int = 255) -> Objects:
    """One object of each class that an image has, of all its pixels of that class.

    >>> objects_of(torch.tensor([[3, 3], [255, 0]])).classes
    tensor([0, 3])
    """
    classes = labels.unique()
    classes = classes[classes != ignored]
    return Objects(classes.long(), labels == classes[:, None, None])


def keyed_draw(seed: int, epoch: int, indices: Int[np.ndarray, " b"]) -> Draw:
    """The draws of a step: an image's depend on (seed, epoch, index) alone, not on its batch."""
    parts = (uniform(seed, epoch, indices, "points", 2) * 2**24).astype(np.int64)
    generators = [torch.Generator().manual_seed(int(a) << 24 | int(b)) for a, b in parts]
    return lambda i, shape: torch.rand(shape, generator=generators[i])


def assign(cost: Float[np.ndarray, "r k"]) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """The pairs of a row and a column, `min(r, k)` of them, that cost least all in all; exact.

    Rows ascend. Costs that are no numbers are taken only where there is nothing else. By shortest
    augmenting paths (Jonker and Volgenant, Computing 38, 1987; Crouse, IEEE TAES 52, 2016): at most
    `n * n * max(r, k)` steps.

    >>> rows, columns = assign(np.array([[4.0, 1.0, 3.0], [2.0, 0.0, 5.0]]))
    >>> rows.tolist(), columns.tolist()
    ([0, 1], [1, 0])
    """
    if cost.shape[0] > cost.shape[1]:
        columns, rows = assign(cost.T)
        order = np.argsort(rows)
        return rows[order], columns[order]
    cost = _finite(cost)
    count, width = cost.shape
    if not count:
        return np.arange(0), np.arange(0)
    of_rows, of_columns = cost.min(axis=1), np.zeros(width)  # prices: the rest is never below 0
    column_of, row_of = np.full(count, -1), np.full(width, -1)
    for row, column in enumerate(cost.argmin(axis=1).tolist()):  # most want one that is free
        if row_of[column] < 0:
            row_of[column], column_of[row] = row, column
    for row in np.flatnonzero(column_of < 0).tolist():
        nearest, done = np.full(width, np.inf), np.zeros(width, dtype=bool)
        before = np.full(width, -1)  # the row from which a column is reached at the least cost
        at, length = row, 0.0
        while True:
            through = length + cost[at] - of_rows[at] - of_columns
            better = ~done & (through < nearest)
            nearest[better], before[better] = through[better], at
            column = int(np.where(done, np.inf, nearest).argmin())
            length, done[column] = float(nearest[column]), True
            if row_of[column] < 0:
                break
            at = int(row_of[column])
        passed = np.flatnonzero(done & (row_of >= 0))
        of_rows[row] += length
        of_rows[row_of[passed]] += length - nearest[passed]
        of_columns[passed] -= length - nearest[passed]
        while column >= 0:  # each row on the path takes the column after it, and leaves its own
            at = int(before[column])
            row_of[column] = at
            column, column_of[at] = int(column_of[at]), column
    return np.arange(count), column_of


def _finite(cost: Float[np.ndarray, "r k"]) -> Float[np.ndarray, "r k"]:
    """With costs that are no numbers larger than all others of an assignment together."""
    cost = cost.astype(np.float64)
    known = np.isfinite(cost)
    if known.all():
        return cost
    low, high = (cost[known].min(), cost[known].max()) if known.any() else (0.0, 0.0)
    return np.where(known, cost, high + (high - low) * len(cost) + 1)


def set_loss(
    predictions: Sequence[Prediction],
    objects: Sequence[Objects],
    config: SetLossConfig | None = None,
    draw: Draw | None = None,
    count: float | None = None,
) -> SetLosses:
    """The loss of what the queries said, each time, of images with these objects.

    `draw` is asked for the points, where those are not all pixels. `count`: by how many objects the
    masks' losses are divided; None is all of the batch. Of several processes, give their mean.
    """
    config = config or SetLossConfig()
    if config.points is not None and draw is None:
        raise UsageError(
            f"{setting('points', config.points)} are drawn: give draw=, or "
            f"{setting('points', None)} for all pixels"
        )
    if count is None:
        count = sum(len(one.classes) for one in objects)
    parts = [_losses(one, objects, config, draw, max(float(count), 1.0)) for one in predictions]
    classes, masks, dice = (torch.stack(part).sum() for part in zip(*parts, strict=True))
    return SetLosses(classes + masks + dice, classes, masks, dice)


def matched(
    found: Prediction,
    objects: Sequence[Objects],
    config: SetLossConfig,
    draw: Draw | None,
) -> list[tuple[Int[Tensor, " n"], Int[Tensor, " n"]]]:
    """Of each image the queries, ascending, and the object that each of them gets."""
    pairs = []
    # Products of sums over thousands of points: in bfloat16 near costs would be equal ones.
    with torch.no_grad(), torch.autocast(found.masks.device.type, enabled=False):
        for i, one in enumerate(objects):
            logits = found.masks[i].float()
            if config.points is None or draw is None:
                at, shown = _all(logits, one.masks), one.masks.flatten(1).to(logits)
            else:
                points = draw(i, (1, config.points, 2)).to(logits.device)
                at, shown = _read(logits, points), _read(one.masks.to(logits), points)
            classes = found.classes[i].float().softmax(dim=-1)[:, one.classes]
            cost = (
                config.mask_weight * _entropies(at, shown)
                + config.dice_weight * _dices(at, shown)
                - config.class_weight * classes
            )
            rows, columns = assign(cost.cpu().numpy())
            pairs.append(tuple(torch.from_numpy(x).to(logits.device) for x in (rows, columns)))
    return pairs  # type: ignore[return-value]  # two each


def _losses(
    found: Prediction,
    objects: Sequence[Objects],
    config: SetLossConfig,
    draw: Draw | None,
    count: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of classes, points and dice, each with its weight."""
    pairs = matched(found, objects, config, draw)
    logits = found.classes.float()
    none = logits.shape[2] - 1
    wanted = torch.full(logits.shape[:2], none, device=logits.device)
    for i, (rows, columns) in enumerate(pairs):
        wanted[i, rows] = objects[i].classes[columns]
    weight = torch.ones(none + 1, device=logits.device)
    weight[none] = config.no_object
    classes = F.cross_entropy(logits.transpose(1, 2), wanted, weight)
    masks = [found.masks[i, rows].float() for i, (rows, _) in enumerate(pairs)]
    shown = [objects[i].masks[columns] for i, (_, columns) in enumerate(pairs)]
    if config.points is None or draw is None:
        at = [_all(mask, true) for mask, true in zip(masks, shown, strict=True)]
        truths = [true.flatten(1).to(mask) for mask, true in zip(masks, shown, strict=True)]
    else:
        points = _unsure(masks, config, draw)
        at = [_read(mask, where) for mask, where in zip(masks, points, strict=True)]
        truths = [
            _read(true.to(mask), where)
            for mask, true, where in zip(masks, shown, points, strict=True)
        ]
    entropy = torch.stack(
        [
            F.binary_cross_entropy_with_logits(x, y, reduction="none").mean(dim=1).sum()
            for x, y in zip(at, truths, strict=True)
        ]
    )
    dice = torch.stack([_dice(x, y).sum() for x, y in zip(at, truths, strict=True)])
    return (
        config.class_weight * classes,
        config.mask_weight * entropy.sum() / count,
        config.dice_weight * dice.sum() / count,
    )


def _unsure(masks: list[Tensor], config: SetLossConfig, draw: Draw) -> list[Tensor]:
    """For each image the points `[m p 2]` of each of its masks' logits `[m h w]`, (x, y) from 0 to
    1: most of them where the logits are nearest to 0.
    """
    assert config.points is not None
    sure = int(config.importance * config.points)
    device = [mask.device for mask in masks]
    with torch.no_grad():
        chosen = []
        for i, mask in enumerate(masks):
            many = draw(i, (len(mask), int(config.points * config.oversample), 2)).to(device[i])
            best = _read(mask, many).abs().neg().topk(sure, dim=1).indices
            chosen.append(many.gather(1, best[..., None].expand(-1, -1, 2)))
        return [
            torch.cat([points, draw(i, (len(points), config.points - sure, 2)).to(points)], dim=1)
            for i, points in enumerate(chosen)
        ]


def _read(masks: Float[Tensor, "m h w"], points: Float[Tensor, "_m p 2"]) -> Float[Tensor, "m p"]:
    """The masks at points of their own, or of all of them, bilinearly; beyond the border lie zeros,
    as in Mask2Former's code.
    """
    if not len(masks):
        return _none_of(masks, points.shape[1])
    grid = (2 * points - 1)[:, None].expand(len(masks), -1, -1, -1)
    return F.grid_sample(masks[:, None], grid.to(masks), align_corners=False)[:, 0, 0]


def _all(masks: Float[Tensor, "m h w"], like: Bool[Tensor, "n H W"]) -> Float[Tensor, "m p"]:
    """The masks at the centres of all pixels of others, bilinearly."""
    if not len(masks):
        return _none_of(masks, like.shape[1] * like.shape[2])
    return F.interpolate(masks[:, None], like.shape[1:], mode="bilinear").flatten(1)


def _none_of(masks: Float[Tensor, "m h w"], points: int) -> Float[Tensor, "m p"]:
    """Of no masks, no numbers; but with a gradient, which processes wait for from each other."""
    return masks.flatten(1)[:, :1].expand(-1, points)


def _entropies(x: Float[Tensor, "q p"], y: Float[Tensor, "m p"]) -> Float[Tensor, "q m"]:
    """The mean cross entropy of each with each."""
    return (F.softplus(-x) @ y.T + F.softplus(x) @ (1 - y).T) / x.shape[1]


def _dices(x: Float[Tensor, "q p"], y: Float[Tensor, "m p"]) -> Float[Tensor, "q m"]:
    """`_dice` of each with each."""
    shares = x.sigmoid()
    return 1 - (2 * shares @ y.T + 1) / (shares.sum(1)[:, None] + y.sum(1) + 1)


def _dice(x: Float[Tensor, "m p"], y: Float[Tensor, "m p"]) -> Float[Tensor, " m"]:
    """How little two masks overlap, of both together (V-Net, arXiv 1606.04797); one point more in
    each keeps empty ones from dividing by 0.
    """
    shares = x.sigmoid()
    return 1 - (2 * (shares * y).sum(1) + 1) / (shares.sum(1) + y.sum(1) + 1)
