"""timm's checkpoint layout: ViT, DeiT (distilled too), DeiT-III, DINOv2, image towers of two kinds,
the hybrids of Google's ResNet and a ViT, NaFlex models, which take images of any grid, and what
timm builds of its class Eva: EVA, EVA-02, Perception Encoders, ViTs with rotary positions.

One table of names; the layouts differ in what their files' code fixes, and a hybrid has a ResNet's
names besides. DeiT, DINO and MAE use these names in their own files as well (`facebook.py` has what
they call otherwise), and so does EVA.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Size, Tensor

from vitrail.models import ViTConfig
from vitrail.weights.clip import ACTIVATION
from vitrail.weights.naflex import COLOURS, kernel_of, matrix_of
from vitrail.weights.names import (
    Layout,
    Names,
    State,
    position_rows,
    with_key_bias,
    without_key_bias,
)

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

TABLE_ALONE = "no positions but the table's (timm's vit_*_rope_ape turns queries and keys besides)"

TIMM = Layout(
    name="timm",
    whose="timm",
    marks=MARKS,
    names=NAMES,
    assumes={"activation": "gelu", "norm_eps": 1e-6, "pool": "class"},
    takes=(
        "norms before attention and MLP (timm's vit_*_rpn has them behind, under the same names)",
        TABLE_ALONE,
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


def _naflex_turn(state: State) -> dict[str, Tensor]:
    """The projection as a kernel, the table's rows and columns in one axis."""
    theirs = dict(state)
    for key, turned in (("proj.weight", kernel_of), ("pos_embed", _rows)):
        if (tensor := theirs.get(f"embeds.{key}")) is not None:
            theirs[f"embeds.{key}"] = turned(tensor)
    return theirs


def _rows(table: Tensor) -> Tensor:
    return table.flatten(1, 2) if table.ndim == 4 else table


