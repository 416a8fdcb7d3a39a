"""A small model of each kind, and what is to be expected of it: data for test_families.py."""

from dataclasses import dataclass, field, replace
from typing import Any

from vitrail.models import (
    BiTConfig,
    DynamicViTConfig,
    GmlpConfig,
    MixerConfig,
    MobileViTConfig,
    ModelConfig,
    ResNetConfig,
    TwinsConfig,
    ViTConfig,
)

Changes = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A model, and the same facts of each."""

    config: ModelConfig
    size: tuple[int, int]
    """Of the images that it is shown: another than its own, where it takes any."""
    maps: tuple[tuple[int, int, int], ...]
    """Channels, rows and columns of each, of images of that size."""
    stride: int
    """Of the first map; each further one has twice that of the one before."""
    pooled: int
    prefix: int = 0
    blocks: tuple[str, ...]
    changes: Changes
    """Of every field one that a user would notice: in the weights or in the output."""
    beside: dict[str, Changes] = field(default_factory=dict)
    """Fields that only mean something beside certain values of others."""
    elsewhere: tuple[str, ...] = ()
    """Fields of any size of images, or of which another test tells."""
    refused: tuple[tuple[Changes, str], ...]
    """Changes that make no sense, and the words that say so."""
    sizes: tuple[tuple[tuple[int, int], str], ...] = (((0, 32), "at least 1x1 pixels, not 0x32"),)
    """Images that it cannot take, and the words that say so."""


PATCHES: Changes = {"patch": (8, 8), "image_size": (32, 48), "classes": 5}
SHAPE: Changes = {"depth": 3, "width": 32, "mlp": 48, **PATCHES}
MIXER = MixerConfig(tokens_mlp=20, **SHAPE)
GMLP = GmlpConfig(**SHAPE)
VIT = ViTConfig(heads=2, **SHAPE)
DYNAMICVIT = DynamicViTConfig(heads=2, prune_before=(1, 2), **SHAPE)
HYBRID = ViTConfig(
    depth=2,
    width=32,
    heads=2,
    mlp=48,
    stem="resnet",
    stem_depths=(1, 2),
    stem_norm=True,
    patch=(16, 16),
    image_size=(64, 96),
    classes=5,
)
TWINS = TwinsConfig(
    depths=(3, 2),
    widths=(16, 24),
    heads=(2, 3),
    mlp=(32, 40),
    reductions=(3, 2),
    window=4,
    classes=5,
)
MOBILEVIT = MobileViTConfig(
    stem_width=8,
    widths=(8, 16, 24),
    depths=(1, 2, 1),
    expansion=2,
    token_widths=(16, 24),
    token_depths=(2, 1),
    mlp=(24, 40),
    heads=2,
    last_width=32,
    classes=5,
    dropout=0.0,
)
RESNET = ResNetConfig(depths=(1, 2), widths=(32, 64), classes=5)
BASIC = replace(RESNET, block="basic")
BIT = BiTConfig(depths=(1, 2), widths=(256, 256), classes=5)

NOT_WHOLE = "36x30 .* cannot be cut into patches of 8x8: use 32x24"
GRID = (
    r"this {} has a weight for each place of 4x6 patches, so it takes images of 32x48 pixels "
    r"\(height x width\), not {}x{}: scale them, or build it with image_size=\({}, {}\)"
)
STAGES = ("stages.0.0", "stages.1.0", "stages.1.1")
VIT_CHANGES: Changes = {
    "depth": 4,
    "width": 64,
    "heads": 4,
    "mlp": 64,
    "patch": (4, 8),
    "image_size": (32, 40),
    "channels": 1,
    "classes": 6,
    "stem": "conv",
    "stem_norm": True,
    "stem_bias": False,
    "stem_depths": (1,),
    "stem_eps": "timm",
    "position": "sincos_mae",
    "prefix_position": False,
    "resample": "bilinear_aligned",
    "pre_norm": True,
    "distilled": True,
    "registers": 2,
    "pool": "mean",
    "pool_norm": True,
    "activation": "gelu_tanh",
    "qkv_bias": False,
    "qk_norm": True,
    "attn_norm": True,
    "mlp_norm": True,
    "final_norm": False,
    "rope": "axial",
    "rope_grid": (9, 9),
    "pool_prefix": True,
    "pool_heads": 4,
    "pool_mlp": 24,
    "layer_scale": 0.1,
    "norm_eps": 0.5,
    "representation": 24,
    "head_bias": False,
    "dropout": 0.5,
    "drop_path": 0.5,
}
VIT_WINDOWS: Changes = {"window": (2, 2), "windows": 2, "global_blocks": (1,), "relative": (4, 6)}
VIT_BESIDE: dict[str, Changes] = {
    "global_blocks": {"window": (2, 2)},
    "relative": {"class_token": False, "pool": "mean"},
    "stem_depths": {"stem": "resnet"},
    "stem_eps": {"stem": "resnet", "stem_depths": (1, 1)},
    "fine": {"scales": "adaptive"},
    "saliency": {"scales": "adaptive"},
    "merge_schedule": {"merge": 4},
    "rope": {"position": "rope"},
    "rope_grid": {"position": "learned_rope", "rope": "pe"},
    "pool_prefix": {"pool": "mean"},
    "pool_heads": {"pool": "map"},
    "pool_mlp": {"pool": "map"},
}
MIXER_REFUSED = (
    ({"depth": 0}, "depth must be at least 1, not 0"),
    ({"mlp": 0}, "mlp must be at least 1"),
    ({"norm_eps": 0.0}, "norm_eps must be in"),
    ({"patch": (0, 8)}, "patch is a pair"),
    ({"image_size": (36, 30)}, NOT_WHOLE),
    ({"activation": "gelu_tan"}, "did you mean 'gelu_tanh'"),
    ({"activation": "swiglu"}, "unknown activation"),
)
STAGED_REFUSED = (
    ({"depths": (1, 0)}, r"depths has a number from 1 for each stage, not \(1, 0\)"),
    ({"widths": ()}, "widths has a number from 1"),
    ({"depths": (1, 2, 3)}, "are of the same stages: give as many of each"),
)
DROPOUT_REFUSED = ({"dropout": 1.0}, r"dropout must be in \[0, 1\), not 1.0")

KINDS = {
    "vit": Kind(
        config=VIT,
        size=(40, 48),
        maps=((32, 5, 6),),
        stride=8,
        pooled=32,
        prefix=1,
        blocks=tuple(f"encoder.blocks.{i}" for i in range(3)),
        changes={
            **VIT_CHANGES,
            **VIT_WINDOWS,
            "scales": "hierarchical",
            "fine": 0.5,
            "saliency": "learned",
            "merge": 4,
            "merge_schedule": "decreasing",
        },
        beside=VIT_BESIDE,
        elsewhere=("indivisible", "class_token"),
        refused=(
            ({"stem": "convv"}, "unknown stem 'convv': did you mean 'conv'"),
            ({"position": "learnt"}, "unknown position 'learnt': did you mean 'learned'"),
            ({"position": "sincos"}, "unknown position 'sincos': did you mean 'sincos_1d'"),
            ({"scales": "adaptve"}, "unknown scales 'adaptve': did you mean 'adaptive'"),
            ({"saliency": "variances"}, "unknown saliency 'variances': did you mean 'variance'"),
            ({"fine": 0.0}, r"fine is a share of the patches, in \(0, 1\], not 0.0"),
            ({"fine": 1.5}, r"in \(0, 1\], not 1.5"),
            ({"pool": "clas"}, "unknown pool 'clas': did you mean 'class'"),
            ({"activation": "gelu_tan"}, "did you mean 'gelu_tanh'"),
            ({"indivisible": "padd"}, "did you mean 'pad'"),
            ({"depth": 0}, "depth must be at least 1, not 0"),
            ({"registers": -1}, "registers cannot be negative"),
            ({"patch": (8,)}, "patch is a pair"),
            ({"patch": (0, 8)}, "patch is a pair"),
            ({"image_size": (36, 30)}, NOT_WHOLE),
            DROPOUT_REFUSED,
            ({"norm_eps": 0.0}, "norm_eps must be in"),
            ({"heads": 3}, "width 32 is not divisible by 3 heads"),
            ({"width": 34, "position": "sincos_mae"}, "width divisible by 4"),
            ({"heads": 16, "position": "rope"}, "heads whose width is divisible by 4"),
            ({"heads": 16, "position": "learned_rope"}, "'learned_rope' needs heads whose width"),
            ({"rope": "axiel"}, "unknown rope 'axiel': did you mean 'axial'"),
            ({"position": "rope", "rope_grid": (9, 9)}, "rope='dinov3' has them as shares"),
            (
                {"position": "rope", "rope": "eva", "rope_grid": (0, 9)},
                r"rows and columns of a grid, not \(0, 9\)",
            ),
            ({"pool": "map", "pool_heads": 3}, "width 32 is not divisible by 3 heads"),
            ({"pool_mlp": -1}, "pool_mlp cannot be negative"),
            ({"pool": "mean", "pool_norm": True, "final_norm": False}, "that there is none"),
            ({"position": "learned_rope", "merge": 2}, "position='learned_rope' .* use merge=0"),
            ({"class_token": False}, "pool='class' needs class_token=True"),
            ({"pool": "mean", "distilled": True}, "needs pool='class'"),
            ({"pool": "first", "merge": 2}, "the first patch, .* use merge=0 and scales='one'"),
            ({"pool": "first", "scales": "hierarchical"}, "has no token of its own"),
        ),
        sizes=(((36, 30), NOT_WHOLE),),
    ),
    "hybrid": Kind(
        config=HYBRID,
        size=(64, 80),
        maps=((256, 16, 20), (512, 8, 10), (32, 4, 5)),
        stride=4,
        pooled=32,
        prefix=1,
        blocks=("encoder.blocks.0", "encoder.blocks.1"),
        changes={"stem_depths": (1, 1), "stem_eps": "timm", "patch": (8, 16), "stem_norm": False},
        elsewhere=(
            *(name for name in VIT_CHANGES if not name.startswith(("stem_", "patch"))),
            *VIT_WINDOWS,
            *(
                "stem_bias",
                "scales",
                "fine",
                "saliency",
                "merge",
                "merge_schedule",
                "indivisible",
                "class_token",
            ),
        ),
        refused=(
            ({"stem_depths": (1, 0)}, r"a number from 1 for each stage, not \(1, 0\)"),
            ({"stem": "patch"}, "are for stem='resnet', not patch"),
            (
                {"stem": "conv", "stem_depths": (), "stem_eps": "timm"},
                "for stem='resnet', not conv",
            ),
            ({"stem_eps": "tim"}, "'tim': did you mean 'timm'"),
            ({"scales": "adaptive"}, "a stem for each size of patch, which would be two ResNets"),
        ),
        sizes=(
            ((60, 96), "cannot be cut into patches of 16x16"),
            ((64, 90), "cannot be cut into patches of 16x16"),
        ),
    ),
    "dynamicvit": Kind(
        config=DYNAMICVIT,
        size=(40, 48),
        maps=((32, 5, 6),),
        stride=8,
        pooled=32,
        prefix=1,
        blocks=tuple(f"encoder.blocks.{i}" for i in range(3)),
        changes={**VIT_CHANGES, "keep": 0.5, "prune_before": (1,)},
        beside=VIT_BESIDE,
        elsewhere=(
            *(
                "scales",
                "fine",
                "saliency",
                "merge",
                "merge_schedule",
                "indivisible",
                "class_token",
            ),
            *VIT_WINDOWS,
        ),
        refused=(
            ({"window": (2, 2)}, "whole maps"),
            ({"keep": 0.0}, r"keep must be in \(0, 1\], not 0.0"),
            ({"keep": -0.5}, r"\(0, 1\]"),
            ({"keep": 1.01}, r"\(0, 1\]"),
            ({"keep": float("nan")}, r"\(0, 1\]"),
            ({"prune_before": ()}, r"ascending numbers of blocks from 1 to 2, \(1, 2\)"),
            ({"prune_before": (0, 2)}, "from 1 to 2"),
            ({"prune_before": (2, 1)}, "ascending"),
            ({"prune_before": (1, 1)}, "ascending"),
            ({"prune_before": (1, 3)}, "from 1 to 2"),
            ({"depth": 12, "prune_before": (12,)}, r"from 1 to 11, \(3, 6, 9\)"),
            ({"width": 34}, "divisible by 4"),
            ({"position": "peg"}, "whole maps"),
            ({"merge": 2}, "merge=0"),
            ({"pool": "first"}, "a patch which a DynamicViT may drop: use pool='mean'"),
            ({"scales": "hierarchical"}, "scales='one'"),
        ),
        sizes=(((36, 30), NOT_WHOLE),),
    ),
    "mixer": Kind(
        config=MIXER,
        size=(32, 48),
        maps=((32, 4, 6),),
        stride=8,
        pooled=32,
        blocks=("blocks.0", "blocks.1", "blocks.2"),
        changes={
            "depth": 4,
            "width": 16,
            "mlp": 64,
            "tokens_mlp": 24,
            "patch": (4, 8),
            "image_size": (32, 40),
            "channels": 1,
            "classes": 6,
            "activation": "gelu_tanh",
            "norm_eps": 0.1,
            "drop_path": 0.5,
        },
        refused=(*MIXER_REFUSED, ({"tokens_mlp": 0}, "tokens_mlp must be at least 1, not 0")),
        sizes=tuple((s, GRID.format("mixer", *s, *s)) for s in ((48, 32), (32, 40), (64, 96))),
    ),
    "gmlp": Kind(
        config=GMLP,
        size=(32, 48),
        maps=((32, 4, 6),),
        stride=8,
        pooled=32,
        blocks=("blocks.0", "blocks.1", "blocks.2"),
        changes={
            "depth": 4,
            "width": 16,
            "mlp": 64,
            "patch": (4, 8),
            "image_size": (32, 40),
            "channels": 1,
            "classes": 6,
            "activation": "gelu_tanh",
            "norm_eps": 0.1,
            "gate_eps": 0.1,
            "drop_path": 0.5,
        },
        refused=(
            *MIXER_REFUSED,
            ({"mlp": 49}, "it must be even, not 49"),
            ({"gate_eps": 0.0}, "gate_eps must be in"),
        ),
        # Also one of as many tokens: 24 of 6x4 are other places than 24 of 4x6.
        sizes=tuple((s, GRID.format("gmlp", *s, *s)) for s in ((48, 32), (32, 40), (64, 96))),
    ),
    "twins": Kind(
        config=TWINS,
        size=(50, 75),
        maps=((16, 13, 19), (24, 7, 10)),
        stride=4,
        pooled=24,
        blocks=tuple(f"stages.{i}.blocks.{j}" for i, n in enumerate((3, 2)) for j in range(n)),
        changes={
            "depths": (3, 1),
            "widths": (16, 48),
            "heads": (1, 3),
            "mlp": (32, 48),
            "reductions": (2, 2),
            "window": 3,
            "channels": 1,
            "classes": 6,
            "norm_eps": 0.5,
            "dropout": 0.5,
            "drop_path": 0.5,
        },
        elsewhere=("image_size",),
        refused=(
            *STAGED_REFUSED,
            ({"reductions": ()}, "reductions has a number from 1"),
            ({"heads": (1, 2, 3)}, "are of the same stages: give as many of each"),
            ({"heads": (3, 3)}, "width 16 is not divisible by 3 heads"),
            ({"window": -1}, "or 0 for no windows, not -1"),
            ({"norm_eps": 0.0}, "norm_eps must be in"),
            DROPOUT_REFUSED,
        ),
    ),
    "mobilevit": Kind(
        config=MOBILEVIT,
        size=(50, 75),
        maps=((8, 25, 38), (16, 13, 19), (24, 7, 10)),
        stride=2,
        pooled=32,
        blocks=("stages.0.0", "stages.1.0", "stages.1.1", "stages.1.2", "stages.2.0", "stages.2.1"),
        changes={
            "stem_width": 16,
            "widths": (8, 16, 32),
            "depths": (2, 2, 1),
            "expansion": 3,
            "token_widths": (16, 16),
            "token_depths": (2, 2),
            "mlp": (24, 24),
            "heads": 4,
            "unfold": 3,
            "last_width": 16,
            "channels": 1,
            "classes": 6,
            "norm_eps": 0.5,
            "dropout": 0.5,
            "drop_path": 0.5,
        },
        elsewhere=("image_size",),
        refused=(
            ({"depths": (1, 0, 1)}, r"depths has a number from 1 for each stage, not \(1, 0, 1\)"),
            ({"mlp": ()}, "mlp has a number from 1"),
            ({"depths": (1, 2)}, "are of the same stages: give as many of each"),
            ({"mlp": (24,)}, "are of the same stages: give as many of each"),
            (
                {"mlp": (8,) * 4, "token_widths": (8,) * 4, "token_depths": (1,) * 4},
                "are of the last of 3 stages, and cannot have 4 entries",
            ),
            ({"heads": 3}, "width 16 is not divisible by 3 heads"),
            ({"expansion": 0}, "expansion must be at least 1, not 0"),
            ({"unfold": 0}, "unfold must be at least 1, not 0"),
            ({"norm_eps": 0.0}, "norm_eps must be in"),
            DROPOUT_REFUSED,
        ),
    ),
    "resnet": Kind(
        config=RESNET,
        size=(40, 56),
        maps=((32, 10, 14), (64, 5, 7)),
        stride=4,
        pooled=64,
        blocks=STAGES,
        changes={
            "block": "basic",
            "depths": (2, 2),
            "widths": (32, 48),
            "channels": 1,
            "classes": 6,
            "norm_eps": 0.5,
            "drop_path": 0.5,
        },
        elsewhere=("image_size",),
        refused=(
            *STAGED_REFUSED,
            ({"widths": (128, 130)}, "divisible by"),
            ({"block": "botleneck"}, "'botleneck': did you mean 'bottleneck'"),
            ({"norm_eps": 0}, "norm_eps must be in"),
        ),
    ),
    "resnet, basic": Kind(
        config=BASIC,
        size=(33, 56),
        maps=((32, 9, 14), (64, 5, 7)),
        stride=4,
        pooled=64,
        blocks=STAGES,
        changes={"block": "bottleneck", "norm_eps": 0.5, "drop_path": 0.5, "widths": (16, 16)},
        elsewhere=("image_size", "depths", "channels", "classes"),
        refused=(),
    ),
    "bit": Kind(
        config=BIT,
        size=(40, 56),
        maps=((256, 10, 14), (256, 5, 7)),
        stride=4,
        pooled=256,
        blocks=STAGES,
        changes={
            "depths": (2, 2),
            "widths": (256, 384),
            "channels": 1,
            "classes": 6,
            "eps": "timm",
            "drop_path": 0.5,
        },
        elsewhere=("image_size",),
        refused=(
            *STAGED_REFUSED,
            ({"widths": (128, 130)}, "divisible by"),
            ({"eps": "tim"}, "'tim': did you mean 'timm'"),
        ),
    ),
}
