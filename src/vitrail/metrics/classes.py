"""How good predictions of classes are, every number with the interval that chance could explain.

The definitions are torchmetrics', and tests/metrics/test_classes.py holds them to it. They are
written out here because a number here is one of a thousand: the bootstrap (Efron, 1979) draws the
images again, with replacement, and takes the metrics of every such draw. All of them are sums over
images, so a draw is a column of weights (how often each image was drawn) and a thousand draws are a
few matrix products. The library's functions take one draw at a time, ten times as long, and import
far more. What the intervals make of the draws, and which need none: vitrail.metrics.intervals.

Letters: n images, c classes, r draws at a time.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from vitrail.errors import DataError
from vitrail.metrics.draws import weights
from vitrail.metrics.estimate import Estimate
from vitrail.metrics.intervals import Ends, dice, from_draws, mean, share, shares

BINS = 15
"""Of the expected calibration error (arXiv 1706.04599)."""
_MOST_DRAWS, _LEAST_DRAWS = 1000, 200
_ROOM = 2 * 10**8
"""Images x classes x draws that take about two seconds on one core."""
MEASURES = (
    "top1", "top5", "map", "precision", "recall", "f1", "auroc", "exact_match", "log_loss", "ece",
)  # fmt: skip
"""All there are, in the order in which a reader wants them."""
_LEAST = torch.finfo(torch.float32).eps
"""The smallest probability that log loss knows, as scikit-learn's for float32."""

