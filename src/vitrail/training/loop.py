"""The one training loop. A task brings the loss; everything that happens is in sight here."""

import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from vitrail.data.batches.batch import Batch
from vitrail.data.batches.loader import EvalLoader
from vitrail.data.batches.making import Loader
from vitrail.data.sources.stream import joined
from vitrail.errors import DataError, UsageError, VitrailError, setting
from vitrail.nn.lora import has_lora, merged_state
from vitrail.runs import Run, TrainConfig
from vitrail.runs.checkpoint import flatten_optimizer, restore_optimizer, restore_weights
from vitrail.runs.store import Checkpoints
from vitrail.runs.world import ALONE, World
from vitrail.tasks import Task
from vitrail.training.grow import drawn_size, resized, size_at
from vitrail.training.measure import Measured, measured
from vitrail.training.optim import learning_rate
from vitrail.training.probe import solve_head
from vitrail.training.profile import Profile
from vitrail.training.progress import Listener, Progress
from vitrail.training.step import Learner, Told


class Interrupted(VitrailError):
    """Stopped by a signal, everything saved."""

    def __init__(self, signum: int, run: Run, step: int) -> None:
        super().__init__(
            f"stopped at step {step}, all saved; go on with: "
            f"vitrail train --resume {shlex.quote(str(run.path))}"
        )
        self.exit_code = 128 + signum


class Ended(NamedTuple):
    """Where a run has ended."""

    at: Progress
    found: Measured | None
    """What was measured there; None: by a process before this one."""


def fit(
    task: Task,
    train: Loader,
    val: EvalLoader,
    config: TrainConfig,
    run: Run,
    *,
    resume: bool = False,
    listen: Listener = lambda event: None,
    notify: Callable[[str], None] = lambda sentence: None,
    world: World = ALONE,
) -> Ended:
    """Train `task` until the run's length is reached, and keep checkpoints in `run`.

    Every process of `world` calls it with its own part of the data; the first writes and talks.

    Raises `DataError` when the loss is no longer a number, `Interrupted` after a signal.
    """
    at = Progress()
    if config.tune.head_init == "probe" and not resume:
        started = time.perf_counter()
        solve_head(task, train, config)
        world.align(task.state_dict().values())
        seconds = time.perf_counter() - started
        at = at._replace(seconds=seconds, head_seconds=seconds)
    learner = Learner(task, config, torch.device(train.device), world, notify)
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

    def strong(batch: int) -> bool:
        """Whether a batch of this epoch may have mosaics: not in the last part of the run."""
        ahead = (batch - at.batch) // config.accumulate
        return scheduled(at._replace(step=at.step + ahead)) < 1 - config.augment.calm

    sizes = config.train_sizes()
    checkpoints = Checkpoints(run, keep=config.keep_checkpoints, crew=world.apart("checkpoints"))
    with (
        checkpoints,
        _signals() as caught,
        Profile(config.profile, run, world.lead, config.precision) as profile,
    ):
        keeper = _Keeper(checkpoints, learner, train)
        checkpoints.tidy()
        if resume:
            at = keeper.restore(notify)
            notify(f"going on from step {at.step}")
        if world.lead:
            run.forget_after(at.step)
        if skipped := learner.prepare():
            train.leave_out(skipped)
        if not resume:
            keeper.save(at)
        elif done(at) < 1 and done(at) * config.evaluations >= at.evaluations + 1:
            at = _evaluate(keeper, at, val, world, listen)  # a signal came before it
        saved = at.seconds
        while done(at) < 1:
            batches = train.epoch(at.epoch, at.batch, strong)
            started = time.perf_counter()
            for group in _groups(batches, config.accumulate):
                part_done = learner.enter(scheduled(at._replace(step=at.step + 1)))
                if len(sizes) > 1:
                    size = size_at(sizes, scheduled(at))
                    if config.data.multiscale is not None:
                        size = drawn_size(sizes, config.seed, at.epoch, at.batch)
                    group = list(resized(group, size))
                lr = learning_rate(config.optim, part_done)
                event: dict[str, Any] = {"step": at.step + 1, "epoch": at.epoch}
                torch.manual_seed(_seed(config.seed, at.step, world.rank))
                told = learner.gradients(group, train.share)
                if told.images:
                    if not told.finite:
                        place = keeper.capture(at, group, told, lr)
                        raise DataError(_no_number(at.step + 1, told, lr, place))
                    learner.update(lr, at.step + 1, scheduled(at._replace(step=at.step + 1)))
                    event |= {"loss": told.loss.total, "lr": lr, "grad_norm": told.norm}
                    event |= {f"part/{name}": value for name, value in told.loss.parts.items()}
                profile.step()
                now = time.perf_counter()
                stop, seconds = _agreed(world, caught, at.seconds + now - started, train.device)
                event["images_per_second"] = told.images / max(seconds - at.seconds, 1e-9)
                at = at._replace(step=at.step + 1, batch=at.batch + len(group), seconds=seconds)
                event |= {"seconds": at.seconds, "done": min(done(at), 1.0)}
                if world.pulse:
                    world.pulse.at(at.step)
                if world.lead:
                    run.append_metrics(event)
                    listen(event)
                if stop:
                    keeper.save(at)
                    checkpoints.flush()
                    raise Interrupted(stop, run, at.step)
                if done(at) * config.evaluations >= at.evaluations + 1 and done(at) < 1:
                    at = _evaluate(keeper, at, val, world, listen)
                    saved = at.seconds
                    if why := task.collapsed(keeper.found.rows if keeper.found else {}):
                        notify(f"the run stops here, for {why}")
                    if why or (config.patience is not None and at.since_best >= config.patience):
                        world.rest()
                        return Ended(at, keeper.found)
                elif at.seconds - saved > 60 * config.checkpoint_minutes and done(at) < 1:
                    keeper.save(at)
                    saved = at.seconds
                if done(at) >= 1:
                    break
                started = time.perf_counter()
            else:
                at = at._replace(epoch=at.epoch + 1, batch=0)
        if keeper.measured != at.step:  # or it was killed between that and the end of the report
            at = _evaluate(keeper, at, val, world, listen)
        world.rest()
        return Ended(at, keeper.found)


