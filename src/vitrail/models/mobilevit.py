"""MobileViT (Mehta and Rastegari, arXiv 2110.02178): a small convolutional network whose last three
stages end in transformers over the whole map.

- stages of MobileNetV2's inverted residuals (1801.04381), each but the first halving the map
- a MobileViT block: 3x3 convolution, then a transformer, projected back and fused with its input
- cells attend in four groups, those at the same place in patches of 2x2: what is beside it a cell
  knows by the convolution, and four groups cost a quarter of attention among all
- no positions; batch norms and SiLU

Any image size. A map that is no whole number of patches is scaled up to one and back (bilinear), as
in the authors' code and timm's.

The images are not normalised: 0 is black, 1 white (mean 0, deviation 1).

Letters: b batch, c channels, h w pixels or cells, n patches, d width of a token.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitrail.errors import UsageError
from vitrail.models.family import Family, StagedConfig, check_heads
from vitrail.nn import (
    BatchNorm,
    Block,
    DropPath,
    Features,
    channels_last,
    drop_path_rates,
    features_of_maps,
    he_normal_,
)


@dataclass(frozen=True, kw_only=True)
class MobileViTConfig(StagedConfig):
    """The shape of one MobileViT. Sizes are (height, width)."""

    finest: ClassVar[int] = 2

    family: Literal["mobilevit"] = "mobilevit"
    stem_width: int = 16
    """Channels of the first convolution."""
    widths: tuple[int, ...] = (32, 64, 96, 128, 160)
    """Channels of each stage's map."""
    depths: tuple[int, ...] = (1, 3, 1, 1, 1)
    """Inverted residuals of each stage; a transformer may follow them."""
    expansion: int = 4
    """How many times its input's channels an inverted residual has inside."""
    token_widths: tuple[int, ...] = (144, 192, 240)
    """Width of the tokens in each of the last stages' transformers."""
    token_depths: tuple[int, ...] = (2, 4, 3)
    """Blocks of each transformer."""
    mlp: tuple[int, ...] = (288, 384, 480)
    """Hidden widths of their MLPs."""
    heads: int = 4
    unfold: int = 2
    """Side of a patch, in cells: one cell of each patch attends to one of each other."""
    last_width: int = 640
    """Channels of what is pooled."""
    image_size: tuple[int, int] = (256, 256)
    norm_eps: float = 1e-5
    """Of the transformers' norms; batch norms have torch's own."""
    dropout: float = 0.1
    """In the transformers and before the head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        transformers = ("token_widths", "token_depths", "mlp")
        self._check_stages(*transformers)
        if len(self.mlp) > len(self.widths):
            raise UsageError(
                f"{', '.join(transformers)} are of the last of {len(self.widths)} stages, and "
                f"cannot have {len(self.mlp)} entries"
            )
        self._check_counts("stem_width", "expansion", "heads", "unfold", "last_width")
        for width in self.token_widths:
            check_heads(width, self.heads)
        self._check_eps("norm_eps")
        self._check_shares("dropout")

    @property
    def shape(self) -> str:
        """Its build in words."""
        widths, depths, tokens = (
            ", ".join(map(str, numbers))
            for numbers in (self.widths, self.token_depths, self.token_widths)
        )
        return (
            f"{len(self.widths)} stages, widths {widths}, the last {len(self.token_depths)} with "
            f"transformers of {depths} blocks, widths {tokens}"
        )


class ConvNorm(nn.Module):
    """A convolution that keeps the size, but for its stride; batch norm; SiLU."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        *,
        act: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            c_in, c_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False
        )
        self.norm = BatchNorm(c_out)
        self.act = nn.SiLU() if act else nn.Identity()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b _c _h _w"]:
        return self.act(self.norm(self.conv(x)))


class InvertedResidual(nn.Module):
    """To many channels, a 3x3 convolution of each alone, and back to few (arXiv 1801.04381)."""

    def __init__(
        self, c_in: int, c_out: int, stride: int, expansion: int, drop_path: float
    ) -> None:
        super().__init__()
        middle = c_in * expansion
        self.conv1 = ConvNorm(c_in, middle, 1)
        self.conv2 = ConvNorm(middle, middle, 3, stride, groups=middle)
        self.conv3 = ConvNorm(middle, c_out, 1, act=False)
        self.shortcut = stride == 1 and c_in == c_out
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b _c _h _w"]:
        y = self.conv3(self.conv2(self.conv1(x)))
        return x + self.drop_path(y) if self.shortcut else y


class MobileViTBlock(nn.Module):
    """What a cell's neighbours say, then what the whole map does (section 3.1 and figure 1b)."""

    def __init__(self, config: MobileViTConfig, width: int, index: int, drop_path: float) -> None:
        """`index`: of its transformer among the config's."""
        super().__init__()
        d = config.token_widths[index]
        self.unfold = config.unfold
        self.local = ConvNorm(width, width, 3)
        self.to_tokens = nn.Conv2d(width, d, 1, bias=False)
        self.blocks = nn.Sequential(
            *(
                Block(
                    d,
                    config.heads,
                    config.mlp[index],
                    activation="silu",
                    norm_eps=config.norm_eps,
                    dropout=config.dropout,
                    drop_path=drop_path,
                )
                for _ in range(config.token_depths[index])
            )
        )
        self.norm = nn.LayerNorm(d, eps=config.norm_eps)
        self.to_map = ConvNorm(d, width, 1)
        self.fuse = ConvNorm(2 * width, width, 3)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        y = self.to_tokens(self.local(x))
        size, side = (y.shape[2], y.shape[3]), self.unfold
        grid = (math.ceil(size[0] / side), math.ceil(size[1] / side))
        y = scaled(y, (grid[0] * side, grid[1] * side))
        y = self.norm(self.blocks(unfold(y, side)))
        y = scaled(fold(y, grid, side), size)
        return self.fuse(torch.cat([x, self.to_map(y)], dim=1))