Statistic = Callable[[Float[Tensor, "n r"]], dict[str, Tensor]]
"""From weights to metrics, each `[r]`, or `[c r]` one a class; NaN where it is not defined."""


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
    """How many bootstrap draws the intervals that need any are made of."""
    summary: dict[str, Estimate | None]
    """top1, top5, precision, recall, f1, auroc, log_loss, ece; of several labels: map, f1, ...

    Precision, recall, F1, AUROC and mAP are means over classes, each counting the same. A class
    that no image shows says nothing of the model, so it does not count, unless the model claims to
    have seen it: then it was wrong each time, and precision, recall and F1 count 0 for it.
    """
    over_all_classes: dict[str, Estimate]
    """Those of them that are another number when every class counts, as 0 where the images say
    nothing of it. Which of the two a library gives (scikit-learn 1.9, torchmetrics 1.9, macro):

    one label       precision, recall, F1: the summary's, both; AUROC: torchmetrics this one,
                    scikit-learn none (an error, or NaN)
    several labels  precision, recall, F1, mAP: this one, both; AUROC: torchmetrics this one,
                    scikit-learn NaN
    """
    per_class: tuple[ClassScores, ...]
    confusion: tuple[tuple[int, ...], ...] | None
    """Images by [true class][predicted class]; None where images have several labels."""
    calibration: tuple[Bin, ...]

    @property
    def absent(self) -> tuple[int, ...]:
        """The classes that no image shows."""
        return tuple(k for k, each in enumerate(self.per_class) if not each.support)

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
        content |= {"per_class": classes, "calibration": calibration}
        every = {name: _plain(estimate) for name, estimate in self.over_all_classes.items()}
        return summary | content | {"over_all_classes": every}


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
    # Of a wrong answer the truth has what the answer leaves over, of a right one the runner-up.
    next_best = p.scatter(1, targets[:, None], -1).max(dim=1).values.clamp(min=0)
    ready = {"top1": share(right.mean().item(), n), "log_loss": _log_loss(own, next_best)}
    if c > 5:
        top5 = (p.topk(5).indices == targets[:, None]).any(dim=1).double()
        ready["top5"] = share(top5.mean().item(), n)
    gap = torch.zeros(n, BINS, dtype=torch.float64)
    gap[torch.arange(n), _bins(confidence)] = right - confidence

    def counts(weights: Float[Tensor, "n r"]) -> _Counts:
        empty = weights.new_zeros(c, weights.shape[1])
        return _Counts(
            hits=empty.index_add(0, targets, weights * right[:, None]),
            predicted=empty.index_add(0, predicted, weights),
            support=empty.index_add(0, targets, weights),
        )

    def statistic(weights: Float[Tensor, "n r"]) -> dict[str, Tensor]:
        found = _scores(counts(weights))
        areas = [auroc(p[:, k], targets == k, weights) for k in range(c)]
        found["auroc"] = torch.stack(areas)
        found["ece"] = (gap.T @ weights).abs().sum(dim=0) / n
        return found

    whole = counts(torch.ones(n, 1, dtype=torch.float64))
    confusion = torch.bincount(targets * c + predicted, minlength=c * c).reshape(c, c)
    return Metrics(
        multi_label=False,
        images=n,
        confusion=tuple(map(tuple, confusion.tolist())),
        calibration=_calibration(confidence, right),
        **_estimates(statistic, whole, n, ready, _chance_gap(confidence))._asdict(),
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
    own = torch.where(truth > 0, p, 1 - p)
    ready = {"exact_match": share(exact.mean().item(), n), "log_loss": _log_loss(own, 1 - own)}
    gap = torch.zeros(n, BINS, dtype=torch.float64).scatter_add(1, _bins(p), truth - p)

    def counts(weights: Float[Tensor, "n r"]) -> _Counts:
        return _Counts(
            hits=(predicted * truth).T @ weights,
            predicted=predicted.T @ weights,
            support=truth.T @ weights,
        )

    def statistic(weights: Float[Tensor, "n r"]) -> dict[str, Tensor]:
        found = _scores(counts(weights))
        areas = [auroc(p[:, k], truth[:, k] > 0, weights) for k in range(c)]
        precisions = [average_precision(p[:, k], truth[:, k] > 0, weights) for k in range(c)]
        found["auroc"] = torch.stack(areas)
        found["average_precision"] = torch.stack(precisions)
        found["ece"] = (gap.T @ weights).abs().sum(dim=0) / (n * c)
        return found

    whole = counts(torch.ones(n, 1, dtype=torch.float64))
    return Metrics(
        multi_label=True,
        images=n,
        confusion=None,
        calibration=_calibration(p.flatten(), truth.flatten()),
        **_estimates(statistic, whole, n, ready, _chance_gap(p.flatten()))._asdict(),
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


class _Counts(NamedTuple):
    """Images by class, drawn with weights: rightly said to be of it, said to be, being."""

    hits: Float[Tensor, "c r"]
    predicted: Float[Tensor, "c r"]
    support: Float[Tensor, "c r"]


def _scores(counts: _Counts) -> dict[str, Tensor]:
    """Precision, recall and F1 by class as their means count them: NaN is the class that is neither
    there nor predicted, 0 the one that is either.
    """
    hits, predicted, support = counts
    neither = torch.where(predicted + support > 0, 0.0, torch.nan)
    return {
        "precision": (hits / predicted).nan_to_num(0) + neither,
        "recall": (hits / support).nan_to_num(0) + neither,
        "f1": 2 * hits / (predicted + support),
    }


class _Found(NamedTuple):
    """Fields of `Metrics`."""

    draws: int
    summary: dict[str, Estimate | None]
    over_all_classes: dict[str, Estimate]
    per_class: tuple[ClassScores, ...]


def _estimates(
    statistic: Statistic, whole: _Counts, n: int, ready: Mapping[str, Estimate], chance: float
) -> _Found:
    """All numbers; `ready` are those that need no draws, `chance` is what `_chance_gap` says."""
    hits, predicted, support = (count[:, 0] for count in whole)
    c = len(support)
    trials = {  # how many images decide a class's score
        "precision": predicted,
        "recall": support,
        "f1": predicted + support - hits,
        "auroc": torch.minimum(support, n - support),
        "average_precision": support,
    }
    draws = min(max(_ROOM // (n * c), _LEAST_DRAWS), _MOST_DRAWS)
    values = statistic(torch.ones(n, 1, dtype=torch.float64))
    blocks = [statistic(weights) for weights in weights(n, draws)]
    summary: dict[str, Estimate | None] = dict(ready)
    over_all: dict[str, Estimate] = {}
    by_class: dict[str, tuple[Tensor, Ends]] = {
        "precision": (hits / predicted, shares(hits / predicted, predicted)),
        "recall": (hits / support, shares(hits / support, support)),
        "f1": (values["f1"][:, 0], dice(values["f1"][:, 0], trials["f1"])),
    }
    for name, score in values.items():
        drawn = torch.cat([block[name] for block in blocks], dim=-1)
        value = score[..., 0]
        if name == "ece":
            low, high = from_draws(value, drawn, torch.tensor(n))
            # Noise alone makes gaps, never closes them: so much of the number may be none.
            summary[name] = _estimate(value, ((low - chance).clamp(min=0), high))
            continue
        if name not in by_class:
            by_class[name] = (value, from_draws(value, drawn, trials[name]))
        counts = ~value.isnan()
        # As many as give a mean of shares this spread; of equal classes, the images of all.
        deciding = counts.sum() ** 2 / (1 / trials[name][counts].clamp(min=1)).sum()
        average = value.nanmean()
        ends = from_draws(average, drawn.nanmean(dim=0), deciding.clamp(max=n))
        found = _estimate(average, ends)
        name = _MEANS.get(name, name)
        summary[name] = found
        if found and not counts.all():
            over_all[name] = Estimate(*(end * counts.sum().item() / c for end in found))
    per_class = tuple(
        ClassScores(
            int(support[k]),
            int(predicted[k]),
            {
                name: _estimate(value[k], (low[k], high[k]))
                for name, (value, (low, high)) in by_class.items()
            },
        )
        for k in range(c)
    )
    return _Found(
        draws, {name: summary[name] for name in MEASURES if name in summary}, over_all, per_class
    )


_MEANS = {"average_precision": "map"}
"""What the mean over classes is called, where that is not what each class's score is called."""


def _estimate(value: Tensor, ends: Ends) -> Estimate | None:
    """None where the number is not defined."""
    if value.isnan():
        return None
    return Estimate(value.item(), *(end.item() for end in ends))


def _log_loss(own: Float[Tensor, "..."], otherwise: Float[Tensor, "..."]) -> Estimate:
    """Of the probabilities of what was true, and of what was not; of several labels, their mean."""
    loss, other = (-p.clamp(min=_LEAST).log().reshape(len(p), -1).mean(1) for p in (own, otherwise))
    return mean(loss, other, -math.log(_LEAST))


def _chance_gap(confidence: Float[Tensor, " n"]) -> float:
    """The calibration error that a perfectly calibrated model shows in a sample of this size, on
    average: in each bin the mean size of normal noise.
    """
    noise = torch.bincount(_bins(confidence), confidence * (1 - confidence), minlength=BINS).sqrt()
    return (math.sqrt(2 / math.pi) * noise.sum() / len(confidence)).item()


def _plain(estimate: Estimate | None) -> dict[str, float] | None:
    return None if estimate is None else estimate._asdict()
