"""The ResNet before a hybrid's encoder (ViT, arXiv 2010.11929, section 3.1; AugReg, 2106.10270).

Its parts are those of google-research/vision_transformer: standardised kernels, group norms,
TensorFlow's SAME padding, bottlenecks that norm after each convolution, with the stride in the
3x3. `models/bit.py` has the ResNet of BiT, which norms before, `models/resnet.py` the original.
"""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitrail.errors import UsageError, setting
from vitrail.nn.conv import Eps, GroupNormReLU, StdConv2d, pad_same
from vitrail.nn.patch import Indivisible, pad_to_patches

_ROOT = 64
"""Channels of the first convolution; a stage's bottlenecks have as many, then twice as many, ..."""


def backbone_stride(depths: tuple[int, ...]) -> int:
    """Pixels per cell: 4 of root and first stage, and each further stage halves the map.

    >>> backbone_stride(()), backbone_stride((3, 4, 9)), backbone_stride((3, 4, 6, 3))
    (4, 16, 32)
    """
    return 4 * 2 ** max(len(depths) - 1, 0)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions, each with its norm, and ReLU after the sum."""

    def __init__(self, c_in: int, middle: int, stride: int, eps: Eps) -> None:
        super().__init__()
        c_out = 4 * middle
        self.conv1 = StdConv2d(c_in, middle, 1, eps=eps)
        self.norm1 = GroupNormReLU(middle, eps)
        self.conv2 = StdConv2d(middle, middle, 3, stride, eps=eps, same=True)
        self.norm2 = GroupNormReLU(middle, eps)
        self.conv3 = StdConv2d(middle, c_out, 1, eps=eps)
        self.norm3 = GroupNormReLU(c_out, eps, relu=False)
        nn.init.zeros_(self.norm3.weight)  # every block starts as its shortcut
        self.shortcut = nn.Sequential()
        if stride > 1 or c_in != c_out:
            self.shortcut.add_module("conv", StdConv2d(c_in, c_out, 1, stride, eps=eps))
            self.shortcut.add_module("norm", GroupNormReLU(c_out, eps, relu=False))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b _c _h _w"]:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x))))
        return F.relu(self.shortcut(x) + self.norm3(self.conv3(y)))


class ResNetStem(nn.Module):
    """Images to tokens by a ResNet, whose last map is then cut into patches.

    `patch` is in pixels of the image. With a map of stride 16 and patches of 16 pixels, each of
    its cells is a token (R50+B/16); the root alone, of stride 4, leaves 8x8 of its cells to a
    token of 32 pixels (R+Ti/16).

    >>> import torch
    >>> tokens, grid = ResNetStem(3, (32, 32), 192, depths=(1, 1))(torch.zeros(2, 3, 64, 96))
    >>> tuple(tokens.shape), grid
    ((2, 6, 192), (2, 3))
    """

    def __init__(
        self,
        channels: int,
        patch: tuple[int, int],
        width: int,
        norm_eps: float | None = None,
        indivisible: Indivisible = "refuse",
        bias: bool = True,
        *,
        depths: tuple[int, ...] = (),
        eps: Eps = "vision_transformer",
    ) -> None:
        """`depths`: bottlenecks of each stage; without stages there is the root alone."""
        super().__init__()
        stride = backbone_stride(depths)
        if patch[0] % stride or patch[1] % stride:
            build = f"stem_depths={depths}" if depths else "no stem_depths"
            raise UsageError(
                f"{setting('stem', 'resnet')} with {build} has a cell for every {stride}x{stride} "
                f"pixels, so the patch must be a multiple of {stride}, not {patch[0]}x{patch[1]}"
            )
        self.patch = patch
        self.indivisible = indivisible
        self.root = nn.Sequential()
        self.root.add_module("conv", StdConv2d(channels, _ROOT, 7, 2, eps=eps, same=True))
        self.root.add_module("norm", GroupNormReLU(_ROOT, eps))
        self.stages = nn.ModuleList()
        c_in = _ROOT
        for i, depth in enumerate(depths):
            middle = _ROOT * 2**i
            blocks = []
            for j in range(depth):
                blocks.append(Bottleneck(c_in, middle, 2 if i and not j else 1, eps))
                c_in = 4 * middle
            self.stages.append(nn.Sequential(*blocks))
        cells = (patch[0] // stride, patch[1] // stride)
        self.proj = nn.Conv2d(c_in, width, kernel_size=cells, stride=cells, bias=bias)
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(width, eps=norm_eps)

    def maps(
        self, x: Float[Tensor, "b c h w"], extent: Int[Tensor, "b 2"] | None = None
    ) -> tuple[Float[Tensor, "b _c _h _w"], ...]:
        """The map of each stage, of strides 4, 8, ...; the root's, where there are no stages.

        Raises `UsageError` for any `extent`.
        """
        if extent is not None:
            raise UsageError(
                f"images of different sizes in one batch ({setting('data.resize')} native or pad) "
                f"do not go with {setting('stem', 'resnet')}, whose norms average over the canvas: "
                f"take resize crop or squash"
            )
        x, _ = pad_to_patches(x, self.patch, self.indivisible)
        # -inf is never the greatest, as a zero could be; each window has a pixel of the image.
        x = F.max_pool2d(pad_same(self.root(x), 3, 2, value=float("-inf")), 3, 2)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return tuple(maps) or (x,)

    def tokens(
        self, last: Float[Tensor, "b c h w"]
    ) -> tuple[Float[Tensor, "b n d"], tuple[int, int]]:
        """Tokens of the last map, and their grid `(gh, gw)`."""
        x = self.proj(last)
        return self.norm(x.flatten(2).transpose(1, 2)), (x.shape[2], x.shape[3])

    def forward(
        self, x: Float[Tensor, "b c h w"], extent: Int[Tensor, "b 2"] | None = None
    ) -> tuple[Float[Tensor, "b n d"], tuple[int, int]]:
        """Tokens, and the grid `(gh, gw)` they came from; `UsageError` for any `extent`."""
        return self.tokens(self.maps(x, extent)[-1])
