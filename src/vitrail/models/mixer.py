"""Models of MLPs alone: tokens are mixed by weights of their places, without attention.

- MLP-Mixer (Tolstikhin et al., arXiv 2105.01601): an MLP across the tokens, then one across the
  channels, each with its norm and its shortcut
- gMLP (Liu et al., 2105.08050): one MLP across the channels, half of whose hidden units are mixed
  across the tokens and gate the other half

Patches -> linear projection -> blocks -> norm -> mean -> linear. There are no positions, for a
weight belongs to a place; and so the grid is part of the model. Images of another size need a model
built for it; `vitrail.weights.mixer` brings weights to its grid.

Letters: b batch, c channels, h w pixels, gh gw token grid, n = gh * gw tokens, d width.
"""

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from jaxtyping import Float, Int
from torch import Tensor, nn

from vitrail.errors import UsageError, setting, unknown_name
from vitrail.models.family import Family, FamilyConfig
from vitrail.nn import (
    DropPath,
    Features,
    Mlp,
    PatchEmbed,
    drop_path_rates,
    features_of_maps,
    lecun_normal_,
    normal_,
    tokens_to_map,
)

Gelu = Literal["gelu", "gelu_tanh"]
"""Exact, as timm runs these models; or approximated by tanh, as Google trained the Mixer."""


