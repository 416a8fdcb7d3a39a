"""The pages: of a task, or of what its model says."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vitrail.evaluation import Evaluation
from vitrail.report.pages import classify, detect, features, pairs, segment
from vitrail.runs.load import LoadedRun


class Page(NamedTuple):
    """A task's part of the report."""

    template: str
    """A file beside this one, which extends the shell."""
    content: Callable[[Evaluation], dict[str, Any]]
    """What the template names beside the shell's."""
    answers: str
    """What the model makes of files."""
    rows: str
    """What of each image is in predictions.csv, and the verb."""
    score: Callable[[Evaluation], str]
    """The title of the chart of `val_...`, the number that training watched."""


_PAIRS = Page(
    "pairs.html.jinja",
    pairs.content,
    answers="features",
    rows="Each image's nearest text is",
    score=lambda evaluation: "Held-out R@1, mean of both ways",
)

PAGES: Mapping[str, Page] = {
    "classify": Page(
        "classify.html.jinja",
        classify.content,
        answers="probabilities",
        rows="Every prediction is",
        score=lambda evaluation: "Held-out accuracy",
    ),
    "segment": Page(
        "segment.html.jinja",
        segment.content,
        answers="masks",
        rows="Each image's own scores are",
        score=lambda evaluation: "Held-out mean IoU",
    ),
    "detect": Page(
        "detect.html.jinja",
        detect.content,
        answers="boxes",
        rows="Each image's objects are",
        score=lambda evaluation: "Held-out AP",
    ),
    "features": Page(
        "features.html.jinja",
        features.content,
        answers="features",
        rows="Each image's nearest one is",
        score=features.score,
    ),
    "clip": _PAIRS,
    "siglip": _PAIRS,
    "lit": _PAIRS,
}
"""By the name of a task, or else by the kind of what its model says (`Reading.kind`)."""


def page_of(loaded: LoadedRun) -> Page:
    """A run's."""
    return PAGES.get(loaded.config.task) or PAGES[loaded.task.reading.kind]
