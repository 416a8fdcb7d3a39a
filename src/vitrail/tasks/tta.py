"""Test-time augmentation: a model asked several times about an image, and its answers averaged."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.data.views.canvas import Canvas, collate
from vitrail.errors import unknown_name
from vitrail.models import Model, ViTConfig


class Look(NamedTuple):
    """One way to look at an image."""

    mirrored: bool = False
    scale: float = 1.0
    """Of its sides, then brought to the nearest whole patches."""


_SCALES = (Look(scale=6 / 7), Look(), Look(scale=8 / 7))  # 192, 224 and 256 pixels for 224

LOOKS: Mapping[str, Sequence[Look]] = {
    "none": (Look(),),
    "flip": (Look(), Look(mirrored=True)),
    "scales": _SCALES,
    "flip+scales": (*_SCALES, *(look._replace(mirrored=True) for look in _SCALES)),
}
"""Name -> what is averaged, for `vitrail evaluate RUN --tta NAME`."""


def looks(name: str) -> Sequence[Look]:
    """The row `name` of `LOOKS`. Raises `UsageError` for a name that it does not have."""
    if name not in LOOKS:
        raise unknown_name("test-time augmentation", name, LOOKS)
    return LOOKS[name]


def probabilities(
    model: Model,
    images: Float[Tensor, "b c h w"],
    extent: Int[Tensor, "b 2"] | None = None,
    *,
    multi_label: bool,
    tta: str = "none",
) -> Float[Tensor, "b classes"]:
    """Each class's, in float32: the mean over the looks of the softmax, or of the sigmoid.

    `extent` is the model's, for images of different sizes.
    """
    answers = []
    for look in looks(tta):
        canvas = Canvas(images, extent)
        shown = canvas if look == Look() else seen(canvas, look, whole_of(model))
        logits = model(*shown).float()
        answers.append(logits.sigmoid() if multi_label else logits.softmax(dim=-1))
    return torch.stack(answers).mean(dim=0)


def whole_of(model: Model) -> tuple[int, int]:
    """Of how many pixels (vertical, horizontal) images must be whole multiples to be taken."""
    config = model.config
    return config.coarsest if isinstance(config, ViTConfig) else config.stride


def seen(canvas: Canvas, look: Look, patch: tuple[int, int]) -> Canvas:
    """The images as `look` shows them, again at the top left of their canvas."""
    if look.scale != 1:
        canvas = _scaled(canvas, look.scale, patch)
    return _mirrored(canvas, patch) if look.mirrored else canvas


def _mirrored(canvas: Canvas, patch: tuple[int, int]) -> Canvas:
    images, extent = canvas
    if extent is None:
        return Canvas(images.flip(-1), None)
    # Column j of an image of width w is its column w - 1 - j; beside it lies what may be anything.
    columns = torch.arange(images.shape[-1], device=images.device)
    columns = (extent[:, 1:] * patch[1] - 1 - columns) % images.shape[-1]
    return Canvas(images.gather(3, columns[:, None, None].expand_as(images)), extent)


def _scaled(canvas: Canvas, scale: float, patch: tuple[int, int]) -> Canvas:
    images, extent = canvas
    if extent is None:
        return Canvas(_resampled(images, scale, patch), None)
    parts = [
        _resampled(image[None, :, : rows * patch[0], : columns * patch[1]], scale, patch)[0]
        for image, (rows, columns) in zip(images, extent.tolist(), strict=True)
    ]
    return collate(parts, patch)


def _resampled(
    images: Float[Tensor, "b c _h _w"], scale: float, patch: tuple[int, int]
) -> Float[Tensor, "b c h w"]:
    sides = zip(images.shape[-2:], patch, strict=True)
    size = [max(1, round(scale * side / p)) * p for side, p in sides]
    return F.interpolate(images, size=size, mode="bicubic", antialias=True)
