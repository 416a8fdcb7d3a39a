"""Twins in the one layout there is: the authors' (Meituan-AutoML/Twins), which timm has kept."""

import re

from vitrail.models.twins import TwinsConfig
from vitrail.weights.family import FamilyLayout

_STEM = "patch_embeds.0.proj.weight"
_STAGE = re.compile(r"stages\.(\d+)\.(embed|peg\.conv|blocks)\.(.+)")
"""Our key of a part of a stage. Theirs has lists of embeddings, of PEGs, and of lists of blocks."""
_LISTS = {
    "embed": "patch_embeds.{0}.",
    "peg.conv": "pos_block.{0}.proj.0.",
    "blocks": "blocks.{0}.",
}
_PARTS = {"attn.attention.": "attn.", "attn.reduce.proj.": "attn.sr.", "attn.reduce.": "attn."}
"""Of our keys and theirs, for the attention of either kind."""


def _theirs(key: str) -> str:
    if stage := _STAGE.fullmatch(key):
        part = stage[3]
        for ours, theirs in _PARTS.items():
            part = part.replace(ours, theirs)
        return _LISTS[stage[2]].format(stage[1]) + part
    return key.replace("stem.", "patch_embeds.0.")


TWINS = FamilyLayout(
    name="twins",
    whose="the authors' and timm's Twins",
    family=TwinsConfig,
    marks=(_STEM, "pos_block.0.proj.0.weight", "blocks.0.0.norm1.weight"),
    theirs=_theirs,
    writes=("timm",),
    changes={"norm_eps": 1e-6},
)

LAYOUTS = (TWINS,)
