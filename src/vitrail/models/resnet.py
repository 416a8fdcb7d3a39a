"""ResNet (He et al., arXiv 1512.03385), the baseline that every ViT is compared with.

As torchvision and timm have it ("v1.5"): where a bottleneck halves the map, its 3x3 convolution
does, not the 1x1 before. Batch norms; convolution, norm, ReLU, and a ReLU after each sum.

Letters: b batch, c channels, h w pixels or cells, d channels of the last map.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitrail.errors import UsageError, unknown_name
from vitrail.nn import BatchNorm, DropPath, Features, drop_path_rates, features_of_maps

BlockKind = Literal["basic", "bottleneck"]


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """The shape of one ResNet. Sizes are (height, width), in pixels."""

    family: Literal["resnet"] = "resnet"
    block: BlockKind = "bottleneck"
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1 with a quarter of the channels between."""
    depths: tuple[int, ...] = (3, 4, 6, 3)
    """Blocks of each stage."""
    widths: tuple[int, ...] = (256, 512, 1024, 2048)
    """Channels of each stage's map."""
    image_size: tuple[int, int] = (224, 224)
    channels: int = 3
    classes: int = 1000
    """0 leaves the head out: `forward` then gives the pooled features."""
    norm_eps: float = 1e-5
    drop_path: float = 0.0
    """Stochastic depth of the last block; it grows linearly from 0 in the first."""

    def __post_init__(self) -> None:
        if self.family != "resnet":
            raise UsageError(f"a ResNetConfig is of the family 'resnet', not '{self.family}'")
        if self.block not in get_args(BlockKind):
            raise unknown_name("block", str(self.block), get_args(BlockKind))
        for field in ("depths", "widths"):
            numbers = getattr(self, field)
            if not (isinstance(numbers, tuple) and numbers and min(numbers) >= 1):
                raise UsageError(f"{field} has a number from 1 for each stage, not {numbers!r}")
        if len(self.depths) != len(self.widths):
            raise UsageError(
                f"depths {self.depths} and widths {self.widths} are of the same stages: give as "
                f"many of each"
            )
        if self.block == "bottleneck" and any(width % 4 for width in self.widths):
            raise UsageError(f"block='bottleneck' needs widths divisible by 4, not {self.widths}")
        if not (isinstance(self.image_size, tuple) and len(self.image_size) == 2):
            raise UsageError(
                f"image_size is a pair (height, width) in pixels, not {self.image_size!r}"
            )
        self.check_size(self.image_size)
        if self.channels < 1:
            raise UsageError(f"channels must be at least 1, not {self.channels}")
        if self.classes < 0:
            raise UsageError("classes cannot be negative")
        if not 0 < self.norm_eps < 1:
            raise UsageError(f"norm_eps must be in (0, 1), not {self.norm_eps}")
        if not 0 <= self.drop_path < 1:
            raise UsageError(f"drop_path must be in [0, 1), not {self.drop_path}")

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise `UsageError` for images without a pixel: a ResNet takes any others."""
        if min(size) < 1:
            raise UsageError(f"an image has at least 1x1 pixels, not {size[0]}x{size[1]}")

    @property
    def stride(self) -> tuple[int, int]:
        """Pixels of the image per cell of the last map."""
        side = 2 ** (len(self.depths) + 1)
        return side, side

    @property
    def grid(self) -> tuple[int, int]:
        """The cells (rows, columns) of the last map at `image_size`."""
        (h, w), (p, q) = self.image_size, self.stride
        return math.ceil(h / p), math.ceil(w / q)

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


class ResNet(nn.Module):
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
        self.config = config
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
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if self.head is not None:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

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
        if extent is not None:
            raise UsageError(
                "images of different sizes in one batch (data.resize native or pad) are for ViTs: "
                "resnet takes resize crop or squash"
            )
        if x.shape[1] != self.config.channels:
            raise UsageError(
                f"the images have {x.shape[1]} channels, the model takes {self.config.channels}: "
                f"build it with channels={x.shape[1]}, or convert the images"
            )
        x = F.max_pool2d(F.relu(self.stem(x)), 3, stride=2, padding=1)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        strides = tuple((4 * 2**i, 4 * 2**i) for i in range(len(maps)))
        return features_of_maps(tuple(maps), strides)

    def logits(self, features: Features) -> Float[Tensor, "b t c"]:
        """The logits of the one head."""
        assert self.head is not None, "this model was built without a head (classes=0)"
        logits: Tensor = self.head(features.pooled)
        return logits[:, None]

    def forward(
        self, x: Float[Tensor, "b c h w"], extent: Int[Tensor, "b 2"] | None = None
    ) -> Float[Tensor, "b out"]:
        """Logits `[b classes]`; the pooled features `[b d]` of a model without a head."""
        features = self.features(x, extent)
        return features.pooled if self.head is None else self.logits(features).mean(dim=1)


ROWS: dict[str, ResNetConfig] = {
    "resnet18": ResNetConfig(block="basic", depths=(2, 2, 2, 2), widths=(64, 128, 256, 512)),
    "resnet50": ResNetConfig(),
}
"""Name -> shape. Image size, classes, drop path are changes to a row, never names."""
