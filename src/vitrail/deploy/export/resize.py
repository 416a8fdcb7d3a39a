"""`Preprocess.view` as tensor operations that every runtime has: for a graph that takes images.

Runtimes' own resizing differs from Pillow's, and that of some drops antialiasing in silence. So an
image is scaled as two products of matrices, one an axis:

    view = rows @ image @ columns.T

Of such a matrix each row says how much every pixel of the image counts in one of the view. It is
made in the graph, from the image's size, by Pillow's own definition (its `Resample.c`): a filter
that is widened where the image shrinks, sums of 1, weights of 22 bits, and rounding to whole levels
after each pass. What is cut off is an offset in the filter's places.

Places are whole numbers and what is left of divisions, so that no image is too large for float32.
OpenVINO has 31 bits for them: for views of 1,000 pixels that is enough for sides of a million.
"""

from collections.abc import Callable
from math import floor, pi
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float32, Int64, UInt8
from torch import Tensor, nn

from vitrail.data.views.preprocess import Interpolation, Preprocess
from vitrail.errors import UsageError

Scalar = Int64[Tensor, ""]


class Resize(nn.Module):
    """Decoded images of one size, any, as the views that `preprocess.view` makes of them.

    Images have the model's channels: greys are made of colours where they are decoded.

    >>> resize = Resize(Preprocess(size=(32, 48), crop=0.875))
    >>> tuple(resize(torch.zeros(2, 480, 640, 3, dtype=torch.uint8)).shape)
    (2, 3, 32, 48)
    """

    def __init__(self, preprocess: Preprocess) -> None:
        super().__init__()
        if not preprocess.one_size:
            raise UsageError(
                f"views by the rule '{preprocess.resize}' differ in size, so that a graph cannot "
                f"make them: the engine does, outside of it; crop, squash and letterbox can go in"
            )
        self.preprocess = preprocess

    def forward(self, image: UInt8[Tensor, "b h w c"]) -> UInt8[Tensor, "b c view_h view_w"]:
        sides = image.shape[1:3]
        height, width = (
            torch.full((), side, dtype=torch.int64, device=image.device) for side in sides
        )
        scaled = self._scaled(height, width)
        rows, columns = (
            _axis(*axis, self.preprocess.interpolation)
            for axis in zip(sides, scaled, self.preprocess.size, strict=True)
        )
        # Pillow before 13 begins with the columns always, 13 with the rows if the height loses more
        # than twice as many pixels as the width (python-pillow/Pillow#9549).
        lost = height - rows.shown
        shown = _either(
            (lost > 0) & (lost > 2 * (width - columns.shown)),
            _rows_first,
            _columns_first,
            (image.permute(0, 3, 1, 2).float(), rows.weights, columns.weights.T.contiguous()),
        ).to(torch.uint8)
        if self.preprocess.resize != "letterbox":
            return shown
        background = torch.full_like(shown, self.preprocess.background)
        shown = torch.where(columns.there, shown, background)
        return torch.where(rows.there[:, None], shown, background)

    def _scaled(self, height: Scalar, width: Scalar) -> tuple[Scalar, Scalar]:
        """(height, width) of the scaled image, of which the view is cut: as `Preprocess` has it."""
        rule, tile = self.preprocess.resize, self.preprocess.tile
        rows, columns = (floor(side / self.preprocess.crop) for side in self.preprocess.size)
        if rule == "squash":
            return torch.full_like(height, rows), torch.full_like(width, columns)
        by_height, by_width = rows * width, columns * height
        by_rows = by_height >= by_width if rule == "crop" else by_height <= by_width
        scaled_h = torch.where(by_rows, rows, _divided(by_width, width)[0].clamp(min=1))
        scaled_w = torch.where(by_rows, _divided(by_height, height)[0].clamp(min=1), columns)
        if rule == "letterbox" and tile:
            small, longer = torch.maximum(height, width) < tile, max(rows, columns)
            tiled_h, tiled_w = (_divided(side * longer, tile)[0] for side in (height, width))
            scaled_h = torch.where(small, tiled_h.clamp(min=1), scaled_h)
            scaled_w = torch.where(small, tiled_w.clamp(min=1), scaled_w)
        return scaled_h, scaled_w


