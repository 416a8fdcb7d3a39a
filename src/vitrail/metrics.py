"""How good predictions are, every number with the interval that chance alone could explain.

The definitions are torchmetrics', and tests/test_metrics.py holds them to it. They are written out
here because a number here is one of a thousand: the bootstrap (Efron, 1979) draws the images again,
with replacement, and takes the metrics of every such draw. All of them are sums over images, so a
draw is a column of weights (how often each image was drawn) and a thousand draws are a few matrix
products. The library's functions take one draw at a time, ten times as long, and import far more.

Letters: n images, c classes, r draws at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from vitrail.errors import DataError

BINS = 15
"""Of the expected calibration error (arXiv 1706.04599)."""
SEED = 0
"""Of the bootstrap's draws: the same predictions always have the same intervals."""
_MOST_DRAWS, _LEAST_DRAWS = 1000, 200
_ROOM = 2 * 10**8
"""Images x classes x draws that take about two seconds on one core."""
_BLOCK = 64  # draws at a time: 10,000 images' weights then fit a core's cache

Statistic = Callable[[Float[Tensor, "n r"]], dict[str, Tensor]]
"""From weights to metrics, each `[r]`, or `[c r]` one a class; NaN where it is not defined."""


class Estimate(NamedTuple):
    """A number and its 95% interval: the percentile bootstrap over images."""

    value: float
    low: float
    high: float


class Bin(NamedTuple):
    """Decisions whose probability lies in (low, high]: what was promised, and what came."""

    low: float
    high: float
    decisions: int
    confidence: float
    """Mean probability of the bin's decisions."""
    accuracy: float
    """Share of them that were right."""


@dataclass(frozen=True)
class ClassScores:
    """One class. A score that its images do not define (recall without any) is None."""

    support: int
    """Images that are of the class."""
    predicted: int
    """Images that were said to be."""
    scores: dict[str, Estimate | None]
    """precision, recall, f1, auroc; average_precision where images have several labels."""


@dataclass(frozen=True)
class Metrics:
    """What predictions are worth. `summary` is in the order in which a reader wants it."""

    multi_label: bool
    images: int
    draws: int
    """How many bootstrap draws the intervals are made of."""
    summary: dict[str, Estimate | None]
    """top1, top5, precision, recall, f1, auroc, log_loss, ece; of several labels: f1, map, ...

    Precision, recall, F1, AUROC are means over classes, each class counting the same. As in
    scikit-learn and torchmetrics, a class that neither occurs nor is predicted does not count.
    """
    per_class: tuple[ClassScores, ...]
    confusion: tuple[tuple[int, ...], ...] | None
    """Images by [true class][predicted class]; None where images have several labels."""
    calibration: tuple[Bin, ...]

    @property
    def headline(self) -> str:
        """The name of the one number that stands for all: top1, or map."""
        return "map" if self.multi_label else "top1"

    def values(self) -> dict[str, float | None]:
        """The summary without its intervals."""
        return {name: None if each is None else each.value for name, each in self.summary.items()}

    def to_dict(self) -> dict[str, Any]:
        """What metrics.json holds: the summary's numbers on top, then the parts."""
        content = asdict(self)
        summary = {name: _plain(estimate) for name, estimate in self.summary.items()}
        classes = [
            {"support": each.support, "predicted": each.predicted}
            | {name: _plain(estimate) for name, estimate in each.scores.items()}
            for each in self.per_class
        ]
        calibration = [part._asdict() for part in self.calibration]
        del content["summary"]
        return summary | content | {"per_class": classes, "calibration": calibration}


