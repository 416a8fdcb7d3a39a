"""The page, put together: everything in it is worked out here and laid out by report.html.jinja.

It is one file without scripts that asks nothing of the network. Names of classes and files are the
user's: they reach the page only through the template, which escapes them.
"""

import functools
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup
from PIL import Image

from vitrail.data.names import title_of
from vitrail.evaluation import Evaluation
from vitrail.models import ViTConfig
from vitrail.nn import patch_grid
from vitrail.report import charts, words
from vitrail.report.facts import facts, unreadable
from vitrail.report.pages import positions
from vitrail.report.pages.table import Page, page_of
from vitrail.report.pictures import Picture, cut, embed, seen
from vitrail.runs import Run

_HERE = Path(__file__).parent


class Patches(NamedTuple):
    """An image as the model sees it, and cut into its patches."""

    whole: Picture
    cut: Picture
    key: str
    size: tuple[int, int]
    """(height, width) in pixels of this image's view."""
    grid: tuple[int, int]
    """Its rows and columns of patches."""
    one_size: bool
    """Whether every image has them."""
    tiled: bool
    """Whether it is a part of the image, which the model sees tile by tile."""


def write_report(run: Run, evaluation: Evaluation) -> Path:
    """Write report.html (report-NAME.html for other images than the held-out ones) into the run.

    Raises `DataError` when the folder cannot be written to.
    """
    return run.write(f"report{evaluation.suffix}.html", render(run, evaluation))


def render(run: Run, evaluation: Evaluation) -> str:
    """The page's text."""
    page = page_of(evaluation.loaded)
    content = _content(run, evaluation, page) | page.content(evaluation)
    return templates().get_template(page.template).render(**content)


@functools.cache
def templates() -> jinja2.Environment:
    """What the pages of this room are laid out by; a template is compiled once a process."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([_HERE, _HERE / "pages"]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": words.percent,
        "span": words.span,
        "rate": words.rate,
        "tail": words.tail,
    }
    environment.globals["style"] = Markup((_HERE / "style.css").read_text(encoding="utf-8"))
    return environment


def _content(run: Run, evaluation: Evaluation, page: Page) -> dict[str, Any]:
    """Everything that the shell names, whatever the task."""
    metrics, events = evaluation.metrics, list(run.metrics())
    speeds = sorted(event["images_per_second"] for event in events if "loss" in event)
    return {
        "title": title_of(evaluation.data),
        "byline": _byline(run, evaluation),
        "evaluation": evaluation,
        "metrics": metrics,
        "headline": metrics.summary[metrics.headline],
        "notes": evaluation.notes(),
        "page": page,
        "curves": charts.curves(events, page.score(evaluation)),
        "training_speed": speeds[len(speeds) // 2] if speeds else None,
        "patches": _patches(evaluation),
        "similarity": positions.similarity(evaluation.loaded.model),
        "no_similarity": positions.why_none(evaluation.loaded.model),
        "unreadable": sorted(unreadable(evaluation).items()),
        "facts": facts(evaluation, events),
        "commands": _commands(run, evaluation),
    }


def _byline(run: Run, evaluation: Evaluation) -> list[str]:
    """The model's name and the day, as far as they are known."""
    day = str(run.environment().get("started", ""))[:10]
    return [part for part in (evaluation.loaded.config.row, day) if part]


def _patches(evaluation: Evaluation) -> Patches | None:
    """The first image that can be read; None for a model that cuts no patches."""
    config, preprocess = evaluation.loaded.model.config, evaluation.loaded.preprocess
    if not isinstance(config, ViTConfig):
        return None
    for i in evaluation.indices.tolist():
        pixels = seen(evaluation.source, i, preprocess)
        if pixels is not None:
            tiled = preprocess.resize == "tiles"
            if tiled:
                pixels = pixels[: preprocess.size[0], : preprocess.size[1]]
            size = pixels.shape[0], pixels.shape[1]
            grid = patch_grid(size, config.coarsest, config.indivisible)
            return Patches(
                embed(Image.fromarray(pixels), lossless=True),
                cut(pixels, config.coarsest, grid),
                evaluation.source.key(i),
                size,
                grid,
                preprocess.one_size,
                tiled,
            )
    return None


def _commands(run: Run, evaluation: Evaluation) -> dict[str, str]:
    """What made the run, and what makes it again."""
    path = shlex.quote(str(run.path))
    loaded = evaluation.loaded
    again = f"vitrail evaluate {path}"
    again += "" if evaluation.own else f" --data {shlex.quote(evaluation.data)}"
    again += "" if evaluation.held_out else f" --split {evaluation.part}"
    again += "" if loaded.checkpoint == loaded.config.keep else f" --checkpoint {loaded.checkpoint}"
    again += f" --tta {evaluation.tta}" if evaluation.tta != "none" else ""
    again += f" --tokens {evaluation.tokens}" if evaluation.tokens else ""
    return {
        "This run was made by": run.environment()["command"],
        "Train it again, with every setting the same": (
            f"vitrail train --config {shlex.quote(str(run.config_file))}"
        ),
        "Measure it again, and write this page anew": again,
        "Ask it about an image": f"vitrail predict {path} IMAGE",
    }
