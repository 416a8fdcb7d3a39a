"""Every task by name: what it learns from, and how it is made of a run's config."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vitrail.data.targets import Classes, Targets
from vitrail.errors import DataError
from vitrail.models import build
from vitrail.tasks.classify import Classify
from vitrail.tasks.distill import Distill, Teacher
from vitrail.tasks.prune import Prune
from vitrail.tasks.task import Task

if TYPE_CHECKING:
    from vitrail.runs import TrainConfig


class Kind(NamedTuple):
    """How a task is made. `targets` are those of the training data."""

    targets: type[Targets]
    """What it learns from."""
    model: Callable[["TrainConfig", Any], Any]
    """config, targets -> the model that is judged, as it is before it has learned."""
    learn: Callable[[Any, "TrainConfig", Any, Teacher | None], Task]
    """model, config, targets, teacher -> the task as it is trained."""
    judge: Callable[[Any, "TrainConfig", Any, str], Task]
    """model, config, targets, test-time augmentation -> the task as it is measured and asked."""
    stated: Callable[[Mapping[str, Any]], Targets]
    """What a checkpoint's state says of the targets, of no image."""


def _classifier(config: "TrainConfig", targets: Classes) -> Any:
    if len(targets.names) != config.model.classes:
        raise DataError(
            f"there are {len(targets.names)} classes, but the model has {config.model.classes}"
        )
    return build(config.model)


def _classify(model: Any, config: "TrainConfig", targets: Classes, teacher: Teacher | None) -> Task:
    if config.model.family == "dynamicvit":
        return Prune(model, config.classify, targets, config.prune, teacher)
    if teacher:
        return Distill(model, config.classify, targets, teacher, config.distill)
    return Classify(model, config.classify, targets)


def _classified(model: Any, config: "TrainConfig", targets: Classes, tta: str) -> Task:
    return Classify(model, config.classify, targets, tta)


def _classes(state: Mapping[str, Any]) -> Classes:
    names = tuple(map(str, state["classes"]))
    empty = np.zeros((0, len(names)), np.uint8) if state["multi_label"] else np.zeros(0, np.int64)
    return Classes(names, empty)


TASKS: Mapping[str, Kind] = {
    "classify": Kind(Classes, _classifier, _classify, _classified, _classes),
}
"""Name -> kind, as in `--task NAME`."""
