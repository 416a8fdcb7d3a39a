"""What a run will take, before it is started: from a few real steps here, and on paper.

Nothing is written.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from vitrail.data import Classes, Source, Splits
from vitrail.data.batches.batch import Batch
from vitrail.data.pixels.cache import MEMORY_BYTES
from vitrail.data.pixels.decode import UnreadableImage
from vitrail.data.sources.stream import HeldImages
from vitrail.data.views.canvas import Canvas
from vitrail.data.views.mix import share_unit
from vitrail.errors import DataError, UsageError, setting
from vitrail.planning.auto import ALL_GIVEN, Auto, Chosen, choose
from vitrail.planning.cluster import (
    Cluster,
    Layout,
    Parallel,
    held_by_one,
    layouts,
    share_out,
    steps_per_epoch,
)
from vitrail.planning.paper import Line, Sizes, Step, count_sizes, count_step
from vitrail.planning.tryout import Makers, Tryout, try_out
from vitrail.runs import TrainConfig
from vitrail.runs.parts import train_source
from vitrail.tasks import Task
from vitrail.training.engine import sentence_on
from vitrail.units import bytes_text

FEWEST_STEPS = 100
"""Fewer than these, and hardly anything is learned but from pretrained weights."""
SPARED = 0.1
"""Share of the free memory that a plan leaves alone."""
_LIBRARIES = 128 * 2**20
_SAMPLES = 8
_LOG_LINE, _PREDICTION, _PROBABILITY = 250, 90, 9
"""Bytes of a step in metrics.jsonl; in predictions.csv of an image, and of a class of it."""

Notify = Callable[[str], None]


class Room(NamedTuple):
    """Bytes that are free; None: the system does not say."""

    memory: int | None
    """Of the machine, or of what its cgroup leaves; of several processes on it, one's share."""
    device: int | None
    """Of the GPU; None on a CPU as well."""
    disk: int | None
    """Where the run folder is to be."""


class Problem(NamedTuple):
    """What would go wrong, and the flag that mends it."""

    level: Literal["problem", "note"]
    """A problem stops the run, or makes it useless; a note is worth knowing."""
    text: str
    mend: str


class Time(NamedTuple):
    """Seconds."""

    step: float
    """One step, its images read for the first time."""
    data: float
    """Of that, waiting for images."""
    later_step: float
    """One step, with images from memory as far as they fit there."""
    images_per_second: float
    """Of a later step."""
    share_of_peak: float
    """Of what a matrix product reaches here, by `Step.flops`; waiting for images not counted."""
    steps_per_epoch: int
    steps: int
    epochs: float
    head: float
    """For the head that `tune.head_init probe` solves."""
    warm: float
    """Until the steps are as fast as they will be."""
    training: float
    """All steps, with the two above."""
    evaluation: float
    """All measurements of the held-out images, the report's with them."""

    @property
    def total(self) -> float:
        """From start to report."""
        return self.training + self.evaluation


class Memory(NamedTuple):
    """Bytes that the run adds to the process, where the model is: on the GPU, or in memory."""

    held: int
    """Weights, gradients, optimiser; of several processes, with what they exchange."""
    activations: int
    """Of the images computed at once."""
    batch: int
    """The images of a step, with those that are being made."""
    cache: int
    """Decoded images, of training and held out; in the machine's memory."""
    saving: int
    """A copy of what a checkpoint holds, while it is written; in the machine's memory."""
    needed: int
    """On a GPU without the last two."""
    free: int | None
    at_once: int
    """Images computed at once."""
    most_at_once: int | None
    """For how many there is room; 0: not for one. None: it is not known what is free."""


class Disk(NamedTuple):
    """Bytes."""

    checkpoint: int
    kept: int
    """Checkpoints at one time: the newest ones, the best, and the one being written."""
    other: int
    """The log and the predictions."""
    needed: int
    free: int | None