class _Axis(NamedTuple):
    """What of an image's axis is where on the view's."""

    shown: Scalar
    """How many pixels of the view show the image; the others come after these."""
    there: Bool[Tensor, " view"]
    """Which they are."""
    weights: Float32[Tensor, "view source"]
    """How much each pixel of the image counts in each of the view."""


def _axis(side: int, scaled: Scalar, size: int, interpolation: Interpolation) -> _Axis:
    """The middle `size` pixels of `side` ones brought to `scaled`; all, if they are fewer."""
    source, index = torch.full_like(scaled, side), torch.arange(size, device=scaled.device)
    shown = scaled.clamp(max=size)
    half, odd = _divided(scaled - shown, 2)
    first = half + odd * _divided(half, 2)[1]  # Python's round: a half to the even side

    # A pixel's middle is in the image at source * (2 * (first + index) + 1) / (2 * scaled). Counted
    # from the middle of the image, source / 2, the numbers are small.
    middle, odd = _divided(source, 2)
    away = 2 * (first + index) + 1 - scaled
    whole, rest = _divided(source * away + odd * scaled, 2 * scaled)
    steps = torch.arange(side, device=scaled.device) - (middle + whole)[:, None]
    if interpolation == "nearest":
        weights = (steps == 0).float()
    else:
        part = rest.float() / (2 * scaled)
        shrinks = (source.float() / scaled).clamp(min=1)
        weights = _FILTERS[interpolation]((steps.float() + (0.5 - part)[:, None]) / shrinks)
        # Beyond what is shown there may be no pixel near, and the sum be 0.
        weights = weights / weights.sum(1, keepdim=True).clamp(min=0.01)
        weights = torch.floor(weights * 2**22 + 0.5) / 2**22
    return _Axis(shown, index < shown, weights)


def _divided(
    over: Int64[Tensor, " *n"], under: Scalar | int
) -> tuple[Int64[Tensor, " *n"], Int64[Tensor, " *n"]]:
    """Quotient and remainder, exact for quotients up to ten million: OpenVINO divides whole numbers
    as float32, and so may be off by one.
    """
    whole = torch.floor(over.float() / under).long()
    rest = over - whole * under
    more = (rest >= under).long() - (rest < 0).long()
    return whole + more, rest - more * under


def _triangle(x: Float32[Tensor, "view source"]) -> Float32[Tensor, "view source"]:
    return (1 - x.abs()).clamp(min=0)


def _cubic(x: Float32[Tensor, "view source"]) -> Float32[Tensor, "view source"]:
    """Keys' with a = -0.5, Catmull and Rom's spline."""
    x = x.abs().clamp(max=2)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((2.5 - 0.5 * x) * x - 4) * x + 2
    return torch.where(x < 1, near, far)


def _lanczos(x: Float32[Tensor, "view source"]) -> Float32[Tensor, "view source"]:
    """Three lobes."""
    x = x.clamp(min=-3, max=3) * pi
    middle = x == 0
    x = torch.where(middle, 1.0, x)
    return torch.where(middle, 1.0, 3 * x.sin() * (x / 3).sin() / (x * x))


_FILTERS = {"bilinear": _triangle, "bicubic": _cubic, "lanczos": _lanczos}


def _either(
    which: Bool[Tensor, ""],
    one: Callable[..., Tensor],
    other: Callable[..., Tensor],
    given: tuple[Tensor, ...],
) -> Tensor:
    """What one function makes, or the other: decided in the graph."""
    if torch.compiler.is_exporting():
        return torch.cond(which, one, other, given)
    return (one if which else other)(*given)  # torch.cond would have itself compiled


def _rows_first(
    pixels: Float32[Tensor, "b c h w"],
    rows: Float32[Tensor, "view_h h"],
    columns: Float32[Tensor, "w view_w"],
) -> Float32[Tensor, "b c view_h view_w"]:
    return _levels(_levels(rows @ pixels) @ columns)


def _columns_first(
    pixels: Float32[Tensor, "b c h w"],
    rows: Float32[Tensor, "view_h h"],
    columns: Float32[Tensor, "w view_w"],
) -> Float32[Tensor, "b c view_h view_w"]:
    return _levels(rows @ _levels(pixels @ columns))


def _levels(x: Float32[Tensor, "b c h w"]) -> Float32[Tensor, "b c h w"]:
    return torch.floor(x + 0.5).clamp(0, 255)
