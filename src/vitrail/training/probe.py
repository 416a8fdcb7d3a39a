"""The linear probe: a frozen backbone, and the linear head that is best for it, solved exactly.

    minimise over V, c:   loss(V z + c) + strength / 2 |V|^2,      z = (x - mean) / deviation

`x [n d]` are the head's inputs, computed once (vitrail.training.features), and the loss is the
task's own, so that class weights, label smoothing and several labels are what they are elsewhere.
It is convex: L-BFGS on all images at once (Liu and Nocedal, 1989) finds the one solution, and there
is no learning rate to get wrong. The strength is chosen on training images alone. The
standardisation is folded into the weights, so that what comes out is a plain linear layer.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.data import keyed
from vitrail.data.batches.loader import EvalLoader
from vitrail.data.batches.making import Loader
from vitrail.data.sources.source import Source
from vitrail.data.targets import classes_of
from vitrail.runs import Run, TrainConfig
from vitrail.runs.store import Checkpoints
from vitrail.tasks import Task
from vitrail.training.features import HeadInputs, head_inputs, heads
from vitrail.training.progress import Listener, Progress

STRENGTHS = tuple(10 ** (-exponent / 2) for exponent in range(9))
"""From 1 to 1e-4, strong to weak: each solution is the start for the next, and once a weaker one
loses, those below it, which take the longest, are not tried."""
_FOLDS = 5
_MANY = 10_000
"""From so many images on, one fold says enough."""

Criterion = Callable[[Tensor, Tensor], Tensor]
"""The mean loss of logits `[n c]` for targets `[n c]`."""


class Linear(NamedTuple):
    """A linear map from features to logits."""

    weight: Float[Tensor, "c d"]
    bias: Float[Tensor, " c"]

    def __call__(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n c"]:
        return x @ self.weight.T + self.bias


class Trial(NamedTuple):
    """What a strength reaches on training images that were kept from the fit."""

    strength: float
    loss: float
    accuracy: float


def fit_probe(
    task: Task,
    train: Loader,
    val: EvalLoader,
    config: TrainConfig,
    run: Run,
    *,
    resume: bool = False,
    listen: Listener = lambda event: None,
) -> Progress:
    """Give `task` the head that solves its problem, and keep the checkpoints that `fit` would."""
    started = time.perf_counter()
    checkpoints = Checkpoints(run, keep=config.keep_checkpoints)
    checkpoints.tidy()
    run.forget_after(0)
    if resume:
        task.model.load_state_dict(checkpoints.newest()[0].tensors["model"])
    else:
        _save(task, checkpoints, Progress())
    total = len(train.source) + len(val.source)

    def tell(images: int) -> None:
        seconds = time.perf_counter() - started
        event = {"step": 0, "epoch": 0, "seconds": seconds, "done": images / total}
        listen(event | {"images_per_second": images / seconds})

    trials = solve_head(task, train, config, mirrored=config.augment.hflip > 0, tell=tell)
    for step, trial in enumerate(trials, start=1):
        found = {f"inner_{name}": value for name, value in trial._asdict().items()}
        seconds = time.perf_counter() - started
        run.append_metrics({"step": step, "epoch": 0, "seconds": seconds} | found)
    seen = head_inputs(
        task.model,
        val,
        precision=config.precision,
        tell=lambda images: tell(len(train.source) + images),
    )
    head = _read_head(task)
    score = _right(task, head(seen.values[0]), _targets(val.source, seen.indices))
    at = Progress(len(trials), 0, 0, time.perf_counter() - started, evaluations=1, best=score)
    event = {"step": at.step, "epoch": 0, "seconds": at.seconds, "val_accuracy": score}
    run.append_metrics(event)
    listen(event)
    _save(task, checkpoints, at, score)
    return at


def solve_head(
    task: Task,
    train: Loader,
    config: TrainConfig,
    *,
    mirrored: bool = False,
    tell: Callable[[int], None] = lambda images: None,
) -> list[Trial]:
    """Set the head of `task` to the solution for its training images; the strengths tried.

    `mirrored`: mirror images count as images of their own.
    """
    loader = EvalLoader(
        train.source, train.preprocess, workers=config.data.workers, device=train.device
    )
    inputs = head_inputs(
        task.model, loader, precision=config.precision, mirrored=mirrored, tell=tell
    )
    train.leave_out(inputs.skipped)
    problem = _Problem(task, inputs, train)
    fold = keyed.permutation(config.seed, 0, len(inputs.indices)) % _FOLDS
    trials = list(problem.trials(fold))
    best = min(trials, key=lambda trial: trial.loss)
    _write_head(task, problem.solve(best.strength))
    return trials


class _Problem:
    """The features and targets of all training images, standardised."""

    def __init__(self, task: Any, inputs: HeadInputs, train: Loader) -> None:
        # Only Apple's GPUs have no float64; there the CPU does it.
        device = train.device if train.device.type != "mps" else torch.device("cpu")
        x = inputs.values.to(device, torch.float64)
        self.task = task
        self.mean = x.mean(dim=(0, 1))
        deviation = x.std(dim=(0, 1), correction=0)
        # A feature that never changes says nothing, and must not be blown up to noise.
        self.deviation = deviation.where(deviation > 1e-6 * (1 + self.mean.abs()), torch.inf)
        x = (x - self.mean) / self.deviation
        # Turned to its principal axes, which changes no length: `solve` is quick there.
        flat = x.flatten(0, 1)
        self.axes = torch.linalg.eigh(flat.T @ flat).eigenvectors
        self.x = x @ self.axes
        self.y = _targets(train.source, inputs.indices).to(self.x)

    def solve(self, strength: float) -> Linear:
        """The head that is best on all images, for features as they come from the backbone."""
        everything = torch.ones(len(self.y), dtype=torch.bool)
        v, c = solve(*self._chosen(everything, self.x), self.task.criterion, strength)
        weight = v @ self.axes.T / self.deviation
        return Linear(weight, c - weight @ self.mean)

    def trials(self, fold: Int[np.ndarray, " n"]) -> Iterator[Trial]:
        """Cross-validation of each strength; all views of an image are in its one fold."""
        count = 1 if len(fold) >= _MANY else _FOLDS
        kept = [torch.from_numpy(fold == i) for i in range(count)]
        x = self.x.float()  # half the time, for what is only compared
        targets = torch.cat([self.y[k] for k in kept])
        found: list[Linear | None] = [None] * count
        losses: list[float] = []
        for strength in STRENGTHS:
            answers = []
            for i, k in enumerate(kept):
                problem = self._chosen(~k, x)
                head = solve(*problem, self.task.criterion, strength, found[i], tolerance=1e-4)
                answers.append(head(x[0, k]))
                found[i] = head
            logits = torch.cat(answers)
            losses.append(float(self.task.criterion(logits, targets.to(logits))))
            yield Trial(strength, losses[-1], _right(self.task, logits, targets))
            if losses[-1] > min(losses):
                return

    def _chosen(
        self, chosen: Bool[Tensor, " n"], x: Float[Tensor, "v n d"]
    ) -> tuple[Float[Tensor, "m d"], Float[Tensor, "m c"]]:
        """All views of some images one after another, and their targets."""
        return x[:, chosen].flatten(0, 1), self.y[chosen].repeat(len(x), 1).to(x)


def solve(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "n c"],
    criterion: Criterion,
    strength: float,
    start: Linear | None = None,
    tolerance: float = 1e-6,
) -> Linear:
    """The minimum of `criterion(x V^T + c, y) + strength / 2 |V|^2`, by L-BFGS from `start`.

    It is quick where the columns of `x` are uncorrelated, and ends where no entry of the gradient,
    in the units chosen below, is above `tolerance`.
    """
    zeros = Linear(x.new_zeros(y.shape[1], x.shape[1]), x.new_zeros(y.shape[1]))
    # In units in which the curvature is about the same along each axis: cross-entropy's is at most
    # half the feature's variance (Boehning, 1992), and the penalty's is its strength.
    unit = (x.square().mean(dim=0) / 2 + strength).rsqrt()
    x, v, c = x * unit, (start or zeros).weight / unit, (start or zeros).bias.clone()
    v.requires_grad_()
    c.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [v, c],
        max_iter=1000,
        history_size=20,
        tolerance_grad=tolerance,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = criterion(x @ v.T + c, y) + strength / 2 * (v * unit).square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    return Linear(v.detach() * unit, c.detach())


def _write_head(task: Any, solution: Linear) -> None:
    layers = heads(task.model)
    widths = [layer.in_features for layer in layers]
    with torch.no_grad():
        for layer, weight in zip(layers, solution.weight.split(widths, dim=1), strict=True):
            # Several heads are averaged: each counts for its share.
            layer.weight.copy_(weight * len(layers))
            layer.bias.copy_(solution.bias)


def _read_head(task: Any) -> Linear:
    layers = heads(task.model)
    weight = torch.cat([layer.weight for layer in layers], dim=1) / len(layers)
    return Linear(weight.detach().cpu(), layers[0].bias.detach().cpu())


def _targets(source: Source, indices: Int[np.ndarray, " n"]) -> Float[Tensor, "n c"]:
    return torch.from_numpy(classes_of(source.targets, "a probe").shares(indices))


def _right(task: Any, logits: Float[Tensor, "n c"], targets: Float[Tensor, "n c"]) -> float:
    """The share of images right; with several labels an image, of labels."""
    if task.multi_label:
        return float(((logits > 0) == (targets > 0.5)).double().mean())
    return float((logits.argmax(dim=1) == targets.argmax(dim=1)).double().mean())


def _save(task: Any, checkpoints: Checkpoints, at: Progress, score: float | None = None) -> None:
    state: dict[str, Any] = {"progress": at._asdict(), **task.state()}
    checkpoints.save(at.step, {"model": task.model.state_dict()}, state, score)
    checkpoints.flush()
