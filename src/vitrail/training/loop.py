"""The one training loop. A task brings the loss; everything that happens is in sight here."""

import math
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vitrail.data.loader import EvalLoader, TrainLoader
from vitrail.errors import DataError, UsageError, VitrailError
from vitrail.nn.lora import has_lora, merged_state
from vitrail.runs import Run, TrainConfig, read_checkpoint, write_checkpoint
from vitrail.runs.checkpoint import flatten_optimizer, restore_optimizer
from vitrail.tasks import Classify
from vitrail.training.optim import Average, build_optimizer, learning_rate
from vitrail.training.probe import solve_head
from vitrail.training.progress import Listener, Progress
from vitrail.training.tune import Tuning


class Interrupted(VitrailError):
    """Stopped by a signal, everything saved."""

    def __init__(self, signum: int, run: Run, step: int) -> None:
        super().__init__(
            f"stopped at step {step}, all saved; go on with: "
            f"vitrail train --resume {shlex.quote(str(run.path))}"
        )
        self.exit_code = 128 + signum


def fit(
    task: Classify,
    train: TrainLoader,
    val: EvalLoader,
    config: TrainConfig,
    run: Run,
    *,
    resume: bool = False,
    listen: Listener = lambda event: None,
) -> Progress:
    """Train `task` until the run's length is reached, and keep checkpoints in `run`.

    Raises `DataError` when the loss is no longer a number, `Interrupted` after a signal.
    """
    device = torch.device(train.device)
    at = Progress()
    if config.tune.head_init == "probe" and not resume:
        started = time.perf_counter()
        solve_head(task, train, config)
        seconds = time.perf_counter() - started
        at = at._replace(seconds=seconds, head_seconds=seconds)
    tuning = Tuning(task, config.tune)
    optimizer = build_optimizer(task.model, config.optim, tuning.scale)
    average = Average(task, config.ema) if config.ema else None
    judged = average.module if average else task
    keeper = _Keeper(run, task, judged, optimizer)
    if resume:
        at = keeper.restore()
        run.forget_after(at.step)
    else:
        keeper.save("last", at)
    steps_per_epoch = len(train) // config.accumulate
    if not steps_per_epoch:
        raise UsageError(
            f"accumulate is {config.accumulate}, but an epoch has only {len(train)} batches"
        )

    def done(at: Progress) -> float:
        """How much of the run is done, 0 to 1, by whichever limit comes first."""
        by_epochs = at.step / (config.epochs * steps_per_epoch) if config.epochs else 0.0
        by_minutes = at.seconds / (60 * config.minutes) if config.minutes else 0.0
        return max(by_epochs, by_minutes)

    def scheduled(at: Progress) -> float:
        """How much of its steps is done: a schedule starts with the first of them."""
        before = done(Progress(seconds=at.head_seconds))
        return max(0.0, (done(at) - before) / (1 - before)) if before < 1 else 1.0

    with _signals() as caught:
        while done(at) < 1:
            batches = train.epoch(at.epoch, first=at.batch)
            started = time.perf_counter()
            for group in _groups(batches, config.accumulate):
                part_done = tuning.enter(scheduled(at._replace(step=at.step + 1)))
                lr = learning_rate(config.optim, part_done)
                for settings in optimizer.param_groups:
                    settings["lr"] = lr * settings["scale"]
                total = 0.0
                parts: dict[str, float] = {}
                for batch in group:
                    with torch.autocast(
                        device.type, torch.bfloat16, enabled=config.precision == "bfloat16"
                    ):
                        losses = task.loss(batch)
                        loss = losses.total / len(group)
                    loss.backward()
                    total += loss.item()
                    for name, part in losses.parts.items():
                        parts[name] = parts.get(name, 0.0) + part.item() / len(group)
                norm = nn.utils.clip_grad_norm_(
                    task.parameters(), config.optim.clip or math.inf
                ).item()
                if not math.isfinite(total + norm):
                    raise DataError(
                        f"the loss is no longer a number at step {at.step + 1} (loss {total}, "
                        f"gradient norm {norm}, learning rate {lr:.3g}). The checkpoint before it "
                        f"is kept in {run.checkpoint('last')}. Try a smaller --optim.lr"
                    )
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                task.after_step(at.step + 1)
                if average:
                    average.update(task, at.step + 1)
                now = time.perf_counter()
                images = sum(len(batch.indices) for batch in group)
                event = {
                    "step": at.step + 1,
                    "epoch": at.epoch,
                    "loss": total,
                    **{f"part/{name}": value for name, value in parts.items()},
                    "lr": lr,
                    "grad_norm": norm,
                    "images_per_second": images / (now - started),
                }
                at = at._replace(
                    step=at.step + 1,
                    batch=at.batch + len(group),
                    seconds=at.seconds + now - started,
                )
                event |= {"seconds": at.seconds, "done": min(done(at), 1.0)}
                run.append_metrics(event)
                listen(event)
                if caught:
                    keeper.save("last", at)
                    raise Interrupted(caught[0], run, at.step)
                if done(at) * config.evaluations >= at.evaluations + 1 and done(at) < 1:
                    at = _evaluate(keeper, at, val, config, listen)
                    if config.patience is not None and at.since_best >= config.patience:
                        return at
                if done(at) >= 1:
                    break
                started = time.perf_counter()
            else:
                at = at._replace(epoch=at.epoch + 1, batch=0)
        return _evaluate(keeper, at, val, config, listen)


