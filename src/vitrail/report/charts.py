"""Charts as SVG that takes its colours and letters from the page it stands in.

Drawn by matplotlib through its objects alone, without pyplot's global state. No text from the user
(class names, file names) ever comes here.
"""

import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, PercentFormatter
from matplotlib.transforms import Bbox

from vitrail.metrics import Bin, Estimate, Kept

_INK, _RIGHT, _WRONG, _MUTED = "#010101", "#020202", "#030303", "#040404"
_VARIABLES = {_INK: "--ink", _RIGHT: "--right", _WRONG: "--wrong", _MUTED: "--muted"}
_SIDES = (("left", 9, -4), ("right", -9, -4), ("center", 0, 10), ("center", 0, -17))
"""Where a point's name may stand: its alignment, and how far from the point, in points."""
_POINTS = 400
"""More than a chart is wide."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vitrail",
    "font.size": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": _MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.labelcolor": _MUTED,
    "text.color": _INK,
}


def curves(events: Sequence[dict[str, Any]], score: str) -> dict[str, Markup]:
    """Title -> chart, from the lines of metrics.jsonl; empty for a run that logged nothing.
    `score`: the title of held-out images' score.
    """
    steps = [event for event in events if "loss" in event]
    scores = [event for event in events if score_of(event)]
    found: dict[str, Markup] = {}
    if len(steps) > 1:
        unit, per_unit = _time_unit(steps[-1]["seconds"])
        time = np.array([event["seconds"] for event in steps]) / per_unit
        loss, lr, speed = (
            np.array([event[key] for event in steps]) for key in ("loss", "lr", "images_per_second")
        )
        found["Training loss"] = _smoothed(time, loss, unit)
        if scores:
            found[score] = _scores(scores, unit, per_unit)
        found["Learning rate"] = _plain(time, lr, unit)
        found["Images per second in training"] = _smoothed(time, speed, unit, from_zero=True)
    return found


@matplotlib.rc_context(_STYLE)
def calibration(bins: Sequence[Bin]) -> Markup:
    """How often predictions come true, against how sure they were; below, how many there are."""
    figure = Figure(figsize=(3.6, 4.0), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[4, 1], sharex=True)
    above.plot([0, 1], [0, 1], color=_MUTED, linewidth=0.8, linestyle=(0, (4, 4)))
    confidence = [part.confidence for part in bins]
    accuracy = [part.accuracy for part in bins]
    above.vlines(confidence, accuracy, confidence, color=_WRONG, linewidth=1.2)
    above.plot(confidence, accuracy, color=_RIGHT, linewidth=1.2, marker="o", markersize=4.5)
    above.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="came true")
    left = [part.low for part in bins]
    width = [part.high - part.low for part in bins]
    counts = [part.decisions for part in bins]
    below.bar(left, counts, width, align="edge", color=_MUTED, alpha=0.45)
    below.set(xlabel="said with probability", ylabel="how many")
    below.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    for axis in (above.xaxis, above.yaxis, below.xaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    return _svg(figure, "calibration")


@matplotlib.rc_context(_STYLE)
def precision_recall(rows: Sequence[tuple[float, float, float]]) -> Markup:
    """Precision at each recall, at an IoU of 0.5 and as the mean over IoUs."""
    recall, half, every = zip(*rows, strict=True)
    figure, axes = _shares("objects found (recall)", "boxes right (precision)")
    axes.fill_between(recall, every, color=_RIGHT, alpha=0.08, linewidth=0)
    axes.plot(recall, half, color=_RIGHT, linewidth=1.6, label="IoU 0.5")
    axes.plot(recall, every, color=_MUTED, linewidth=1.2, label="IoU 0.5 to 0.95, mean")
    axes.legend(frameon=False, loc="upper right")
    return _svg(figure, "recall")


@matplotlib.rc_context(_STYLE)
def thresholds(rows: Sequence[Kept], best: float | None) -> Markup:
    """Precision, recall and F1 of the boxes from a score on; upright, the best such score."""
    figure, axes = _shares("boxes kept from this score on", "at an IoU of 0.5")
    score = [row.threshold for row in rows]
    axes.set_xlim(0, max(row.threshold for row in rows if row.found) + 0.02)
    if best is not None:
        axes.axvline(best, color=_MUTED, linewidth=0.8, linestyle=(0, (4, 4)))
    precision = [np.nan if row.precision is None else row.precision for row in rows]
    axes.plot(score, precision, color=_RIGHT, linewidth=1.2, label="right (precision)")
    axes.plot(
        score, [row.recall for row in rows], color=_WRONG, linewidth=1.2, label="found (recall)"
    )
    axes.plot(score, [row.f1 for row in rows], color=_INK, linewidth=1.8, label="F1")
    axes.legend(frameon=False, loc="best")
    return _svg(figure, "thresholds")


def _shares(x: str, y: str) -> tuple[Figure, Axes]:
    """Axes from 0 to 1."""
    figure = Figure(figsize=(3.6, 3.0), layout="constrained")
    axes = figure.subplots()
    axes.grid(color=_MUTED, linewidth=0.4, alpha=0.3)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel=x, ylabel=y)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure, axes


class Point(NamedTuple):
    """One model, where its speed and its accuracy put it."""

    name: str
    images_per_second: float
    accuracy: Estimate
    ahead: bool
    """Whether no other is at least as fast and more accurate."""


@matplotlib.rc_context(_STYLE)
def accuracy_against_speed(points: Sequence[Point]) -> Markup:
    """A point a model, with its interval; below and left of the line another model is better."""
    figure = Figure(figsize=(7.6, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.grid(color=_MUTED, linewidth=0.4, alpha=0.3)
    speeds = [point.images_per_second for point in points]
    if max(speeds) > 4 * min(speeds):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(LogLocator(10, subs=()))
        axes.set_xlim(min(speeds) / 1.35, max(speeds) * 1.35)
    else:
        axes.set_xlim(0.8 * min(speeds), 1.2 * max(speeds))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:g}"))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set(xlabel="images a second", ylabel="right, of the held-out images")
    low, high = (f(point.accuracy[k] for point in points) for f, k in ((min, 1), (max, 2)))
    room = 0.08 * (high - low) or 0.02
    axes.set_ylim(max(low - room, -0.01), min(high + room, 1.01))
    # Of models at least so fast, the best: level to the left of each point, a step down at it.
    ahead = sorted((p for p in points if p.ahead), key=lambda point: point.images_per_second)
    x = [axes.get_xlim()[0], *(point.images_per_second for point in ahead)]
    y = [ahead[0].accuracy.value, *(point.accuracy.value for point in ahead)]
    axes.plot(x, y, drawstyle="steps-pre", color=_RIGHT, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.fill_between(x, y, step="pre", color=_RIGHT, alpha=0.05, linewidth=0)
    for _, speed, accuracy, is_ahead in points:
        colour = _RIGHT if is_ahead else _MUTED
        axes.vlines(speed, accuracy.low, accuracy.high, color=colour, linewidth=3.5, alpha=0.3)
        axes.plot(speed, accuracy.value, "o", color=colour, markersize=6.5)
    _label(figure, axes, points)
    return _svg(figure, "speed")


def _label(figure: Figure, axes: Axes, points: Sequence[Point]) -> None:
    """Names beside their points, each on the side where it covers least."""
    figure.draw_without_rendering()  # only then is it known where everything lies
    scale = figure.dpi / 72
    dots = [axes.transData.transform((p.images_per_second, p.accuracy.value)) for p in points]
    taken = [
        Bbox.from_bounds(x - 6 * scale, y - 6 * scale, 12 * scale, 12 * scale) for x, y in dots
    ]
    for point, (x, _) in zip(points, dots, strict=True):
        ends = [axes.transData.transform((1, end))[1] for end in point.accuracy[1:]]
        taken.append(Bbox([[x - 2 * scale, ends[0]], [x + 2 * scale, ends[1]]]))
    for point in points:
        tries: list[tuple[float, Annotation, Bbox]] = []
        for align, right, up in _SIDES:
            text = axes.annotate(
                point.name,
                (point.images_per_second, point.accuracy.value),
                (right, up),
                textcoords="offset points",
                ha=align,
                color=_INK if point.ahead else _MUTED,
                fontweight="bold" if point.ahead else "normal",
            )
            text.set_in_layout(False)
            box = text.get_window_extent()
            outside = _area(box) - _overlap(box, axes.bbox)
            tries.append((3 * outside + sum(_overlap(box, other) for other in taken), text, box))
        _, chosen, place = min(tries, key=lambda attempt: attempt[0])
        taken.append(place)
        for _, text, _ in tries:
            if text is not chosen:
                text.remove()


def _area(box: Bbox) -> float:
    return float(box.width * box.height)


def _overlap(one: Bbox, other: Bbox) -> float:
    shared = Bbox.intersection(one, other)
    return _area(shared) if shared else 0.0


def _time_unit(seconds: float) -> tuple[str, float]:
    if seconds < 180:
        return "seconds of training", 1
    return ("minutes of training", 60) if seconds < 3 * 3600 else ("hours of training", 3600)


@matplotlib.rc_context(_STYLE)
def _smoothed(time: np.ndarray, values: np.ndarray, unit: str, from_zero: bool = False) -> Markup:
    """Every step thin, and a running median over a fortieth of the run."""
    half = max(1, len(values) // 80)
    padded = np.pad(values, half, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    smooth = np.median(windows, axis=1)
    figure, axes = _axes(unit)
    axes.plot(*_thinned(time, values), color=_MUTED, linewidth=0.5, alpha=0.55)
    axes.plot(*_thinned(time, smooth), color=_RIGHT, linewidth=1.6)
    # One slow step (a checkpoint, a busy machine) must not flatten all the others.
    top = float(np.quantile(values, 0.995)) * 1.05
    axes.set_ylim(0 if from_zero else min(0, float(values.min())), top or 1)
    return _svg(figure, f"smoothed{from_zero:d}")


@matplotlib.rc_context(_STYLE)
def _plain(time: np.ndarray, values: np.ndarray, unit: str) -> Markup:
    figure, axes = _axes(unit)
    axes.plot(*_thinned(time, values), color=_RIGHT, linewidth=1.6)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=False)
    return _svg(figure, "plain")


@matplotlib.rc_context(_STYLE)
def _scores(events: Sequence[dict[str, Any]], unit: str, per_unit: float) -> Markup:
    figure, axes = _axes(unit)
    time = [event["seconds"] / per_unit for event in events]
    score = [event[score_of(event)] for event in events]
    axes.plot(time, score, color=_RIGHT, linewidth=1.6, marker="o", markersize=3.5)
    axes.set_ylim(0, 1.04)
    axes.set_xlim(left=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return _svg(figure, "scores")


def _axes(unit: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(3.6, 2.3), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(unit)
    axes.grid(axis="y", color=_MUTED, linewidth=0.4, alpha=0.35)
    axes.margins(x=0.01)
    return figure, axes


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `_POINTS` of the points, the last among them."""
    chosen = np.unique(np.linspace(0, len(x) - 1, min(len(x), _POINTS)).round().astype(int))
    return x[chosen], y[chosen]


