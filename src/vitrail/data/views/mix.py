"""Mixup and cutmix: the images of a batch, and their targets, mixed in pairs.

Letters: b batch, p pairs, c channels, h w pixels, k classes.
"""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from vitrail.data.keyed import uniform
from vitrail.data.views.augment import AugmentConfig
from vitrail.data.views.preprocess import Preprocess
from vitrail.errors import UsageError, setting


def mix(
    images: Float[Tensor, "b c h w"],
    targets: Float[Tensor, "b k"],
    indices: Int[np.ndarray, " b"],
    config: AugmentConfig,
    *,
    seed: int,
    epoch: int,
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b k"]]:
    """Images 2i and 2i + 1 of the batch mixed into each other, and their targets likewise.

    Mixup (arXiv 1710.09412) adds the two with shares that sum to 1; cutmix (arXiv 1905.04899)
    swaps a box, and the targets have the exact share of the pixels. The share is drawn for the
    index of a pair's first image, so batches of an even size may be split over processes. An odd
    last image stays as it is.
    """
    pairs = len(images) // 2
    if not (config.mixes and pairs):
        return images, targets
    h, w = images.shape[2:]
    draws = uniform(seed, epoch, indices[: 2 * pairs : 2], "mix", 4).astype(np.float64)
    boxes, taken = _boxes(draws, (h, w), config)
    top, bottom, left, right = boxes.T
    share = taken * (bottom - top) * (right - left) / (h * w)
    # float32 whatever the images are: bfloat16 does not hold places beyond 256.
    drawn = torch.from_numpy(np.column_stack((boxes, taken))).to(images.device, torch.float32)
    return (
        _with_partners(images, _on_pixels(drawn, (h, w))[:, None].to(images.dtype)),
        _with_partners(targets, torch.from_numpy(share).to(targets)[:, None]),
    )


def share_unit(config: AugmentConfig, processes: int) -> int:
    """A batch that so many processes share evenly is a multiple of this: mixed pairs stay whole."""
    return processes * (2 if config.mixes and processes > 1 else 1)


def check_mixable(config: AugmentConfig, preprocess: Preprocess) -> None:
    """Raise `UsageError` where images are to be mixed that have different sizes."""
    if config.mixes and not preprocess.one_size:
        raise UsageError(
            f"{setting('data.resize', preprocess.resize)} makes batches of images of different "
            f"sizes, which mixup and cutmix cannot mix: switch them off "
            f"({setting('augment.mixup', 0)} and {setting('augment.cutmix', 0)}), or use "
            f"{setting('data.resize', 'crop')} or squash"
        )


def _boxes(
    draws: Float64[np.ndarray, "p 4"], size: tuple[int, int], config: AugmentConfig
) -> tuple[Int64[np.ndarray, "p 4"], Float64[np.ndarray, " p"]]:
    """Each pair's box (top, bottom, left, right), and what the images take there of each other.

    Mixup's box is the whole image; in cutmix's they take all.
    """
    choice, quantile, *centre = draws.T
    cut = choice < (0.5 if config.mixup and config.cutmix else float(config.cutmix > 0))
    boxes = np.tile((0, size[0], 0, size[1]), (len(draws), 1))
    if cut.any():
        side = np.sqrt(beta(config.cutmix, quantile[cut]))
        for axis, n in enumerate(size):
            middle = np.floor(centre[axis][cut] * n)
            edges = np.round(middle[:, None] + np.outer(side * n / 2, (-1, 1)))
            boxes[cut, 2 * axis : 2 * axis + 2] = edges.clip(0, n)
    taken = beta(config.mixup, quantile) if config.mixup else np.ones_like(quantile)
    return boxes, np.where(cut, 1.0, taken)


def _on_pixels(boxes: Float[Tensor, "p 5"], size: tuple[int, int]) -> Float[Tensor, "p h w"]:
    """From (top, bottom, left, right, taken in the box), what each pixel takes."""
    top, bottom, left, right, taken = boxes.T[..., None]
    rows, columns = (torch.arange(n, device=boxes.device) for n in size)
    tall = (rows >= top) & (rows < bottom)
    wide = (columns >= left) & (columns < right)
    return (tall * taken)[:, :, None] * wide[:, None]


def _with_partners(x: Float[Tensor, "b ..."], taken: Float[Tensor, "p ..."]) -> Tensor:
    """Each of `x` with the part `taken` of it replaced by its partner."""
    stop = 2 * len(taken)
    mixed = x.clone()
    mixed[:stop:2].lerp_(x[1:stop:2], taken)
    mixed[1:stop:2].lerp_(x[:stop:2], taken)
    return mixed


def beta(alpha: float, quantile: Float64[np.ndarray, " p"]) -> Float64[np.ndarray, " p"]:
    """The inverse of the distribution function of Beta(alpha, alpha)."""
    cumulative, places, power = _beta_table(alpha)
    # It is symmetric about 1/2, and the table holds its lower half.
    lower = np.interp(np.minimum(quantile, 1 - quantile), cumulative, places) ** (1 / power)
    return np.where(quantile < 0.5, lower, 1 - lower)


@lru_cache
def _beta_table(
    alpha: float,
) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"], float]:
    """The distribution function at the places t = x^power, for x from 0 to 1/2; and the power."""
    # With alpha below 1 the density is infinite at x = 0, but finite in t.
    power = min(alpha, 1.0)
    places = np.linspace(0, 0.5**power, 4097)
    x = places ** (1 / power)
    density = x ** (alpha - power) * (1 - x) ** (alpha - 1)
    cumulative = np.concatenate(([0], np.cumsum(density[1:] + density[:-1])))
    return cumulative / (2 * cumulative[-1]), places, power
