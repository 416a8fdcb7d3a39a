"""MoCo v3's two views of an image (arXiv 2104.02057), which are BYOL's (2006.07733)."""

from dataclasses import replace

from vitrail.data.views.augment import AugmentConfig

PUBLISHED = AugmentConfig(
    crop_scale=(0.08, 1.0),
    hflip=0.5,
    jitter=0.4,
    saturation=0.2,
    hue=0.1,
    jitter_probability=0.8,
    grey=0.2,
    blur=1.0,
    solarize=0.2,
)
"""A crop, colours, sometimes grey and a mirror image; the first view always blurred, the second
rarely, and sometimes solarised.

A probability here is that of the thing itself. DINOv2's code hands the opposite to its blur, so
that its first view never had any (dinov2#411): compare results with that in mind.
"""


def moco_views(said: AugmentConfig = PUBLISHED) -> tuple[AugmentConfig, AugmentConfig]:
    """The two views of what is `said` once: blur is the first one's, and a tenth of it the
    second's; only the second is ever solarised.

    >>> [(one.blur, one.solarize) for one in moco_views()]
    [(1.0, 0.0), (0.1, 0.2)]
    """
    return replace(said, solarize=0.0), replace(said, blur=0.1 * said.blur)
