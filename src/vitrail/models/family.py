"""What every family has in common: a config that checks itself, and the way to logits.

A family's file says what is its own; the rest is here once, so that the same fault gets the same
message whatever the model.

Letters: b batch, c channels or classes, h w pixels, t heads, d width of what is pooled.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn

from vitrail.errors import UsageError, setting
from vitrail.nn import Features


@dataclass(frozen=True, kw_only=True)
class FamilyConfig(ABC):
    """The fields of every family's config. Sizes are (height, width), in pixels."""

    family: str = ""
    """Which family this is, where configs of several are read from a file."""
    image_size: tuple[int, int] = (224, 224)
    channels: int = 3
    classes: int = 1000
    """0 leaves the head out: `forward` then gives the pooled features."""
    drop_path: float = 0.0
    """Stochastic depth of the last block; it grows linearly from 0 in the first."""

    def __post_init__(self) -> None:
        """Raise `UsageError` for what no model of the family could be; a family adds its own."""
        own = type(self).family
        if self.family != own:
            raise UsageError(
                f"a {type(self).__name__} is of the family '{own}', not '{self.family}'"
            )
        self._check_pairs("image_size")
        self._check_counts("channels")
        if self.classes < 0:
            raise UsageError(f"{setting('classes')} cannot be negative")
        self._check_shares("drop_path")

    def _check_counts(self, *fields: str) -> None:
        for field in fields:
            if getattr(self, field) < 1:
                raise UsageError(f"{setting(field)} must be at least 1, not {getattr(self, field)}")

    def _check_pairs(self, *fields: str) -> None:
        for field in fields:
            pair = getattr(self, field)
            if not (isinstance(pair, tuple) and len(pair) == 2 and min(pair) >= 1):
                raise UsageError(
                    f"{setting(field)} is a pair (height, width) in pixels, not {pair!r}"
                )

    def _check_shares(self, *fields: str) -> None:
        for field in fields:
            if not 0 <= getattr(self, field) < 1:
                raise UsageError(f"{setting(field)} must be in [0, 1), not {getattr(self, field)}")

    def _check_eps(self, *fields: str) -> None:
        for field in fields:
            if not 0 < getattr(self, field) < 1:
                raise UsageError(f"{setting(field)} must be in (0, 1), not {getattr(self, field)}")

    @property
    @abstractmethod
    def stride(self) -> tuple[int, int]:
        """Pixels of the image per cell of the last map."""

    @property
    @abstractmethod
    def grid(self) -> tuple[int, int]:
        """The cells (rows, columns) of the last map at `image_size`."""

    @property
    @abstractmethod
    def shape(self) -> str:
        """The build in words, for a report."""

    @abstractmethod
    def check_size(self, size: tuple[int, int]) -> None:
        """Raise `UsageError` for a (height, width) of images that the model cannot take."""


def check_heads(width: int, heads: int) -> None:
    """Raise `UsageError` where a width cannot be dealt to so many heads."""
    if width % heads:
        raise UsageError(f"width {width} is not divisible by {heads} heads")


@dataclass(frozen=True, kw_only=True)
class StagedConfig(FamilyConfig):
    """A family of several maps, each half as high and wide as the one before, of images of any
    size. Tuples have one entry a stage.
    """

    finest: ClassVar[int] = 4
    """Pixels of the image per cell of the first map."""

    depths: tuple[int, ...]
    """Blocks of each stage."""
    widths: tuple[int, ...]
    """Channels of each stage's map."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_stages("depths", "widths")

    def _check_stages(self, *fields: str) -> None:
        """Each has a number from 1 for each stage, and all of them are of the same stages."""
        for field in fields:
            numbers = getattr(self, field)
            if not (isinstance(numbers, tuple) and numbers and min(numbers) >= 1):
                raise UsageError(
                    f"{setting(field)} has a number from 1 for each stage, not {numbers!r}"
                )
        if len({len(getattr(self, field)) for field in fields}) > 1:
            named = [f"{setting(field)} {getattr(self, field)}" for field in fields]
            raise UsageError(
                f"{', '.join(named[:-1])} and {named[-1]} are of the same stages: give as many of "
                f"each"
            )

    @property
    def strides(self) -> tuple[tuple[int, int], ...]:
        """Pixels of the image per cell of each map."""
        sides = [self.finest * 2**i for i in range(len(self.depths))]
        return tuple((side, side) for side in sides)

    @property
    def stride(self) -> tuple[int, int]:
        """Pixels of the image per cell of the last map."""
        return self.strides[-1]

    @property
    def grid(self) -> tuple[int, int]:
        """The cells (rows, columns) of the last map at `image_size`."""
        (h, w), (p, q) = self.image_size, self.stride
        return math.ceil(h / p), math.ceil(w / q)

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise `UsageError` for images without a pixel: any others are taken."""
        if min(size) < 1:
            raise UsageError(f"an image has at least 1x1 pixels, not {size[0]}x{size[1]}")


class Family(nn.Module, ABC):
    """A backbone, whose `features` a family defines, and its head."""

    config: FamilyConfig
    head: nn.Linear | None
    pooling: ClassVar[tuple[str, ...]] = ()
    """The modules, if it has them, that only the image's one vector goes through: nothing that
    reads its maps has a gradient for them."""

    @abstractmethod
    def block_names(self) -> list[str]:
        """The names of its blocks, first to last."""

    @abstractmethod
    def features(
        self, x: Float[Tensor, "b c h w"], extent: Int[Tensor, "b 2"] | None = None
    ) -> Features:
        """Everything a head may want of images `x` (already normalised)."""

    def zero_head(self) -> None:
        """Let the head, if there is one, prefer no class before it has learned."""
        if self.head is not None:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def logits(self, features: Features) -> Float[Tensor, "b t c"]:
        """The logits of each head apart; here of the one head."""
        assert self.head is not None, "this model was built without a head (classes=0)"
        return self.head(features.pooled)[:, None]

    def forward(
        self, x: Float[Tensor, "b c h w"], extent: Int[Tensor, "b 2"] | None = None
    ) -> Float[Tensor, "b out"]:
        """Logits `[b classes]`; the pooled features `[b d]` of a model without a head.

        `extent` is for images of different sizes, which ViTs alone take: see `ViT.features`.
        """
        features = self.features(x, extent)
        return features.pooled if self.head is None else self.logits(features).mean(dim=1)

    def check_channels(self, x: Float[Tensor, "b c h w"]) -> None:
        """Raise `UsageError` for images of other channels than the model's."""
        if x.shape[1] != self.config.channels:
            raise UsageError(
                f"the images have {x.shape[1]} channels, the model takes {self.config.channels}: "
                f"build it with {setting('channels', x.shape[1])}, or convert the images"
            )

    def check_images(self, x: Float[Tensor, "b c h w"], extent: Int[Tensor, "b 2"] | None) -> None:
        """Raise `UsageError` for images that a family without `extent` cannot take."""
        if extent is not None:
            raise UsageError(
                f"images of different sizes in one batch ({setting('data.resize')} native or pad) "
                f"are for ViTs: {self.config.family} takes resize crop or squash"
            )
        self.check_channels(x)
