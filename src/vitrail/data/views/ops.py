"""Pillow's image operations on batches of tensors, each a pure function.

Every one takes images, uint8 [b c h w] of one or three channels, and one level an image, float
[b], and gives new images of the same shape: to within one grey level what Pillow's ImageOps,
ImageEnhance and Image.transform make of the images one at a time, on whatever device they lie.
Sums over an image are taken in integers, so that no result depends on what shares its batch.

Operations on one channel are those on a grey image; to change its colour does nothing.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64, UInt8
from torch import Tensor

Images = UInt8[Tensor, "b c h w"]
Levels = Float[Tensor, " b"]
Amounts = Float64[np.ndarray, " b"]
Maps = Float64[np.ndarray, "b 3 3"]

MAX_BLUR = 2.0
"""The greatest standard deviation that `blur` takes, in pixels."""


def brightness(images: Images, factor: Levels) -> Images:
    """0 is black, 1 the image itself, more is brighter."""
    return _grey_levels(images * _each(factor))


def contrast(images: Images, factor: Levels) -> Images:
    """0 is the image's mean grey, 1 the image itself, more has more contrast."""
    grey = _luma(images)
    mean = grey.sum((1, 2, 3), dtype=torch.int64) / grey[0].numel()
    return _blend(_each((mean + 0.5).floor()), images, factor)


def color(images: Images, factor: Levels) -> Images:
    """0 is grey, 1 the image itself, more is more colourful."""
    return images.clone() if images.shape[1] == 1 else _blend(_luma(images), images, factor)


def hue(images: Images, turn: Levels) -> Images:
    """Colours turned around the wheel by a part of it: 1/3 makes red green, and 1 is no change.

    By HSV, as torchvision does it. Pillow's own HSV has 8 bits, hence hues 1/255 of the wheel
    apart; here they are what they are.
    """
    if images.shape[1] == 1:
        return images.clone()
    red, green, blue = images.to(torch.int16).unbind(1)
    most, least = images.amax(1), images.amin(1)
    chroma = (most - least).float()
    # The greatest channel says which third of the wheel, the others where in it. (Differences of
    # whole numbers, and a grey has no hue and needs none.)
    beside = torch.where(
        most == red, green - blue, torch.where(most == green, blue - red, red - green)
    )
    third = torch.where(most == red, 0, torch.where(most == green, 2, 4))
    sixths = (beside / chroma.clamp(min=1)).add_(third).add_(6 * turn[:, None, None])
    changed = torch.empty(images.shape, device=images.device)
    for channel, n in enumerate((5, 3, 1)):
        # Of each channel how far it is below the greatest, by its distance from its own hue.
        k = sixths + n
        k.sub_((k / 6).floor_().mul_(6)).sub_(2).abs_().neg_().add_(2).clamp_(0, 1).mul_(chroma)
        torch.sub(most, k, out=changed[:, channel])
    return _grey_levels(changed.add_(0.5))


def grayscale(images: Images, _level: Levels) -> Images:
    """The luma, in all channels."""
    return _luma(images).expand_as(images)


def sharpness(images: Images, factor: Levels) -> Images:
    """0 is smoothed by a 3x3 kernel, 1 the image itself, more is sharper. Borders stay."""
    x = images.to(torch.int16)
    rows = x[..., :-2, :] + x[..., 1:-1, :] + x[..., 2:, :]
    around = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    smooth = images.float()
    # Pillow's SMOOTH: 5 in the middle, 1 around it, over 13.
    smooth[..., 1:-1, 1:-1] = ((around + 4 * x[..., 1:-1, 1:-1]) / 13 + 0.5).floor()
    return _blend(smooth, images, factor)


def blur(images: Images, sigma: Levels) -> Images:
    """Gaussian blur of at most MAX_BLUR pixels; beyond its edge an image goes on unchanged.

    A true Gaussian; Pillow's is three box blurs, a few grey levels off on hard edges.
    """
    b, c, h, w = images.shape
    reach = int(3 * MAX_BLUR)
    # The same taps for every batch, so that no result depends on the largest sigma in it.
    steps = torch.arange(-reach, reach + 1, device=images.device)
    taps = torch.exp(-0.5 * (steps / sigma[:, None]) ** 2)
    taps = (taps / taps.sum(1, keepdim=True)).repeat_interleave(c, 0)
    x = F.pad(images.float(), (reach,) * 4, mode="replicate").reshape(1, b * c, -1, w + 2 * reach)
    x = F.conv2d(x, taps[:, None, :, None], groups=b * c)
    x = F.conv2d(x, taps[:, None, None, :], groups=b * c)
    return _grey_levels(x.view(b, c, h, w) + 0.5)


def autocontrast(images: Images, _level: Levels) -> Images:
    """Each channel stretched to the full range of levels."""
    low, high = (edge(images, (2, 3), keepdim=True).float() for edge in (torch.amin, torch.amax))
    stretched = (images - low) * (255 / (high - low).clamp(min=1))
    return _grey_levels(torch.where(high > low, stretched, images.float()))


def equalize(images: Images, _level: Levels) -> Images:
    """Each channel's histogram made as even as one table of levels can."""
    planes = images.flatten(0, 1).flatten(1).long()
    counts = _histograms(planes)
    brightest = torch.where(counts > 0, torch.arange(256, device=images.device), 0).argmax(1)
    step = (planes.shape[1] - counts.gather(1, brightest[:, None])) // 255
    below = counts.cumsum(1) - counts
    even = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    table = torch.where(step > 0, even, torch.arange(256, device=images.device))
    return table.to(torch.uint8).gather(1, planes).view_as(images)


