"""Vision Transformer (Dosovitskiy et al., arXiv 2010.11929) and everything of its exact shape.

- patches -> linear projection -> class token -> learned positions -> pre-norm encoder -> linear
- hybrids R+ViT (the paper's section 3.1, 2106.10270): patches of a ResNet's map
- DeiT (2012.12877): the same, and a distillation token with a head of its own
- DeiT-III (2204.07118): LayerScale; the class token has no position
- DINOv2 (2304.07193): patch 14, LayerScale; registers (2309.16588); a gated MLP in the giant
- CLIP's image tower (2103.00020): a norm before the encoder; its projection is the "head"
- SigLIP's (2303.15343): attention pooling, no class token; SigLIP 2's (2502.14786), the same
- DINOv3 (2508.10104): rotary positions, registers, LayerScale; gated MLPs in S+, H+ and 7B
- EVA-02 (2303.11331), EVA-CLIP (2303.15389): rotary positions besides the table, norms within
  attention and MLP; EVA (2211.07636), which has neither
- Perception Encoder (2504.13181): rotary positions besides the table, a norm before the encoder
- ViTDet (2203.16527): attention in windows but for four blocks, relative positions; and RF-DETR's
  windows (2511.09554)
- RoPE-ViT (2403.13298): rotary positions alone, or besides the table
- timm's wee to so150m: registers and the mean of the patches, no class token
- g, G, e (2106.04560, 2209.06794) and So400m (2305.13035) of the scaling studies
- small rows of our own, with a convolutional stem (2106.14881), for small images and CPUs

Letters: b batch, c channels, h w pixels, gh gw token grid, n = gh * gw patch tokens, k prefix
tokens, d width. One row of `ROWS` is one published shape; everything else is a change to a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from vitrail.errors import UsageError, setting, unknown_name
from vitrail.models.family import Family, FamilyConfig, check_heads
from vitrail.nn import (
    Activation,
    Adaptive,
    AttentionPool,
    Block,
    ConvStem,
    Encoder,
    Eps,
    Features,
    Grid,
    Grids,
    Hierarchical,
    Indivisible,
    LearnedPosition,
    PatchEmbed,
    PatchifyStem,
    Pool,
    Position,
    Resample,
    ResNetStem,
    Rope,
    RotaryPosition,
    Saliency,
    Scales,
    SinCosPosition,
    TwoGrids,
    Windows,
    cells_cut,
    decreasing,
    drop_path_rates,
    encode_merging,
    lecun_normal_,
    mean_of,
    normal_,
    pad_to_patches,
    patch_grid,
    take,
    tokens_to_map,
)

MergeSchedule = Literal["constant", "decreasing"]
Stem = Literal["patch", "overlap", "patchify", "conv", "resnet"]
Look: TypeAlias = Callable[[Float[Tensor, "b t d"], tuple[int, int]], Bool[Tensor, "b t t"] | None]
"""From the tokens before a block, and the patches' grid, to what each token may attend to."""


