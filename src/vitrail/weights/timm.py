"""timm's checkpoint layout: ViT, DeiT (distilled too), DeiT-III, DINOv2, image towers of two kinds,
and the hybrids of Google's ResNet and a ViT.

One table of names; the layouts differ in what their files' code fixes, and a hybrid has a ResNet's
names besides. DeiT, DINO and MAE use these names in their own files as well (`facebook.py` has what
they call otherwise).
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Size, Tensor

from vitrail.models import ViTConfig
from vitrail.weights.clip import ACTIVATION
from vitrail.weights.names import Layout, Names, position_rows

NAMES: Names = {
    "prefix.class": "cls_token",
    "prefix.distilled": "dist_token",
    "prefix.registers": "reg_token",
    "position.table": "pos_embed",
    "stem.proj": "patch_embed.proj",
    "stem.norm": "patch_embed.norm",
    "pre_norm": "norm_pre",
    "encoder.blocks.{i}.norm1": "blocks.{i}.norm1",
    "encoder.blocks.{i}.attn.qkv": "blocks.{i}.attn.qkv",
    "encoder.blocks.{i}.attn.q_norm": "blocks.{i}.attn.q_norm",
    "encoder.blocks.{i}.attn.k_norm": "blocks.{i}.attn.k_norm",
    "encoder.blocks.{i}.attn.proj": "blocks.{i}.attn.proj",
    "encoder.blocks.{i}.scale1": "blocks.{i}.ls1",
    "encoder.blocks.{i}.norm2": "blocks.{i}.norm2",
    "encoder.blocks.{i}.mlp.fc1": "blocks.{i}.mlp.fc1",
    "encoder.blocks.{i}.mlp.fc2": "blocks.{i}.mlp.fc2",
    "encoder.blocks.{i}.scale2": "blocks.{i}.ls2",
    "encoder.norm": "norm",
    "pool_norm": "fc_norm",
    "pool.probe": "attn_pool.latent",
    "pool.q": "attn_pool.q",
    "pool.kv": "attn_pool.kv",
    "pool.proj": "attn_pool.proj",
    "pool.norm": "attn_pool.norm",
    "pool.mlp.fc1": "attn_pool.mlp.fc1",
    "pool.mlp.fc2": "attn_pool.mlp.fc2",
    "head": "head",
    "head_distilled": "head_dist",
}
MARKS = ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight")

TIMM = Layout(
    name="timm",
    whose="timm",
    marks=MARKS,
    names=NAMES,
    assumes={"activation": "gelu", "norm_eps": 1e-6, "pool": "class"},
    takes=(
        "norms before attention and MLP (timm's vit_*_rpn has them behind, under the same names)",
        "no positions but the table's (timm's vit_*_rope_ape turns queries and keys besides)",
    ),
    always={"pool": ("class", "mean", "class_mean", "map")},
)
TIMM_SIGLIP = replace(
    TIMM,
    name="timm-siglip",
    whose="SigLIP in timm's names",
    marks=(*MARKS, "attn_pool.latent"),
    # Trained in JAX with the tanh approximation, which timm itself runs only part of them with.
    assumes={"activation": "gelu_tanh", "norm_eps": 1e-6},
    resample="bilinear_aligned",
)
TIMM_CLIP = replace(
    TIMM,
    name="timm-clip",
    whose="CLIP in timm's names",
    marks=(*MARKS, "norm_pre.weight"),
    assumes={"norm_eps": 1e-5, "pool": "class"},
    asks={"activation": ACTIVATION},
)


_BACKBONE = "patch_embed.backbone"
_BLOCK = f"{_BACKBONE}.stages.{{i}}.blocks.{{j}}"
_PARTS = ("conv1", "norm1", "conv2", "norm2", "conv3", "norm3")

TIMM_HYBRID = replace(
    TIMM,
    name="timm-hybrid",
    whose="timm's hybrids",
    marks=(*MARKS, f"{_BACKBONE}.stem.conv.weight"),
    names={
        **NAMES,
        "stem.root.conv": f"{_BACKBONE}.stem.conv",
        "stem.root.norm": f"{_BACKBONE}.stem.norm",
        **{f"stem.stages.{{i}}.{{j}}.{part}": f"{_BLOCK}.{part}" for part in _PARTS},
        "stem.stages.{i}.{j}.shortcut.conv": f"{_BLOCK}.downsample.conv",
        "stem.stages.{i}.{j}.shortcut.norm": f"{_BLOCK}.downsample.norm",
    },
    assumes={**TIMM.assumes, "stem_eps": "timm"},
)
TIMM_ROOT = replace(  # a root without stages, which has no module around it there
    TIMM_HYBRID,
    name="timm-root",
    marks=(*MARKS, f"{_BACKBONE}.conv.weight"),
    names={
        **NAMES,
        "stem.root.conv": f"{_BACKBONE}.conv",
        "stem.root.norm": f"{_BACKBONE}.norm",
    },
)


def from_timm(state: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """A timm state dict under our names, for `ViT(config).load_state_dict`.

    Raises `DataError` with the name of a key that is missing, unexpected or of another shape.
    """
    return _layout(config).read(state, config)


def to_timm(
    state: Mapping[str, Tensor], config: ViTConfig, like: Mapping[str, Size] | None = None
) -> dict[str, Tensor]:
    """The inverse of `from_timm`: our state dict under timm's names.

    With registers the layout is timm's own for DINOv2, `no_embed_class=True`: the class token's
    position is added to the token. Only so150m and so150m2, and a file whose names and shapes
    `like` has, have rows for registers too; here these are zeros. timm's heads have a bias, so one
    without gets zeros. Such files come back as the same function, not bit by bit.
    """
    tokens = int(config.class_token) + int(config.distilled)
    learned = config.registers > 0 and config.position == "learned"
    rows = learned and _rows_for_registers(config, like)
    if learned and config.prefix_position != rows and tokens:
        given, wanted = (tokens, 0) if config.prefix_position else (0, tokens)
        state, config = position_rows(state, given, wanted), replace(config, prefix_position=rows)
    theirs = _layout(config).write(state, config)
    if rows:
        table = theirs["pos_embed"]
        zeros = table.new_zeros(1, config.registers, config.width)
        theirs["pos_embed"] = torch.cat([table[:, :tokens], zeros, table[:, tokens:]], dim=1)
    if config.classes and not config.head_bias:
        theirs["head.bias"] = theirs["head.weight"].new_zeros(config.classes)
    return theirs


_ROWS_FOR_REGISTERS = {(896, 18), (832, 21)}
"""Width and depth of timm's so150m and so150m2."""


def _rows_for_registers(config: ViTConfig, like: Mapping[str, Size] | None) -> bool:
    """Whether timm's table has a row for every prefix token, registers too."""
    tables = [shape for key, shape in (like or {}).items() if key.endswith("pos_embed")]
    if not tables:
        return not config.class_token and (config.width, config.depth) in _ROWS_FOR_REGISTERS
    prefix = int(config.class_token) + int(config.distilled) + config.registers
    return tables[0][1] == config.grid[0] * config.grid[1] + prefix


def _layout(config: ViTConfig) -> Layout:
    if config.stem != "resnet":
        return TIMM
    return TIMM_HYBRID if config.stem_depths else TIMM_ROOT