def invert(images: Images, _level: Levels) -> Images:
    """The negative."""
    return 255 - images


def posterize(images: Images, bits: Levels) -> Images:
    """Each level's `bits` most significant bits, rounded up to whole ones, and at least one."""
    dropped = 8 - bits.ceil().clamp(1, 8).long()
    return images & _each((256 - (1 << dropped)).to(torch.uint8))


def solarize(images: Images, threshold: Levels) -> Images:
    """The negative of whatever is as bright as `threshold`."""
    return torch.where(images < _each(threshold), images, 255 - images)


def solarize_add(images: Images, added: Levels) -> Images:
    """`added`, at most 127, on top of whatever is darker than 128."""
    return torch.where(images < 128, images + _each(added.to(torch.uint8)), images)


PHOTOMETRIC: dict[str, Callable[[Images, Levels], Images]] = {
    op.__name__: op
    for op in (
        *(autocontrast, equalize, invert, posterize, solarize, solarize_add),
        *(color, contrast, brightness, sharpness, grayscale, hue, blur),
    )
}
"""What changes the pixels where they are, by name."""


def rotate(degrees: Amounts, size: tuple[int, int]) -> Maps:
    """Counter-clockwise about the centre."""
    h, w = size
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return _maps(cos, -sin, (w - w * cos + h * sin) / 2, sin, cos, (h - w * sin - h * cos) / 2)


def shear_x(slope: Amounts, _size: tuple[int, int]) -> Maps:
    """Each row `slope` pixels further to the left than the one above it."""
    return _maps(1, slope, 0, 0, 1, 0)


def shear_y(slope: Amounts, _size: tuple[int, int]) -> Maps:
    """Each column `slope` pixels further up than the one left of it."""
    return _maps(1, 0, 0, slope, 1, 0)


def translate_x(part: Amounts, size: tuple[int, int]) -> Maps:
    """To the left, by a part of the width."""
    return _maps(1, 0, part * size[1], 0, 1, 0)


def translate_y(part: Amounts, size: tuple[int, int]) -> Maps:
    """Up, by a part of the height."""
    return _maps(1, 0, 0, 0, 1, part * size[0])


GEOMETRIC: dict[str, Callable[[Amounts, tuple[int, int]], Maps]] = {
    op.__name__: op for op in (rotate, shear_x, shear_y, translate_x, translate_y)
}
"""What moves the pixels, by name: level and (height, width) to the map for `warp`."""


def warp(images: Images, maps: Maps, fill: int) -> Images:
    """Each image seen through its map, bilinear; `fill` where that falls outside the image.

    A map takes a place (x, y, 1) in the new image to its place in the old one, both in pixels from
    the upper left corner, the first pixel's centre at (0.5, 0.5). Maps in a row are one map, their
    product, so that an image is only resampled once.
    """
    h, w = images.shape[-2:]
    # The same in grid_sample's units, where an image reaches from -1 to 1.
    unit = np.array([[2 / w, 0, -1], [0, 2 / h, -1], [0, 0, 1]])
    a, b, c, d, e, f = (
        torch.from_numpy((unit @ maps @ np.linalg.inv(unit))[:, :2].reshape(-1, 6))
        .to(images.device, torch.float32)
        .T[..., None, None]
    )
    x, y = ((torch.arange(n, device=images.device) * 2 + 1) / n - 1 for n in (w, h))
    u, v = a * x + (b * y[:, None] + c), d * x + (e * y[:, None] + f)
    grid = torch.stack((u, v), -1)
    seen = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    # Pixels that were moved by whole pixels keep their levels in spite of rounding.
    levels = _grey_levels(seen.add_(0.001))
    outside = torch.maximum(u.abs_(), v.abs_()) > 1
    return levels.masked_fill_(outside[:, None], fill)


def _maps(*entries: int | float | Amounts) -> Maps:
    """The first two rows of the matrices, entry by entry."""
    return np.stack(np.broadcast_arrays(*entries, 0.0, 0.0, 1.0), axis=-1).reshape(-1, 3, 3)


def _each(levels: Tensor) -> Tensor:
    return levels[:, None, None, None]


def _grey_levels(x: Tensor) -> Images:
    """As Pillow does: what is out of range is clipped (in place), and the fraction dropped."""
    return x.clamp_(0, 255).to(torch.uint8)


def _luma(images: Images) -> UInt8[Tensor, "b 1 h w"]:
    """ITU-R 601-2, in Pillow's fixed point."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.to(torch.int32).unbind(1)
    luma = (19595 * red).add_(green, alpha=38470).add_(blue, alpha=7471).add_(32768)
    return (luma >> 16).to(torch.uint8)[:, None]


def _blend(base: Tensor, images: Images, factor: Levels) -> Images:
    """From `base` at 0 through the image at 1, and beyond."""
    return _grey_levels(images.float().lerp_(base.float(), _each(1 - factor)))


def _histograms(planes: Int64[Tensor, "k n"]) -> Int64[Tensor, "k 256"]:
    k = planes.shape[0]
    own_bins = planes + 256 * torch.arange(k, device=planes.device)[:, None]
    return torch.bincount(own_bins.flatten(), minlength=256 * k).view(k, 256)
