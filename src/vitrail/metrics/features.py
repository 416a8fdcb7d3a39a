"""How good features are that nobody has taught classes: every number with its interval.

    knn      the share of images whose class the images nearest to each have, of all others
    probe    the same of a linear map from features to classes, solved without each image in turn
    std      how far the features spread: 1 where they fill all directions alike, 0 where all images
             have become one point
    rankme   how many directions they use, of `dimensions`
    alpha_req  by which power the variances of their directions fall, the largest first: features
             that serve have about 1; more is that few directions hold all, less that noise does

The first two need classes, the others do not. knn is DINO's weighted vote (Caron et al., arXiv
2104.14294, and before it Wu et al., 1805.01978): k 20, temperature 0.07. Published numbers ask the
training images about the validation ones, and so does `knn`; where there are none to be asked the
measured images are asked about each other (`leave_one_out`), which gives less, for there are fewer.

Letters: n images, m images that are asked, d features, c classes, r draws.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from vitrail.errors import DataError
from vitrail.metrics.draws import weights
from vitrail.metrics.estimate import Estimate
from vitrail.metrics.intervals import from_draws, share

_AT_ONCE = 1024
"""Images whose likeness to all others is held at once."""
_MOST_DRAWS, _LEAST_DRAWS = 200, 20
_ROOM = 2 * 10**10
"""Sums of products that take some seconds on one core."""
_ROUNDING = 1e-10
"""The share of the greatest variance that is none."""
_STRENGTHS = tuple(10.0**exponent for exponent in range(-4, 3))
"""Of the probe, as shares of the features' mean variance."""


@dataclass(frozen=True)
class FeatureMetrics:
    """What features are worth. `summary` is in the order in which a reader wants it."""

    images: int
    dimensions: int
    """Of the features: what `rankme` could be at most."""
    draws: int
    """How many bootstrap draws the intervals that need any are made of."""
    neighbours: int | None
    """How many vote; None without classes."""
    temperature: float | None
    """What likenesses are divided by, to vote with; None without classes."""
    bank: int | None
    """How many training images vote; None: the other ones of these."""
    chance: float | None
    """The share of images that are of the most frequent class: what knowing nothing gives."""
    summary: dict[str, Estimate | None]
    """knn, probe (with classes), std, rankme, alpha_req; None where there are too few images to
    tell.
    """

    @property
    def headline(self) -> str:
        """Where classes are known knn, else rankme."""
        return "knn" if "knn" in self.summary else "rankme"

    def values(self) -> dict[str, float | None]:
        """The summary without its intervals."""
        return {name: None if each is None else each.value for name, each in self.summary.items()}

    def to_dict(self) -> dict[str, Any]:
        """What metrics.json holds: the summary's numbers on top, then the parts."""
        numbers = {
            name: None if each is None else each._asdict() for name, each in self.summary.items()
        }
        return {
            **numbers,
            "images": self.images,
            "dimensions": self.dimensions,
            "draws": self.draws,
            "neighbours": self.neighbours,
            "temperature": self.temperature,
            "bank": self.bank,
            "chance": self.chance,
        }


