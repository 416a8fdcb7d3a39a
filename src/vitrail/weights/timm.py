"""timm's checkpoint layout: ViT, DeiT (distilled too), DeiT-III, DINOv2, image towers of two kinds,
the hybrids of Google's ResNet and a ViT, and NaFlex models, which take images of any grid.

One table of names; the layouts differ in what their files' code fixes, and a hybrid has a ResNet's
names besides. DeiT, DINO and MAE use these names in their own files as well (`facebook.py` has what
they call otherwise).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from vitrail.models import ViTConfig
from vitrail.weights.clip import ACTIVATION
from vitrail.weights.naflex import COLOURS, kernel_of, matrix_of
from vitrail.weights.names import Layout, Names, State, position_rows

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


def from_timm(state: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """A timm state dict under our names, for `ViT(config).load_state_dict`.

    Raises `DataError` with the name of a key that is missing, unexpected or of another shape.
    """
    return _layout(config).read(state, config)


def to_timm(state: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """The inverse of `from_timm`: our state dict under timm's names.

    With registers the layout is timm's own for DINOv2, `no_embed_class=True`: the class token's
    position is added to the token. timm's heads have a bias, so one without gets zeros. Such files
    come back as the same function, not bit by bit.
    """
    if config.registers and config.position == "learned" and config.prefix_position:
        tokens = int(config.class_token) + int(config.distilled)
        state, config = position_rows(state, tokens, 0), replace(config, prefix_position=False)
    theirs = _layout(config).write(state, config)
    if config.classes and not config.head_bias:
        theirs["head.bias"] = theirs["head.weight"].new_zeros(config.classes)
    return theirs


def _layout(config: ViTConfig) -> Layout:
    if config.pool == "map" and config.resample == "bilinear_antialias":
        return TIMM_NAFLEX_SIGLIP
    if config.stem != "resnet":
        return TIMM
    return TIMM_HYBRID if config.stem_depths else TIMM_ROOT
