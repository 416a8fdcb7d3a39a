"""ResNet (He et al., arXiv 1512.03385), the baseline that every ViT is compared with.

As torchvision and timm have it ("v1.5"): where a bottleneck halves the map, its 3x3 convolution
does, not the 1x1 before. Batch norms; convolution, norm, ReLU, and a ReLU after each sum.

Letters: b batch, c channels, h w pixels or cells, d channels of the last map.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitrail.errors import UsageError, setting, unknown_name
from vitrail.models.family import Family, StagedConfig
from vitrail.nn import (
    BatchNorm,
    DropPath,
    Features,
    channels_last,
    drop_path_rates,
    features_of_maps,
    he_normal_,
)

BlockKind = Literal["basic", "bottleneck"]


@dataclass(frozen=True, kw_only=True)
class ResNetConfig(StagedConfig):
    """The shape of one ResNet. Sizes are (height, width), in pixels."""

    family: Literal["resnet"] = "resnet"
    block: BlockKind = "bottleneck"
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1 with a quarter of the channels between."""
    depths: tuple[int, ...] = (3, 4, 6, 3)
    """Blocks of each stage."""
    widths: tuple[int, ...] = (256, 512, 1024, 2048)
    """Channels of each stage's map."""
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_eps("norm_eps")
        if self.block not in get_args(BlockKind):
            raise unknown_name("block", str(self.block), get_args(BlockKind))
        if self.block == "bottleneck" and any(width % 4 for width in self.widths):
            raise UsageError(
                f"{setting('block', 'bottleneck')} needs widths divisible by 4, not {self.widths}"
            )

    @property
    def shape(self) -> str:
        """The build in words, for a report."""
        depths, widths = (", ".join(map(str, numbers)) for numbers in (self.depths, self.widths))
        return f"{len(self.depths)} stages of {depths} {self.block} blocks, widths {widths}"


class Basic(nn.Module):
    """Two 3x3 convolutions: ResNet-18 and 34."""

    def __init__(self, c_in: int, c_out: int, stride: int, norm_eps: float, drop_path: float):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.norm1 = BatchNorm(c_out, eps=norm_eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.norm2 = BatchNorm(c_out, eps=norm_eps)
        self.drop_path = DropPath(drop_path)
        self.shortcut = _shortcut(c_in, c_out, stride, norm_eps)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b _c _h _w"]:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return F.relu(self.shortcut(x) + self.drop_path(y))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions, the 3x3 with the stride."""

    def __init__(self, c_in: int, c_out: int, stride: int, norm_eps: float, drop_path: float):
        super().__init__()
        middle = c_out // 4
        self.conv1 = nn.Conv2d(c_in, middle, 1, bias=False)
        self.norm1 = BatchNorm(middle, eps=norm_eps)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, padding=1, bias=False)
        self.norm2 = BatchNorm(middle, eps=norm_eps)
        self.conv3 = nn.Conv2d(middle, c_out, 1, bias=False)
        self.norm3 = BatchNorm(c_out, eps=norm_eps)
        self.drop_path = DropPath(drop_path)
        self.shortcut = _shortcut(c_in, c_out, stride, norm_eps)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b _c _h _w"]:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return F.relu(self.shortcut(x) + self.drop_path(y))


def _shortcut(c_in: int, c_out: int, stride: int, norm_eps: float) -> nn.Sequential:
    """Nothing, or a 1x1 convolution where a block's output has another shape than its input."""
    shortcut = nn.Sequential()
    if stride > 1 or c_in != c_out:
        shortcut.add_module("conv", nn.Conv2d(c_in, c_out, 1, stride, bias=False))
        shortcut.add_module("norm", BatchNorm(c_out, eps=norm_eps))
    return shortcut


class ResNet(Family):
    """A ResNet.

    >>> import torch
    >>> model = ResNet(ResNetConfig(block="basic", depths=(1, 1), widths=(16, 32), classes=10))
    >>> model(torch.zeros(3, 3, 64, 96)).shape
    torch.Size([3, 10])
    >>> model.features(torch.zeros(3, 3, 64, 96)).grid
    (8, 12)
    """

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.config: ResNetConfig = config
        kind = {"basic": Basic, "bottleneck": Bottleneck}[config.block]
        c_in = config.widths[0] if config.block == "basic" else config.widths[0] // 4
        self.stem = nn.Sequential()
        self.stem.add_module("conv", nn.Conv2d(config.channels, c_in, 7, 2, padding=3, bias=False))
        self.stem.add_module("norm", BatchNorm(c_in, eps=config.norm_eps))
        rates = iter(drop_path_rates(config.drop_path, sum(config.depths)))
        self.stages = nn.ModuleList()
        for i, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
            blocks = []
            for j in range(depth):
                stride = 2 if i and not j else 1
                blocks.append(kind(c_in, width, stride, config.norm_eps, next(rates)))
                c_in = width
            self.stages.append(nn.Sequential(*blocks))
        self.head = nn.Linear(c_in, config.classes) if config.classes else None
        self.initialise()

    def initialise(self) -> None:
        """As torchvision does: He's normal distribution for kernels; but zeros for the head."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
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

        `maps`: each stage's last, of strides 4, 8, 16, 32. Raises `UsageError` for an `extent`.
        """
        self.check_images(x, extent)
        x = F.max_pool2d(F.relu(self.stem(channels_last(x))), 3, stride=2, padding=1)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return features_of_maps(tuple(maps), self.config.strides)


ROWS: dict[str, ResNetConfig] = {
    "resnet18": ResNetConfig(block="basic", depths=(2, 2, 2, 2), widths=(64, 128, 256, 512)),
    "resnet50": ResNetConfig(),
}
"""Name -> shape. Image size, classes, drop path are changes to a row, never names."""
