"""Images to patch tokens: the linear patch embedding of ViT, and what else stands before encoders.

| `stem`     | what it is                                              | source                  |
|------------|---------------------------------------------------------|-------------------------|
| `patch`    | one convolution, stride = kernel                        | ViT, 2010.11929         |
| `overlap`  | one convolution, kernel = 2 stride - 1                  | PVTv2, 2106.13797       |
| `patchify` | 4x4, then 2x2 patches of patches, normed in between     | ConvNeXt, 2201.03545    |
| `conv`     | 3x3 of stride 2, batch-normed, one after the other      | Xiao et al., 2106.14881 |
| `resnet`   | patches of a ResNet's map, in `vitrail.nn.resnet`       | ViT, section 3.1        |

With patches of `p x q` pixels an image `[c h w]` becomes `n = (h / p) * (w / q)` tokens of width
`d`. A convolution whose stride is its kernel is exactly "cut into patches, flatten each as
`(c, p, q)`, multiply by one matrix" (ViT, arXiv 2010.11929, equation 1); the test
`test_patch.py` holds the two against each other.
"""

import math
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vitrail.errors import UsageError, setting
from vitrail.nn.conv import BatchNorm
from vitrail.nn.grids import on_canvas

Indivisible = Literal["refuse", "pad"]


