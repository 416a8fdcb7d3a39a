"""BiT, Big Transfer (Kolesnikov et al., arXiv 1912.11370): the ResNet that ViT was measured with.

A ResNetV2 (1603.05027): norm and ReLU stand before each convolution and not behind it, so that the
sum of the branches runs through the network as it is, to one norm at its end. Group norms and
standardised kernels (1903.10520) instead of batch norms; the stride in the 3x3 convolutions;
widths `k` times a ResNet's in `R50xk`.

Letters: b batch, c channels, h w pixels or cells, d channels of the last map.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitrail.errors import UsageError, unknown_name
from vitrail.models.family import Family, StagedConfig
from vitrail.nn import (
    GROUPS,
    DropPath,
    Eps,
    Features,
    GroupNormReLU,
    StdConv2d,
    drop_path_rates,
    features_of_maps,
    he_normal_,
)


@dataclass(frozen=True, kw_only=True)
class BiTConfig(StagedConfig):
    """The shape of one BiT. Sizes are (height, width), in pixels."""

    family: Literal["bit"] = "bit"
    depths: tuple[int, ...] = (3, 4, 6, 3)
    """Blocks of each stage."""
    widths: tuple[int, ...] = (256, 512, 1024, 2048)
    """Channels of each stage's map."""
    eps: Eps = "big_transfer"
    """Whose epsilons the norms and the standardised kernels have: as the weights' makers did."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eps not in get_args(Eps):
            raise unknown_name("eps", str(self.eps), get_args(Eps))
        if any(width % (4 * GROUPS) for width in self.widths):
            raise UsageError(
                f"bottlenecks have a quarter of the width, in {GROUPS} groups: widths must be "
                f"divisible by {4 * GROUPS}, not {self.widths}"
            )

    @property
    def shape(self) -> str:
        """The build in words, for a report."""
        depths, widths = (", ".join(map(str, numbers)) for numbers in (self.depths, self.widths))
        return f"{len(self.depths)} stages of {depths} bottleneck blocks, widths {widths}"


class Block(nn.Module):
    """1x1, 3x3, 1x1 convolutions, a norm and ReLU before each; the shortcut begins behind the
    first of these where it has a convolution of its own.
    """

    def __init__(self, c_in: int, c_out: int, stride: int, eps: Eps, drop_path: float) -> None:
        super().__init__()
        middle = c_out // 4
        self.norm1 = GroupNormReLU(c_in, eps)
        self.conv1 = StdConv2d(c_in, middle, 1, eps=eps)
        self.norm2 = GroupNormReLU(middle, eps)
        self.conv2 = StdConv2d(middle, middle, 3, stride, eps=eps)
        self.norm3 = GroupNormReLU(middle, eps)
        self.conv3 = StdConv2d(middle, c_out, 1, eps=eps)
        self.drop_path = DropPath(drop_path)
        same = stride == 1 and c_in == c_out
        self.shortcut = None if same else StdConv2d(c_in, c_out, 1, stride, eps=eps)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b _c _h _w"]:
        y = self.norm1(x)
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = self.conv3(self.norm3(self.conv2(self.norm2(self.conv1(y)))))
        return shortcut + self.drop_path(y)


class BiT(Family):
    """A ResNetV2 as Big Transfer has it.

    >>> import torch
    >>> model = BiT(BiTConfig(depths=(1, 1), widths=(128, 256), classes=10))
    >>> model(torch.zeros(3, 3, 64, 96)).shape
    torch.Size([3, 10])
    >>> model.features(torch.zeros(3, 3, 64, 96)).grid
    (8, 12)
    """

    def __init__(self, config: BiTConfig) -> None:
        super().__init__()
        self.config: BiTConfig = config
        eps = config.eps
        c_in = config.widths[0] // 4
        self.stem = StdConv2d(config.channels, c_in, 7, 2, eps=eps)
        rates = iter(drop_path_rates(config.drop_path, sum(config.depths)))
        self.stages = nn.ModuleList()
        for i, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
            blocks = []
            for j in range(depth):
                blocks.append(Block(c_in, width, 2 if i and not j else 1, eps, next(rates)))
                c_in = width
            self.stages.append(nn.Sequential(*blocks))
        self.norm = GroupNormReLU(c_in, eps)
        self.head = nn.Linear(c_in, config.classes) if config.classes else None
        self.initialise()

    def initialise(self) -> None:
        """He's normal distribution for kernels, whose scale only sets how fast they turn: they are
        standardised. Zeros for the head.
        """
        for module in self.modules():
            if isinstance(module, StdConv2d):
                he_normal_(module)
        self.zero_head()

    def block_names(self) -> list[str]:
        """The modules of the blocks, first to last."""
        return [
            f"stages.{i}.{j}" for i, depth in enumerate(self.config.depths) for j in range(depth)
        ]

    def features(
        self, x: Float[Tensor, "b c h w"], extent: Int[Tensor, "b 2"] | None = None
    ) -> Features:
        """Everything a head may want of images `x` (already normalised), of any size.

        `maps`: each stage's last, of strides 4, 8, 16, 32, and only the last of them normed.
        Raises `UsageError` for an `extent`.
        """
        self.check_images(x, extent)
        # A border of zeros, which are greater than half of what they stand beside: no norm, no
        # ReLU has been here.
        x = F.max_pool2d(F.pad(self.stem(x), (1, 1, 1, 1)), 3, stride=2)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        maps[-1] = self.norm(maps[-1])
        return features_of_maps(tuple(maps), self.config.strides)


ROWS: dict[str, BiTConfig] = {
    "bit_r50x1": BiTConfig(),
    "bit_r101x1": BiTConfig(depths=(3, 4, 23, 3)),
    "bit_r152x2": BiTConfig(depths=(3, 8, 36, 3), widths=(512, 1024, 2048, 4096)),
}
"""Name -> shape. Image size, classes, drop path are changes to a row, never names."""