def judged(
    features: Float[Tensor, "n d"],
    classes: Float[Tensor, "n c"] | None = None,
    *,
    k: int = 20,
    temperature: float = 0.07,
    votes: Float[Tensor, "n c"] | None = None,
    bank: int | None = None,
) -> FeatureMetrics:
    """Metrics of the features of at least one image, of any length each.

    `classes`: which each image is of, as shares or as zeros and ones; None: nobody knows. An image
    of several counts as right where the one that is told is among them. `votes`: of how many other
    images (`bank`), as `knn` gives them; None: of the others among these.

    Raises `DataError` when a feature is not a number.
    """
    x = _checked(features)
    n, d = x.shape
    summary: dict[str, Estimate | None] = {}
    chance = None
    if classes is not None:
        of = classes.detach().cpu().double()
        chance = (of > 0).double().mean(dim=0).max().item()
        said = {}
        if n > 1:
            near = leave_one_out(x, of, k=k, temperature=temperature)
            said = {"probe": probe(x, of), "knn": near}
        if votes is not None:
            said["knn"] = votes.cpu()
        for name in ("knn", "probe"):
            right = rights(said[name], of).double().mean().item() if name in said else None
            summary[name] = None if right is None else share(right, n)
    least = min(n, d)
    draws = min(max(_ROOM // (n * d * least + 40 * least**3), _LEAST_DRAWS), _MOST_DRAWS)
    spreads, ranks, powers = [], [], []
    for drawn in weights(n, draws):
        spreads.append(_spread(x, drawn))
        ranks.append(_rank(x, drawn))
        powers.append(_power(x, drawn))
    count = torch.tensor(n)
    for name, value, draw, floor, most in (
        ("std", spread(x), torch.cat(spreads), 0.0, 1.0),
        ("rankme", torch.tensor(rankme(x), dtype=torch.float64), torch.cat(ranks), 1.0, float(d)),
    ):
        room = max(most - floor, 1e-9)
        part, parts = (((each - floor) / room).clamp(0, 1) for each in (value, draw))
        low, high = (floor + room * end.item() for end in from_draws(part, parts, count))
        # The formula of one direction gives a little less than 1.
        summary[name] = Estimate(value.item(), min(low, value.item()), high)
    summary["alpha_req"] = _decay(x, torch.cat(powers))
    return FeatureMetrics(
        images=n,
        dimensions=d,
        draws=draws,
        neighbours=None if classes is None else k,
        temperature=None if classes is None else temperature,
        bank=bank,
        chance=chance,
        summary=summary,
    )


def knn(
    features: Float[Tensor, "n d"],
    bank: Float[Tensor, "m d"],
    classes: Float[Tensor, "m c"],
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> Float[Tensor, "n c"]:
    """The votes for each class: of the `k` images of the bank that are most like an image, each
    exp(likeness / temperature) for its `classes`. Likeness is the cosine.

    >>> bank, classes = torch.tensor([[1.0, 0], [0, 1]]), torch.eye(2)
    >>> knn(torch.tensor([[0.9, 0.1]]), bank, classes).argmax(dim=1).tolist()
    [0]
    """
    return _votes(features, bank, classes, k, temperature, own=False)


def leave_one_out(
    features: Float[Tensor, "n d"],
    classes: Float[Tensor, "n c"],
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> Float[Tensor, "n c"]:
    """`knn` among images themselves, none of which has a vote on itself. One image gets none."""
    return _votes(features, features, classes, k, temperature, own=True)


class Nearest(NamedTuple):
    """Of each image the other one that is most like it."""

    which: Int64[Tensor, " n"]
    likeness: Float[Tensor, " n"]
    """The cosine; -inf where there is no other image."""


def nearest(features: Float[Tensor, "n d"]) -> Nearest:
    """Among images themselves."""
    x = F.normalize(features.detach().float(), dim=1)
    found = [_likeness(x, x, start, own=True).max(dim=1) for start in range(0, len(x), _AT_ONCE)]
    return Nearest(
        torch.cat([each.indices for each in found]), torch.cat([each.values for each in found])
    )


def rights(votes: Float[Tensor, "n c"], classes: Float[Tensor, "n c"]) -> Bool[Tensor, " n"]:
    """Whether the class with the most votes is one that the image has."""
    return classes.to(votes.device).gather(1, votes.argmax(dim=1, keepdim=True))[:, 0] > 0


def probe(features: Float[Tensor, "n d"], classes: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    """What a linear map from the features of all other images says of each.

    Ridge regression onto the classes, with an intercept that is not held back. Fitted values are
    H y, of one matrix H, and what a fit without image i says of it is then exactly
    (H y - h y)_i / (1 - h), h = H_ii (Allen, Technometrics 16, 1974). Of seven strengths the one
    with the least such error is taken.
    """
    x, y = features.detach().cpu().double(), classes.detach().cpu().double()
    n = len(x)
    x, mean = x - x.mean(dim=0), y.mean(dim=0)
    variances, axes = torch.linalg.eigh(x.T @ x / n)
    seen, scale = x @ axes, variances.mean().clamp(min=1e-300)
    found = []
    for strength in _STRENGTHS:
        shrunk = seen / (variances.clamp(min=0) + strength * scale) / n
        fitted = mean + shrunk @ (seen.T @ (y - mean))
        own = (shrunk * seen).sum(dim=1, keepdim=True) + 1 / n
        others = (fitted - own * y) / (1 - own).clamp(min=1e-9)
        found.append(((others - y).square().mean().item(), others))
    return min(found, key=lambda each: each[0])[1]


def rankme(features: Float[Tensor, "n d"]) -> float:
    """How many directions the features use, from 1 to d (Garrido et al., arXiv 2210.02885).

    exp(-sum p ln p), p = s / sum s + 1e-7 of the singular values s. The paper takes 25,600 images;
    fewer than some times d have less to show, and features are compared on the same images only.
    """
    x = features.detach().cpu().double()
    return _rank(x, torch.ones(len(x), 1, dtype=torch.float64)).item()


def alpha_req(features: Float[Tensor, "n d"]) -> float:
    """By which power the eigenvalues of the features' covariance fall: the i-th is about i^-alpha
    (Agrawal et al., NeurIPS 2022, "alpha-ReQ"). The slope of log over log by least squares, over
    all that are more than rounding; nan of fewer than three.
    """
    x = features.detach().cpu().double()
    return _power(x, torch.ones(len(x), 1, dtype=torch.float64)).item()


def spread(features: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """The deviation of features of length 1 over the images, a mean over their d numbers, in units
    of 1 / sqrt(d): 1 where they point everywhere alike, 0 where they have become one (SimSiam,
    arXiv 2011.10566, section 4.1).
    """
    x = features.detach().double()
    return _spread(x, torch.ones(len(x), 1, dtype=torch.float64, device=x.device))[0]


def _checked(features: Tensor) -> Float[Tensor, "n d"]:
    x = features.detach().cpu().double()
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"features are {list(x.shape)}: they must be [n d], of one image at least")
    if broken := (~x.isfinite()).any(dim=1).sum().item():
        raise DataError(
            f"the model's features are not numbers for {broken} of {len(x)} images: its weights "
            f"are damaged, or training went astray. Use an earlier checkpoint"
        )
    return x


def _votes(
    features: Tensor, bank: Tensor, classes: Tensor, k: int, temperature: float, *, own: bool
) -> Float[Tensor, "n c"]:
    x, bank = (F.normalize(each.detach().float(), dim=1) for each in (features, bank))
    classes = classes.to(x)
    k = min(k, len(bank) - own)
    votes = x.new_zeros(len(x), classes.shape[1])
    for start in range(0, len(x), _AT_ONCE):
        near, which = _likeness(x, bank, start, own=own).topk(k, dim=1)
        # Of one image's votes only their shares matter: so the largest is 1, and none overflows.
        weights = ((near - near[:, :1]) / temperature).exp()
        votes[start : start + _AT_ONCE] = (weights[:, :, None] * classes[which]).sum(dim=1)
    return votes


def _likeness(x: Tensor, bank: Tensor, start: int, *, own: bool) -> Float[Tensor, "some m"]:
    """Of some rows of `x` and all of the bank; `own`: it is x, and none is like itself."""
    alike = x[start : start + _AT_ONCE] @ bank.T
    if own:
        alike.diagonal(start).fill_(-torch.inf)
    return alike


def _spread(x: Float[Tensor, "n d"], weights: Float[Tensor, "n r"]) -> Float[Tensor, " r"]:
    """By how often each image was drawn."""
    x = F.normalize(x, dim=1)
    total = weights.sum(dim=0)[:, None].clamp(min=1)
    variance = weights.T @ x.square() / total - (weights.T @ x / total).square()
    return variance.clamp(min=0).sqrt().mean(dim=1) * math.sqrt(x.shape[1])


def _rank(x: Float[Tensor, "n d"], weights: Float[Tensor, "n r"]) -> Float[Tensor, " r"]:
    """By how often each image was drawn: of a row n times, a singular value is as of sqrt(n) x."""
    ranks = []
    for column in weights.T:
        rows = x[column > 0] * column[column > 0].sqrt()[:, None]
        gram = rows.T @ rows if rows.shape[0] > rows.shape[1] else rows @ rows.T
        singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
        p = singular / singular.sum().clamp(min=1e-300) + 1e-7
        ranks.append((-(p * p.log()).sum()).exp())
    return torch.stack(ranks)


def _power(x: Float[Tensor, "n d"], weights: Float[Tensor, "n r"]) -> Float[Tensor, " r"]:
    """By how often each image was drawn."""
    powers = []
    for column in weights.T:
        drawn = column > 0
        share = column[drawn][:, None] / column.sum().clamp(min=1)
        rows = (x[drawn] - (x[drawn] * share).sum(dim=0)) * share.sqrt()
        gram = rows.T @ rows if rows.shape[0] > rows.shape[1] else rows @ rows.T
        values = torch.linalg.eigvalsh(gram).flip(0)
        # Of features that have become one, what is left is the rounding of their mean.
        least = _ROUNDING * torch.maximum(
            values[0], _ROUNDING * x[drawn].square().sum(dim=1).mean()
        )
        values = values[values > least]
        if len(values) < 3:
            powers.append(x.new_tensor(math.nan))
            continue
        place = torch.arange(1, len(values) + 1, dtype=x.dtype).log()
        place, height = place - place.mean(), values.log() - values.log().mean()
        powers.append(-(place * height).sum() / place.square().sum())
    return torch.stack(powers)


def _decay(x: Float[Tensor, "n d"], draws: Float[Tensor, " r"]) -> Estimate | None:
    """With its interval from draws; None where there are too few directions to tell."""
    value, draws = alpha_req(x), draws[draws.isfinite()]
    if not math.isfinite(value) or not len(draws):
        return None
    # Draws repeat images, and so have steeper spectra: their deviations count, not their places.
    low, high = (draws - draws.mean()).quantile(draws.new_tensor([0.025, 0.975])).tolist()
    return Estimate(value, value + min(low, 0.0), value + max(high, 0.0))
