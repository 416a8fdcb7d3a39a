"""What every backbone returns: one type with named parts, whatever the family."""

from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor


class Features(NamedTuple):
    """The output of `model.features(x)` for images `x [b c h w]`.

    Letters: `b` batch, `n` patch tokens, `k` prefix tokens, `d` width; see docs/shapes.md.
    """

    patches: Float[Tensor, "b n d"]
    """Patch tokens after the final norm, row by row: `n = gh * gw`."""
    prefix: Float[Tensor, "b k d"]
    """Class, distillation and register tokens, in this order; `k` may be 0."""
    grid: tuple[int, int]
    """`(gh, gw)`: the token grid, height first."""
    maps: tuple[Float[Tensor, "b _c _h _w"], ...]
    """One feature map a stage, finest first, for dense heads."""
    strides: tuple[tuple[int, int], ...]
    """Pixels of input per cell of each map, as (vertical, horizontal)."""
    pooled: Float[Tensor, "b e"]
    """The image's one vector: what a linear classifier reads. Mostly `e` is `d`."""
    valid: Bool[Tensor, "b n"] | None = None
    """Which patch tokens show the image, of images of different sizes on one canvas, or are left,
    of a model that drops some; the others are zeros. None: all of them."""


def tokens_to_map(
    patches: Float[Tensor, "b n d"], grid: tuple[int, int]
) -> Float[Tensor, "b d gh gw"]:
    """Lay the tokens back on their grid."""
    b, _, d = patches.shape
    return patches.transpose(1, 2).reshape(b, d, *grid)


def features_of_maps(
    maps: tuple[Float[Tensor, "b _c _h _w"], ...], strides: tuple[tuple[int, int], ...]
) -> Features:
    """What a convolutional backbone has found: the cells of its last map are the patches, and
    their mean is the image's vector.
    """
    last = maps[-1]
    patches = last.flatten(2).transpose(1, 2)
    return Features(
        patches=patches,
        prefix=patches.new_empty(patches.shape[0], 0, patches.shape[2]),
        grid=(last.shape[2], last.shape[3]),
        maps=maps,
        strides=strides,
        pooled=patches.mean(dim=1),
    )