def scaled(x: Float[Tensor, "b c h w"], size: tuple[int, int]) -> Float[Tensor, "b c _h _w"]:
    """The map at another size; as it is where it has that size."""
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear")


def unfold(x: Float[Tensor, "b d h w"], side: int) -> Float[Tensor, "g n d"]:
    """Sequences of the cells at one place of every patch: `g = b * side * side` of them.

    >>> unfold(torch.arange(8.0).view(1, 1, 2, 4), side=2)[:, :, 0].tolist()
    [[0.0, 2.0], [1.0, 3.0], [4.0, 6.0], [5.0, 7.0]]
    """
    b, d, h, w = x.shape
    x = x.view(b, d, h // side, side, w // side, side).permute(0, 3, 5, 2, 4, 1)
    return x.reshape(b * side * side, -1, d)


def fold(
    tokens: Float[Tensor, "g n d"], grid: tuple[int, int], side: int
) -> Float[Tensor, "b d h w"]:
    """The inverse of `unfold`, for `grid` patches."""
    d = tokens.shape[2]
    x = tokens.view(-1, side, side, *grid, d).permute(0, 5, 3, 1, 4, 2)
    return x.reshape(-1, d, grid[0] * side, grid[1] * side)


class MobileViT(Family):
    """A MobileViT of the first version.

    >>> config = MobileViTConfig(widths=(16, 24), depths=(1, 1), token_widths=(32,),
    ...                          token_depths=(1,), mlp=(64,), last_width=48, classes=10)
    >>> model = MobileViT(config)
    >>> model(torch.zeros(3, 3, 64, 96)).shape
    torch.Size([3, 10])
    >>> model.features(torch.zeros(3, 3, 64, 96)).grid
    (16, 24)
    """

    pooling: ClassVar[tuple[str, ...]] = ("expand",)

    def __init__(self, config: MobileViTConfig) -> None:
        super().__init__()
        self.config: MobileViTConfig = config
        self.stem = ConvNorm(config.channels, config.stem_width, 3, stride=2)
        convolutional = len(config.widths) - len(config.token_widths)
        rates = iter(drop_path_rates(config.drop_path, len(self.block_names())))
        c_in = config.stem_width
        self.stages = nn.ModuleList()
        for i, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
            blocks: list[nn.Module] = []
            for j in range(depth):
                stride = 2 if i and not j else 1
                blocks.append(InvertedResidual(c_in, width, stride, config.expansion, next(rates)))
                c_in = width
            if i >= convolutional:
                blocks.append(MobileViTBlock(config, width, i - convolutional, next(rates)))
            self.stages.append(nn.Sequential(*blocks))
        self.expand = ConvNorm(c_in, config.last_width, 1)
        self.drop = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.last_width, config.classes) if config.classes else None
        self.initialise()

    def initialise(self) -> None:
        """As the authors' code does, but zeros for the head: He's normal distribution for kernels,
        one of deviation 0.02 for matrices.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                he_normal_(module)
            elif isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.zero_head()

    def block_names(self) -> list[str]:
        """The modules of the blocks, first to last: inverted residuals and MobileViT blocks."""
        convolutional = len(self.config.widths) - len(self.config.token_widths)
        return [
            f"stages.{i}.{j}"
            for i, depth in enumerate(self.config.depths)
            for j in range(depth + int(i >= convolutional))
        ]

    def features(
        self, x: Float[Tensor, "b c h w"], extent: Int[Tensor, "b 2"] | None = None
    ) -> Features:
        """Everything a head may want of images `x`, from 0 to 1 and of any size.

        `maps`: each stage's last, of strides 2, 4, 8, 16, 32. `patches` are the cells of one more,
        the last stage's at the width of what is pooled. Raises `UsageError` for an `extent`.
        """
        self.check_images(x, extent)
        x = self.stem(channels_last(x))
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        last = features_of_maps((self.expand(x),), (self.config.stride,))
        return last._replace(maps=tuple(maps), strides=self.config.strides)

    def logits(self, features: Features) -> Float[Tensor, "b t c"]:
        """The logits of the one head."""
        return super().logits(features._replace(pooled=self.drop(features.pooled)))


ROWS: dict[str, MobileViTConfig] = {
    "mobilevit_xxs": MobileViTConfig(
        widths=(16, 24, 48, 64, 80),
        expansion=2,
        token_widths=(64, 80, 96),
        mlp=(128, 160, 192),
        last_width=320,
        dropout=0.05,
    ),
    "mobilevit_xs": MobileViTConfig(
        widths=(32, 48, 64, 80, 96),
        token_widths=(96, 120, 144),
        mlp=(192, 240, 288),
        last_width=384,
    ),
    "mobilevit_s": MobileViTConfig(),
}
"""Name -> shape. Image size, classes, dropout are changes to a row, never names."""