@dataclass(frozen=True, kw_only=True)
class ViTConfig(FamilyConfig):
    """The shape of one Vision Transformer. Sizes are (height, width), in pixels."""

    family: Literal["vit"] = "vit"
    depth: int = 12
    width: int = 768
    heads: int = 12
    mlp: int = 3072
    """Hidden width of the MLP (after gating, for `swiglu`)."""
    patch: tuple[int, int] = (16, 16)
    """Pixels of the image per token, whatever the stem."""
    image_size: tuple[int, int] = (224, 224)
    """Sets the grid of the position table; other sizes are resampled on the fly."""
    stem: Stem = "patch"
    stem_norm: bool = False
    stem_bias: bool = True
    stem_depths: tuple[int, ...] = ()
    """Of stem="resnet": the bottlenecks of each stage; without stages there is its root alone."""
    stem_eps: Eps = "vision_transformer"
    """Of stem="resnet": whose epsilons it has, as the weights' makers did."""
    indivisible: Indivisible = "refuse"
    """An image that is no whole number of patches: an error, or zero padding right and below."""
    scales: Scales = "one"
    """Patches of two sizes in one sequence (vitrail.nn.multiscale): all of `patch` and all of twice
    its sides, or of `patch` with some cut in four. Features are of the grid of `patch`."""
    fine: float = 0.25
    """Of scales="adaptive": the share of the patches that is cut in four."""
    saliency: Saliency = "variance"
    """Of scales="adaptive": how they are chosen."""
    position: Position = "learned"
    prefix_position: bool = True
    """Whether class and distillation token have rows in the learned position table."""
    resample: Resample = "bicubic_antialias"
    """How the learned position table is brought to another grid: as its makers did."""
    rope: Rope = "dinov3"
    """Of rotary positions: by whose angles queries and keys are turned."""
    rope_grid: tuple[int, int] | None = None
    """Of rotary positions that are counted in cells, as all but DINOv3's are: the rows and columns
    to which they are scaled, whatever the grid. None: they are not."""
    pre_norm: bool = False
    """CLIP's LayerNorm between the embeddings and the first block."""
    class_token: bool = True
    distilled: bool = False
    """DeiT's second token, with its own head; the two heads' logits are averaged."""
    registers: int = 0
    pool: Pool = "class"
    pool_norm: bool = False
    """The final norm acts on the pooled vector, not on the tokens: MAE fine-tuned, timm's "avg"."""
    pool_prefix: bool = False
    """The mean and attention pooling are of the prefix tokens too, not of the patches alone."""
    pool_heads: int = 0
    """Of attention pooling: its heads; 0 is as many as a block has."""
    pool_mlp: int = 0
    """Of attention pooling: the hidden width of its MLP; 0 is that of a block."""
    final_norm: bool = True
    """Whether there is a norm after the last block at all."""
    activation: Activation = "gelu"
    qkv_bias: bool = True
    qk_norm: bool = False
    attn_norm: bool = False
    """A norm within attention, of what the heads have found (EVA-02-CLIP's sub-LN)."""
    mlp_norm: bool = False
    """A norm within the MLP, of the hidden channels (EVA-02 from B on)."""
    layer_scale: float | None = None
    """Initial value of LayerScale; None leaves it out."""
    norm_eps: float = 1e-6
    representation: int = 0
    """Width of a tanh layer between the pooled token and the head, as the original ImageNet-21k
    checkpoints have it ("pre-logits"); 0 leaves it out."""
    head_bias: bool = True
    dropout: float = 0.0
    window: tuple[int, int] | None = None
    """Rows and columns of tokens: blocks attend within windows of that size (ViTDet), and prefix
    tokens are in each (vitrail.nn.windows). Grids that it does not divide are padded. None: all
    tokens attend to all."""
    windows: int = 0
    """Instead: so many windows side by side and one below the other, each with prefix tokens of its
    own from the first block to the last (RF-DETR). 0: none."""
    global_blocks: tuple[int, ...] = ()
    """Of windows: the blocks, counted from 0, in which all tokens attend to all. ViTDet: four, each
    the last of a quarter."""
    relative: tuple[int, int] | None = None
    """Tables of relative positions in attention (ViTDet): those of global blocks are for a grid of
    these rows and columns, those in windows for the window. Other grids interpolate them."""
    merge: int = 0
    """Patch tokens merged into similar ones after the attention of each block (ToMe): it makes any
    ViT faster as it is. At 224 pixels in patches of 16, 13 leave 40 of 196 after 12 blocks."""
    merge_schedule: MergeSchedule = "constant"
    """decreasing: twice as many in the first block and none in the last, which is faster and costs
    more accuracy (ToMe, section 4.1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, known in _CHOICES.items():
            if getattr(self, field) not in known:
                raise unknown_name(field, str(getattr(self, field)), known)
        self._check_counts("depth", "width", "heads", "mlp")
        self._check_pairs("patch")
        self._check_shares("dropout")
        self._check_eps("norm_eps")
        check_heads(self.width, self.heads)
        for field in ("registers", "representation", "pool_heads", "pool_mlp"):
            if getattr(self, field) < 0:
                raise UsageError(f"{setting(field)} cannot be negative")
        if min(self.stem_depths, default=1) < 1:
            raise UsageError(
                f"{setting('stem_depths')} has a number from 1 for each stage, not "
                f"{self.stem_depths}"
            )
        if self.stem != "resnet" and (self.stem_depths or self.stem_eps != "vision_transformer"):
            raise UsageError(
                f"{setting('stem_depths')} and {setting('stem_eps')} are for "
                f"{setting('stem', 'resnet')}, not {self.stem}"
            )
        if not 0 < self.fine <= 1:
            raise UsageError(
                f"{setting('fine')} is a share of the patches, in (0, 1], not {self.fine}"
            )
        parts = {"sincos_1d": 2}.get(self.position, 4)
        if self.position.startswith("sincos") and self.width % parts:
            raise UsageError(
                f"{setting('position', self.position)} needs a width divisible by {parts}"
            )
        if self.turned:
            self._check_rope()
        if self.pool == "map" and self.pool_heads:
            check_heads(self.width, self.pool_heads)
        if self.pool_norm and not self.final_norm:
            raise UsageError(
                f"{setting('pool_norm', True)} says where the final norm is, and "
                f"{setting('final_norm', False)} that there is none"
            )
        if self.scales != "one":
            self._check_scales()
        if self.pool.startswith("class") and not self.class_token:
            raise UsageError(
                f"{setting('pool', self.pool)} needs {setting('class_token', True)}; or use "
                f"{setting('pool', 'mean')} or map"
            )
        if self.pool == "first" and (self.merge or self.scales != "one"):
            raise UsageError(
                f"{setting('pool', 'first')} reads the first patch, which has no token of its own "
                f"where patches are merged or of two sizes: use {setting('merge', 0)} and "
                f"{setting('scales', 'one')}"
            )
        if self.distilled and self.pool != "class":
            raise UsageError(
                f"{setting('distilled', True)} averages two tokens' heads, so it needs "
                f"{setting('pool', 'class')}"
            )
        if self.distilled and self.pool_norm:
            raise UsageError(
                f"{setting('distilled', True)} reads two tokens: {setting('pool_norm', True)} "
                f"would norm one"
            )
        if self.distilled and self.representation:
            raise UsageError(
                f"{setting('distilled', True)} and a representation layer do not go together"
            )
        self.check_size(self.image_size)
        if self.merge:
            self._check_merge()
        self._check_windows()

    def _check_windows(self) -> None:
        for name in ("window", "relative"):
            sides = getattr(self, name)
            if sides is not None and min(sides) < 1:
                raise UsageError(f"{setting(name)} has rows and columns of tokens, not {sides}")
        if self.windows < 0 or (self.windows and self.window is not None):
            raise UsageError(
                f"{setting('windows')} is how many windows there are along a side, and "
                f"{setting('window')} how large they are: give one of them, from 1"
            )
        cut = self.window is not None or self.windows
        blocks = self.global_blocks
        if blocks and not cut:
            raise UsageError(
                f"{setting('global_blocks', blocks)} are those that do not attend in windows: give "
                f"{setting('window', (14, 14))} for the others, or leave it out"
            )
        if blocks != tuple(sorted({i for i in blocks if 0 <= i < self.depth})):
            quarters = tuple(sorted({max(1, self.depth * i // 4) - 1 for i in (1, 2, 3, 4)}))
            raise UsageError(
                f"{setting('global_blocks', blocks)}: give ascending numbers of blocks from 0 to "
                f"{self.depth - 1}, {quarters} for instance"
            )
        if self.relative is not None and (
            self.windows or self.turned or self.class_token or self.distilled or self.registers
        ):
            raise UsageError(
                f"{setting('relative', self.relative)} has a place for each token, and sizes of "
                f"windows: it needs {setting('class_token', False)}, no other prefix tokens, no "
                f"rotary positions, and {setting('window')} instead of {setting('windows')}"
            )
        if (cut or self.relative is not None) and (self.merge or self.scales != "one"):
            raise UsageError(
                f"{setting('window')}, {setting('windows')} and {setting('relative')} are for "
                f"whole grids of patches: use {setting('merge', 0)} and {setting('scales', 'one')}"
            )

    def _check_rope(self) -> None:
        if self.width // self.heads % 4:
            raise UsageError(
                f"{setting('position', self.position)} needs heads whose width is divisible by 4"
            )
        if self.rope_grid is None:
            return
        if min(self.rope_grid) < 1:
            raise UsageError(
                f"{setting('rope_grid')} has the rows and columns of a grid, not {self.rope_grid}"
            )
        if self.rope == "dinov3":
            raise UsageError(
                f"{setting('rope_grid', self.rope_grid)} scales positions that are counted in "
                f"cells, and {setting('rope', 'dinov3')} has them as shares of the image"
            )

    def _check_merge(self) -> None:
        n = self.tokens
        most = n // 2 if self.merge_schedule == "constant" else n // 4
        if not 0 <= self.merge <= most:
            raise UsageError(
                f"{setting('merge', self.merge)}: of the {n} patch tokens of an image of "
                f"{self.image_size[0]}x{self.image_size[1]}, 0 to {most} can be merged after "
                f"each block, usually {n // 15}"
            )
        if self.turned or self.position == "peg":
            raise UsageError(
                f"{setting('position', self.position)} tells the blocks where each token lies, and "
                f"a merged one lies in several places: use {setting('merge', 0)}"
            )

    def _check_scales(self) -> None:
        if self.position in ("peg", "sincos_1d"):
            raise UsageError(
                f"{setting('scales', self.scales)} has two grids in one plane, and "
                f"{setting('position', self.position)} is for the cells of one: use "
                f"'learned', 'sincos_mae' or 'rope'"
            )
        if self.stem == "resnet":
            raise UsageError(
                f"{setting('scales', self.scales)} has a stem for each size of patch, which would "
                f"be two ResNets: use {setting('stem', 'patch')}, 'overlap', 'patchify' or 'conv'"
            )
        if self.merge:
            raise UsageError(
                f"{setting('scales', self.scales)} and {setting('merge', self.merge)} do not go "
                f"together: {setting('merge', 0)} encodes both grids, {setting('scales', 'one')} "
                f"merges"
            )
        if self.scales == "adaptive" and (self.patch[0] % 2 or self.patch[1] % 2):
            raise UsageError(
                f"{setting('scales', 'adaptive')} halves patches, so their sides must be even, not "
                f"{self.patch[0]}x{self.patch[1]}"
            )

    @property
    def has_table(self) -> bool:
        """Whether it learns a row for each position."""
        return self.position in ("learned", "learned_rope")

    @property
    def turned(self) -> bool:
        """Whether queries and keys are turned by where their tokens lie."""
        return self.position in ("rope", "learned_rope")

    @property
    def grid(self) -> tuple[int, int]:
        """The token grid (rows, columns) at `image_size`."""
        rows, columns = patch_grid(self.image_size, self.coarsest, self.indivisible)
        down, right = (c // p for c, p in zip(self.coarsest, self.patch, strict=True))
        return rows * down, columns * right

    @property
    def coarsest(self) -> tuple[int, int]:
        """The largest patch, (height, width): an image is cut into a whole number of them."""
        if self.scales == "hierarchical":
            return 2 * self.patch[0], 2 * self.patch[1]
        return self.patch

    @property
    def tokens(self) -> int:
        """How many the encoder gets of an image of `image_size`, without class token and such."""
        n = self.grid[0] * self.grid[1]
        if self.scales == "adaptive":
            return n + 3 * cells_cut(self.fine, n)
        return n + n // 4 if self.scales == "hierarchical" else n

    @property
    def stride(self) -> tuple[int, int]:
        """Pixels of input for each cell of the last map, (vertical, horizontal)."""
        return self.patch

    @property
    def shape(self) -> str:
        """Its build in words."""
        words = f"{self.depth} blocks, width {self.width}, {self.heads} heads"
        if self.merge:
            each = "each" if self.merge_schedule == "constant" else "each on average"
            words += f", {self.merge} tokens merged after {each}"
        if self.cuts is not None:
            size = f"{self.windows}x{self.windows} windows"
            if self.window is not None:
                size = f"windows of {self.window[0]}x{self.window[1]} tokens"
            words += f", {self.depth - len(self.global_blocks)} of the blocks in {size}"
        return words

    @property
    def cuts(self) -> Windows | None:
        """How grids are cut into windows, where they are."""
        if self.window is None and not self.windows:
            return None
        return Windows(self.window, self.windows)

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise `UsageError` for a (height, width) of images that the model cannot take."""
        patch_grid(size, self.coarsest, self.indivisible)

    @property
    def pooled(self) -> int:
        """Length of an image's one vector, before a representation layer."""
        return 2 * self.width if self.pool == "class_mean" else self.width


