"""Vision Transformer (Dosovitskiy et al., arXiv 2010.11929) and everything of its exact shape.

- patches -> linear projection -> class token -> learned positions -> pre-norm encoder -> linear
- DeiT (2012.12877): the same, and a distillation token with a head of its own
- DeiT-III (2204.07118): LayerScale; the class token has no position
- DINOv2 (2304.07193): patch 14, LayerScale; registers (2309.16588); a gated MLP in the giant
- CLIP's image tower (2103.00020): a norm before the encoder; its projection is the "head"
- SigLIP's (2303.15343): attention pooling, no class token
- g, G, e (2106.04560, 2209.06794) and So400m (2305.13035) of the scaling studies
- small rows of our own, with a convolutional stem (2106.14881), for small images and CPUs

Letters: b batch, c channels, h w pixels, gh gw token grid, n = gh * gw patch tokens, k prefix
tokens, d width. One row of `ROWS` is one published shape; everything else is a change to a row.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitrail.errors import UsageError, unknown_name
from vitrail.nn import (
    Activation,
    AttentionPool,
    Block,
    ConvStem,
    Encoder,
    Features,
    Grids,
    Indivisible,
    LearnedPosition,
    PatchEmbed,
    Pool,
    Position,
    Resample,
    RotaryPosition,
    SinCosPosition,
    drop_path_rates,
    patch_grid,
    tokens_to_map,
)

Stem = Literal["patch", "conv"]


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """The shape of one Vision Transformer. Sizes are (height, width), in pixels."""

    family: Literal["vit"] = "vit"
    depth: int = 12
    width: int = 768
    heads: int = 12
    mlp: int = 3072
    """Hidden width of the MLP (after gating, for `swiglu`)."""
    patch: tuple[int, int] = (16, 16)
    image_size: tuple[int, int] = (224, 224)
    """Sets the grid of the position table; other sizes are resampled on the fly."""
    channels: int = 3
    classes: int = 1000
    """0 leaves the head out: `forward` then gives the pooled features."""
    stem: Stem = "patch"
    stem_norm: bool = False
    stem_bias: bool = True
    indivisible: Indivisible = "refuse"
    """An image that is no whole number of patches: an error, or zero padding right and below."""
    position: Position = "learned"
    prefix_position: bool = True
    """Whether class and distillation token have rows in the learned position table."""
    resample: Resample = "bicubic_antialias"
    """How the learned position table is brought to another grid: as its makers did."""
    pre_norm: bool = False
    """CLIP's LayerNorm between the embeddings and the first block."""
    class_token: bool = True
    distilled: bool = False
    """DeiT's second token, with its own head; the two heads' logits are averaged."""
    registers: int = 0
    pool: Pool = "class"
    pool_norm: bool = False
    """The final norm acts on the pooled vector, not on the tokens: MAE fine-tuned, timm's "avg"."""
    activation: Activation = "gelu"
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale: float | None = None
    """Initial value of LayerScale; None leaves it out."""
    norm_eps: float = 1e-6
    representation: int = 0
    """Width of a tanh layer between the pooled token and the head, as the original ImageNet-21k
    checkpoints have it ("pre-logits"); 0 leaves it out."""
    head_bias: bool = True
    dropout: float = 0.0
    drop_path: float = 0.0
    """Stochastic depth of the last block; it grows linearly from 0 in the first."""

    def __post_init__(self) -> None:
        for field, known in _CHOICES.items():
            if getattr(self, field) not in known:
                raise unknown_name(field, str(getattr(self, field)), known)
        for field in ("depth", "width", "heads", "mlp", "channels"):
            if getattr(self, field) < 1:
                raise UsageError(f"{field} must be at least 1, not {getattr(self, field)}")
        for field in ("patch", "image_size"):
            pair = getattr(self, field)
            if not (isinstance(pair, tuple) and len(pair) == 2 and min(pair) >= 1):
                raise UsageError(f"{field} is a pair (height, width) in pixels, not {pair!r}")
        for field in ("classes", "registers", "representation"):
            if getattr(self, field) < 0:
                raise UsageError(f"{field} cannot be negative")
        for field in ("dropout", "drop_path"):
            if not 0 <= getattr(self, field) < 1:
                raise UsageError(f"{field} must be in [0, 1), not {getattr(self, field)}")
        if self.family != "vit":
            raise UsageError(f"a ViTConfig is of the family 'vit', not '{self.family}'")
        if not 0 < self.norm_eps < 1:
            raise UsageError(f"norm_eps must be in (0, 1), not {self.norm_eps}")
        if self.width % self.heads:
            raise UsageError(f"width {self.width} is not divisible by {self.heads} heads")
        parts = {"sincos_1d": 2}.get(self.position, 4)
        if self.position.startswith("sincos") and self.width % parts:
            raise UsageError(f"position='{self.position}' needs a width divisible by {parts}")
        if self.position == "rope" and self.width // self.heads % 4:
            raise UsageError("position='rope' needs heads whose width is divisible by 4")
        if self.pool.startswith("class") and not self.class_token:
            raise UsageError(
                f"pool='{self.pool}' needs class_token=True; or use pool='mean' or 'map'"
            )
        if self.distilled and self.pool != "class":
            raise UsageError("distilled=True averages two tokens' heads, so it needs pool='class'")
        if self.distilled and self.pool_norm:
            raise UsageError("distilled=True reads two tokens: pool_norm=True would norm one")
        if self.distilled and self.representation:
            raise UsageError("distilled=True and a representation layer do not go together")
        patch_grid(self.image_size, self.patch, self.indivisible)

    @property
    def grid(self) -> tuple[int, int]:
        """The token grid (rows, columns) at `image_size`."""
        return patch_grid(self.image_size, self.patch, self.indivisible)

    @property
    def pooled(self) -> int:
        """Length of an image's one vector, before a representation layer."""
        return 2 * self.width if self.pool == "class_mean" else self.width