def _groups(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Batches `size` at a time; what is left over at the end of an epoch is not used."""
    group = []
    while True:
        with record_function("vitrail/data"):
            batch = next(batches, None)
        if batch is None:
            return
        group.append(batch)
        if len(group) == size:
            yield group
            group = []


def _seed(seed: int, step: int, rank: int) -> int:
    """What dropout and stochastic depth draw from in one step: it has no state to be resumed."""
    return int.from_bytes(blake2b(f"{seed} {step} {rank}".encode(), digest_size=7).digest())


def _no_number(step: int, told: Told, lr: float, place: str) -> str:
    return (
        f"the loss is no longer a number at step {step} (loss {told.loss.total}, gradient norm "
        f"{told.norm}, "
        f"learning rate {lr:.3g}). The weights before it and its batch are kept in {place}, and "
        f"so is the last checkpoint. Try a smaller {setting('optim.lr')}"
    )


def _agreed(
    world: World, caught: list[int], seconds: float, device: torch.device | str
) -> tuple[int, float]:
    """On which signal to stop (0: none), and how long the run has lasted: by the lead's clock."""
    if world.size == 1:
        return (caught[0] if caught else 0), seconds
    said = torch.zeros(2, world.size, dtype=torch.float64, device=device)
    said[:, world.rank] = torch.tensor([caught[0] if caught else 0, seconds])
    signals, clocks = world.sum(said).tolist()
    return int(max(signals)), clocks[0]


class _Keeper:
    """Everything of a run that a checkpoint must hold, and the way there and back."""

    def __init__(self, checkpoints: Checkpoints, learner: Learner, train: Loader) -> None:
        self.checkpoints = checkpoints
        self.learner = learner
        self.task = learner.task
        self.average = learner.average
        self.train = train
        self.measured = -1
        """The step that it was restored at, if that one has been evaluated."""
        self.found: Measured | None = None
        """What was measured last."""

    @contextmanager
    def judged(self) -> Iterator[Task]:
        """The task as it is measured and kept, in evaluation mode: with its averaged weights."""
        self.task.eval()
        if self.average is None:
            yield self.task
            return
        with self.average.in_place_of(self.task.model):
            yield self.task

    def save(self, at: Progress, score: float | None = None) -> None:
        self.checkpoints.save(at.step, self._tensors(), self._state(at), score)

    def capture(self, at: Progress, group: list[Batch], told: Told, lr: float) -> str:
        """Keep a step that went wrong, to be looked at: what it started from, and what it saw."""
        batches = {
            f"batch-{i}": {
                **{f"images-{k}" if k else "images": v.images for k, v in enumerate(batch.views)},
                **batch.targets,
            }
            for i, batch in enumerate(group)
        }
        state = {
            **self._state(at),
            "indices": [batch.indices.tolist() for batch in group],
            "found": {"loss": str(told.loss.total), "grad_norm": str(told.norm), "lr": lr},
        }
        return str(self.checkpoints.save_aside("fault", {**self._tensors(), **batches}, state))

    def _state(self, at: Progress) -> dict[str, Any]:
        state = {"progress": at._asdict(), **self.task.state()}
        if self.train.position is not None:
            state["stream"] = joined(self.learner.world.gather(self.train.position))
        return state

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        tensors = {"optimizer": flatten_optimizer(self.learner.optimizer)}
        if beside := _beside(self.task):
            tensors["beside"] = beside
        # "model" is what is judged, and always plain: to go on from it takes what learns besides,
        # and, where that is not plain, what the average of it has otherwise.
        adapted = has_lora(self.task.model)
        if adapted or self.average:
            weights = {k: v.clone() for k, v in self.task.model.state_dict().items()}
            tensors["weights"] = weights
        with self.judged():
            tensors["model"] = merged_state(self.task.model)
            if self.average:
                tensors["model"] = {k: v.clone() for k, v in tensors["model"].items()}
            if adapted and self.average:
                tensors["average"] = {
                    name: value.clone()
                    for name, value in self.task.model.state_dict().items()
                    if not value.equal(weights[name])
                }
        return tensors

    def restore(self, notify: Callable[[str], None]) -> Progress:
        checkpoint, problems = self.checkpoints.newest()
        for problem in problems:
            notify(f"{problem}; going on from the checkpoint before it")
        tensors = checkpoint.tensors
        weights = tensors.get("weights", tensors["model"])
        model = self.task.model
        if self.average:
            restore_weights(model, weights | tensors.get("average", tensors["model"]))
            self.average.values = {
                name: value.detach().clone() for name, value in model.named_parameters()
            }
        restore_weights(model, weights)
        if beside := tensors.get("beside"):
            own = self.task.state_dict()
            restore_weights(self.task, own | beside)
        restore_optimizer(self.learner.optimizer, tensors["optimizer"])
        self.learner.engine.follow()
        if self.train.position is not None:
            self.train.seek(checkpoint.state["stream"])
        at = Progress(**checkpoint.state["progress"])
        self.measured = at.step if "score" in checkpoint.state else -1
        return at


def _evaluate(
    keeper: _Keeper, at: Progress, val: EvalLoader, world: World, listen: Listener
) -> Progress:
    """Measure the held-out images, log it, and keep a checkpoint."""
    with keeper.judged() as task:
        found = measured(task, val, world, half=keeper.learner.engine.half)
        score = task.score(found.rows) if len(found.indices) else 0.0
    # Later passes find the images in memory: from files they were read in the first one.
    keeper.found = found if keeper.found is None else found._replace(seconds=keeper.found.seconds)
    better = score > at.best
    at = at._replace(
        evaluations=at.evaluations + 1,
        best=max(score, at.best),
        since_best=0 if better else at.since_best + 1,
    )
    event = {"step": at.step, "epoch": at.epoch, "seconds": at.seconds}
    event[f"val_{task.score_name}"] = score
    if world.lead:
        keeper.checkpoints.run.append_metrics(event)
        listen(event)
    keeper.save(at, score)
    return at


def _beside(task: Task) -> dict[str, Tensor]:
    """What a task keeps beside its model."""
    return {k: v for k, v in task.state_dict().items() if not k.startswith("model.")}


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
