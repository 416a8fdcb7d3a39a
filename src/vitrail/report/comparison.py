"""The page of a comparison, compare.html: models side by side, for someone who has to choose one.

As a run's report it is one file without scripts that asks nothing of the network.
"""

import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from vitrail.bench.compare import Comparison, Row
from vitrail.bench.hog import HOG
from vitrail.bench.measure import BATCH
from vitrail.data.names import title_of
from vitrail.errors import DataError
from vitrail.report import charts, words
from vitrail.report.page import templates

PAGE = "compare.html"
_BY = "\N{MULTIPLICATION SIGN}"
_NOTHING = "\N{EN DASH}"


class Cell(NamedTuple):
    """A number, and how long its bar is beside the others of its column."""

    text: str
    share: float
    """Of the column's largest, in percent."""
    best: bool
    note: str = ""


_COLUMNS: dict[str, tuple[Callable[[Row], float | None], Callable[[float], str], bool]] = {
    "parameters": (lambda row: row.parameters, words.short, False),
    "MACs": (lambda row: row.macs, words.short, False),
    "images/s": (lambda row: row.speed and row.speed.images_per_second, words.rate, True),
    "one image": (lambda row: row.speed and row.speed.latency, words.milliseconds, False),
    "memory": (lambda row: row.memory, words.megabytes, False),
}
"""Heading -> its number, how it is written, and whether more is better."""


def write_comparison(folder: Path, comparison: Comparison, command: str) -> Path:
    """Write compare.html into the comparison's folder; `command` is what made it.

    Raises `DataError` where it cannot be written.
    """
    page = folder / PAGE
    try:
        page.write_text(render(folder, comparison, command), encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write {page}: {error.strerror}") from error
    return page


def render(folder: Path, comparison: Comparison, command: str) -> str:
    """The page's text."""
    template = templates().get_template("comparison.html.jinja")
    return template.render(**_content(folder, comparison, command))


def _content(folder: Path, comparison: Comparison, command: str) -> dict[str, Any]:
    """Everything that the template names."""
    settings, finished = comparison.settings, comparison.finished
    points = [
        charts.Point(
            row.name, row.speed.images_per_second, row.accuracy, row.name in comparison.frontier
        )
        for row in finished
        if row.speed and row.accuracy
    ]
    return {
        "title": title_of(settings.data),
        "day": str(comparison.environment.get("started", ""))[:10],
        "comparison": comparison,
        "settings": settings,
        "judged": comparison.judged,
        "best": finished[0] if finished else None,
        "rows": finished,
        "failed": [row for row in comparison.rows if row.error is not None],
        "cells": {row.name: _cells(row, finished) for row in finished},
        "columns": list(_COLUMNS),
        "chart": charts.accuracy_against_speed(points) if points else None,
        "frontier": comparison.frontier,
        "level": [row.name for row in comparison.level],
        "length": _length(settings.minutes),
        "trained": {row.name: _trained(row) for row in finished},
        "hog": HOG,
        "batch": BATCH,
        "machine": _machine(comparison),
        "commands": {
            "This comparison was made by": command,
            "Go on with it, or add models to it": f"{command} --out {shlex.quote(str(folder))}"
            if "--out" not in command
            else command,
            "Ask the best one about an image": _predict(folder, finished),
        },
    }


def _length(minutes: float) -> str:
    """As a person would say it.

    >>> _length(3), _length(0.5)
    ('3 minutes', '30 seconds')
    """
    count, unit = (minutes, "minute") if minutes >= 1 else (60 * minutes, "second")
    return f"{count:g} {unit}{'' if count == 1 else 's'}"


def _cells(row: Row, rows: list[Row]) -> list[Cell]:
    cells = []
    for value_of, text_of, more_is_better in _COLUMNS.values():
        value = value_of(row)
        others = [other for each in rows if (other := value_of(each)) is not None]
        if value is None:
            cells.append(Cell(_NOTHING, 0.0, False))
            continue
        best = (max if more_is_better else min)(others)
        share = 100 * value / max(others) if max(others) else 0.0
        cells.append(Cell(text_of(value), max(1.0, share), math.isclose(value, best)))
    speed = row.speed
    if speed:
        place = list(_COLUMNS).index("one image")
        cells[place] = cells[place]._replace(note=f"95%: {words.milliseconds(speed.latency_p95)}")
    return cells


def _trained(row: Row) -> list[str]:
    """How long it learned, and how often it saw each image."""
    taken = [] if row.training_seconds is None else [words.duration(row.training_seconds)]
    return taken if row.epochs is None else [*taken, f"{row.epochs:.3g} epochs"]


def _machine(comparison: Comparison) -> list[tuple[str, str]]:
    settings, environment = comparison.settings, comparison.environment
    versions = {"Python": environment.get("python", ""), **environment.get("versions", {})}
    side = "each model's own" if settings.size is None else f" {_BY} ".join(map(str, settings.size))
    rows = [
        ("recipe", settings.recipe),
        ("image", side if settings.size is None else f"{side} pixels"),
        ("precision", settings.precision),
        ("threads", str(settings.threads)),
        ("device", settings.device),
        ("GPU", str(environment.get("gpu") or "")),
        ("seed", str(settings.seed)),
        ("processor", str(environment.get("processor", ""))),
        ("system", str(environment.get("system", ""))),
        ("software", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    return [(name, value) for name, value in rows if value]


def _predict(folder: Path, finished: list[Row]) -> str:
    """The command for the best model that is a run."""
    runs = [row.name for row in finished if row.name != HOG]
    return f"vitrail predict {shlex.quote(str(folder / runs[0]))} IMAGE" if runs else ""