_CHOICES: dict[str, tuple[str, ...]] = {
    "stem": get_args(Stem),
    "stem_eps": get_args(Eps),
    "indivisible": get_args(Indivisible),
    "scales": get_args(Scales),
    "saliency": get_args(Saliency),
    "merge_schedule": get_args(MergeSchedule),
    "position": get_args(Position),
    "resample": get_args(Resample),
    "rope": get_args(Rope),
    "pool": get_args(Pool),
    "activation": get_args(Activation),
}


class ViT(Family):
    """A Vision Transformer.

    >>> model = ViT(ViTConfig(depth=2, width=64, heads=2, mlp=128, image_size=(64, 96)))
    >>> model(torch.zeros(3, 3, 64, 96)).shape
    torch.Size([3, 1000])
    >>> model.features(torch.zeros(3, 3, 64, 96)).grid
    (4, 6)
    """

    pooling: ClassVar[tuple[str, ...]] = ("pool", "pool_norm", "representation")

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config: ViTConfig = config
        d = config.width
        stems: dict[Stem, Callable[..., nn.Module]] = {
            "patch": PatchEmbed,
            "overlap": partial(PatchEmbed, overlap=True),
            "patchify": PatchifyStem,
            "conv": ConvStem,
            "resnet": partial(ResNetStem, depths=config.stem_depths, eps=config.stem_eps),
        }
        stem = partial(
            stems[config.stem],
            config.channels,
            width=d,
            norm_eps=config.norm_eps if config.stem_norm else None,
            indivisible=config.indivisible,
            bias=config.stem_bias,
        )
        self.stem = stem(patch=config.patch)
        self.stem_second: Hierarchical | Adaptive | None = None
        if config.scales == "hierarchical":
            self.stem_second = Hierarchical(stem(patch=config.coarsest), d)
        elif config.scales == "adaptive":
            half = (config.patch[0] // 2, config.patch[1] // 2)
            self.stem_second = Adaptive(stem(patch=half), d, config.fine, config.saliency)
        positioned = int(config.class_token) + int(config.distilled)
        prefix = positioned + config.registers
        self.prefix = nn.Parameter(torch.zeros(prefix, d)) if prefix else None
        self.position: LearnedPosition | SinCosPosition | None = None
        if config.has_table:
            rows = positioned if config.prefix_position else 0
            self.position = LearnedPosition(config.grid, d, rows, config.resample)
        elif config.position in ("sincos_moco", "sincos_mae", "sincos_bigvision", "sincos_1d"):
            self.position = SinCosPosition(config.grid, d, config.position)
        self.rotary = (
            RotaryPosition(d // config.heads, config.rope, config.rope_grid)
            if config.turned
            else None
        )
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
                    attn_norm=config.attn_norm,
                    mlp_norm=config.mlp_norm,
                    windows=None if (everywhere := i in config.global_blocks) else config.cuts,
                    relative=config.relative
                    if config.relative is None or everywhere or config.window is None
                    else config.window,
                )
                for i, rate in enumerate(drop_path_rates(config.drop_path, config.depth))
            ),
            d,
            config.norm_eps if config.final_norm and not config.pool_norm else None,
            peg=config.position == "peg",
        )
        self.pool = (
            AttentionPool(
                d,
                config.pool_heads or config.heads,
                config.pool_mlp or config.mlp,
                config.activation,
                config.norm_eps,
            )
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
                lecun_normal_(module)
            if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith(("fc1.bias", "fc2.bias")):
                normal_(parameter, std=1e-6)
        if self.prefix is not None:
            # The class token starts at zero, as in JAX; others would then stay equal to it.
            normal_(self.prefix[int(self.config.class_token) :], std=0.02)
        for head in (self.head, self.head_distilled):
            if head is not None:
                nn.init.zeros_(head.weight)

    def block_names(self) -> list[str]:
        """The names of its blocks, first to last."""
        return [f"encoder.blocks.{i}" for i in range(self.config.depth)]

    def features(
        self, x: Float[Tensor, "b c h w"], extent: Int[Tensor, "b 2"] | None = None
    ) -> Features:
        """Everything a head may want of images `x` (already normalised).

        Images of different sizes share a batch as a canvas with each at its top left, `extent`
        being the (rows, columns) of patches that show it. Each gets exactly what it would get
        alone: positions of its own grid, attention and pooling over its own tokens. What else is
        on the canvas changes nothing, and has zeros in `patches` and `maps`.
        """
        tokens, grid, stages = self.embed(x, extent)
        if self.config.merge:
            prefix, patches, pooled = self._merged(tokens, grid)
        else:
            rotation = None if self.rotary is None else self.rotary(grid)
            prefix, patches = self.split(self.encoder(tokens, grid, rotation), self._copies(grid))
            pooled = self.vector(prefix, patches, grid.keys() if isinstance(grid, Grids) else None)
        if isinstance(grid, Grids):
            patches = grid.scatter(patches)
            return self.laid_out(patches, prefix, grid.canvas, stages, pooled, grid.shown)
        if isinstance(grid, TwoGrids):
            return self.laid_out(grid.cells(patches), prefix, grid.grid, stages, pooled)
        return self.laid_out(patches, prefix, grid, stages, pooled)

    def taps(
        self, x: Float[Tensor, "b c h w"], blocks: Sequence[int]
    ) -> tuple[Float[Tensor, "b d gh gw"], ...]:
        """The patches after each of `blocks`, counted from 0 and ascending, as maps, each through
        the final norm: of the last block it is the last of `features(x).maps`.

        Later blocks are not computed. Raises `UsageError` for a model that merges tokens.
        """
        self.check_whole("taps")
        tokens, grid, _ = self.embed(x)
        assert not isinstance(grid, Grids)  # there is no extent
        rotation = None if self.rotary is None else self.rotary(grid)
        maps = []
        for i in range(max(blocks) + 1):
            tokens = self.encoder.step(i, tokens, grid, rotation)
            if i in blocks:
                patches = self.split(self.encoder.norm(tokens), self._copies(grid))[1]
                if isinstance(grid, TwoGrids):
                    maps.append(tokens_to_map(grid.cells(patches), grid.grid))
                else:
                    maps.append(tokens_to_map(patches, grid))
        return tuple(maps)

    def joined(
        self,
        x: Float[Tensor, "b c h w"],
        queries: Float[Tensor, "q d"],
        blocks: int,
        look: Look | None = None,
    ) -> tuple[Float[Tensor, "b t d"], tuple[int, int]]:
        """Queries, prefix tokens and patches after the final norm, the queries having gone through
        the last `blocks` blocks with the others (EoMT, arXiv 2503.19108); and the patches' grid.

        Before each of these blocks `look(tokens, grid)` is shown the tokens, normed as at the end,
        and says which of them each may attend to. Raises `UsageError` for a model whose patches
        are merged, or of two sizes.
        """
        self.check_whole("queries")
        tokens, grid, _ = self.embed(x)
        assert isinstance(grid, tuple)  # one size of images, one of patches
        rotation = None if self.rotary is None else self.rotary(grid)
        first = self.config.depth - blocks
        for i in range(self.config.depth):
            if i == first:
                tokens = torch.cat([queries.expand(x.shape[0], -1, -1).to(tokens), tokens], dim=1)
            seen = None
            if i >= first and look is not None:
                seen = look(self.encoder.norm(tokens), grid)
            tokens = self.encoder.step(i, tokens, grid, rotation, seen)
        return self.encoder.norm(tokens), grid

    def shown(
        self, x: Float[Tensor, "b c h w"], places: Int[Tensor, "b m"]
    ) -> Float[Tensor, "b t d"]:
        """Prefix tokens and some of the patches, those at `places`, after the final norm, the other
        patches having been taken away before the first block (MAE, arXiv 2111.06377).

        Raises `UsageError` for a model whose patches see each other before, or need each other's
        places: the stems but `patch` and `patchify`, windows, merging, two sizes of patches.
        """
        self.check_whole("some patches")
        tokens, grid, _ = self.embed(x)
        assert isinstance(grid, tuple)  # one size of images, one of patches
        prefix, patches = self.split(tokens)
        rotation = None if self.rotary is None else self.rotary(grid).at(places)
        tokens = torch.cat([prefix, take(patches, places)], dim=1)
        return self.encoder(tokens, grid, rotation)

    def check_whole(self, what: Literal["taps", "queries", "some patches"]) -> None:
        """Raise `UsageError` where `what` would need of blocks and stem what these do not do."""
        if self.config.merge:
            raise UsageError(
                f"{what} of a ViT need a token for each patch in every block: use "
                f"{setting('merge', 0)}"
            )
        leaks = self.config.stem not in ("patch", "patchify") or self.config.position == "peg"
        if what == "some patches" and leaks:
            raise UsageError(
                f"patches can be left out where none has seen another before: use "
                f"{setting('stem', 'patch')} and another position than peg"
            )
        if what != "taps" and (self.config.cuts or self.config.relative):
            raise UsageError(
                f"{what} go through blocks in which all tokens attend to all: use "
                f"{setting('window', None)}, {setting('windows', 0)}, {setting('relative', None)}"
            )
        if what != "taps" and self.config.scales != "one":
            raise UsageError(
                f"{what} go with patches of one size: use {setting('scales', 'one')}, not "
                f"{self.config.scales}"
            )

    def embed(
        self, x: Float[Tensor, "b c h w"], extent: Int[Tensor, "b 2"] | None = None
    ) -> tuple[Float[Tensor, "b t d"], Grid, tuple[Tensor, ...]]:
        """Images as the encoder takes them: prefix tokens, then patches, with their positions.

        Beside them the patches' grid, and the maps of a stem that has some.
        """
        self.check_channels(x)
        if extent is not None and (self.config.cuts or self.config.relative):
            raise UsageError(
                f"images of different sizes in one batch ({setting('data.resize')} native or pad) "
                f"have no grid in common for windows and relative positions: take resize crop or "
                f"squash, or use {setting('window', None)}, {setting('windows', 0)}, "
                f"{setting('relative', None)}"
            )
        if self.stem_second is not None:
            if extent is not None:
                raise UsageError(
                    f"images of different sizes in one batch ({setting('data.resize')} native or "
                    f"pad) need {setting('scales', 'one')}: with {self.config.scales} take resize "
                    f"crop or squash"
                )
            x, _ = pad_to_patches(x, self.config.coarsest, self.config.indivisible)
        stages: tuple[Tensor, ...] = ()
        if isinstance(self.stem, ResNetStem):
            stages = self.stem.maps(x, extent)
            patches, canvas = self.stem.tokens(stages[-1])
        else:
            patches, canvas = self.stem(x, extent)
        grid: Grid = canvas
        if extent is not None:
            grid = Grids(extent, canvas)
            patches = grid.gather(patches)
        elif self.stem_second is not None:
            patches, grid = self.stem_second(x, patches, canvas)
        if self.prefix is None:
            prefix = patches.new_empty(x.shape[0], 0, patches.shape[2])
        else:
            prefix = self.prefix.expand(x.shape[0], -1, -1)
        if self.position is not None:
            patches, prefix = self.position(patches, prefix, grid)
        tokens = self.pre_norm(self.drop(torch.cat([prefix, patches], dim=1)))
        if (copies := self._copies(grid)) > 1:
            k = prefix.shape[1]
            tokens = torch.cat([tokens[:, :k].repeat(1, copies, 1), tokens[:, k:]], dim=1)
        return tokens, grid, stages

    def _copies(self, grid: Grid) -> int:
        """How many of each prefix token go through the encoder: one, or one for each window."""
        cuts = self.config.cuts
        if cuts is None or cuts.copies != "own":
            return 1
        assert isinstance(grid, tuple)  # others are refused
        return cuts.cut(grid).windows

    def split(
        self, tokens: Float[Tensor, "b t d"], copies: int = 1
    ) -> tuple[Float[Tensor, "b k d"], Float[Tensor, "b m d"]]:
        """Prefix tokens, each the mean of its `copies`, and patches apart."""
        k = 0 if self.prefix is None else len(self.prefix)
        prefix, patches = tokens[:, : copies * k], tokens[:, copies * k :]
        return (prefix if copies == 1 else prefix.unflatten(1, (copies, k)).mean(dim=1)), patches

    def vector(
        self,
        prefix: Float[Tensor, "b k d"],
        patches: Float[Tensor, "b m d"],
        keys: Shaped[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b e"]:
        """An image's one vector. `keys`: which patches count, or for how many each; None is all."""
        if self.config.pool_prefix:
            patches = torch.cat([prefix, patches], dim=1)
            if keys is not None:
                keys = torch.cat([keys.new_ones(prefix.shape[:2]), keys], dim=1)
        if self.pool is not None:
            pooled = self.pool(patches, keys)
        elif self.config.pool == "class":
            pooled = prefix[:, 0]
        elif self.config.pool == "first":
            pooled = patches[:, 0]
        else:
            pooled = mean_of(patches, keys)
            if self.config.pool == "class_mean":
                pooled = torch.cat([prefix[:, 0], pooled], dim=1)
        pooled = self.pool_norm(pooled)
        return pooled if self.representation is None else self.representation(pooled).tanh()

    def _merged(
        self, tokens: Float[Tensor, "b t d"], grid: Grid
    ) -> tuple[Float[Tensor, "b k d"], Float[Tensor, "b n d"], Float[Tensor, "b e"]]:
        """Prefix, patches and vector of an encoder that merges: a patch has the token it is in."""
        if isinstance(grid, Grids):
            raise UsageError(
                f"images of different sizes in one batch ({setting('data.resize')} native or pad) "
                f"cannot have their tokens merged: use {setting('merge', 0)}, or resize crop or "
                f"squash"
            )
        k = 0 if self.prefix is None else len(self.prefix)
        r = self.config.merge
        counts = r if self.config.merge_schedule == "constant" else decreasing(r, self.config.depth)
        tokens, sizes, home = encode_merging(self.encoder, tokens, k, counts)
        pooled = self.vector(*self.split(tokens), sizes[:, k:])
        return tokens[:, :k], take(tokens, home), pooled

    def laid_out(
        self,
        patches: Float[Tensor, "b n d"],
        prefix: Float[Tensor, "b k d"],
        grid: tuple[int, int],
        stages: tuple[Tensor, ...],
        pooled: Float[Tensor, "b e"],
        valid: Bool[Tensor, "b n"] | None = None,
    ) -> Features:
        """The features of patches that fill their `grid`."""
        return Features(
            patches=patches,
            prefix=prefix,
            grid=grid,
            maps=(*stages, tokens_to_map(patches, grid)),
            strides=(*((4 * 2**i, 4 * 2**i) for i in range(len(stages))), self.config.patch),
            pooled=pooled,
            valid=valid,
        )

    def logits(self, features: Features) -> Float[Tensor, "b t c"]:
        """The logits of each head apart: the classifier's, then, in DeiT, the distilled one's."""
        assert self.head is not None, "this model was built without a head (classes=0)"
        logits = [self.head(features.pooled)]
        if self.head_distilled is not None:
            logits.append(self.head_distilled(features.prefix[:, 1]))
        return torch.stack(logits, dim=1)


_TI = ViTConfig(width=192, heads=3, mlp=768)
_S = ViTConfig(width=384, heads=6, mlp=1536)
_M = ViTConfig(width=512, heads=8, mlp=2048)
_B = ViTConfig()
_L = ViTConfig(width=1024, depth=24, heads=16, mlp=4096)
_H = ViTConfig(width=1280, depth=32, heads=16, mlp=5120, patch=(14, 14))


def _patch(config: ViTConfig, side: int) -> ViTConfig:
    return replace(config, patch=(side, side))


def _hybrid(config: ViTConfig, side: int, *depths: int) -> ViTConfig:
    return replace(_patch(config, side), stem="resnet", stem_depths=depths)


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


def _tipsv2(config: ViTConfig) -> ViTConfig:
    return replace(
        _dinov2(config), registers=1, image_size=(448, 448), resample="bilinear_antialias"
    )


def _dinov3(config: ViTConfig, mlp: int = 0) -> ViTConfig:
    """With a gated MLP of width `mlp`, if that is given."""
    gated = replace(config, mlp=mlp, activation="swiglu") if mlp else config
    return replace(gated, classes=0, position="rope", registers=4, layer_scale=1e-5, norm_eps=1e-5)


def _pooled(config: ViTConfig, registers: int) -> ViTConfig:
    """As in timm's search for better baselines: no class token, 256 pixels."""
    return replace(
        config,
        image_size=(256, 256),
        class_token=False,
        prefix_position=False,
        registers=registers,
        pool="mean",
        pool_norm=True,
        layer_scale=1e-5,
    )


def _siglip(config: ViTConfig) -> ViTConfig:
    return replace(config, classes=0, class_token=False, pool="map", activation="gelu_tanh")


def _pe(config: ViTConfig, side: int, **changes: Any) -> ViTConfig:
    """A Perception Encoder, whose output is the last block's: Spatial and Lang."""
    config = replace(config, image_size=(side, side))
    dense = replace(
        config,
        position="learned_rope",
        rope="pe",
        rope_grid=config.grid,
        pre_norm=True,
        stem_bias=False,
        norm_eps=1e-5,
        classes=0,
        pool="mean",
        final_norm=False,
    )
    return replace(dense, **changes)


def _pe_core(config: ViTConfig, side: int, embedding: int, **changes: Any) -> ViTConfig:
    """One trained with texts: the classes are the joint embedding's axes."""
    pooled = {"pool": "map", "pool_heads": 8, "pool_prefix": True, "final_norm": True}
    return _pe(config, side, classes=embedding, **pooled, **changes)


def _eva(config: ViTConfig) -> ViTConfig:
    return replace(_patch(config, 14), pool="mean", pool_norm=True)


def _eva02(config: ViTConfig, mlp: int, **changes: Any) -> ViTConfig:
    rope: dict[str, Any] = {"position": "learned_rope", "rope": "eva", "rope_grid": (16, 16)}
    return replace(_eva(config), activation="swiglu", mlp=mlp, **rope | changes)


def _eva02_clip(config: ViTConfig, mlp: int, embedding: int, **changes: Any) -> ViTConfig:
    inner = {"attn_norm": True, "mlp_norm": True}
    changes = {"pool": "class", "pool_norm": False, "classes": embedding, **inner, **changes}
    return _eva02(config, mlp, **changes)


def _rope_vit(config: ViTConfig) -> ViTConfig:
    return replace(config, position="rope", rope="axial", layer_scale=1e-5)


def _rope_ape(config: ViTConfig) -> ViTConfig:
    return replace(_rope_vit(config), position="learned_rope", prefix_position=False)


def _rope_gap(config: ViTConfig, registers: int) -> ViTConfig:
    return replace(
        config,
        image_size=(256, 256),
        position="rope",
        rope="eva",
        rope_grid=(16, 16),
        layer_scale=1e-5,
        class_token=False,
        registers=registers,
        pool="mean",
        pool_norm=True,
    )


def _vitdet(config: ViTConfig, global_blocks: tuple[int, ...]) -> ViTConfig:
    return replace(
        config,
        dropout=0.0,
        classes=0,
        class_token=False,
        prefix_position=False,
        pool="mean",
        final_norm=False,
        resample="bicubic",
        window=(14, 14),
        global_blocks=global_blocks,
        relative=(64, 64),
    )


_SMALL = ViTConfig(depth=6, stem="conv", class_token=False, pool="mean")

_EVA_G = replace(_H, width=1408, depth=40, mlp=6144)
_PE_G = ViTConfig(
    width=1536,
    depth=50,
    heads=16,
    mlp=8960,
    patch=(14, 14),
    class_token=False,
    prefix_position=False,
    pool="mean",
)
_PE_LANG_L = replace(_patch(_L, 14), depth=23)

_DINOV2_G = ViTConfig(width=1536, depth=40, heads=24, mlp=4096, activation="swiglu")
_SO400M = ViTConfig(width=1152, depth=27, heads=16, mlp=4304, patch=(14, 14))

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
    # Hybrids: R26 and R50 count the ResNet's layers, the number after it a token's pixels. Google's
    # name R+Ti/16 takes the root for a stride of 2, but convolution and pooling make it 4, and
    # patches of 8x8 cells 32: with 16 pixels the position table would have four times the rows.
    "r_ti16": _hybrid(_TI, 32),
    "r26_s32": _hybrid(_S, 32, 2, 2, 2, 2),
    "r50_b16": _hybrid(replace(_B, dropout=0.1), 16, 3, 4, 9),
    "r50_l32": _hybrid(replace(_L, dropout=0.1), 32, 3, 4, 6, 3),
    # Scaling Vision Transformers: g and G with the class token of their public checkpoints
    "vit_g14": replace(_H, width=1408, depth=40, mlp=6144),
    "vit_bigg14": replace(_H, width=1664, depth=48, mlp=8192),
    # e (PaLI) and So400m (SigLIP) pool by attention and have no class token
    "vit_e14": replace(_H, width=1792, depth=56, mlp=15360, class_token=False, pool="map"),
    "vit_so400m14": replace(_siglip(_SO400M), classes=1000),
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
    # TIPSv2 (2604.12012): its register is a second class token
    "tipsv2_b14": _tipsv2(_B),
    "tipsv2_l14": _tipsv2(_L),
    "tipsv2_so400m14": _tipsv2(_SO400M),
    "tipsv2_g14": _tipsv2(_DINOV2_G),
    # DINOv3; Ti is EUPE's, g LingBot-Vision's. The distilled ones' biases of q, k and v are zeros
    "dinov3_ti16": _dinov3(_TI),
    "dinov3_s16": _dinov3(_S),
    "dinov3_s16plus": _dinov3(_S, mlp=1536),
    "dinov3_b16": _dinov3(_B),
    "dinov3_l16": _dinov3(_L),
    "dinov3_h16plus": _dinov3(replace(_patch(_H, 16), heads=20), mlp=5120),
    "dinov3_g16": _dinov3(_patch(_DINOV2_G, 16), mlp=4096),
    "dinov3_7b16": _dinov3(ViTConfig(width=4096, depth=40, heads=32, qkv_bias=False), mlp=8192),
    # CLIP's image towers as OpenAI trained them: the classes are the joint embedding's axes
    "clip_b32": _clip(_patch(_B, 32)),
    "clip_b16": _clip(_B),
    "clip_l14": _clip(_patch(_L, 14), 768),
    # SigLIP's, whose embedding is what the pooling gives
    "siglip_b16": _siglip(_B),
    "siglip_l16": replace(_siglip(_L), image_size=(256, 256)),
    # and those that came with SigLIP 2
    "siglip_b32": replace(_siglip(_patch(_B, 32)), image_size=(256, 256)),
    "siglip_so400m14": _siglip(_SO400M),
    "siglip_so400m16": replace(_siglip(_patch(_SO400M, 16)), image_size=(256, 256)),
    "siglip_g16": _siglip(
        ViTConfig(width=1536, depth=40, heads=16, mlp=6144, image_size=(256, 256))
    ),
    # timm's, between the sizes of the paper: their names are timm's
    "vit_wee16": _pooled(ViTConfig(width=256, depth=14, heads=4, mlp=1280), registers=1),
    "vit_little16": _pooled(ViTConfig(width=320, depth=14, heads=5, mlp=1792), registers=4),
    "vit_medium16": _pooled(_M, registers=4),
    "vit_mediumd16": _pooled(replace(_M, depth=20), registers=4),
    "vit_betwixt16": _pooled(ViTConfig(width=640, heads=10, mlp=2560), registers=4),
    "vit_so150m16": replace(
        _pooled(ViTConfig(width=896, depth=18, heads=14, mlp=2304), registers=4),
        pool_norm=False,
        layer_scale=None,
    ),
    "vit_so150m2_16": _pooled(
        ViTConfig(width=832, depth=21, heads=13, mlp=2176, qkv_bias=False), registers=1
    ),
    # and TinyCLIP's (2309.12314) towers in its names
    "clip_xsmall16": _clip(ViTConfig(width=256, depth=10, heads=4, mlp=1024)),
    "clip_medium16": _clip(_M),
    "clip_medium32": _clip(_patch(_M, 32)),
    "clip_betwixt32": _clip(_patch(ViTConfig(width=640, heads=10, mlp=2560), 32)),
    # Perception Encoders: Core, with texts; Spatial and Lang, whose output is the last block's
    "pe_core_ti16": _pe_core(_TI, 384, 512),
    "pe_core_s16": _pe_core(_S, 384, 512),
    "pe_core_b16": _pe_core(_B, 224, 1024),
    "pe_core_l14": _pe_core(_patch(_L, 14), 336, 1024),
    "pe_core_g14": _pe_core(_PE_G, 448, 1280, pool_mlp=6144),
    "pe_spatial_ti16": _pe(_TI, 512),
    "pe_spatial_s16": _pe(_S, 512),
    "pe_spatial_b16": _pe(_B, 512),
    "pe_spatial_l14": _pe(_patch(_L, 14), 448),
    "pe_spatial_g14": _pe(_PE_G, 448, layer_scale=0.1),
    "pe_lang_l14": _pe(_PE_LANG_L, 448, layer_scale=0.1),
    "pe_lang_g14": _pe(replace(_PE_G, depth=47), 448, layer_scale=0.1),
    # EVA and EVA-02, as fine-tuned on ImageNet, and as CLIP's image towers
    "eva_g14": _eva(_EVA_G),
    "eva_g14_clip": replace(_EVA_G, classes=1024),
    "eva02_ti14": _eva02(_TI, 512),
    "eva02_s14": _eva02(_S, 1024),
    "eva02_b14": _eva02(_B, 2048, mlp_norm=True),
    "eva02_l14": _eva02(_L, 2730, mlp_norm=True),
    "eva02_b16_clip": _eva02_clip(_B, 2048, 512, patch=(16, 16)),
    "eva02_l14_clip": _eva02_clip(_L, 2730, 768),
    # RoPE-ViT (ape: with a position table besides), and timm's own with registers
    "vit_s16_rope": _rope_vit(_S),
    "vit_b16_rope": _rope_vit(_B),
    "vit_l16_rope": _rope_vit(_L),
    "vit_s16_rope_ape": _rope_ape(_S),
    "vit_b16_rope_ape": _rope_ape(_B),
    "vit_l16_rope_ape": _rope_ape(_L),
    "vit_m16_rope_reg1_gap": _rope_gap(_M, 1),
    "vit_mediumd16_rope_reg1_gap": _rope_gap(replace(_M, depth=20, qkv_bias=False), 1),
    "vit_betwixt16_rope_reg4_gap": _rope_gap(ViTConfig(width=640, heads=10, mlp=2560), 4),
    "vit_b16_rope_reg1_gap": _rope_gap(_B, 1),
    # ViTDet's backbones (2203.16527), as in detectron2: positions of MAE, detectors at 1024 pixels
    "vitdet_b": _vitdet(_B, (2, 5, 8, 11)),
    "vitdet_l": _vitdet(_L, (5, 11, 17, 23)),
    # Ours, to learn from few images or on few cores: see vitrail.recipes.scratch and pretrain
    "vit_mini16": replace(_SMALL, width=192, heads=6, mlp=768, image_size=(96, 96)),
    "vit_nano8": replace(_patch(_SMALL, 8), width=128, heads=4, mlp=512, image_size=(32, 32)),
    "vit_pico8": replace(
        _patch(_SMALL, 8), depth=2, width=192, heads=6, mlp=768, image_size=(64, 64)
    ),
}
"""Name -> shape. Image size, classes, dropout are changes to a row, never names."""
