"""Maps of several strides and one width, for what is large and small in an image.

- `SimplePyramid`: of a backbone whose maps are all of one stride, from its last alone (ViTDet,
  arXiv 2203.16527, section 3 and appendix A.2), with group norms for its LayerNorms
- `FeaturePyramid`: of a backbone of several stages, each map with what the coarser ones know (FPN,
  1612.03144)

Strides are the backbone's own, doubled or halved: of patches of 14 pixels 7, 14, 28. A map's cells
are laid from the image's top left; the last row and column may reach beyond the image.

Letters: b batch, c channels, h w cells.
"""

from collections.abc import Sequence
from math import gcd

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.heads.maps import at_stride
from vitrail.nn import he_normal_

Maps = tuple[Float[Tensor, "b _c _h _w"], ...]

_GROUPS = 32


def group_norm(channels: int) -> nn.GroupNorm:
    """Of 32 groups, or of fewer where these would have less than two channels each: a group of one
    number, of a map of one cell, has no spread.
    """
    return nn.GroupNorm(gcd(min(_GROUPS, max(1, channels // 2)), channels), channels)


class ConvNorm(nn.Sequential):
    """A convolution without a bias that keeps the map's size, and a group norm."""

    def __init__(self, c_in: int, c_out: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False)
        self.norm = group_norm(c_out)


def _halved(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c _h _w"]:
    """Twice the stride, by the largest of each 2 x 2; the last row and column may be of one."""
    return F.max_pool2d(x, 2, ceil_mode=True)


class SimplePyramid(nn.Module):
    """Maps of stride 1/2, 1, 2, ... times that of the map it is given.

    >>> import torch
    >>> maps = SimplePyramid(64, (14, 14), 32, levels=3)(torch.zeros(2, 64, 5, 7))
    >>> [tuple(each.shape) for each in maps]
    [(2, 32, 10, 14), (2, 32, 5, 7), (2, 32, 3, 4)]
    """

    def __init__(self, c_in: int, stride: tuple[int, int], width: int, levels: int) -> None:
        """`stride` of the map it is given, in pixels; odd ones have halves."""
        super().__init__()
        scales = (0.5, *(2**i for i in range(levels - 1)))
        self.strides = tuple((stride[0] * scale, stride[1] * scale) for scale in scales)
        self.enlarge = nn.ConvTranspose2d(c_in, c_in // 2, 2, 2)
        self.maps = nn.ModuleList()
        for level in range(levels):
            own = c_in // 2 if level == 0 else c_in
            self.maps.append(nn.Sequential(ConvNorm(own, width, 1), ConvNorm(width, width, 3)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                he_normal_(module)

    def forward(self, x: Float[Tensor, "b _c h w"]) -> Maps:
        """From the last map of a backbone, finest first."""
        found = [self.maps[0](self.enlarge(x))]
        for each in list(self.maps)[1:]:
            found.append(each(x))
            x = _halved(x)
        return tuple(found)


class FeaturePyramid(nn.Module):
    """The maps of a backbone's stages, and coarser ones, each of `width` channels."""

    def __init__(
        self, c_in: Sequence[int], strides: Sequence[tuple[int, int]], width: int, levels: int
    ) -> None:
        """`c_in` and `strides` of the maps it is given, finest first; beyond them each level is
        half of the one before.
        """
        super().__init__()
        self.own = tuple(strides)
        last = strides[-1]
        more = range(1, levels - len(strides) + 1)
        self.strides = (*self.own, *((last[0] * 2**i, last[1] * 2**i) for i in more))
        self.lateral = nn.ModuleList(ConvNorm(c, width, 1) for c in c_in)
        self.maps = nn.ModuleList(ConvNorm(width, width, 3) for _ in c_in)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                he_normal_(module)

    def forward(self, maps: Maps, size: tuple[int, int]) -> Maps:
        """`maps` of images of `size` (height, width), finest first."""
        found: list[Tensor] = []
        above: Tensor | None = None
        for i in reversed(range(len(self.own))):
            x = self.lateral[i](maps[i])
            if above is not None:
                x = x + at_stride(above, self.own[i + 1], self.own[i], size)
            above = x
            found.insert(0, self.maps[i](x))
        while len(found) < len(self.strides):
            found.append(_halved(found[-1]))
        return tuple(found)
