"""Whether an exported model gives the run's answers: on its held-out images, by the code that
measured the run.

What was lost is the difference of the number that stands for the task (top-1, mIoU, AP), with its
95% interval over images that both were asked about.

Letters: n images.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from vitrail.data import Source
from vitrail.data.views.canvas import normalise
from vitrail.data.views.preprocess import Preprocess
from vitrail.deploy.engines import Engine
from vitrail.deploy.export.alike import LIKE, same_answer
from vitrail.deploy.exported import levels, measure, task_of
from vitrail.metrics import Estimate, paired
from vitrail.metrics.draws import SEED
from vitrail.metrics.masks import hits
from vitrail.runs.load import LoadedRun
from vitrail.tasks import Task
from vitrail.tasks.answers import Look
from vitrail.training.measure import Measured

_DRAWS = 200


class Proof(NamedTuple):
    """What two models say of the same images, the run's own and the exported one."""

    images: int
    before: Any
    """The metrics of the run's own model."""
    after: Any
    """Those of the exported one."""
    same: Bool[np.ndarray, " n"]
    """Of each image: whether the answers are."""
    keys: tuple[str, ...]
    """The images' names."""
    lost: Estimate
    """Of the number that stands for the task, 0 to 1; negative where it gained."""

    @property
    def agreement(self) -> float:
        """The share of images with the same answers."""
        return float(self.same.mean())

    @property
    def differ(self) -> tuple[str, ...]:
        """The images whose answers are not the same."""
        return tuple(key for key, same in zip(self.keys, self.same, strict=True) if not same)


def prove(loaded: LoadedRun, source: Source, engine: Engine, before: Measured) -> Proof:
    """Ask both about the images of `source`. `before`: what the run's own model makes of them."""
    task = task_of(engine, loaded.task.reading, loaded.config, loaded.task.targets)
    after = measure(task, source, levels(loaded.preprocess), loaded.config)
    n = len(before.indices)
    keys = tuple(source.key(int(i)) for i in before.indices)
    if (found := _same_rows(loaded.task, before.rows, after.rows)) is None:
        found = np.array([_same_answers(loaded, engine, source, int(i)) for i in before.indices])
    return Proof(
        images=n,
        before=loaded.task.judge(before.rows),
        after=loaded.task.judge(after.rows),
        same=found,
        keys=keys,
        lost=_lost(loaded.task, before.rows, after.rows),
    )


def _same_rows(
    task: Task, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> Bool[np.ndarray, " n"] | None:
    """By what was measured, where that is all that was said."""
    if task.reading.kind == "features":
        return ((before["features"] * after["features"]).sum(dim=1) >= LIKE).numpy()
    if task.reading.kind != "classify":
        return None
    one, other = before["probabilities"], after["probabilities"]
    if task.reading.several:
        return ((one > 0.5) == (other > 0.5)).all(dim=1).numpy()
    return (one.argmax(dim=1) == other.argmax(dim=1)).numpy()


def _same_answers(loaded: LoadedRun, engine: Engine, source: Source, i: int) -> bool:
    image = source.load(i)
    view = loaded.preprocess.view(image)
    seen = loaded.preprocess.seen(image.height, image.width)
    reading = loaded.task.reading
    looks = looked_at(loaded.task, loaded.preprocess), engine.run
    (one,), (other,) = (reading.answers(look, [view], [seen]) for look in looks)
    return same_answer(one, other)


def looked_at(task: Task, preprocess: Preprocess) -> Look:
    """What a run's own model says of views, in arrays."""

    @torch.inference_mode()
    def look(views: Any) -> dict[str, np.ndarray]:
        images = normalise(preprocess, torch.from_numpy(np.stack(views)))
        return {name: values.numpy() for name, values in task.outputs(images).items()}

    return look


def scores_of(task: Task, before: Measured, after: Measured) -> Float64[np.ndarray, " n"]:
    """How good the answer to each image of `after` is, 0 to 1: whether a class is right, the share
    of labels or of pixels that are, or of objects that were found; of features, how near they are
    to what they were `before`.
    """
    rows = after.rows
    match task.reading.kind:
        case "classify" if not task.reading.several:
            score = rows["probabilities"].argmax(dim=1) == rows["targets"]
        case "classify":
            score = ((rows["probabilities"] > 0.5) == (rows["targets"] > 0)).double().mean(dim=1)
        case "segment":
            right, truth = hits(rows)
            score = right / truth.clamp(min=1)
        case "detect":
            objects, missed = (rows[name].sum(dim=1).double() for name in ("objects", "missed"))
            score = 1 - missed / objects.clamp(min=1)
        case _:
            score = (before.rows["features"] * rows["features"]).sum(dim=1)
    return score.double().numpy()


def _lost(task: Task, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Estimate:
    """Of single labels by the counts of what changed; else by drawing images anew."""
    if task.reading.kind == "classify" and not task.reading.several:
        right = [rows["probabilities"].argmax(dim=1) == rows["targets"] for rows in (before, after)]
        gained, lost = (int((one & ~other).sum()) for one, other in (right, right[::-1]))
        return paired(gained, lost, len(right[0]))
    n = len(next(iter(before.values())))
    draw = torch.Generator().manual_seed(SEED)
    places = [torch.randint(n, (n,), generator=draw) for _ in range(_DRAWS)]

    def score(rows: Mapping[str, Tensor], chosen: Tensor) -> float:
        return task.score({name: values[chosen] for name, values in rows.items()})

    value = task.score(before) - task.score(after)
    drawn = torch.tensor([score(before, some) - score(after, some) for some in places])
    low, high = drawn.quantile(torch.tensor([0.025, 0.975])).tolist()
    return Estimate(value, min(low, value), max(high, value))