@dataclass(frozen=True, kw_only=True)
class _Config(FamilyConfig):
    """What the two families have in common. Sizes are (height, width), in pixels."""

    depth: int = 12
    width: int = 768
    mlp: int = 3072
    """Hidden width of the MLP across the channels."""
    patch: tuple[int, int] = (16, 16)
    image_size: tuple[int, int] = (224, 224)
    """The only size of images that the model takes: its weights are of this grid's places."""
    activation: Gelu = "gelu"
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation not in get_args(Gelu):
            raise unknown_name("activation", str(self.activation), get_args(Gelu))
        self._check_counts("depth", "width", "mlp")
        self._check_pairs("patch")
        self._check_eps("norm_eps")
        (h, w), (p, q) = self.image_size, self.patch
        if h % p or w % q:
            raise UsageError(
                f"an image of {h}x{w} pixels (height x width) cannot be cut into patches of "
                f"{p}x{q}: use {max(p, h // p * p)}x{max(q, w // q * q)}"
            )

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise `UsageError` for a (height, width) of images other than the model's own."""
        if size != self.image_size:
            (h, w), (rows, columns) = self.image_size, self.grid
            raise UsageError(
                f"this {self.family} has a weight for each place of {rows}x{columns} patches, so "
                f"it takes images of {h}x{w} pixels (height x width), not {size[0]}x{size[1]}: "
                f"scale them, or build it with {setting('image_size', size)}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """The token grid (rows, columns)."""
        return self.image_size[0] // self.patch[0], self.image_size[1] // self.patch[1]

    @property
    def stride(self) -> tuple[int, int]:
        """Pixels of the image per cell of the map."""
        return self.patch

    @property
    def shape(self) -> str:
        """Its build in words."""
        return f"{self.depth} blocks, width {self.width}, {self.grid[0]}x{self.grid[1]} tokens"


@dataclass(frozen=True, kw_only=True)
class MixerConfig(_Config):
    """The shape of one MLP-Mixer. Sizes are (height, width), in pixels."""

    family: Literal["mixer"] = "mixer"
    tokens_mlp: int = 384
    """Hidden width of the MLP across the tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_counts("tokens_mlp")


@dataclass(frozen=True, kw_only=True)
class GmlpConfig(_Config):
    """The shape of one gMLP. Sizes are (height, width), in pixels."""

    family: Literal["gmlp"] = "gmlp"
    depth: int = 30
    width: int = 512
    gate_eps: float = 1e-5
    """Of the norm before the gate: torch's own, which timm's weights were trained with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mlp % 2:
            raise UsageError(f"one half of mlp gates the other, so it must be even, not {self.mlp}")
        self._check_eps("gate_eps")


def _act(kind: Gelu) -> nn.GELU:
    return nn.GELU("tanh" if kind == "gelu_tanh" else "none")


class MixerBlock(nn.Module):
    """Across the tokens, then across the channels (2105.01601, equation 1)."""

    def __init__(self, config: MixerConfig, drop_path: float) -> None:
        super().__init__()
        d, (rows, columns) = config.width, config.grid
        self.norm1 = nn.LayerNorm(d, eps=config.norm_eps)
        self.mlp_tokens = Mlp(rows * columns, config.tokens_mlp, _act(config.activation))
        self.norm2 = nn.LayerNorm(d, eps=config.norm_eps)
        self.mlp_channels = Mlp(d, config.mlp, _act(config.activation))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        x = x + self.drop_path(self.mlp_tokens(self.norm1(x).mT).mT)
        return x + self.drop_path(self.mlp_channels(self.norm2(x)))


class SpatialGate(nn.Module):
    """`u * (W norm(v) + b)`, with `u` and `v` the halves of the channels and `W` across the tokens
    (2105.08050, section 2.1).
    """

    def __init__(self, tokens: int, width: int, norm_eps: float) -> None:
        """`width` of the whole, of which half comes out."""
        super().__init__()
        self.norm = nn.LayerNorm(width // 2, eps=norm_eps)
        self.proj = nn.Linear(tokens, tokens)

    def forward(self, x: Float[Tensor, "b n e"]) -> Float[Tensor, "b n _e"]:
        u, v = x.chunk(2, dim=-1)
        return u * self.proj(self.norm(v).mT).mT


class GmlpBlock(nn.Module):
    """One MLP with the gate between its two linear maps (2105.08050, figure 1)."""

    def __init__(self, config: GmlpConfig, drop_path: float) -> None:
        super().__init__()
        rows, columns = config.grid
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.fc1 = nn.Linear(config.width, config.mlp)
        self.act = _act(config.activation)
        self.gate = SpatialGate(rows * columns, config.mlp, config.gate_eps)
        self.fc2 = nn.Linear(config.mlp // 2, config.width)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return x + self.drop_path(self.fc2(self.gate(self.act(self.fc1(self.norm(x))))))


class _Model(Family):
    """Patches through blocks to the mean of the tokens."""

    def __init__(self, config: _Config, blocks: Iterable[MixerBlock | GmlpBlock]) -> None:
        super().__init__()
        self.config: _Config = config
        d = config.width
        self.stem = PatchEmbed(config.channels, config.patch, d)
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(d, eps=config.norm_eps)
        self.head = nn.Linear(d, config.classes) if config.classes else None
        self.initialise()

    @abstractmethod
    def initialise(self) -> None:
        """Give the weights their first values."""

    def block_names(self) -> list[str]:
        """The names of its blocks, first to last."""
        return [f"blocks.{i}" for i in range(self.config.depth)]

    def features(
        self, x: Float[Tensor, "b c h w"], extent: Int[Tensor, "b 2"] | None = None
    ) -> Features:
        """Everything a head may want of images `x` (already normalised).

        Raises `UsageError` for images of another size than the model's, and for an `extent`.
        """
        config = self.config
        self.check_images(x, extent)
        config.check_size((x.shape[2], x.shape[3]))
        tokens, grid = self.stem(x)
        tokens = self.norm(self.blocks(tokens))
        return features_of_maps((tokens_to_map(tokens, grid),), (config.stride,))


class Mixer(_Model):
    """An MLP-Mixer.

    >>> import torch
    >>> model = Mixer(MixerConfig(depth=2, width=64, mlp=128, tokens_mlp=32, image_size=(64, 96)))
    >>> model(torch.zeros(3, 3, 64, 96)).shape
    torch.Size([3, 1000])
    >>> model.features(torch.zeros(3, 3, 64, 96)).grid
    (4, 6)
    """

    config: MixerConfig

    def __init__(self, config: MixerConfig) -> None:
        rates = drop_path_rates(config.drop_path, config.depth)
        super().__init__(config, (MixerBlock(config, rate) for rate in rates))

    def initialise(self) -> None:
        """As Google's JAX code does: flax's defaults, and zeros for the head."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                lecun_normal_(module)
        self.zero_head()


class Gmlp(_Model):
    """A gMLP.

    >>> import torch
    >>> model = Gmlp(GmlpConfig(depth=2, width=64, mlp=128, image_size=(64, 96)))
    >>> model(torch.zeros(3, 3, 64, 96)).shape
    torch.Size([3, 1000])
    >>> model.features(torch.zeros(3, 3, 64, 96)).grid
    (4, 6)
    """

    config: GmlpConfig

    def __init__(self, config: GmlpConfig) -> None:
        rates = drop_path_rates(config.drop_path, config.depth)
        super().__init__(config, (GmlpBlock(config, rate) for rate in rates))

    def initialise(self) -> None:
        """Gates near 1, whatever the tokens (section 2.1); the rest, which the paper leaves open,
        as timm does.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                lecun_normal_(module)
        for name, parameter in self.named_parameters():
            if name.endswith(("fc1.bias", "fc2.bias", "gate.proj.weight")):
                normal_(parameter, std=1e-6)
            elif name.endswith("gate.proj.bias"):
                nn.init.ones_(parameter)
        self.zero_head()


_S = MixerConfig(depth=8, width=512, mlp=2048, tokens_mlp=256)
_B = MixerConfig()
_L = MixerConfig(depth=24, width=1024, mlp=4096, tokens_mlp=512)

ROWS: dict[str, MixerConfig | GmlpConfig] = {
    # Mixer: table 1 of the paper
    "mixer_s32": replace(_S, patch=(32, 32)),
    "mixer_s16": _S,
    "mixer_b32": replace(_B, patch=(32, 32)),
    "mixer_b16": _B,
    "mixer_l32": replace(_L, patch=(32, 32)),
    "mixer_l16": _L,
    "mixer_h14": MixerConfig(depth=32, width=1280, mlp=5120, tokens_mlp=640, patch=(14, 14)),
    # gMLP: table 1 of the paper
    "gmlp_ti16": GmlpConfig(width=128, mlp=768),
    "gmlp_s16": GmlpConfig(width=256, mlp=1536),
    "gmlp_b16": GmlpConfig(),
}
"""Name -> shape. Image size, classes, drop path are changes to a row, never names."""
