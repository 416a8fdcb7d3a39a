"""What takes a step: the one way for the run itself, for the sweep of rates and for the try-out."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.profiler import record_function

from vitrail.data.batches.batch import Batch
from vitrail.runs import TrainConfig
from vitrail.runs.world import ALONE, World
from vitrail.tasks import Task
from vitrail.training.average import Average
from vitrail.training.engine import Engine, StepLoss
from vitrail.training.optim import build_optimizer, weight_decay
from vitrail.training.tune import Tuning


class Told(NamedTuple):
    """Of a step, before its update."""

    images: int
    """Of all processes; where there are none, nothing was computed."""
    loss: StepLoss
    norm: float
    """Of the gradient, before it was cut to `optim.clip`."""

    @property
    def finite(self) -> bool:
        """Whether the step may be taken."""
        return math.isfinite(self.loss.total + self.norm)


class Learner:
    """A task that learns: in what precision and pieces, by which optimiser, with what average."""

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        device: torch.device,
        world: World = ALONE,
        notify: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self.task = task
        self.config = config
        self.device = device
        self.world = world
        self.tuning = Tuning(task, config.tune)
        self.engine = Engine(task, config, device, world, notify)
        self.optimizer = build_optimizer(
            task.model, config.optim, self.tuning.scale, beside=task.named_beside()
        )
        self.average = Average(task.model, config.ema) if config.ema else None
        self.notify = notify

    def prepare(self) -> dict[str, str]:
        """Before the first step, with the weights that it is taken from: see `Task.prepare`."""
        return self.task.prepare(self.device, self.notify)

    def enter(self, done: float) -> float:
        """Let learn what learns when `done` (0 to 1) of the steps are over; how much of its part
        of the run that is, for the schedule.
        """
        part_done = self.tuning.enter(done)
        self.task.enter(done)
        self.engine.enter()
        return part_done

    def count(self, group: Sequence[Batch]) -> tuple[int, float]:
        """Of all processes: the images of a step, and what they weigh in a mean."""
        here = [
            float(sum(len(batch.indices) for batch in group)),
            sum(self.task.weight(batch) for batch in group if len(batch.indices)),
        ]
        said = torch.tensor(here, dtype=torch.float64, device=self.device)
        images, weight = self.world.sum(said).tolist()
        return int(images), weight

    def gradients(self, group: Sequence[Batch], share: int | None = None) -> Told:
        """Give the parameters their gradients, cut to `optim.clip`.

        `share`: images that each process has of a batch, if all of them can be read.
        """
        images, weight = self.count(group)
        if not weight:  # not all of them could be unreadable, but who knows
            return Told(images, StepLoss(0.0, {}), 0.0)
        loss = self.engine.gradients(group, weight, share)
        with record_function("vitrail/optimiser"):
            return Told(images, loss, self._clipped())

    def update(self, lr: float, step: int, done: float) -> None:
        """Take step number `step` (from 1), after which `done` of the steps are over."""
        with record_function("vitrail/optimiser"):
            for settings in self.optimizer.param_groups:
                settings["lr"] = lr * settings["scale"]
                if settings["decayed"]:
                    settings["weight_decay"] = weight_decay(self.config.optim, done)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.task.after_step(done)
            self.engine.follow()
            if self.average:
                self.average.update(self.task.model, step)

    def _clipped(self) -> float:
        """The gradient's global norm, before it is cut."""
        if self.config.optim.clip_by == "tensor":
            return cut_each(self.task.parameters(), self.config.optim.clip or math.inf)
        norm = nn.utils.clip_grad_norm_(self.task.parameters(), self.config.optim.clip or math.inf)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def cut_each(parameters: Iterable[nn.Parameter], most: float) -> float:
    """Cut each parameter's gradient to a norm of `most`, as DINO does; the norm of all before."""
    from torch.distributed.tensor import DTensor  # not where nothing is cut so: slow to import

    squares = 0.0
    for parameter in parameters:
        if parameter.grad is not None:
            norm, rows = torch.linalg.vector_norm(parameter.grad), parameter.grad
            if isinstance(rows, DTensor):  # this process's, of which the whole's norm decides
                norm, rows = norm.full_tensor(), rows.to_local()
            rows.mul_((most / (norm + 1e-6)).clamp(max=1))
            squares = squares + norm.double() ** 2
    return float(squares) ** 0.5