_CHOICES: dict[str, tuple[str, ...]] = {
    "stem": get_args(Stem),
    "indivisible": get_args(Indivisible),
    "position": get_args(Position),
    "resample": get_args(Resample),
    "pool": get_args(Pool),
    "activation": get_args(Activation),
}


class ViT(nn.Module):
    """A Vision Transformer.

    >>> model = ViT(ViTConfig(depth=2, width=64, heads=2, mlp=128, image_size=(64, 96)))
    >>> model(torch.zeros(3, 3, 64, 96)).shape
    torch.Size([3, 1000])
    >>> model.features(torch.zeros(3, 3, 64, 96)).grid
    (4, 6)
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        d = config.width
        stem = ConvStem if config.stem == "conv" else PatchEmbed
        self.stem = stem(
            config.channels,
            config.patch,
            d,
            norm_eps=config.norm_eps if config.stem_norm else None,
            indivisible=config.indivisible,
            bias=config.stem_bias,
        )
        positioned = int(config.class_token) + int(config.distilled)
        prefix = positioned + config.registers
        self.prefix = nn.Parameter(torch.zeros(prefix, d)) if prefix else None
        self.position: LearnedPosition | SinCosPosition | None = None
        if config.position == "learned":
            rows = positioned if config.prefix_position else 0
            self.position = LearnedPosition(config.grid, d, rows, config.resample)
        elif config.position in ("sincos_moco", "sincos_mae", "sincos_bigvision", "sincos_1d"):
            self.position = SinCosPosition(config.grid, d, config.position)
        self.rotary = RotaryPosition(d // config.heads) if config.position == "rope" else None
        self.drop = nn.Dropout(config.dropout)
        self.pre_norm = nn.LayerNorm(d, eps=config.norm_eps) if config.pre_norm else nn.Identity()
        self.encoder = Encoder(
            (
                Block(
                    d,
                    config.heads,
                    config.mlp,
                    activation=config.activation,
                    qkv_bias=config.qkv_bias,
                    qk_norm=config.qk_norm,
                    layer_scale=config.layer_scale,
                    norm_eps=config.norm_eps,
                    dropout=config.dropout,
                    drop_path=rate,
                )
                for rate in drop_path_rates(config.drop_path, config.depth)
            ),
            d,
            None if config.pool_norm else config.norm_eps,
            peg=config.position == "peg",
        )
        self.pool = (
            AttentionPool(d, config.heads, config.mlp, config.activation, config.norm_eps)
            if config.pool == "map"
            else None
        )
        pooled = config.pooled
        self.pool_norm = (
            nn.LayerNorm(pooled, eps=config.norm_eps) if config.pool_norm else nn.Identity()
        )
        self.representation = (
            nn.Linear(pooled, config.representation) if config.representation else None
        )
        self.head = (
            nn.Linear(config.representation or pooled, config.classes, bias=config.head_bias)
            if config.classes
            else None
        )
        self.head_distilled = (
            nn.Linear(d, config.classes) if config.classes and config.distilled else None
        )
        self.initialise()

    def initialise(self) -> None:
        """As Google's JAX code does: Xavier in the encoder, zeros for class token and heads."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                # The fused q, k, v are three matrices, each with its own fan.
                for matrix in module.weight.chunk({"qkv": 3, "kv": 2}.get(name.split(".")[-1], 1)):
                    nn.init.xavier_uniform_(matrix)
            elif isinstance(module, nn.Conv2d):
                # flax's lecun_normal: variance 1 / fan_in after its tails are cut at 2 sigma.
                std = 1 / math.sqrt(module.weight[0].numel()) / 0.87962566103423978
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
            if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith(("fc1.bias", "fc2.bias")):
                nn.init.normal_(parameter, std=1e-6)
        if self.prefix is not None:
            # The class token starts at zero, as in JAX; others would then stay equal to it.
            nn.init.normal_(self.prefix[int(self.config.class_token) :], std=0.02)
        for head in (self.head, self.head_distilled):
            if head is not None:
                nn.init.zeros_(head.weight)

    def features(
        self, x: Float[Tensor, "b c h w"], extent: Int[Tensor, "b 2"] | None = None
    ) -> Features:
        """Everything a head may want of images `x` (already normalised).

        Images of different sizes share a batch as a canvas with each at its top left, `extent`
        being the (rows, columns) of patches that show it. Each gets exactly what it would get
        alone: positions of its own grid, attention and pooling over its own tokens. What else is
        on the canvas changes nothing, and has zeros in `patches` and `maps`.
        """
        if x.shape[1] != self.config.channels:
            raise UsageError(
                f"the images have {x.shape[1]} channels, the model takes {self.config.channels}: "
                f"build it with channels={x.shape[1]}, or convert the images"
            )
        patches, canvas = self.stem(x, extent)
        grids = None if extent is None else Grids(extent, canvas)
        grid = grids or canvas
        if grids is not None:
            patches = grids.gather(patches)
        if self.prefix is None:
            prefix = patches.new_empty(x.shape[0], 0, patches.shape[2])
        else:
            prefix = self.prefix.expand(x.shape[0], -1, -1)
        if self.position is not None:
            patches, prefix = self.position(patches, prefix, grid)
        rotation = None if self.rotary is None else self.rotary(grid)
        tokens = self.pre_norm(self.drop(torch.cat([prefix, patches], dim=1)))
        tokens = self.encoder(tokens, grid, rotation)
        prefix, patches = tokens.split([prefix.shape[1], patches.shape[1]], dim=1)
        if self.pool is not None:
            pooled = self.pool(patches, grids.keys() if grids else None)
        elif self.config.pool == "class":
            pooled = prefix[:, 0]
        else:
            pooled = grids.mean(patches) if grids else patches.mean(dim=1)
            if self.config.pool == "class_mean":
                pooled = torch.cat([prefix[:, 0], pooled], dim=1)
        pooled = self.pool_norm(pooled)
        if self.representation is not None:
            pooled = self.representation(pooled).tanh()
        if grids is not None:
            patches = grids.scatter(patches)
        return Features(
            patches=patches,
            prefix=prefix,
            grid=canvas,
            maps=(tokens_to_map(patches, canvas),),
            strides=(self.config.patch,),
            pooled=pooled,
            valid=grids.shown if grids else None,
        )

    def logits(self, features: Features) -> Float[Tensor, "b t c"]:
        """The logits of each head apart: the classifier's, then, in DeiT, the distilled one's."""
        assert self.head is not None, "this model was built without a head (classes=0)"
        logits = [self.head(features.pooled)]
        if self.head_distilled is not None:
            logits.append(self.head_distilled(features.prefix[:, 1]))
        return torch.stack(logits, dim=1)

    def forward(
        self, x: Float[Tensor, "b c h w"], extent: Int[Tensor, "b 2"] | None = None
    ) -> Float[Tensor, "b out"]:
        """Logits `[b classes]`; the pooled features `[b d]` of a model without a head.

        `extent` is for images of different sizes, as in `features`.
        """
        features = self.features(x, extent)
        return features.pooled if self.head is None else self.logits(features).mean(dim=1)


