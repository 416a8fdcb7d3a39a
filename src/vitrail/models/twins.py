"""Twins (Chu et al., arXiv 2104.13840): four maps, ever coarser, with attention that is local or to
a summary, so that its cost grows with the number of tokens and not with its square.

- patches of 4x4 pixels; each further stage begins with patches of 2x2 cells of the one before
- SVT: blocks attend by turns within windows of 7x7 cells (LSA) and to every `r x r` cells'
  summary (GSA); PCPVT: all of them to summaries
- no positions but a convolution after the first block of each stage (PEG, CPVT, 2102.10882)

Any image size. What is no whole number of patches, or of cells in a summary, gets zeros to the
right and below, as the convolutions have around them anyhow; each patch and each summary has at
least one pixel of the image in it. A window that reaches beyond the map is smaller instead: the
cells outside are no keys. (The authors' code refuses such sizes; timm's lets its windows attend to
zeros and its summaries leave out what is over.)

Letters: b batch, c channels, h w pixels, n tokens of a map, m of them attended to, d width, e width
of a head, nw windows of s cells.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vitrail.errors import UsageError, setting
from vitrail.models.family import Family, StagedConfig, check_heads
from vitrail.nn import (
    Attention,
    DropPath,
    Features,
    Mlp,
    PatchEmbed,
    Peg,
    attend,
    drop_path_rates,
    normal_,
    tokens_to_map,
)

_EMBED_EPS = 1e-5
"""Of the norms after patches and summaries: torch's own, unlike the blocks'."""


@dataclass(frozen=True, kw_only=True)
class TwinsConfig(StagedConfig):
    """The shape of one Twins. Tuples have one entry a stage; sizes are (height, width)."""

    family: Literal["twins"] = "twins"
    depths: tuple[int, ...] = (2, 2, 10, 4)
    """Blocks of each stage."""
    widths: tuple[int, ...] = (64, 128, 256, 512)
    heads: tuple[int, ...] = (2, 4, 8, 16)
    mlp: tuple[int, ...] = (256, 512, 1024, 2048)
    """Hidden widths of the MLPs."""
    reductions: tuple[int, ...] = (8, 4, 2, 1)
    """Of GSA: `r` makes one key of each `r x r` cells."""
    window: int = 7
    """Side of the windows that every other block attends in, the first one too, in cells; 0 for no
    windows, which is PCPVT."""
    norm_eps: float = 1e-6
    dropout: float = 0.0
    """After the patches' projection, attention and MLPs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_stages("depths", "widths", "heads", "mlp", "reductions")
        for width, heads in zip(self.widths, self.heads, strict=True):
            check_heads(width, heads)
        if self.window < 0:
            raise UsageError(
                f"{setting('window')} is a number of cells, or 0 for no windows, not {self.window}"
            )
        self._check_eps("norm_eps")
        self._check_shares("dropout")

    @property
    def shape(self) -> str:
        """Its build in words."""
        depths, widths = (", ".join(map(str, numbers)) for numbers in (self.depths, self.widths))
        windows = f"windows of {self.window}x{self.window}" if self.window else "no windows"
        return f"{len(self.depths)} stages of {depths} blocks, widths {widths}, {windows}"


class LocalAttention(nn.Module):
    """LSA: self-attention within windows of the map (section 3.2), laid from its top left."""

    def __init__(self, width: int, heads: int, window: int, dropout: float) -> None:
        super().__init__()
        self.window = window
        self.attention = Attention(width, heads, dropout=dropout)

    def forward(self, x: Float[Tensor, "b n d"], grid: tuple[int, int]) -> Float[Tensor, "b n d"]:
        b, _, d = x.shape
        windows = to_windows(x.view(b, *grid, d), self.window)
        shown = shown_in_windows(grid, self.window, x.device)
        keys = None if shown is None else shown.repeat(b, 1)
        return from_windows(self.attention(windows, keys=keys), grid, self.window).flatten(1, 2)


