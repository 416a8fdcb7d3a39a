"""95% intervals that hold at the edges: all right, few images, no two draws that differ.

What every sample happened to agree on is not certain: 2 images of 2 right say little about the
third. So no interval here is without width, and all rest on one thought, Agresti's and Coull's (The
American Statistician 52, 1998): the doubt of an image or two more is added before anything is said.

share       of images: exact coverage, summed over all outcomes, is at least 93% for any number of
            images and any share from 0.5 to 0.99 (tests/metrics/test_intervals.py)
from_draws  of a mean over classes or an area: as many images as would spread a share so far
mean        of a loss
paired      of two models on the same images, by hits; paired_scores by scores

The percentile bootstrap, which they replace, holds a true 97% on 30 images in 61% of samples.
Letters: r draws; `...` any shape.
"""

from statistics import NormalDist

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.metrics.estimate import Estimate

Z = NormalDist().inv_cdf(0.975)
_CORRECTED = 20
"""With fewer trials Agresti's and Coull's interval of a share holds less than 93% (83% of 2)."""


Ends = tuple[Float[Tensor, "..."], Float[Tensor, "..."]]
"""Low and high of intervals; NaN where the value is."""


def share(value: float, trials: float) -> Estimate:
    """The interval of a share of so many images.

    >>> tuple(round(end, 3) for end in share(1.0, 2))
    (1.0, 0.198, 1.0)
    >>> tuple(round(end, 3) for end in share(0.83, 364))
    (0.83, 0.788, 0.865)
    """
    low, high = shares(
        torch.tensor(value, dtype=torch.float64), torch.tensor(trials, dtype=torch.float64)
    )
    return Estimate(value, low.item(), high.item())


def shares(value: Float[Tensor, "..."], trials: Float[Tensor, "..."]) -> Ends:
    """The intervals of shares of so many images each; `trials` need not be whole.

    Agresti's and Coull's; of fewer than 20 Wilson's with continuity correction (Newcombe,
    Statistics in Medicine 17, 1998), which is the wider one.
    """
    m, z2 = trials.clamp(min=1).to(value.dtype), Z**2
    centre = (value * m + z2 / 2) / (m + z2)
    half = Z * (centre * (1 - centre) / (m + z2)).sqrt()
    below = (z2 - 2 - 1 / m + 4 * value * (m * (1 - value) + 1)).clamp(min=0).sqrt()
    above = (z2 + 2 - 1 / m + 4 * value * (m * (1 - value) - 1)).clamp(min=0).sqrt()
    low = centre - (1 + Z * below) / (2 * (m + z2))
    high = centre + (1 + Z * above) / (2 * (m + z2))
    few = m < _CORRECTED
    low, high = torch.where(few, low, centre - half), torch.where(few, high, centre + half)
    return torch.minimum(low, value).clamp(min=0), torch.maximum(high, value).clamp(max=1)


def dice(value: Float[Tensor, "..."], trials: Float[Tensor, "..."]) -> Ends:
    """The intervals of F1 scores: 2 j / (1 + j) of the share j of hits among `trials`, the images
    that are of a class or said to be.
    """
    low, high = shares(value / (2 - value), trials)
    return 2 * low / (1 + low), 2 * high / (1 + high)


def from_draws(
    value: Float[Tensor, "..."], draws: Float[Tensor, "... r"], trials: Float[Tensor, "..."]
) -> Ends:
    """The intervals of numbers between 0 and 1 that are no shares, from bootstrap draws of them.

    Each is that of a share of the same value, of so many images that it would spread as far: the
    effective sample size of surveys (Korn and Graubard, Survey Methodology 24, 1998). `trials` is
    how many images decide the number. The doubt of one of them is added to spread and share alike:
    where no draw differs, there are so many images as there are, and not infinitely many.
    """
    spread = (draws - value[..., None]).square().nanmean(dim=-1).nan_to_num(0)
    one = 1 / trials.clamp(min=1).to(value.dtype)
    return shares(value, (value * (1 - value) + one) / (spread + one**2))


def estimates(
    value: Float[Tensor, "*c"], draws: Float[Tensor, "*c r"], trials: Float[Tensor, "*c"]
) -> list[Estimate | None]:
    """Each number with its interval, as `from_draws` has it; None where it is not defined."""
    low, high = from_draws(value, draws, trials)
    ends = (each.reshape(-1).tolist() for each in (value, low, high))
    return [None if v != v else Estimate(v, a, b) for v, a, b in zip(*ends, strict=True)]


def mean_of_classes(
    value: Float[Tensor, " c"],
    draws: Float[Tensor, "c r"],
    trials: Int[Tensor, " c"],
    images: Float[Tensor, ""],
) -> Estimate | None:
    """The mean over the classes that have the score; each is decided by so many `trials`, all of
    them by so many `images`.
    """
    counts = ~value.isnan()
    # As many as give a mean of shares this spread; of equal classes, the images of all.
    deciding = counts.sum() ** 2 / (1 / trials[counts].double().clamp(min=1)).sum()
    return estimates(value.nanmean(), draws.nanmean(0), deciding.clamp(max=images))[0]


def mean(values: Float[Tensor, " n"], otherwise: Float[Tensor, " n"], most: float) -> Estimate:
    """The interval of the mean of losses between 0 and `most`.

    `otherwise` is what each would be had something else been true: to the spread of the mean comes
    that of one such image more. A model that was never wrong on 20 images may be on the next.
    """
    n, value = len(values), values.mean()
    spread = values.var(correction=0) / max(n - 1, 1) + ((otherwise.mean() - value) / n) ** 2
    low, high = value - Z * spread.sqrt(), value + Z * spread.sqrt()
    if n == 1:  # of which no spread is known
        low, high = torch.zeros(()), torch.tensor(most)
    return Estimate(value.item(), max(low.item(), 0.0), min(high.item(), most))


def paired(gained: int, lost: int, images: int) -> Estimate:
    """How much better one model is than another on the same images, as a difference of shares.

    `gained` images only the first has right, `lost` only the second. Bonett's and Price's adjusted
    Wald interval (British Journal of Mathematical and Statistical Psychology 65, 2012), which
    Fagerland, Lydersen and Laake recommend (Statistics in Medicine 33, 2014).

    >>> tuple(round(end, 3) for end in paired(0, 0, 20))
    (0.0, -0.126, 0.126)
    """
    p, q = (gained + 1) / (images + 2), (lost + 1) / (images + 2)
    half = Z * ((p + q - (p - q) ** 2) / (images + 2)) ** 0.5
    value = (gained - lost) / images
    return Estimate(value, max(min(p - q - half, value), -1), min(max(p - q + half, value), 1))


def paired_scores(better: Float[Tensor, " n"]) -> Estimate:
    """The same for scores between 0 and 1: `better` is by how much the first is, on each image.

    Two images are added, as `paired` does: one on which the first is better, one on which it is
    worse, by as much as on any image, or by 1 where none differs. Of hits it is `paired`; of other
    scores, few of which differ, it holds 88% from 30 images on, and 93% from 100.

    >>> paired_scores(torch.tensor([1.0, -1.0, 1.0, 0.0])).value == paired(2, 1, 4).value
    True
    """
    better = better.double()
    n, most = len(better), better.abs().max().item() or 1.0
    centre = better.sum().item() / (n + 2)
    spread = (better.square().sum().item() + 2 * most**2) / (n + 2) - centre**2
    half, value = Z * (spread / (n + 2)) ** 0.5, better.mean().item()
    return Estimate(value, max(min(centre - half, value), -1), min(max(centre + half, value), 1))