_TI = ViTConfig(width=192, heads=3, mlp=768)
_S = ViTConfig(width=384, heads=6, mlp=1536)
_M = ViTConfig(width=512, heads=8, mlp=2048)
_B = ViTConfig()
_L = ViTConfig(width=1024, depth=24, heads=16, mlp=4096)
_H = ViTConfig(width=1280, depth=32, heads=16, mlp=5120, patch=(14, 14))


def _patch(config: ViTConfig, side: int) -> ViTConfig:
    return replace(config, patch=(side, side))


def _deit3(config: ViTConfig) -> ViTConfig:
    return replace(config, layer_scale=1e-6, prefix_position=False)


def _dinov2(config: ViTConfig) -> ViTConfig:
    return replace(
        _patch(config, 14),
        image_size=(518, 518),
        classes=0,
        layer_scale=1e-5,
        resample="bicubic_offset",
    )


def _registers(config: ViTConfig) -> ViTConfig:
    return replace(config, registers=4, resample="bicubic_antialias")


def _clip(config: ViTConfig, embedding: int = 512) -> ViTConfig:
    return replace(
        config,
        classes=embedding,
        pre_norm=True,
        stem_bias=False,
        head_bias=False,
        norm_eps=1e-5,
        activation="gelu_quick",
    )


