"""What `vitrail train --plan` says: the run on this machine, then on paper, then what is wrong."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from rich.text import Text

from vitrail.cli.table import Column, print_facts, print_table
from vitrail.planning.cluster import RESERVED, Layout
from vitrail.planning.plan import Plan
from vitrail.planning.tryout import Tryout
from vitrail.report import words
from vitrail.units import bytes_text

_NAMES = {"alone": "one GPU", "ddp": "DDP", "fsdp": "FSDP"}


class _Row(NamedTuple):
    what: str
    value: str
    how: str = ""


def show_plan(plan: Plan) -> dict[str, Any]:
    """Print it; what --json says."""
    print_facts(map(_cells, (*_here(plan), *_cluster(plan))))
    print_table(_LAYOUT, map(_layout, plan.layouts))
    print_facts((each.level, f"{each.text}: {each.mend}") for each in plan.problems)
    return {"plan": plan.to_dict()}


def _cells(row: _Row) -> tuple[Text, Text]:
    how = Text(f"; {row.how}" if row.value and row.how else row.how, "dim")
    return Text(row.what, "bold"), Text(row.value) + how


def _here(plan: Plan) -> Iterator[_Row]:
    config, sizes, memory, disk = plan.config, plan.sizes, plan.memory, plan.disk
    learning = (
        "" if sizes.learning == sizes.parameters else f", {words.short(sizes.learning)} learn"
    )
    yield _Row(
        "model",
        f"{words.short(sizes.parameters)} parameters{learning}",
        f"{words.short(plan.forward_flops)}FLOP an image forward, {words.short(plan.flops)}FLOP "
        f"with the backward pass{' and checkpointing' if config.checkpointing else ''}",
    )
    if plan.time and plan.tryout:
        time, images = plan.time, plan.tryout.images
        batch = config.accumulate * config.data.batch_size
        yield _Row(
            "step",
            f"{_seconds(time.step)}, {_seconds(time.later_step)} from the second epoch",
            f"{_seconds(time.data)} waiting for images; measured with {images} at once, a "
            f"step has {batch:,}",
        )
        yield _Row(
            "speed",
            f"{words.rate(time.images_per_second)} images/s",
            f"{words.percent(time.share_of_peak)} of the "
            f"{words.short(plan.tryout.rate)}FLOP/s that a matrix product reaches here",
        )
        yield _Row(
            "length",
            f"{_counted(time.steps, 'step')}, {time.epochs:.3g} epochs",
            f"{_counted(time.steps_per_epoch, 'step')} an epoch",
        )
        before = f"{words.duration(time.head)} for the head, " if time.head else ""
        before += f"{words.duration(time.warm)} to compile, " if config.compile else ""
        yield _Row(
            "time",
            words.duration(time.total),
            f"{before}{words.duration(time.training - time.head)} training, "
            f"{words.duration(time.evaluation)} measuring on held-out images",
        )
    parts = {
        "weights, gradients, optimiser": memory.held,
        "activations": memory.activations,
        "the batch": memory.batch,
        "decoded images": memory.cache,
        "a checkpoint on its way": memory.saving,
    }
    yield _Row(
        "memory",
        f"{bytes_text(memory.needed)} of {_known(memory.free)} free",
        ", ".join(f"{bytes_text(size)} {name}" for name, size in parts.items()),
    )
    if plan.tryout and plan.tryout.error is not None:
        yield _Row("", "", _error(plan.tryout))
    most = "room unknown" if memory.most_at_once is None else f"room for {memory.most_at_once:,}"
    yield _Row("at once", f"{_counted(memory.at_once, 'image')}, {most}")
    yield _Row(
        "disk",
        f"{bytes_text(disk.needed)} of {_known(disk.free)} free",
        f"{disk.kept} checkpoints of {bytes_text(disk.checkpoint)}, "
        f"{bytes_text(disk.other)} log and predictions",
    )


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _seconds(time: float) -> str:
    return f"{time:.3f} s" if time < 1 else words.duration(time)


def _error(tried: Tryout) -> str:
    assert tried.measured is not None and tried.error is not None
    return (
        f"of a step of {tried.images} images {bytes_text(tried.estimated)} were foreseen, "
        f"{bytes_text(tried.measured)} measured ({tried.error:+.0%})"
    )


def _known(size: int | None) -> str:
    return "an unknown amount" if size is None else bytes_text(size)


def _cluster(plan: Plan) -> Iterator[_Row]:
    cluster, (way, *_) = plan.cluster, plan.layouts
    price = "" if cluster.price is None else f", {cluster.price:g} an hour each"
    yield _Row(
        "on paper",
        f"{_counted(cluster.gpus, 'GPU')} of {cluster.memory:g} GB{price}",
        f"{words.short(way.images)} images at {words.percent(cluster.utilisation)} of "
        f"{cluster.tflops:g} TFLOP/s, without evaluation; {words.percent(RESERVED)} of the memory "
        f"is left alone",
    )


_LAYOUT = (
    Column("", justify="left"),
    Column("weights", 7),
    Column("gradients", 9),
    Column("optimiser", 10),
    Column("average", 12),
    Column("exchange", 11),
    Column("activations", 8),
    Column("a GPU", 1),
    Column("fits", 2),
    Column("room for", 5),
    Column("images/s", 6),
    Column("time", 3),
    Column("GPU-hours", 4),
    Column("cost", 4),
)


def _layout(layout: Layout) -> tuple[str, ...]:
    """The cells of `_LAYOUT`."""
    again = ", checkpointing" if layout.checkpointing else ""
    parts = (
        layout.weights, layout.gradients, layout.optimizer, layout.average, layout.exchange,
        layout.activations, layout.memory,
    )  # fmt: skip
    return (
        _NAMES[layout.parallel] + again,
        *map(bytes_text, parts),
        "yes" if layout.fits else "no",
        f"{layout.most_at_once:,}",
        words.rate(layout.images_per_second),
        words.duration(3600 * layout.hours),
        f"{layout.gpu_hours:,.1f}",
        "" if layout.cost is None else f"{layout.cost:,.2f}",
    )