def _naflex_back(state: dict[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    return {
        **state,
        "embeds.proj.weight": matrix_of(state["embeds.proj.weight"]),
        "embeds.pos_embed": state["embeds.pos_embed"].unflatten(1, config.grid),
    }


def _naflex_shows(state: State) -> dict[str, Any]:
    """The grid of its table, which has two axes."""
    table, kernel = state.get("embeds.pos_embed"), state.get("embeds.proj.weight")
    if table is None or kernel is None or table.ndim != 4 or not table.numel():
        return {}
    patch = kernel_of(kernel).shape[2:]
    if len(patch) != 2:
        return {}
    return {"image_size": (table.shape[1] * patch[0], table.shape[2] * patch[1])}


TIMM_NAFLEX = replace(
    TIMM,
    name="timm-naflex",
    whose="timm's NaFlex",
    marks=("embeds.proj.weight", "embeds.pos_embed", "blocks.0.attn.qkv.weight"),
    names={
        **{ours: name for ours, name in NAMES.items() if ours != "prefix.class"},
        "prefix.registers": "embeds.reg_token",
        "position.table": "embeds.pos_embed",
        "stem.proj": "embeds.proj",
        "stem.norm": "embeds.norm",
    },
    turn=_naflex_turn,
    back=_naflex_back,
    shows=_naflex_shows,
    assumes={"activation": "gelu", "norm_eps": 1e-6},
    takes=(
        *COLOURS,
        "positions resized by rows and columns (timm's naflexvit_*_par_* keep their proportions, "
        "under the same names)",
    ),
    always={"class_token": (False,), "distilled": (False,), "prefix_position": (False,)},
)
TIMM_NAFLEX_SIGLIP = replace(
    TIMM_NAFLEX,
    name="timm-naflex-siglip",
    whose="SigLIP 2 (NaFlex) in timm's names",
    marks=(*TIMM_NAFLEX.marks, "attn_pool.latent"),
    assumes={"activation": "gelu_tanh", "norm_eps": 1e-6},
    takes=COLOURS,
    resample="bilinear_antialias",
)


# --- what timm builds of its class Eva ---

_EVA: Names = {
    **NAMES,
    "encoder.blocks.{i}.attn.norm": "blocks.{i}.attn.norm",
    "encoder.blocks.{i}.mlp.norm": "blocks.{i}.mlp.norm",
    "encoder.blocks.{i}.scale1.gamma": "blocks.{i}.gamma_1",
    "encoder.blocks.{i}.scale2.gamma": "blocks.{i}.gamma_2",
}
_QKV = "encoder.blocks.{i}.attn.qkv"
_QV_BIAS: Names = {  # as a rule: queries and values have a bias, keys have none
    f"{_QKV}.weight": "blocks.{i}.attn.qkv.weight",
    f"{_QKV}.bias": tuple(f"blocks.{{i}}.attn.{x}_bias" for x in "qkv"),
}
_APART: Names = {
    _QKV: tuple(f"blocks.{{i}}.attn.{x}_proj" for x in "qkv"),
    "encoder.blocks.{i}.mlp.fc1": ("blocks.{i}.mlp.fc1_g", "blocks.{i}.mlp.fc1_x"),
}


def _own_grid(facts: Mapping[str, Any]) -> tuple[int, int]:
    """That of the position table: what a Perception Encoder scales its places to."""
    height, width = (s // p for s, p in zip(facts["image_size"], facts["patch"], strict=True))
    return height, width


def _is(*, gated: bool | None = None, **there: bool) -> Callable[[State, str], bool]:
    """Whether a file has these tensors of the model's, and whether its MLP is gated."""

    def own(state: State, prefix: str) -> bool:
        fc1, fc2 = (state.get(f"{prefix}blocks.0.mlp.fc{i}.weight") for i in (1, 2))
        packed = fc1 is not None and fc2 is not None and fc1.shape[:1] != fc2.shape[1:]
        return gated in (None, packed) and all(
            any(f"{prefix}{name}{leaf}" in state for leaf in ("", ".weight")) == wanted
            for name, wanted in there.items()
        )

    return own


_EVA02 = {"position": "learned_rope", "rope": "eva", "rope_grid": (16, 16)}
_BEHIND = "norms before attention and MLP (EVA-02-CLIP-E has them behind, under the same names)"

TIMM_EVA = replace(
    TIMM,
    name="timm-eva",
    whose="EVA",
    marks=(MARKS[0], "blocks.0.attn.q_bias"),
    own=_is(pos_embed=True, gated=False),
    names={**_EVA, **_QV_BIAS},
    turn=with_key_bias,
    back=without_key_bias,
    aside=("mask_token", "lm_head.*"),
    takes=(_BEHIND,),
)
TIMM_EVA02_PACKED = replace(
    TIMM_EVA,
    name="timm-eva02-packed",
    whose="EVA-02",
    own=_is(pos_embed=True, gated=True),
    assumes={**TIMM.assumes, **_EVA02},
    always={name: (value,) for name, value in _EVA02.items()},
    takes=(),
)
TIMM_EVA02 = replace(
    TIMM_EVA02_PACKED,
    name="timm-eva02",
    marks=(MARKS[0], "blocks.0.attn.q_proj.weight", "blocks.0.mlp.fc1_g.weight"),
    own=_is(pos_embed=True),
    names={**_EVA, **_APART},
)
_OWN_MLP: Names = {
    "encoder.blocks.{i}.mlp.norm": "blocks.{i}.mlp.ffn_ln",
    "encoder.blocks.{i}.mlp.fc2": "blocks.{i}.mlp.w3",
}
_BESIDE_EVA = ("*rope.freqs_cos", "*rope.freqs_sin", "mask_token", "lm_head.*")
EVA02_PACKED = replace(  # EVA-02's own names, as BAAI's files have them; EVA's are timm's
    TIMM_EVA02_PACKED,
    name="eva02-packed",
    marks=(MARKS[0], "blocks.0.attn.q_bias", "blocks.0.mlp.w12.weight"),
    own=_is(pos_embed=True),
    names={
        **TIMM_EVA02_PACKED.names,
        **_OWN_MLP,
        "encoder.blocks.{i}.mlp.fc1": "blocks.{i}.mlp.w12",
    },
    aside=_BESIDE_EVA,
)
EVA02 = replace(
    EVA02_PACKED,
    name="eva02",
    marks=(MARKS[0], "blocks.0.attn.q_proj.weight", "blocks.0.mlp.w1.weight"),
    names={
        **_EVA,
        **_OWN_MLP,
        f"{_QKV}.weight": tuple(f"blocks.{{i}}.attn.{x}_proj.weight" for x in "qkv"),
        f"{_QKV}.bias": _QV_BIAS[f"{_QKV}.bias"],
        "encoder.blocks.{i}.attn.norm": "blocks.{i}.attn.inner_attn_ln",
        "encoder.blocks.{i}.mlp.fc1": ("blocks.{i}.mlp.w1", "blocks.{i}.mlp.w2"),
    },
)
TIMM_ROPE_GAP = replace(
    TIMM_EVA,
    name="timm-rope-gap",
    whose="timm's vit_*_rope_*_gap",
    marks=(*MARKS, "blocks.0.gamma_1"),
    own=_is(pos_embed=False, cls_token=False),
    assumes={**TIMM.assumes, **_EVA02, "position": "rope"},
    always={"position": ("rope",), "rope": ("eva",), "rope_grid": ((16, 16),)},
    takes=(),
)
TIMM_ROPE_VIT = replace(
    TIMM,
    name="timm-rope-vit",
    whose="RoPE-ViT in timm's names",
    marks=(*MARKS, "blocks.0.gamma_1"),
    own=_is(pos_embed=False, cls_token=True, reg_token=False),
    names=_EVA,
    assumes={**TIMM.assumes, "position": "rope", "rope": "axial"},
    always={"position": ("rope", "learned_rope"), "rope": ("axial",), "rope_grid": (None,)},
    takes=("angles of fixed periods (timm's vit_*_rope_mixed learns them)",),
)

_PE = {
    "activation": "gelu",
    "norm_eps": 1e-5,
    "position": "learned_rope",
    "rope": "pe",
    "rope_grid": _own_grid,
}
_PE_ALWAYS = {
    "position": ("learned_rope",),
    "rope": ("pe",),
    "pre_norm": (True,),
    "stem_bias": (False,),
}
TIMM_PE = replace(
    TIMM,
    name="timm-pe",
    whose="Perception Encoder in timm's names",
    marks=(*MARKS, "norm_pre.weight", "attn_pool.latent"),
    names=_EVA,
    assumes={**_PE, "pool_heads": 8, "pool_prefix": True},
    always={**_PE_ALWAYS, "pool_heads": (8,), "pool_prefix": (True,)},
    takes=(),
)
TIMM_PE_DENSE = replace(  # PE-Spatial and PE-Lang, whose output is the last block's
    TIMM_PE,
    name="timm-pe-dense",
    marks=(*MARKS, "norm_pre.weight"),
    own=_is(norm=False, fc_norm=False, attn_pool=False),
    shows=lambda state: {"final_norm": False},
    assumes={**_PE, "pool": "mean"},
    always={**_PE_ALWAYS, "final_norm": (False,)},
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
    learned = config.registers > 0 and config.has_table
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
    if config.turned:
        return _turned_layout(config)
    if config.pool == "map" and config.resample == "bilinear_antialias":
        return TIMM_NAFLEX_SIGLIP
    if config.stem != "resnet":
        return TIMM
    return TIMM_HYBRID if config.stem_depths else TIMM_ROOT


def _turned_layout(config: ViTConfig) -> Layout:
    """Whose code turns queries and keys as this model does."""
    if config.rope == "pe":
        return TIMM_PE if config.pool == "map" else TIMM_PE_DENSE
    if config.rope == "axial":
        return TIMM_ROPE_VIT
    if config.rope == "eva" and config.position == "rope":
        return TIMM_ROPE_GAP
    if config.rope == "eva":
        return TIMM_EVA02 if config.mlp_norm else TIMM_EVA02_PACKED
    return TIMM