@dataclass(frozen=True)
class Plan:
    """What a run will take."""

    config: TrainConfig
    """The run, with the numbers that were to be found."""
    sizes: Sizes
    forward_flops: float
    """Of one image, forward."""
    flops: float
    """Of one image, both passes, as the run is configured."""
    tryout: Tryout | None
    """None: there is no room for it here."""
    time: Time | None
    memory: Memory
    disk: Disk
    cluster: Cluster
    layouts: tuple[Layout, ...]
    """The cluster's."""
    problems: tuple[Problem, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        sizes = self.sizes._asdict() | {"held": self.sizes.held._asdict()}
        tryout = self.tryout and self.tryout._asdict() | {
            "activations": self.tryout.activations._asdict(),
            "error": self.tryout.error,
        }
        return {
            "batch_size": self.config.data.batch_size,
            "micro_batch": self.config.micro_batch,
            "sizes": sizes,
            "forward_flops": self.forward_flops,
            "flops": self.flops,
            "tryout": tryout,
            "time": self.time and self.time._asdict() | {"total": self.time.total},
            "memory": self.memory._asdict(),
            "disk": self.disk._asdict(),
            "cluster": asdict(self.cluster),
            "layouts": [layout._asdict() for layout in self.layouts],
            "problems": [problem._asdict() for problem in self.problems],
        }


def make_plan(
    config: TrainConfig,
    splits: Splits,
    makers: Makers,
    device: torch.device,
    room: Room,
    cluster: Cluster,
    *,
    auto: Auto = ALL_GIVEN,
    seconds: float = 20.0,
    notify: Notify = lambda sentence: None,
) -> Plan:
    """Try it out for about so many `seconds`, choose what is `auto`, and work out the rest.

    Raises `UsageError` for a run that cannot be, and for a cluster that cannot share its batches;
    `DataError` where there is no room for the least that could be chosen; and whatever the run
    would raise when it makes its model or reads its first images.
    """
    if config.method == "probe":
        raise UsageError("method 'probe' takes no steps, and looks at each image once: just run it")
    images = len(train_source(config, splits))
    processes = math.lcm(config.devices, cluster.gpus)
    config = auto.start(config, processes)
    load = share_out(config, cluster, images)
    steps_per_epoch(config, images)  # raises what the run would
    sizes = count_sizes(makers.on_paper(), config)
    steps = {again: _on_paper(makers, config, load.at_once, again) for again in (False, True)}
    lines = {again: Line.through(*some) for again, some in steps.items()}
    flops = {again: some[0].flops / some[0].images for again, some in steps.items()}
    line = lines[config.checkpointing]
    free = room.memory if device.type == "cpu" else room.device
    most = images if free is None else line.most((1 - SPARED) * free - sizes.held.alone)
    tried = None
    if not most:
        notify("there is not enough memory for a single image, so no step is tried")
    else:
        notify(f"trying a few steps, for about {seconds:.0f} s")
        tried = try_out(
            config, splits, makers, device, sizes, flops[config.checkpointing], seconds,
            # What is counted on paper is the least that they take.
            most=max(1, most // 2),
        )  # fmt: skip
    cache = _cache(config, splits)
    cache = cache._replace(
        bytes=cache.bytes + kept_maps(config, makers.on_paper(), len(splits.train), device)
    )
    line = _weighed(tried, sizes) if tried else line

    def memory_of(config: TrainConfig) -> Memory:
        return _memory(config, sizes, line, device, room, images, cache)

    if any(auto):
        config, notes = _chosen(auto, config, images, device, processes, memory_of)
        for note in notes:
            notify(note)
        load = share_out(config, cluster, images)
    if config.data.first_size is not None:
        notify("images grow while training: times are those of whole ones, so the run takes less")
    if config.data.multiscale is not None:
        height, width = config.train_sizes()[-1]
        notify(
            f"the size of images changes while training: times and memory are those of the "
            f"largest, {height}x{width}, so the run takes less"
        )
    if views := config.tune.kept_views:
        epochs = "epoch" if views == 1 else f"{views} epochs"
        notify(f"times are those of the first {epochs}: later ones read what was kept of them")
    memory = memory_of(config)
    found = tried and run_time(
        config, splits, tried, device, flops[config.checkpointing], cache[1:]
    )
    disk = _disk(config, splits, sizes, found, room)
    half = config.precision == "bfloat16"
    ways = layouts(sizes, lines, flops, load, cluster, half=half)
    problems = [
        *_of_memory(config, memory, memory.held + lines[config.checkpointing].at(1), sizes.coupled),
        *_of_pieces(config, images, memory, sizes.apart),
        *_of_disk(disk),
        *_of_length(config, images, found),
        *_of_data(config, splits, found, device),
        *_of_cluster(config, cluster, ways),
    ]
    forward = steps[False][0].forward_flops / steps[False][0].images
    return Plan(
        config, sizes, forward, flops[config.checkpointing], tried, found, memory, disk, cluster,
        ways, tuple(problems),
    )  # fmt: skip


def _chosen(
    auto: Auto,
    config: TrainConfig,
    images: int,
    device: torch.device,
    processes: int,
    memory_of: Callable[[TrainConfig], Memory],
) -> Chosen:
    """The config with the numbers for which there is room."""
    free = memory_of(config).free
    if free is None:
        raise DataError(
            f"it cannot be told how much memory is free on {device}, so no number follows from it: "
            f"say how many, with {setting('data.batch_size')} or {setting('micro_batch')}"
        )
    return choose(
        auto,
        config,
        lambda config: memory_of(config).needed,
        int((1 - SPARED) * free),
        images=images,
        unit=share_unit(config.augment, processes),
        device=device.type,
    )


def _on_paper(makers: Makers, config: TrainConfig, images: int, checkpointing: bool) -> list[Step]:
    """A step over so many images, over twice as many, and over these cut in two."""
    return [
        count_step(makers.on_paper(), config, n, checkpointing=checkpointing, at_once=at_once)
        for n, at_once in ((images, None), (2 * images, None), (2 * images, images))
    ]


def _weighed(tried: Tryout, sizes: Sizes) -> Line:
    """The activations as they were counted; or more, if much more was measured.

    Libraries have memory of their own, which is not counted: some that they take once, and some by
    the image, as oneDNN does for convolutions.
    """
    held = sizes.held.alone
    if tried.measured is None or tried.estimated <= held:
        return tried.activations
    counted, measured = tried.estimated - held, tried.measured - held - _LIBRARIES
    more = max(1.0, measured / counted)
    fixed, *others = tried.activations
    return Line(fixed * more + _LIBRARIES, *(each * more for each in others))


def kept_maps(config: TrainConfig, task: Task, images: int, device: torch.device) -> int:
    """Bytes of what a frozen part of a `task` on paper says of all views, which a process keeps:
    `tune.kept_views`.
    """
    if not config.tune.kept_views:
        return 0
    with torch.device("meta"):
        view = torch.zeros(1, config.model.channels, *config.train_preprocess().size)
        maps = task.eval().fixed(Batch((Canvas(view, None),), {}, np.arange(1)))
    # On a GPU the last norm is computed in float32, whatever the precision of the products.
    half = config.precision == "bfloat16" and device.type == "cpu"
    numbers = sum(each.numel() for each in maps) * config.tune.kept_views * images
    return numbers * (2 if half else 4)


class _Cache(NamedTuple):
    bytes: int
    """Of decoded images, and of a stream's, as they came; of maps that are kept."""
    train_share: float
    """Of the training images, those that are kept decoded."""
    val_share: float


def _cache(config: TrainConfig, splits: Splits) -> _Cache:
    """What the loaders will keep: training images at no more than about twice the model's size,
    measured on a few of them; held-out images as the model sees them. Of a stream, what it shuffles
    and what it holds out.
    """
    held = _held(config, splits)
    if config.data.cache != "memory":
        share = 1.0 if config.data.cache == "disk" else 0.0
        return _Cache(held, share, share)
    val = config.model.channels * math.prod(config.preprocess().size) * len(splits.val)
    if splits.stream is not None:
        share = min(1.0, MEMORY_BYTES / val)
        return _Cache(held + round(val * share), 0.0, share)
    train = _decoded(config, train_source(config, splits))
    shares = [min(1.0, MEMORY_BYTES / size) if size else 1.0 for size in (train, val)]
    return _Cache(round(train * shares[0] + val * shares[1]), *shares)


def _held(config: TrainConfig, splits: Splits) -> int:
    """Bytes of a stream's encoded images that are in memory; 0 if there is none."""
    parts = {id(part): part for part in (splits.val, splits.test)}.values()
    held = [part for part in parts if isinstance(part, HeldImages)]
    size = sum(part.bytes for part in held)
    return size + config.data.stream.buffer * size // sum(map(len, held)) if held else 0


def _decoded(config: TrainConfig, source: Source) -> float:
    """Bytes of all training images as they would be kept, from a few of them."""
    preprocess = config.train_preprocess()
    height, width = preprocess.size
    sizes = []
    for i in np.linspace(0, len(source) - 1, _SAMPLES).astype(int).tolist():
        try:
            image = preprocess.convert(source.load(i))
        except UnreadableImage:
            continue
        factor = max(1, min(image.height // (2 * height), image.width // (2 * width)))
        sizes.append(image.height * image.width * len(image.getbands()) / factor**2)
    return float(np.mean(sizes)) * len(source) if sizes else 0.0


def _devices(config: TrainConfig, device: torch.device) -> int:
    """How many of them compute at once; the processes of a CPU do not make it faster."""
    return config.devices if device.type != "cpu" else 1


def run_time(
    config: TrainConfig,
    splits: Splits,
    tried: Tryout,
    device: torch.device,
    flops: float,
    cached: tuple[float, float],
) -> Time:
    """A step is `images * (read + compute) + update`: on a CPU data and model take turns. Beside a
    GPU images are read ahead, and it is the longer of both. Each of several GPUs has its share of
    the images; the processes of one machine share its cores, and reading takes as long as for one.

    `flops` are those of one image, `cached` the shares of the training and of the held-out images
    that are kept decoded.
    """
    assert splits.val is not None
    images, held_out = len(train_source(config, splits)), len(splits.val)
    step_images = config.accumulate * min(config.data.batch_size, images)
    share, overlapped = _devices(config, device), device.type != "cpu"
    busy = step_images * tried.compute / share + tried.update

    def step(read: float) -> float:
        return max(step_images * read, busy) if overlapped else step_images * read + busy

    mixed = cached[0] * tried.read_again + (1 - cached[0]) * tried.read
    first, later = step(tried.read), step(mixed)
    per_epoch = steps_per_epoch(config, images)
    head = images * (tried.read + tried.judge) if config.tune.head_init == "probe" else 0.0
    counts = []
    if config.epochs is not None:
        counts.append(math.ceil(config.epochs * per_epoch))
    if config.minutes is not None:
        left = max(0.0, 60 * config.minutes - head - tried.warm)
        of_first = min(math.ceil(left / first), per_epoch)
        counts.append(of_first + math.ceil(max(0.0, left - of_first * first) / later))
    steps = min(counts)
    of_first = min(steps, per_epoch)
    judge_again = cached[1] * tried.judge_read_again + (1 - cached[1]) * tried.judge_read
    looks = min(config.evaluations, max(steps, 1))
    seen = tried.judge / share
    judged = splits.test if splits.test is not None else splits.val
    evaluation = held_out * (tried.judge_read + looks * seen + (looks - 1) * judge_again)
    evaluation += len(judged) * (tried.judge_read + seen)  # for the report, which reads anew
    return Time(
        step=first,
        data=first - busy,
        later_step=later,
        images_per_second=step_images / later,
        share_of_peak=flops * step_images / share / busy / tried.rate,
        steps_per_epoch=per_epoch,
        steps=steps,
        epochs=steps / per_epoch,
        head=head,
        warm=tried.warm,
        training=head + tried.warm + of_first * first + (steps - of_first) * later,
        evaluation=evaluation,
    )


def _memory(
    config: TrainConfig,
    sizes: Sizes,
    line: Line,
    device: torch.device,
    room: Room,
    images: int,
    cache: _Cache,
) -> Memory:
    """The sum of what may be there at once: at most what will be.

    A batch is there as float32, 4 bytes a value, each of a step's; and one of them once more as
    bytes and as it is mixed.
    """
    batch = max(1, min(config.data.batch_size, images) // config.devices)
    parallel: Parallel = config.parallel if config.devices > 1 else "alone"
    parts = held_by_one(sizes, parallel, config.devices, half=config.precision == "bfloat16")
    held = round(sum(parts.values()))
    values = config.model.channels * math.prod(config.train_preprocess().size)
    made = batch * values * (4 * config.accumulate + 5)
    on_cpu = device.type == "cpu"
    beside = cache.bytes + sizes.checkpoint if on_cpu else 0
    free = room.memory if on_cpu else room.device
    at_once = min(config.micro_batch or batch, batch)
    fixed = held + made + beside
    return Memory(
        held=held,
        activations=line.at(at_once, batch),
        batch=made,
        cache=cache.bytes,
        saving=sizes.checkpoint,
        needed=fixed + line.at(at_once, batch),
        free=free,
        at_once=at_once,
        most_at_once=None if free is None else line.most((1 - SPARED) * free - fixed, batch),
    )


def _disk(
    config: TrainConfig, splits: Splits, sizes: Sizes, found: Time | None, room: Room
) -> Disk:
    """Checkpoints (the newest, the best, the one being written), the log, the predictions."""
    assert splits.val is not None
    judged = splits.test if splits.test is not None else splits.val
    classes = len(splits.train.targets.names)
    other = len(judged) * (_PREDICTION + _PROBABILITY * classes)
    other += _LOG_LINE * found.steps if found else 0
    kept = config.keep_checkpoints + 2
    return Disk(sizes.checkpoint, kept, other, kept * sizes.checkpoint + other, room.disk)


def _of_memory(config: TrainConfig, memory: Memory, least: int, coupled: bool) -> Iterator[Problem]:
    if memory.free is None or memory.most_at_once is None:
        return
    less = [] if config.checkpointing else ["--checkpointing True"]
    less += [] if config.precision == "bfloat16" else ["--precision bfloat16"]
    single = memory.needed - memory.activations + memory.activations / memory.at_once
    if least > (1 - SPARED) * memory.free or not memory.most_at_once:
        yield Problem(
            "problem",
            f"there is no room for a single image: {bytes_text(memory.free)} are free, and "
            f"{bytes_text(max(least, single))} needed",
            ", ".join([*less, "a smaller --model or --model.image-size"]),
        )
    elif memory.at_once > memory.most_at_once:
        fewer = "--data.batch-size" if coupled else "--micro-batch"
        yield Problem(
            "problem",
            f"{memory.at_once} images at once take {bytes_text(memory.needed)}, and "
            f"{bytes_text(memory.free)} are free: there is room for {memory.most_at_once}",
            " or ".join([f"{fewer} {memory.most_at_once}", *less]),
        )


def _of_pieces(config: TrainConfig, images: int, memory: Memory, apart: str) -> Iterator[Problem]:
    batch = max(1, min(config.data.batch_size, images) // config.devices)
    if apart and memory.at_once < batch:
        yield Problem(
            "note",
            sentence_on(apart, memory.at_once),
            "--checkpointing True, and --micro-batch as large as there is room for",
        )


def _of_disk(disk: Disk) -> Iterator[Problem]:
    if disk.free is not None and disk.needed > disk.free:
        least = disk.needed - disk.checkpoint * (disk.kept - 4)
        fewer = "--keep-checkpoints 2 or " if least <= disk.free and disk.kept > 4 else ""
        yield Problem(
            "problem",
            f"the run needs {bytes_text(disk.needed)} of disk ({disk.kept} checkpoints of "
            f"{bytes_text(disk.checkpoint)}), and {bytes_text(disk.free)} are free",
            f"{fewer}--out on another disk",
        )


def _of_length(config: TrainConfig, images: int, found: Time | None) -> Iterator[Problem]:
    batch = config.data.batch_size
    if batch > images:
        yield Problem(
            "problem",
            f"a batch of {batch} is more than the {images} training images: each step would see "
            f"all of them",
            f"--data.batch-size {max(1, images // 8)}",
        )
    if found is None:
        return

    def longer(share: float) -> str:
        """The flag that makes the run that it is be `share` of the run."""
        if config.minutes and (config.epochs is None or found.epochs < config.epochs):
            return f"--minutes {math.ceil(config.minutes / max(share, 0.001))}"
        return f"--epochs {math.ceil(found.epochs / max(share, 0.001))}"

    if found.steps < FEWEST_STEPS:
        more = longer(found.steps / FEWEST_STEPS)
        smaller = batch * found.steps // FEWEST_STEPS
        yield Problem(
            "problem",
            f"only {_count(found.steps, 'step')}: too few to learn much",
            f"{more} or --data.batch-size {max(8, smaller)}" if batch > 8 else more,
        )
    if found.epochs < 1:
        yield Problem(
            "note",
            f"the run ends after {found.epochs:.0%} of the first epoch, so not every image is seen",
            longer(found.epochs),
        )
    if found.evaluation > 0.5 * found.training:
        fewer = max(1, config.evaluations // 4)
        less = "stream.held-out 500" if config.data.streamed else "val-fraction 0.1"
        yield Problem(
            "note",
            f"measuring takes {found.evaluation / found.total:.0%} of the time",
            f"--evaluations {fewer}" if fewer < config.evaluations else f"--data.{less}",
        )


def _of_data(
    config: TrainConfig, splits: Splits, found: Time | None, device: torch.device
) -> Iterator[Problem]:
    assert splits.val is not None
    overlapped = device.type != "cpu"
    if config.devices > 1 and not overlapped:
        yield Problem(
            "note",
            f"{config.devices} processes share the cores of one machine: planned is one process, "
            f"and each more takes as much memory again",
            "--devices 1",
        )
    yield from _of_classes(splits)
    if found and found.data > (0.1 if overlapped else 0.4) * found.step:
        workers = 2 * config.data.workers
        yield Problem(
            "note",
            f"{found.data / found.step:.0%} of a step of the first epoch is waiting for images",
            f"--data.workers {workers}" if overlapped else "smaller image files",
        )


def _of_classes(splits: Splits) -> Iterator[Problem]:
    said, held = splits.train.targets, splits.val.targets
    if not (isinstance(said, Classes) and isinstance(held, Classes)):
        return
    judged, learned = held.counts(), said.counts().astype(np.float64)
    if splits.stream is not None:  # which does not say how many there are of a class
        learned = np.full(len(said.names), np.inf)
    for few, text in (
        (learned == 0, "no training image"),
        (learned == 1, "one training image"),
        ((judged == 0) & (learned > 0), "no held-out image, by which it would be judged,"),
    ):
        listed = [name for name, there in zip(said.names, few, strict=True) if there]
        if listed:
            shown = ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if listed[5:] else "")
            mend = "add images, or leave the class out"
            yield Problem("note", f"{text} of {_count(len(listed), 'class')}: {shown}", mend)


def _of_cluster(
    config: TrainConfig, cluster: Cluster, ways: tuple[Layout, ...]
) -> Iterator[Problem]:
    if not any(way.fits for way in ways):
        best = min(ways, key=lambda way: way.memory)
        most = max(way.most_at_once for way in ways)
        yield Problem(
            "problem",
            f"on the cluster no layout fits: the least is {bytes_text(best.memory)} a GPU, and "
            f"{bytes_text(cluster.room)} can be had of {cluster.memory:g} GB",
            f"--micro-batch {most}" if most else "--cluster.gpus more, or --cluster.memory larger",
        )
    if config.precision == "float32" and cluster != Cluster() and cluster.tflops > 100:
        yield Problem(
            "note",
            f"no GPU reaches {cluster.tflops:g} TFLOP/s in float32, which the run computes in",
            "--precision bfloat16, or --cluster.tflops 67",
        )


def _count(number: int, noun: str) -> str:
    many = "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{many if number != 1 else ''}"