def patch_grid(
    size: tuple[int, int], patch: tuple[int, int], indivisible: Indivisible
) -> tuple[int, int]:
    """The token grid `(gh, gw)` of an image of `size` (height, width) in pixels.

    Raises `UsageError` when the patches do not cover the image exactly and `indivisible` says so.

    >>> patch_grid((224, 224), (16, 16), "refuse")
    (14, 14)
    """
    if indivisible == "refuse" and (size[0] % patch[0] or size[1] % patch[1]):
        down = tuple(max(p, s // p * p) for s, p in zip(size, patch, strict=True))
        raise UsageError(
            f"an image of {size[0]}x{size[1]} pixels (height x width) cannot be cut into patches "
            f"of {patch[0]}x{patch[1]}: use {down[0]}x{down[1]}, or "
            f"{setting('indivisible', 'pad')}"
        )
    return math.ceil(size[0] / patch[0]), math.ceil(size[1] / patch[1])


def pad_to_patches(
    x: Float[Tensor, "b c h w"], patch: tuple[int, int], indivisible: Indivisible
) -> tuple[Float[Tensor, "b c _h _w"], tuple[int, int]]:
    """Pad the bottom and the right with zeros (the mean pixel) to whole patches; and the grid."""
    h, w = x.shape[-2:]
    grid = patch_grid((h, w), patch, indivisible)
    missing = (grid[0] * patch[0] - h, grid[1] * patch[1] - w)
    return (F.pad(x, (0, missing[1], 0, missing[0])) if any(missing) else x), grid


class PatchEmbed(nn.Module):
    """Cut into patches and project each: one convolution, stride = kernel.

    With `overlap` its kernel is `2 p - 1` and it pads `p - 1`: 7, 4 and 3 for patches of 4, as in
    PVTv2 (arXiv 2106.13797) and SegFormer (2105.15203). A token then sees its own patch and, but
    for a pixel, the ones above and to the left of it.

    >>> import torch
    >>> tokens, grid = PatchEmbed(3, (16, 16), 192)(torch.zeros(2, 3, 64, 96))
    >>> tuple(tokens.shape), grid
    ((2, 24, 192), (4, 6))
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
        overlap: bool = False,
    ) -> None:
        """`norm_eps`: a LayerNorm after the projection, as Twins, Swin and PVT have it."""
        super().__init__()
        self.patch = patch
        self.indivisible = indivisible
        kernel, margin = patch, (0, 0)
        if overlap:
            margin = (patch[0] - 1, patch[1] - 1)
            kernel = (patch[0] + margin[0], patch[1] + margin[1])
        self.proj = nn.Conv2d(channels, width, kernel, stride=patch, padding=margin, bias=bias)
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(width, eps=norm_eps)

    def forward(
        self, x: Float[Tensor, "b c h w"], extent: Int[Tensor, "b 2"] | None = None
    ) -> tuple[Float[Tensor, "b n d"], tuple[int, int]]:
        """Tokens, and the grid `(gh, gw)` they came from. A token sees nothing below or right of
        its patch, whatever `extent` of (rows, columns) shows an image.
        """
        x, grid = pad_to_patches(x, self.patch, self.indivisible)
        return self.norm(self.proj(x).flatten(2).transpose(1, 2)), grid


class ChannelNorm(nn.LayerNorm):
    """LayerNorm of maps `[b c h w]`: over the channels of each cell.

    `nn.LayerNorm(c)` itself would take the last axis, the width, for the channels.
    """

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class PatchifyStem(nn.Module):
    """ConvNeXt's 4x4 patches, and its way from them to larger ones (arXiv 2201.03545, section 2).

    A 4x4 convolution of stride 4 and a norm; then, until the patch is reached, downsampling by a
    norm and a 2x2 convolution of stride 2. Channels double up to `d`: a patch of 16 has two
    downsamplings, of `d/4` channels to `d/2` to `d`. A token sees its own patch and nothing else.
    """

    def __init__(
        self,
        channels: int,
        patch: tuple[int, int],
        width: int,
        norm_eps: float | None = None,
        indivisible: Indivisible = "refuse",
        bias: bool = True,
    ) -> None:
        """`norm_eps`: one more LayerNorm, after the last convolution, and after its own norm
        where that has one (a patch of 4). `bias` is the last convolution's.
        """
        super().__init__()
        stages = int(math.log2(patch[0])) - 2
        if patch[0] != patch[1] or 2 ** (stages + 2) != patch[0] or stages < 0:
            raise UsageError(
                f"{setting('stem', 'patchify')} makes patches of 4x4 and doubles them, so the "
                f"patch must be square and 4, 8, 16, 32 or so, not {patch[0]}x{patch[1]}"
            )
        if width % 2**stages:
            raise UsageError(
                f"{setting('stem', 'patchify')} with patch {patch[0]} needs a width divisible by "
                f"{2**stages}, not {width}"
            )
        self.patch = patch
        self.indivisible = indivisible
        sizes = [width // 2 ** (stages - i) for i in range(stages + 1)]
        self.patchify = nn.Sequential(
            nn.Conv2d(channels, sizes[0], 4, stride=4, bias=bias or stages > 0),
            ChannelNorm(sizes[0], eps=1e-6),
        )
        self.downsample = nn.Sequential(
            *(
                nn.Sequential(
                    ChannelNorm(c_in, eps=1e-6),
                    nn.Conv2d(c_in, c_out, 2, stride=2, bias=bias or c_out < width),
                )
                for c_in, c_out in pairwise(sizes)
            )
        )
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(width, eps=norm_eps)

    def forward(
        self, x: Float[Tensor, "b c h w"], extent: Int[Tensor, "b 2"] | None = None
    ) -> tuple[Float[Tensor, "b n d"], tuple[int, int]]:
        """Tokens, and the grid `(gh, gw)` they came from; a token sees its patch alone."""
        x, grid = pad_to_patches(x, self.patch, self.indivisible)
        x = self.downsample(self.patchify(x))
        return self.norm(x.flatten(2).transpose(1, 2)), grid


class ConvStem(nn.Module):
    """Stacked 3x3 convolutions of stride 2, then 1x1 (Xiao et al., arXiv 2106.14881).

    The published stem that makes a ViT train faster and less fussily than one big-stride
    projection. For a patch of `2^s` there are `s` convolutions whose channels double up to `d`.
    """

    def __init__(
        self,
        channels: int,
        patch: tuple[int, int],
        width: int,
        norm_eps: float | None = None,
        indivisible: Indivisible = "refuse",
        bias: bool = True,
    ) -> None:
        super().__init__()
        stages = int(math.log2(patch[0]))
        if patch[0] != patch[1] or 2**stages != patch[0] or stages < 1:
            raise UsageError(
                f"{setting('stem', 'conv')} halves the image step by step, so the patch must be "
                f"square and a power of two (2, 4, 8, 16, 32), not {patch[0]}x{patch[1]}"
            )
        if width % 2 ** (stages - 1):
            raise UsageError(
                f"{setting('stem', 'conv')} with patch {patch[0]} needs a width divisible by "
                f"{2 ** (stages - 1)}, not {width}"
            )
        self.patch = patch
        self.indivisible = indivisible
        sizes = [channels, *(width // 2 ** (stages - 1 - i) for i in range(stages))]
        self.convs = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=False),
                    BatchNorm(c_out),
                    nn.ReLU(),
                )
                for c_in, c_out in pairwise(sizes)
            )
        )
        self.proj = nn.Conv2d(width, width, kernel_size=1, bias=bias)
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(width, eps=norm_eps)

    def forward(
        self, x: Float[Tensor, "b c h w"], extent: Int[Tensor, "b 2"] | None = None
    ) -> tuple[Float[Tensor, "b n d"], tuple[int, int]]:
        """Tokens, and the grid `(gh, gw)` they came from; `extent` (rows, columns) of them show
        each image.
        """
        x, grid = pad_to_patches(x, self.patch, self.indivisible)
        if extent is None or not self.training:
            # On its even number of rows, a convolution's row i sees rows 2i - 1 to 2i + 1: over
            # the top and left of an image, where zeros are, and never over its bottom or right.
            x = self.convs(x)
        else:
            for stage in self.convs:
                convolution, norm, activation = stage.children()
                x = convolution(x)
                shown = on_canvas(extent * (x.shape[2] // grid[0]), (x.shape[2], x.shape[3]))
                x = activation(_normalise_shown(norm, x, shown))
        return self.norm(self.proj(x).flatten(2).transpose(1, 2)), grid


def _normalise_shown(
    norm: nn.Module, x: Float[Tensor, "b c h w"], shown: Bool[Tensor, "b h w"]
) -> Float[Tensor, "b c h w"]:
    """Batch normalisation, the statistics over what is `shown`; zeros elsewhere."""
    last = x.movedim(1, -1)
    normal = norm(last[shown][:, :, None, None]).flatten(1)
    return torch.zeros_like(last).index_put((shown,), normal.to(x.dtype)).movedim(-1, 1)