def _groups(batches: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Batches `size` at a time; what is left over at the end of an epoch is not used."""
    group = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []


class _Keeper:
    """Everything of a run that a checkpoint must hold, and the way there and back."""

    def __init__(
        self, run: Run, task: Classify, judged: Classify, optimizer: torch.optim.Optimizer
    ) -> None:
        """`judged` is `task` itself, or the running average of it."""
        self.run = run
        self.task = task
        self.judged = judged
        self.optimizer = optimizer

    def save(self, name: str, at: Progress) -> None:
        tensors = {
            "model": merged_state(self.judged.model),
            "optimizer": flatten_optimizer(self.optimizer),
            "random": {"torch": torch.get_rng_state()},
        }
        # "model" is what is judged, and always plain: to go on from it takes what learns besides,
        # and, where that is not plain, what the average of it has otherwise.
        adapted, averaged = has_lora(self.task.model), self.judged is not self.task
        if adapted or averaged:
            tensors["weights"] = weights = self.task.model.state_dict()
        if adapted and averaged:
            average = self.judged.model.state_dict()
            tensors["average"] = {
                name: value for name, value in average.items() if not value.equal(weights[name])
            }
        state = {"progress": at._asdict(), **self.task.state()}
        write_checkpoint(self.run.checkpoint(name), tensors, state)

    def restore(self) -> Progress:
        checkpoint = read_checkpoint(self.run.checkpoint("last"))
        tensors = checkpoint.tensors
        weights = tensors.get("weights", tensors["model"])
        self.task.model.load_state_dict(weights)
        if self.judged is not self.task:
            average = tensors.get("average", tensors["model"])
            self.judged.model.load_state_dict(weights | average)
        restore_optimizer(self.optimizer, tensors["optimizer"])
        torch.set_rng_state(tensors["random"]["torch"])
        return Progress(**checkpoint.state["progress"])


def _evaluate(
    keeper: _Keeper, at: Progress, val: EvalLoader, config: TrainConfig, listen: Listener
) -> Progress:
    """Measure the held-out images, log it, and keep a checkpoint."""
    score = _score(keeper.judged.eval(), val, config)
    better = score > at.best
    at = at._replace(
        evaluations=at.evaluations + 1,
        best=max(score, at.best),
        since_best=0 if better else at.since_best + 1,
    )
    event = {"step": at.step, "epoch": at.epoch, "seconds": at.seconds, "val_accuracy": score}
    keeper.run.append_metrics(event)
    listen(event)
    keeper.save("last", at)
    if better:
        keeper.save("best", at)
    return at


@torch.inference_mode()
def _score(task: Classify, val: EvalLoader, config: TrainConfig) -> float:
    """The share of images right: the likeliest class, or each label on its side of a half."""
    right = total = 0
    mixed = config.precision == "bfloat16"
    with torch.autocast(val.device.type, torch.bfloat16, enabled=mixed):
        for batch in val:
            predicted = task.predict(batch)
            if task.multi_label:
                good = (predicted > 0.5) == (batch.targets > 0.5)
            else:
                good = predicted.argmax(dim=1) == batch.targets.argmax(dim=1)
            right += int(good.sum())
            total += good.numel()
    return right / max(total, 1)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Signals that ask to stop, noted for the end of the step instead of acted on; twice is now."""
    caught: list[int] = []

    def note(signum: int, frame: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(signum)

    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
