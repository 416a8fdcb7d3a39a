"""Weights for another geometry: position tables for another grid, patch kernels for another patch.

Published code resizes position tables in eight ways with eight results. Which one a checkpoint's
makers used is part of what the checkpoint is, so each has a name:

| name                 | what it is                                 | whose                     |
|----------------------|--------------------------------------------|---------------------------|
| `bicubic_antialias`  | pixels are areas; low-pass when shrinking  | timm, DINOv2 registers    |
| `bicubic`            | pixels are areas                           | DeiT, MAE, Hugging Face   |
| `bicubic_offset`     | the same, the new grid taken 0.1 larger    | DINO, DINOv2              |
| `bilinear`           | pixels are areas                           | timm reading Google files |
| `bilinear_antialias` | pixels are areas; low-pass when shrinking  | SigLIP 2 NaFlex, TIPS     |
| `bilinear_aligned`   | corners stay where they are (scipy's zoom) | Google's ViT, big_vision  |
| `nearest`            | the row of the cell that a cell begins in  | Idefics3, SmolVLM         |
| `flexivit`           | as `bilinear_antialias`, and its kernels'  | FlexiViT, 2212.08013      |

Patch kernels get the pseudo-inverse of how a patch is resized: bilinearly in FlexiViT's own code,
bicubically with a low-pass in timm, which all others here follow.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int
from torch import Tensor

Resample = Literal[
    "bicubic_antialias",
    "bicubic",
    "bicubic_offset",
    "bilinear",
    "bilinear_antialias",
    "bilinear_aligned",
    "nearest",
    "flexivit",
]


class _Way(NamedTuple):
    """How one code resizes."""

    kind: Literal["bicubic", "bilinear"]
    antialias: bool = False
    aligned: bool = False
    offset: float = 0.0
    """How much larger than it is the new grid is taken."""


_TABLES: Mapping[Resample, _Way] = {
    "bicubic_antialias": _Way("bicubic", antialias=True),
    "bicubic": _Way("bicubic"),
    "bicubic_offset": _Way("bicubic", offset=0.1),
    "bilinear": _Way("bilinear"),
    "bilinear_antialias": _Way("bilinear", antialias=True),
    "bilinear_aligned": _Way("bilinear", aligned=True),
    "flexivit": _Way("bilinear", antialias=True),
}
_PATCHES: Mapping[Resample, _Way] = {"flexivit": _Way("bilinear")}
"""How images of patches are resized, where it is not as by timm."""


def resample_table(
    table: Float[Tensor, "n d"],
    old: tuple[int, int],
    new: tuple[int, int],
    mode: Resample = "bicubic_antialias",
) -> Float[Tensor, "m d"]:
    """A position table of grid `old` for grid `new`, rows, then columns; square or not.

    >>> resample_table(torch.zeros(14 * 14, 8), (14, 14), (8, 20)).shape
    torch.Size([160, 8])
    """
    if old == new:
        return table
    x = table.float().T.reshape(1, -1, *old)
    if mode == "nearest":
        rows, columns = (_nearest(o, n).to(x.device) for o, n in zip(old, new, strict=True))
        return x[:, :, rows][:, :, :, columns].flatten(2)[0].T.to(table.dtype)
    way = _TABLES[mode]
    if way.offset:
        # The 0.1 guards against a rounded-down size; it also moves every sampling point a little.
        scale = [(n + way.offset) / o for n, o in zip(new, old, strict=True)]
        x = F.interpolate(x, scale_factor=scale, mode=way.kind)
    elif way.antialias:
        x = _resized(_resized(x, new[1], way).mT, new[0], way).mT
    else:
        x = F.interpolate(x, size=new, mode=way.kind, align_corners=way.aligned)
    return x.flatten(2)[0].T.to(table.dtype)


def _resized(x: Float[Tensor, "*b n"], new: int, way: _Way) -> Float[Tensor, "*b m"]:
    """The last axis resampled.

    One axis at a time: torch 2.13 gives wrong values for whole maps that are one row or column.
    """
    rows = x.reshape(-1, 1, 1, x.shape[-1])
    rows = F.interpolate(rows, size=(1, new), mode=way.kind, antialias=way.antialias)
    return rows.view(*x.shape[:-1], new)


def _nearest(old: int, new: int) -> Int[Tensor, " n"]:
    """The cells of `old` in which those of `new` begin, in the float32 that Idefics3 counts in: of
    some that begin together it takes the one before.
    """
    begins = torch.arange(new, dtype=torch.float32) * (1 / torch.tensor(float(new)))
    borders = torch.arange(1 / old, 1.0, 1 / old)
    return torch.bucketize(begins.clamp(max=1 - 1e-6), borders, right=True)


def resample_patch(
    kernel: Float[Tensor, "d c _p _q"],
    new: tuple[int, int],
    mode: Resample = "bicubic_antialias",
) -> Float[Tensor, "d c p q"]:
    """A patch kernel for patches of another size: FlexiViT's pseudo-inverse (arXiv 2212.08013).

    With `B` the matrix that resizes a patch, `w' = pinv(B^T) w` is the kernel whose products with
    resized patches are nearest to the old ones, and equal to them when the patch grows (equation
    5). Interpolating the kernel itself would change their scale and more. `mode` is how the
    model's makers resample: it says which `B`.
    """
    if kernel.shape[-2:] == new:
        return kernel
    way = _PATCHES.get(mode, _TABLES["bicubic_antialias"])
    rows, columns = (
        _inverse(o, n, way).to(kernel.device) for o, n in zip(kernel.shape[-2:], new, strict=True)
    )
    return (rows @ kernel.double() @ columns.T).to(kernel.dtype)


def _inverse(old: int, new: int, way: _Way) -> Float64[Tensor, "n o"]:
    """`pinv(B^T)` along one axis: resizing is separable, and so is its pseudo-inverse.

    Of both axes at once the matrix would have no full rank where one grows and the other shrinks.
    """
    return torch.linalg.pinv(_resized(torch.eye(old, dtype=torch.float64), new, way))


def adapt_channels(
    kernel: Float[Tensor, "d _c p q"], channels: int
) -> Float[Tensor, "d channels p q"]:
    """A patch kernel for images of another number of channels, with outputs of the same size.

    To one channel the kernels are summed (exactly a grey image shown as RGB); to more they are
    repeated in turn and scaled by old / new (timm's rule).
    """
    old = kernel.shape[1]
    if old == channels:
        return kernel
    if channels == 1:
        return kernel.float().sum(dim=1, keepdim=True).to(kernel.dtype)
    turns = [i % old for i in range(channels)]
    return kernel[:, turns] * (old / channels)
