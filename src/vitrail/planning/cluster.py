"""What a run would take on GPUs that are not here: memory, hours and cost, by arithmetic.

Nothing of it is measured. The sizes and the activations are counted (`vitrail.planning.paper`),
and the share of their peak that the GPUs reach, and their price, are what the user says. Ideal are:
the exchange between GPUs (hidden behind the computing, or part of the utilisation), the data
(always there), and evaluation (not counted).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from vitrail.data.batches.making import share_of
from vitrail.errors import UsageError, setting
from vitrail.planning.paper import Line, Sizes
from vitrail.runs import TrainConfig

RESERVED = 0.1
"""Share of a GPU's memory that is left for CUDA itself, NCCL's buffers and what falls between two
allocations."""
_GB, _TERA = 10**9, 10**12

Parallel = Literal["alone", "ddp", "fsdp"]


@dataclass(frozen=True)
class Cluster:
    """GPUs to plan for. The defaults are one H100 SXM, and no price."""

    gpus: int = 1
    """How many, over all machines."""
    memory: float = 80.0
    """Of one GPU, in GB (10^9 bytes)."""
    tflops: float = 989.0
    """The peak of one GPU in 10^12 FLOP/s, in the run's number format and without sparsity: an
    H100 SXM has 989 in bfloat16, an A100 312; their float32 is 67 and 19.5."""
    utilisation: float = 0.4
    """The share of that peak which training reaches, recomputation counted as work."""
    price: float | None = None
    """Of one GPU for an hour, in any currency."""
    images: int | None = None
    """Training images there, where the DATA here is only a part of them."""

    def __post_init__(self) -> None:
        for name, count in (("gpus", self.gpus), ("images", self.images)):
            if count is not None and count < 1:
                raise UsageError(f"cluster.{name} must be at least 1, not {count}")
        for name, number in (("memory", self.memory), ("tflops", self.tflops)):
            if not 0 < number < math.inf:
                raise UsageError(f"cluster.{name} must be above 0, not {number:g}")
        if not 0 < self.utilisation <= 1:
            raise UsageError(
                f"{setting('cluster.utilisation')} is a share of the peak, above 0 and at most 1, "
                f"not {self.utilisation:g}: ViTs reach 0.3 to 0.5"
            )
        if self.price is not None and not 0 <= self.price < math.inf:
            raise UsageError(f"{setting('cluster.price')} cannot be negative: {self.price:g}")

    @property
    def room(self) -> float:
        """Bytes that a run can have of one GPU."""
        return (1 - RESERVED) * self.memory * _GB


class Load(NamedTuple):
    """What a cluster is to do."""

    batch: int
    """Images of a batch, over all GPUs."""
    each: int
    """Of these, each GPU's."""
    at_once: int
    """Of these, computed at once."""
    steps: int | None
    """None: the run's length is given in minutes."""
    images: int | None
    """Images computed in the whole run."""
    minutes: float | None


class Layout(NamedTuple):
    """One way to put the run on the GPUs. Bytes are those of one GPU."""

    parallel: Parallel
    checkpointing: bool
    weights: float
    """With their bfloat16 copy and a teacher's."""
    gradients: float
    optimizer: float
    average: float
    exchange: float
    """What there is to send to the other GPUs, and what came from them."""
    activations: float
    """Of the images computed at once."""
    memory: float
    """All of it: at most, for not everything is there at the same moment."""
    fits: bool
    most_at_once: int
    """Images at once for which there is room; 0: none."""
    images_per_second: float
    """Of all GPUs."""
    images: float
    """In the whole run."""
    hours: float
    gpu_hours: float
    cost: float | None


def steps_per_epoch(config: TrainConfig, images: int) -> int:
    """Steps of an epoch: what makes no whole batch, and no whole step, is left out.

    Raises `UsageError` where there is none.
    """
    batches = images // min(config.data.batch_size, images)
    if batches < config.accumulate:
        raise UsageError(
            f"{setting('accumulate')} is {config.accumulate}, but an epoch has only {batches} "
            f"batches: set {setting('accumulate')} {batches}, or a smaller "
            f"{setting('data.batch_size')}"
        )
    return batches // config.accumulate


