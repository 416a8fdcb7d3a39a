"""The pages by the names of their tasks."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vitrail.evaluation import Evaluation
from vitrail.report.pages import classify


class Page(NamedTuple):
    """A task's part of the report."""

    template: str
    """A file beside this one, which extends the shell."""
    content: Callable[[Evaluation], dict[str, Any]]
    """What the template names beside the shell's."""


PAGES: Mapping[str, Page] = {
    "classify": Page("classify.html.jinja", classify.content),
}
