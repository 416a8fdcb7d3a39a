"""Recipes: functions from what the data is like to a whole config. Flags only change their fields.

Each docstring says where it comes from, the command, and what it reached.
"""

from collections.abc import Callable

from vitrail.recipes.facts import Facts as Facts
from vitrail.recipes.facts import facts as facts
from vitrail.recipes.scratch import demo as demo
from vitrail.recipes.scratch import fashion_mnist as fashion_mnist
from vitrail.recipes.scratch import fashion_mnist_long as fashion_mnist_long
from vitrail.recipes.scratch import scratch as scratch
from vitrail.runs import TrainConfig

RECIPES: dict[str, Callable[[Facts], TrainConfig]] = {
    "scratch": scratch,
    "demo": demo,
    "fashion-mnist": fashion_mnist,
    "fashion-mnist-long": fashion_mnist_long,
}
"""Name -> recipe, for `vitrail train --recipe NAME`."""