def classification(probabilities: Float[Tensor, "n c"], targets: Int64[Tensor, " n"]) -> Metrics:
    """Metrics of predictions where every image has one label.

    Raises `DataError` when a probability is not a number, `ValueError` when shapes do not fit.

    >>> right, wrong = [0.9, 0.1], [0.2, 0.8]
    >>> scores = classification(torch.tensor([right, wrong, right]), torch.tensor([0, 0, 0]))
    >>> round(scores.summary["top1"].value, 3), scores.confusion
    (0.667, ((2, 1), (0, 0)))
    """
    p = _checked(probabilities, targets, dimensions=1)
    n, c = p.shape
    targets = targets.cpu()
    confidence, predicted = p.max(dim=1)
    right = (predicted == targets).double()
    own = p.gather(1, targets[:, None])[:, 0]
    means = {"top1": right}
    if c > 5:
        means["top5"] = (p.topk(5).indices == targets[:, None]).any(dim=1).double()
    log_loss = -own.clamp(min=torch.finfo(torch.float32).eps).log()
    bins = _bins(confidence)
    gap = torch.zeros(n, BINS, dtype=torch.float64)
    gap[torch.arange(n), bins] = right - confidence

    def statistic(weights: Float[Tensor, "n r"]) -> dict[str, Tensor]:
        empty = weights.new_zeros(c, weights.shape[1])
        found = {name: values @ weights / n for name, values in means.items()}
        found |= _scores(
            hits=empty.index_add(0, targets, weights * right[:, None]),
            predicted=empty.index_add(0, predicted, weights),
            support=empty.index_add(0, targets, weights),
        )
        areas = [auroc(p[:, k], targets == k, weights) for k in range(c)]
        found["class auroc"] = torch.stack(areas)
        found["auroc"] = found["class auroc"].nanmean(dim=0)
        found["log_loss"] = log_loss @ weights / n
        found["ece"] = (gap.T @ weights).abs().sum(dim=0) / n
        return found

    summary, per_class, draws = _estimates(statistic, n, c)
    confusion = torch.bincount(targets * c + predicted, minlength=c * c).reshape(c, c)
    support, said = confusion.sum(dim=1).tolist(), confusion.sum(dim=0).tolist()
    return Metrics(
        multi_label=False,
        images=n,
        draws=draws,
        summary=summary,
        per_class=tuple(map(ClassScores, support, said, per_class)),
        confusion=tuple(map(tuple, confusion.tolist())),
        calibration=_calibration(confidence, right),
    )


def multi_label(probabilities: Float[Tensor, "n c"], targets: Int[Tensor, "n c"]) -> Metrics:
    """Metrics of predictions where an image has any number of labels (`targets` zeros and ones).

    A label counts as predicted from probability 0.5 on. `map` is the mean average precision,
    `exact_match` the share of images with every label right. Raises as `classification` does.
    """
    p = _checked(probabilities, targets, dimensions=2)
    n, c = p.shape
    truth = targets.cpu().double()
    predicted = (p >= 0.5).double()
    exact = (predicted == truth).all(dim=1).double()
    chosen = torch.where(truth > 0, p, 1 - p)
    log_loss = -chosen.clamp(min=torch.finfo(torch.float32).eps).log().mean(dim=1)
    gap = torch.zeros(n, BINS, dtype=torch.float64).scatter_add(1, _bins(p), truth - p)

    def statistic(weights: Float[Tensor, "n r"]) -> dict[str, Tensor]:
        found = _scores(
            hits=(predicted * truth).T @ weights,
            predicted=predicted.T @ weights,
            support=truth.T @ weights,
        )
        areas = [auroc(p[:, k], truth[:, k] > 0, weights) for k in range(c)]
        precisions = [average_precision(p[:, k], truth[:, k] > 0, weights) for k in range(c)]
        found["class auroc"] = torch.stack(areas)
        found["class average_precision"] = torch.stack(precisions)
        found = {"map": found["class average_precision"].nanmean(dim=0)} | found
        found["auroc"] = found["class auroc"].nanmean(dim=0)
        found["exact_match"] = exact @ weights / n
        found["log_loss"] = log_loss @ weights / n
        found["ece"] = (gap.T @ weights).abs().sum(dim=0) / (n * c)
        return found

    summary, per_class, draws = _estimates(statistic, n, c)
    support = truth.sum(dim=0).long().tolist()
    said = predicted.sum(dim=0).long().tolist()
    return Metrics(
        multi_label=True,
        images=n,
        draws=draws,
        summary=summary,
        per_class=tuple(map(ClassScores, support, said, per_class)),
        confusion=None,
        calibration=_calibration(p.flatten(), truth.flatten()),
    )


def auroc(
    scores: Float[Tensor, " n"], positive: Bool[Tensor, " n"], weights: Float[Tensor, "n r"]
) -> Float[Tensor, " r"]:
    """Area under the ROC curve: how often a positive image scores above a negative one.

    Ties count half. NaN for weights under which there are no positives or no negatives.
    """
    order = scores.argsort()
    rising, positive, weights = scores[order], positive[order], weights[order]
    negative = F.pad((weights * ~positive[:, None]).cumsum(0), (0, 0, 1, 0))
    found, own = rising[positive], weights[positive]
    below = negative[torch.searchsorted(rising, found)]
    not_above = negative[torch.searchsorted(rising, found, right=True)]
    wins = (own * (below + not_above) / 2).sum(dim=0)
    return wins / (own.sum(dim=0) * negative[-1])