def _siglip(config: ViTConfig) -> ViTConfig:
    return replace(config, classes=0, class_token=False, pool="map", activation="gelu_tanh")


_SMALL = ViTConfig(depth=6, stem="conv", class_token=False, pool="mean")

_DINOV2_G = ViTConfig(width=1536, depth=40, heads=24, mlp=4096, activation="swiglu")

ROWS: dict[str, ViTConfig] = {
    # ViT: table 1 of the paper, the sizes of "How to train your ViT?" (2106.10270), big_vision
    "vit_mu16": ViTConfig(width=32, depth=1, heads=2, mlp=128),
    "vit_ti16": _TI,
    "vit_s32": _patch(_S, 32),
    "vit_s16": _S,
    "vit_s14": _patch(_S, 14),
    "vit_s8": _patch(_S, 8),
    "vit_m16": _M,
    "vit_b32": _patch(_B, 32),
    "vit_b16": _B,
    "vit_b14": _patch(_B, 14),
    "vit_b8": _patch(_B, 8),
    "vit_l32": _patch(_L, 32),
    "vit_l16": replace(_L, dropout=0.1),
    "vit_l14": _patch(_L, 14),
    "vit_h14": replace(_H, dropout=0.1),
    # Scaling Vision Transformers: g and G with the class token of their public checkpoints
    "vit_g14": replace(_H, width=1408, depth=40, mlp=6144),
    "vit_bigg14": replace(_H, width=1664, depth=48, mlp=8192),
    # e (PaLI) and So400m (SigLIP) pool by attention and have no class token
    "vit_e14": replace(_H, width=1792, depth=56, mlp=15360, class_token=False, pool="map"),
    "vit_so400m14": replace(
        _H, width=1152, depth=27, mlp=4304, class_token=False, pool="map", activation="gelu_tanh"
    ),
    # DeiT
    "deit_ti16": _TI,
    "deit_s16": _S,
    "deit_b16": _B,
    "deit_ti16_distilled": replace(_TI, distilled=True),
    "deit_s16_distilled": replace(_S, distilled=True),
    "deit_b16_distilled": replace(_B, distilled=True),
    # DeiT-III
    "deit3_s16": _deit3(_S),
    "deit3_m16": _deit3(_M),
    "deit3_b16": _deit3(_B),
    "deit3_l16": _deit3(_L),
    "deit3_h14": _deit3(_H),
    # DINOv2, backbones at the 518 pixels that their position table was trained for last
    "dinov2_s14": _dinov2(_S),
    "dinov2_b14": _dinov2(_B),
    "dinov2_l14": _dinov2(_L),
    "dinov2_g14": _dinov2(_DINOV2_G),
    "dinov2_s14_reg": _registers(_dinov2(_S)),
    "dinov2_b14_reg": _registers(_dinov2(_B)),
    "dinov2_l14_reg": _registers(_dinov2(_L)),
    "dinov2_g14_reg": _registers(_dinov2(_DINOV2_G)),
    # CLIP's image towers as OpenAI trained them: the classes are the joint embedding's axes
    "clip_b32": _clip(_patch(_B, 32)),
    "clip_b16": _clip(_B),
    "clip_l14": _clip(_patch(_L, 14), 768),
    # SigLIP's, whose embedding is what the pooling gives
    "siglip_b16": _siglip(_B),
    "siglip_l16": replace(_siglip(_L), image_size=(256, 256)),
    # Ours, to learn from few images or on few cores: see vitrail.recipes.scratch
    "vit_mini16": replace(_SMALL, width=192, heads=6, mlp=768, image_size=(96, 96)),
    "vit_nano8": replace(_patch(_SMALL, 8), width=128, heads=4, mlp=512, image_size=(32, 32)),
}
"""Name -> shape. Image size, classes, dropout are changes to a row, never names."""
