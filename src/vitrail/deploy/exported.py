"""An exported model in the place of a task's own, so that it is measured by the same code.

A task asks its model in torch, of normalised images. What stands here passes the pixels on to an
engine: images have to be loaded with `levels(preprocess)`, which leaves them 0 to 255.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitrail.data import Source
from vitrail.data.batches.loader import EvalLoader
from vitrail.data.targets import Targets
from vitrail.data.views.preprocess import Preprocess
from vitrail.deploy.engines import Engine
from vitrail.heads.maps import at_stride
from vitrail.nn.boxes import Candidates
from vitrail.runs import TrainConfig
from vitrail.runs.world import ALONE
from vitrail.tasks import TASKS, Task
from vitrail.tasks.answers import Reading
from vitrail.training.measure import Measured, measured

_BATCH = 16
_SAYS = {"classify": "logits", "segment": "scores", "features": "features"}
"""Of each kind, which of its arrays a model gives by itself."""


class Exported(nn.Module):
    """A model as a task knows it."""

    head = None

    def __init__(self, engine: Engine, reading: Reading) -> None:
        super().__init__()
        self._engine = engine
        self._kind = reading.kind
        self.stride = reading.stride
        self.doubles = reading.doubles

    def forward(
        self, images: Float[Tensor, "b c h w"], extent: Int[Tensor, "b 2"] | None = None
    ) -> Tensor:
        """Of pixels 0 to 255."""
        return self._said(images)[_SAYS[self._kind]]

    def candidates(self, images: Float[Tensor, "b c h w"], most: int) -> Candidates:
        """Boxes, as a detector gives them."""
        return Candidates(**self._said(images))

    def pixels(
        self, logits: Float[Tensor, "b _classes _h _w"], size: tuple[int, int]
    ) -> Float[Tensor, "b _classes h w"]:
        """Scores of each pixel, as a segmenter gives them."""
        return at_stride(logits, self.stride, (1, 1), size)

    def _said(self, images: Float[Tensor, "b c h w"]) -> dict[str, Tensor]:
        views = images.round().to(torch.uint8).cpu().numpy()
        found = self._engine.run([*views])
        return {name: torch.from_numpy(values).to(images.device) for name, values in found.items()}


def task_of(engine: Engine, reading: Reading, config: TrainConfig, targets: Targets) -> Task:
    """The task of a run whose model was exported, with the engine's answers to be judged."""
    model: Any = Exported(engine, reading)
    return TASKS[config.task].judge(model, config, targets, "none").eval()


def levels(preprocess: Preprocess) -> Preprocess:
    """The same views, as pixels 0 to 255."""
    n = preprocess.channels
    return replace(preprocess, mean=(0.0,) * n, std=(1 / 255,) * n)


def measure(task: Task, source: Source, preprocess: Preprocess, config: TrainConfig) -> Measured:
    """What a task says of images, on the CPU and in float32, read as the run's config has it."""
    loader = EvalLoader(
        source,
        preprocess,
        batch_size=1 if preprocess.alone else _BATCH,
        workers=config.data.workers,
        reading=config.data.reading(),
    )
    return measured(task, loader, ALONE, half=False)


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's config as a bundle keeps it: without where things lie on somebody's machine."""
    kept = {name: value for name, value in config.items() if name not in ("weights", "teacher")}
    return kept | {
        "data": kept["data"] | {"path": "data"},
        "distill": kept["distill"] | {"teacher": None},
    }
