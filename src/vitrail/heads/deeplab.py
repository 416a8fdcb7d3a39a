"""DeepLabV3+ (Chen et al., arXiv 1802.02611) on the maps of any backbone.

- ASPP (1706.05587, section 3.3): the coarse map seen at several scales at once, by 3x3
  convolutions of several dilations, one of 1x1 and the mean of the whole map
- the decoder (1802.02611, section 3.2): that at stride 4, beside a fine map of few channels, and
  two 3x3 convolutions over both

Plain convolutions, not separable ones, as the checkpoints of the widely used PyTorch code have.
A plain ViT has no fine map: `Deconv`, `Side` and an early block's patches are three ways to one.

Letters: b batch, c channels or classes, h w cells, H W pixels.
"""

import math
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.heads.maps import Stride, at_stride
from vitrail.nn import BatchNorm, he_normal_, normal_

FINE = (4, 4)
"""The stride of the decoder, and of its logits."""


class ConvNormReLU(nn.Sequential):
    """A convolution without a bias that keeps the map's size, batch norm, ReLU."""

    def __init__(self, c_in: int, c_out: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv2d(c_in, c_out, kernel, padding=padding, dilation=dilation, bias=False)
        self.norm = BatchNorm(c_out)
        self.act = nn.ReLU()


def rates_at(rates: tuple[int, ...], stride: float) -> tuple[int, ...]:
    """Dilations for a map of another stride than 16 that reach as many pixels far.

    >>> rates_at((6, 12, 18), 8.0), rates_at((6, 12, 18), 32.0)
    ((12, 24, 36), (3, 6, 9))
    """
    return tuple(max(1, round(rate * 16 / stride)) for rate in rates)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: a cell and its surroundings, at several distances.

    >>> ASPP(32, 16, rates=(6, 12, 18)).eval()(torch.zeros(2, 32, 5, 7)).shape
    torch.Size([2, 16, 5, 7])
    """

    def __init__(
        self, c_in: int, width: int, rates: tuple[int, ...] = (6, 12, 18), dropout: float = 0.1
    ) -> None:
        """`rates`: the dilations of the 3x3 convolutions, in cells."""
        super().__init__()
        self.near = ConvNormReLU(c_in, width, 1)
        self.far = nn.ModuleList(ConvNormReLU(c_in, width, 3, rate) for rate in rates)
        # Of one image there is one number a channel: then `BatchNorm` uses its running statistics.
        self.whole = ConvNormReLU(c_in, width, 1)
        self.project = ConvNormReLU((2 + len(rates)) * width, width, 1)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b _c h w"]:
        whole = self.whole(x.mean(dim=(2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        branches = [self.near(x), *(far(x) for far in self.far), whole]
        return self.drop(self.project(torch.cat(branches, dim=1)))


class DeepLabHead(nn.Module):
    """ASPP of the coarse map, brought to the fine one and refined with it."""

    def __init__(
        self,
        high: int,
        low: int,
        classes: int,
        width: int = 256,
        low_width: int = 48,
        rates: tuple[int, ...] = (6, 12, 18),
        dropout: float = 0.1,
        fine: "Deconv | Side | None" = None,
    ) -> None:
        """`high` and `low`: channels of the coarse and of the fine map; `fine`: what makes the
        latter, if that has weights of its own.
        """
        super().__init__()
        self.fine = fine
        self.aspp = ASPP(high, width, rates, dropout)
        self.low = ConvNormReLU(low, low_width, 1)
        self.refine = nn.Sequential(
            ConvNormReLU(width + low_width, width, 3), ConvNormReLU(width, width, 3)
        )
        self.classifier = nn.Conv2d(width, classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                he_normal_(module)
        normal_(self.classifier.weight, std=0.01)
        assert self.classifier.bias is not None
        nn.init.zeros_(self.classifier.bias)

    def forward(
        self,
        high: Float[Tensor, "b _c _h _w"],
        stride: Stride,
        low: Float[Tensor, "b _d h w"],
        size: tuple[int, int],
    ) -> Float[Tensor, "b c h w"]:
        """Logits of stride 4, of a coarse map of `stride` and a fine one of images of `size`."""
        x = at_stride(self.aspp(high), stride, FINE, size)
        return self.classifier(self.refine(torch.cat([x, self.low(low)], dim=1)))


def doublings(patch: tuple[int, int]) -> tuple[int, int]:
    """How often to double the rows and the columns of a map of patches to come nearest to stride 4.

    >>> doublings((16, 16)), doublings((14, 14)), doublings((4, 32))
    ((2, 2), (2, 2), (0, 3))
    """
    down, right = (max(0, round(math.log2(side / 4))) for side in patch)
    return down, right


class Deconv(nn.Module):
    """A fine map of a plain ViT's last: transposed 2x2 convolutions, each with half the channels of
    the one before (ViTDet's pyramid, arXiv 2203.16527, appendix A.2; batch norms for its
    LayerNorms).

    Of patches of 14 pixels that gives cells of 3.5, which are brought to the grid of stride 4:
    `ceil(h / 4)` rows and `ceil(w / 4)` columns.
    """

    def __init__(self, width: int, patch: tuple[int, int]) -> None:
        super().__init__()
        down, right = doublings(patch)
        steps = max(down, right)
        widths = [max(1, width // 2**i) for i in range(steps + 1)]
        self.stride: Stride = (patch[0] / 2**down, patch[1] / 2**right)
        self.steps = nn.Sequential()
        for i, (c_in, c_out) in enumerate(pairwise(widths)):
            kernel = (1 + int(i < down), 1 + int(i < right))
            if i:
                self.steps.append(BatchNorm(c_in))
                self.steps.append(nn.GELU())
            self.steps.append(nn.ConvTranspose2d(c_in, c_out, kernel, kernel))
        self.width = widths[-1]

    def forward(
        self, x: Float[Tensor, "b c h w"], size: tuple[int, int]
    ) -> Float[Tensor, "b _c _h _w"]:
        """The map of stride 4 of images of `size`."""
        return at_stride(self.steps(x), self.stride, FINE, size)


class Side(nn.Module):
    """A fine map of the image itself: a 3x3 convolution of stride 2, batch norm, GELU, and the
    largest of 3x3 cells at every other, as DEIMv2 puts beside a DINOv3 (arXiv 2509.20787, its
    Spatial Tuning Adapter).
    """

    width = 16

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, self.width, 3, stride=2, padding=1, bias=False)
        he_normal_(self.conv)
        self.norm = BatchNorm(self.width)
        self.act = nn.GELU()
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b _c h w"]:
        return self.pool(self.act(self.norm(self.conv(x))))