def average_precision(
    scores: Float[Tensor, " n"], positive: Bool[Tensor, " n"], weights: Float[Tensor, "n r"]
) -> Float[Tensor, " r"]:
    """Mean, over the positive images, of the precision among all that score at least as high.

    NaN for weights under which there are no positives.
    """
    order = (-scores).argsort()
    falling, weights = -scores[order], weights[order]
    positive = positive[order]
    found, own = falling[positive], weights[positive]
    hits = own.cumsum(0)[torch.searchsorted(found, found, right=True) - 1]
    seen = weights.cumsum(0)[torch.searchsorted(falling, found, right=True) - 1]
    # Nothing seen means that this positive was not drawn either: its precision has no weight.
    return (own * hits / seen.clamp(min=1)).sum(dim=0) / own.sum(dim=0)


def _checked(probabilities: Tensor, targets: Tensor, dimensions: int) -> Float[Tensor, "n c"]:
    """The probabilities in float64 on the CPU, where sums of weights are exact."""
    p = probabilities.detach().cpu().double()
    if p.ndim != 2 or 0 in p.shape or targets.shape != p.shape[:dimensions]:
        raise ValueError(
            f"probabilities {list(p.shape)} and targets {list(targets.shape)} do not fit: they "
            f"must be [n c] and {'[n]' if dimensions == 1 else '[n c]'}, with at least one image"
        )
    broken = (~p.isfinite()).any(dim=1).sum().item()
    if broken:
        raise DataError(
            f"the model's probabilities are not numbers for {broken} of {len(p)} images: its "
            f"weights are damaged, or training went astray. Use an earlier checkpoint"
        )
    return p


def _bins(confidence: Tensor) -> Tensor:
    """The calibration bin of each probability; as torchmetrics, (low, high]."""
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)
    return (torch.bucketize(confidence, edges) - 1).clamp(0, BINS - 1)


def _calibration(confidence: Tensor, right: Tensor) -> tuple[Bin, ...]:
    """The bins that hold any decision."""
    bins = _bins(confidence)
    count = torch.bincount(bins, minlength=BINS)
    promised = torch.bincount(bins, confidence, minlength=BINS) / count
    came = torch.bincount(bins, right, minlength=BINS) / count
    rows = zip(count.tolist(), promised.tolist(), came.tolist(), strict=True)
    return tuple(Bin(i / BINS, (i + 1) / BINS, *row) for i, row in enumerate(rows) if row[0])


def _scores(hits: Tensor, predicted: Tensor, support: Tensor) -> dict[str, Tensor]:
    """Precision, recall, F1 by class and their means, from weighted counts `[c r]`."""
    by_class = {
        "precision": hits / predicted,
        "recall": hits / support,
        "f1": 2 * hits / (predicted + support),
    }
    counts = predicted + support > 0
    means = {
        name: values.nan_to_num(0).sum(dim=0) / counts.sum(dim=0)
        for name, values in by_class.items()
    }
    return means | {f"class {name}": values for name, values in by_class.items()}


def _weights(n: int, draws: int) -> Iterator[Float[Tensor, "n r"]]:
    """How often each image is in each draw, some draws at a time."""
    generator = torch.Generator().manual_seed(SEED)
    for start in range(0, draws, _BLOCK):
        shape = (min(_BLOCK, draws - start), n)
        drawn = torch.randint(n, shape, generator=generator)
        ones = torch.ones(1, 1, dtype=torch.float64).expand(shape)
        yield torch.zeros(shape, dtype=torch.float64).scatter_add_(1, drawn, ones).T.contiguous()


def _estimates(
    statistic: Statistic, n: int, c: int
) -> tuple[dict[str, Estimate | None], list[dict[str, Estimate | None]], int]:
    """Summary, scores by class, and the number of draws that their intervals took."""
    draws = min(max(_ROOM // (n * c), _LEAST_DRAWS), _MOST_DRAWS)
    values = statistic(torch.ones(n, 1, dtype=torch.float64))
    blocks = [statistic(weights) for weights in _weights(n, draws)]
    edges = torch.tensor([0.025, 0.975], dtype=torch.float64)
    summary: dict[str, Estimate | None] = {}
    per_class: list[dict[str, Estimate | None]] = [{} for _ in range(c)]
    for name, value in values.items():
        drawn = torch.cat([block[name] for block in blocks], dim=-1)
        low, high = drawn.nanquantile(edges, dim=-1)
        if value.ndim == 1:
            summary[name] = _estimate(value, low, high)
        else:
            for k, scores in enumerate(per_class):
                scores[name.removeprefix("class ")] = _estimate(value[k], low[k], high[k])
    return summary, per_class, draws


def _estimate(value: Tensor, low: Tensor, high: Tensor) -> Estimate | None:
    """None where the number is not defined."""
    if value.isnan().any():
        return None
    return Estimate(value.item(), low.item(), high.item())


def _plain(estimate: Estimate | None) -> dict[str, float] | None:
    return None if estimate is None else estimate._asdict()