def to_windows(x: Float[Tensor, "b gh gw d"], side: int) -> Float[Tensor, "nw s d"]:
    """The cells of each window in a row, `s = side * side`, image by image and row by row; zeros
    where a window reaches beyond the map.
    """
    b, gh, gw, d = x.shape
    x = F.pad(x, (0, 0, 0, -gw % side, 0, -gh % side))
    x = x.view(b, x.shape[1] // side, side, x.shape[2] // side, side, d)
    return x.transpose(2, 3).reshape(-1, side * side, d)


def from_windows(
    windows: Float[Tensor, "nw s d"], grid: tuple[int, int], side: int
) -> Float[Tensor, "b gh gw d"]:
    """The inverse of `to_windows`, for maps of `grid`."""
    rows, columns = (math.ceil(size / side) for size in grid)
    d = windows.shape[-1]
    x = windows.view(-1, rows, columns, side, side, d).transpose(2, 3)
    return x.reshape(-1, rows * side, columns * side, d)[:, : grid[0], : grid[1]]


def shown_in_windows(
    grid: tuple[int, int], side: int, device: torch.device
) -> Bool[Tensor, "nw s"] | None:
    """Which cells of one map's windows are cells of the map; None if all of them are.

    >>> shown_in_windows((1, 3), 2, torch.device("cpu")).int().tolist()
    [[1, 1, 0, 0], [1, 0, 0, 0]]
    """
    if not (grid[0] % side or grid[1] % side):
        return None  # a mask would cost the fastest attention kernels
    return to_windows(torch.ones(1, *grid, 1, device=device), side)[..., 0] > 0


class SummaryAttention(nn.Module):
    """GSA: every cell attends to summaries, one of each `r x r` cells (section 3.2; PVT's spatial
    reduction, arXiv 2102.12122). Those at the right and the bottom may be of fewer.
    """

    def __init__(self, width: int, heads: int, reduction: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.reduce = (
            PatchEmbed(width, (reduction, reduction), width, _EMBED_EPS, indivisible="pad")
            if reduction > 1
            else None
        )
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b n d"], grid: tuple[int, int]) -> Float[Tensor, "b n d"]:
        b, n, d = x.shape
        q = self.q(x).view(b, n, self.heads, d // self.heads).transpose(1, 2)
        if self.reduce is not None:
            x, _ = self.reduce(tokens_to_map(x, grid))
        k, v = self.kv(x).view(b, -1, 2, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj_drop(self.proj(attend(q, k, v).transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """Attention of one kind or the other, then MLP, each on the normalised input and added."""

    def __init__(
        self,
        attention: LocalAttention | SummaryAttention,
        width: int,
        mlp: int,
        norm_eps: float,
        dropout: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = attention
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, mlp, nn.GELU(), dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n d"], grid: tuple[int, int]) -> Float[Tensor, "b n d"]:
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Blocks at one resolution, with a PEG after the first; but for the first stage, patches of
    2x2 cells before.
    """

    def __init__(self, config: TwinsConfig, index: int, drop_path: list[float]) -> None:
        """`drop_path`: the rates of its blocks."""
        super().__init__()
        width, heads = config.widths[index], config.heads[index]
        self.embed = (
            PatchEmbed(config.widths[index - 1], (2, 2), width, _EMBED_EPS, indivisible="pad")
            if index
            else None
        )
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList()
        for i, rate in enumerate(drop_path):
            attention = (
                LocalAttention(width, heads, config.window, config.dropout)
                if config.window and i % 2 == 0
                else SummaryAttention(width, heads, config.reductions[index], config.dropout)
            )
            self.blocks.append(
                Block(attention, width, config.mlp[index], config.norm_eps, config.dropout, rate)
            )
        self.peg = Peg(width)

    def forward(
        self, x: Float[Tensor, "b n_in d_in"], grid: tuple[int, int]
    ) -> tuple[Float[Tensor, "b n d"], tuple[int, int]]:
        """Tokens and their grid, as the stage leaves them."""
        if self.embed is not None:
            x, grid = self.embed(tokens_to_map(x, grid))
        x = self.drop(x)
        for i, block in enumerate(self.blocks):
            x = block(x, grid)
            if i == 0:
                x = self.peg(x, grid)
        return x, grid


class Twins(Family):
    """A Twins, SVT or PCPVT.

    >>> config = TwinsConfig(depths=(2, 1), widths=(32, 64), heads=(1, 2), mlp=(64, 128),
    ...                      reductions=(2, 1), classes=10)
    >>> model = Twins(config)
    >>> model(torch.zeros(3, 3, 50, 75)).shape
    torch.Size([3, 10])
    >>> model.features(torch.zeros(3, 3, 50, 75)).grid
    (7, 10)
    """

    def __init__(self, config: TwinsConfig) -> None:
        super().__init__()
        self.config: TwinsConfig = config
        self.stem = PatchEmbed(
            config.channels, (4, 4), config.widths[0], _EMBED_EPS, indivisible="pad"
        )
        rates = drop_path_rates(config.drop_path, sum(config.depths))
        self.stages = nn.ModuleList()
        for i, depth in enumerate(config.depths):
            self.stages.append(Stage(config, i, rates[:depth]))
            rates = rates[depth:]
        self.norm = nn.LayerNorm(config.widths[-1], eps=config.norm_eps)
        self.head = nn.Linear(config.widths[-1], config.classes) if config.classes else None
        self.initialise()

    def initialise(self) -> None:
        """As the authors' code does, but zeros for the head: normal distributions, of deviation
        0.02 for matrices, and He's over the outputs for kernels.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                fan_out = module.weight[:, 0].numel() / module.groups
                normal_(module.weight, std=math.sqrt(2 / fan_out))
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        self.zero_head()

    def block_names(self) -> list[str]:
        """The names of its blocks, first to last."""
        return [
            f"stages.{i}.blocks.{j}"
            for i, depth in enumerate(self.config.depths)
            for j in range(depth)
        ]

    def features(
        self, x: Float[Tensor, "b c h w"], extent: Int[Tensor, "b 2"] | None = None
    ) -> Features:
        """Everything a head may want of images `x` (already normalised), of any size.

        `maps`: each stage's last, of strides 4, 8, 16, 32, and only the last of them normed.
        Raises `UsageError` for an `extent`.
        """
        self.check_images(x, extent)
        tokens, grid = self.stem(x)
        maps = []
        for stage in self.stages:
            tokens, grid = stage(tokens, grid)
            maps.append(tokens_to_map(tokens, grid))
        tokens = self.norm(tokens)
        maps[-1] = tokens_to_map(tokens, grid)
        return Features(
            patches=tokens,
            prefix=tokens.new_empty(tokens.shape[0], 0, tokens.shape[2]),
            grid=grid,
            maps=tuple(maps),
            strides=self.config.strides,
            pooled=tokens.mean(dim=1),
        )


def _svt(width: int, heads: int, depths: tuple[int, ...]) -> TwinsConfig:
    """Width and heads of the first stage, which each further one doubles."""
    widths = tuple(width * 2**i for i in range(4))
    return TwinsConfig(
        depths=depths,
        widths=widths,
        heads=tuple(heads * 2**i for i in range(4)),
        mlp=tuple(4 * w for w in widths),
    )


def _pcpvt(*depths: int) -> TwinsConfig:
    return TwinsConfig(
        depths=depths,
        widths=(64, 128, 320, 512),
        heads=(1, 2, 5, 8),
        mlp=(512, 1024, 1280, 2048),
        window=0,
    )


ROWS: dict[str, TwinsConfig] = {
    "twins_svt_s": _svt(64, 2, (2, 2, 10, 4)),
    "twins_svt_b": _svt(96, 3, (2, 2, 18, 2)),
    "twins_svt_l": _svt(128, 4, (2, 2, 18, 2)),
    "twins_pcpvt_s": _pcpvt(3, 4, 6, 3),
    "twins_pcpvt_b": _pcpvt(3, 4, 18, 3),
    "twins_pcpvt_l": _pcpvt(3, 8, 27, 3),
}
"""Name -> shape. Image size, classes, drop path are changes to a row, never names."""