def share_out(config: TrainConfig, cluster: Cluster, images: int) -> Load:
    """Who computes what, with `images` training images here.

    `steps = ceil(epochs * floor(floor(images / batch) / accumulate))`: an epoch leaves out what
    makes no whole batch, and no whole step. Raises `UsageError` for a batch that the GPUs cannot
    share, which the loader would refuse as well.
    """
    images = cluster.images or images
    batch = min(config.data.batch_size, images)
    each = share_of(batch, (0, cluster.gpus), config.augment, images)
    at_once = min(config.micro_batch or each, each)
    steps = None
    if config.epochs is not None:
        steps = math.ceil(config.epochs * steps_per_epoch(config, images))
    done = None if steps is None else steps * batch * config.accumulate
    return Load(batch, each, at_once, steps, done, config.minutes)


def layouts(
    sizes: Sizes,
    activations: Mapping[bool, Line],
    flops: Mapping[bool, float],
    load: Load,
    cluster: Cluster,
    *,
    half: bool,
) -> tuple[Layout, ...]:
    """DDP and FSDP, each without and with checkpointing; on one GPU there is nothing to divide.

    `activations` and `flops` (of one image, both passes) by whether there is checkpointing; `half`:
    bfloat16. Memory, with P parameters of which L learn, and N GPUs:

    - DDP, everything on every GPU: `4 P` weights, `4 L` gradients, the optimiser's states (8 L of
      AdamW), `4 P` average; in bfloat16 a copy, `2 P`, and its gradients, `2 L`; and DDP's buckets,
      as large as the gradients of what computes.
    - FSDP2 (`fully_shard` by block, ZeRO's stage 3, arXiv 1910.02054, figure 1): a share `1 / N` of
      weights, gradients, states and average; and in the format that computes, of e bytes, what is
      in no block, two blocks (the next one comes while one computes), and one block's gradients,
      which are reduced in float32: `e (outside + 2 block) + (e + 4) block`.
    - both: the activations of the images computed at once. They are not divided.

    Time: `images * flops / (N * peak * utilisation)`. Minutes are meant for this machine, and count
    only where no epochs are given.
    """
    return tuple(_layouts(sizes, activations, flops, load, cluster, half))


def held_by_one(
    sizes: Sizes, parallel: Parallel, processes: int, *, half: bool
) -> dict[str, float]:
    """What one of the processes holds from the first step to the last, part by part; see `layouts`.

    `alone` is that of a single process.
    """
    held = sizes.held
    computing = held.copy_gradients if half else held.gradients
    if parallel == "fsdp":
        width = 2 if half else 4
        block, outside = sizes.largest_block, sizes.outside_blocks
        return {
            "weights": held.weights / processes + held.teacher,
            "gradients": held.gradients / processes,
            "optimizer": held.optimizer / processes,
            "average": held.average / processes,
            "exchange": width * (outside + 2 * block) + (width + 4) * block,
        }
    several = parallel == "ddp"
    return {
        "weights": held.weights + held.copy + held.teacher,
        "gradients": held.gradients + (held.copy_gradients if several else 0),
        "optimizer": held.optimizer,
        "average": held.average,
        "exchange": computing if several else 0,
    }


def _layouts(
    sizes: Sizes,
    activations: Mapping[bool, Line],
    flops: Mapping[bool, float],
    load: Load,
    cluster: Cluster,
    half: bool,
) -> Iterator[Layout]:
    gpus = cluster.gpus
    kinds: tuple[Parallel, ...] = ("ddp", "fsdp") if gpus > 1 else ("alone",)
    for parallel in kinds:
        parts = held_by_one(sizes, parallel, gpus, half=half)
        for again in (False, True):
            line, static = activations[again], sum(parts.values())
            memory = static + line.at(load.at_once, load.each)
            rate = gpus * cluster.tflops * _TERA * cluster.utilisation / flops[again]
            seconds = 60 * (load.minutes or 0.0)
            if load.images is not None:
                seconds = load.images / rate
            gpu_hours = gpus * seconds / 3600
            yield Layout(
                parallel=parallel,
                checkpointing=again,
                **parts,
                activations=line.at(load.at_once, load.each),
                memory=memory,
                fits=memory <= cluster.room,
                most_at_once=line.most(cluster.room - static, load.each),
                images_per_second=rate,
                images=seconds * rate,
                hours=seconds / 3600,
                gpu_hours=gpu_hours,
                cost=None if cluster.price is None else gpu_hours * cluster.price,
            )
