"""What a head needs of a backbone, whatever its family.

Letters: b batch, c channels, h w pixels.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from vitrail.errors import UsageError, setting
from vitrail.heads.queries import Jointly
from vitrail.nn import Features


@runtime_checkable
class Backbone(Protocol):
    """What a head needs of a backbone: a `vitrail.models.family.Family` has it."""

    config: Any
    pooling: ClassVar[tuple[str, ...]]

    def features(self, x: Tensor, extent: Tensor | None = None) -> Features:
        """Maps and strides."""
        ...

    def block_names(self) -> list[str]:
        """Its blocks, first to last."""
        ...


@runtime_checkable
class Tapped(Backbone, Jointly, Protocol):
    """One whose blocks all have a map of one stride, and can be read: a `vitrail.models.ViT`."""

    def taps(self, x: Tensor, blocks: tuple[int, ...]) -> tuple[Tensor, ...]:
        """The maps after these blocks."""
        ...


def quarters(depth: int) -> tuple[int, ...]:
    """The blocks, counted from 0, after every quarter of `depth`.

    Those of DINOv2's and DINOv3's evaluations: of 24 the second is the fifth, not the sixth.

    >>> quarters(12), quarters(24), quarters(40)
    ((2, 5, 8, 11), (4, 11, 17, 23), (9, 19, 29, 39))
    """
    if depth == 24:
        return (4, 11, 17, 23)
    return tuple(max(0, depth * i // 4 - 1) for i in (1, 2, 3, 4))


def quarters_of(backbone: Tapped) -> tuple[int, ...]:
    """The blocks after every quarter of a ViT's; `UsageError` where it has too few."""
    depth = backbone.config.depth
    if depth < 4:
        raise UsageError(
            f"a ViT of {depth} blocks has no four quarters: use {setting('taps', 'last')}, and "
            f"{setting('fine', 'deconv')} or side"
        )
    return quarters(depth)


@functools.cache
def shapes_of(kind: Callable[[Any], Any], config: Any) -> Features:
    """A backbone's features without numbers: their shapes and strides, whatever the family."""
    with torch.device("meta"), torch.no_grad():
        twin = kind(config).eval()
        return twin.features(torch.zeros(1, config.channels, *config.image_size))


def refuse_extent(extent: Tensor | None, instead: str) -> None:
    """Raise `UsageError` for images of different sizes on one canvas; `instead`: a resize rule."""
    if extent is not None:
        raise UsageError(
            f"images of different sizes in one batch ({setting('data.resize')} native or pad) have "
            f"no maps of one size for a head: use {setting('data.resize', instead)}"
        )