def _svg(figure: Figure, name: str) -> Markup:
    """The figure as an element that can stand in a page among others, `name` apart from them."""
    stream = io.StringIO()
    # Not `savefig`, which draws everything once before, for nothing.
    FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"<svg[^>]*viewBox=\"([^\"]*)\"[^>]*>", r'<svg viewBox="\1">', text, count=1)
    text = _own_ids(text, name)
    text = text.replace("xlink:href", "href")
    text = re.sub(r" font-family: [^;\"]*;", "", text)
    text = re.sub(r"(\.\d\d)\d+", r"\1", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return Markup(re.sub(r"\s*\n\s*", "\n", text))  # made here, of numbers only


def _own_ids(text: str, name: str) -> str:
    """Keep the ids that are referred to, and make them the chart's own."""
    used = set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", text))
    names = {one or other for one, other in used}

    def renamed(match: re.Match[str]) -> str:
        return f' id="{name}-{match[1]}"' if match[1] in names else ""

    text = re.sub(r" id=\"([^\"]+)\"", renamed, text)
    return re.sub(r"url\(#|href=\"#", lambda match: f"{match[0]}{name}-", text)


def score_of(event: dict[str, Any]) -> str:
    """The name under which an event of the log has the score of held-out images; empty: none."""
    return next((name for name in event if name.startswith("val_")), "")
