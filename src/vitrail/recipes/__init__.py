"""Recipes: functions from what the data is like to a whole config. Flags only change their fields.

Each docstring says where it comes from, the command, and what it reached.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from vitrail.recipes import deit, detect, finetune, pairs, pretrain, scratch, segment
from vitrail.recipes.facts import LOOKED_AT as LOOKED_AT
from vitrail.recipes.facts import Facts as Facts
from vitrail.recipes.facts import facts as facts
from vitrail.runs import TrainConfig


class Recipe(NamedTuple):
    """A config for given data and machine, and the weights it starts from."""

    config: Callable[[Facts], TrainConfig]
    weights: str | None = None
    """A name in WEIGHTS, where the recipe is about these; others may be given with --weights."""
    offline: str | None = None
    """The recipe to take where those weights cannot be fetched."""
    task: str = "classify"
    """What it is for, a name in TASKS."""


RECIPES: Mapping[str, Recipe] = {
    "scratch": Recipe(scratch.scratch),
    "fashion-mnist": Recipe(scratch.fashion_mnist),
    "fashion-mnist-long": Recipe(scratch.fashion_mnist_long),
    "demo-scratch": Recipe(scratch.demo_scratch),
    "demo": Recipe(finetune.demo, weights="focus_s14", offline="demo-scratch"),
    "finetune": Recipe(finetune.finetune),
    "probe": Recipe(finetune.probe),
    "last-blocks": Recipe(finetune.last_blocks),
    "lora": Recipe(finetune.lora),
    "vit-sgd": Recipe(finetune.vit_sgd),
    "deit": Recipe(deit.deit),
    "dynamicvit": Recipe(deit.dynamicvit),
    "segment": Recipe(segment.segment, task="segment"),
    "detect": Recipe(detect.detect, task="detect"),
    "mocov3": Recipe(pretrain.mocov3, task="mocov3"),
    "dino": Recipe(pretrain.dino, task="dino"),
    "lejepa": Recipe(pretrain.lejepa, task="lejepa"),
    "mae": Recipe(pretrain.mae, task="mae"),
    "distill-features": Recipe(pretrain.distill_features, task="distill-features"),
    "clip": Recipe(pairs.clip, task="clip"),
    "siglip": Recipe(pairs.siglip, task="siglip"),
    "lit": Recipe(pairs.lit, task="lit"),
}
"""Name -> recipe, for `vitrail train --recipe NAME`."""


def usual_recipe(task: str, *, weights: bool) -> str:
    """The recipe of a task where none is asked for."""
    if task != "classify":
        return task
    return "finetune" if weights else "scratch"
