"""DINO's views of an image (arXiv 2104.14294): two of much of it, and small ones of little."""

from dataclasses import replace

from vitrail.data.views.augment import AugmentConfig
from vitrail.data.views.moco import PUBLISHED as MOCO
from vitrail.data.views.moco import moco_views

PUBLISHED = replace(MOCO, crop_scale=(0.4, 1.0))
"""As MoCo v3's, which are BYOL's, but for the crop: what two views show has to overlap, where small
ones show the rest."""


def dino_views(
    said: AugmentConfig, count: int, scale: tuple[float, float], size: tuple[int, int]
) -> tuple[AugmentConfig, ...]:
    """The two large views of what is `said` once, then `count` small ones of (height, width) `size`
    that show `scale` of the area: half of them blurred where the first always is, none solarised.

    >>> [(one.blur, one.size) for one in dino_views(PUBLISHED, 2, (0.05, 0.4), (96, 96))]
    [(1.0, None), (0.1, None), (0.5, (96, 96)), (0.5, (96, 96))]
    """
    small = replace(said, crop_scale=scale, size=size, blur=0.5 * said.blur, solarize=0.0)
    return (*moco_views(said), *(small,) * count)


def small_size(size: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of small views beside large ones of `size`: 3/7, as 96 of 224 pixels, in
    whole patches.

    >>> small_size((224, 224), (16, 16)), small_size((64, 64), (8, 8))
    ((96, 96), (24, 24))
    """
    height, width = (max(1, round(3 * s / (7 * p))) * p for s, p in zip(size, patch, strict=True))
    return height, width
