"""The table of numbers of a page, whatever the task."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

from vitrail.metrics import Estimate
from vitrail.report import words


class Number(NamedTuple):
    """A row of the table."""

    name: str
    meaning: str
    value: str
    span: str
    estimate: Estimate
    is_share: bool
    over_all: str
    """The value when every class counts; empty where that is the same."""


def numbers(
    summary: Mapping[str, Estimate | None],
    meanings: Mapping[str, tuple[str, str]],
    *,
    no_shares: Collection[str] = (),
    over_all: Mapping[str, Estimate] | None = None,
) -> list[Number]:
    """Those of a summary that are defined; `meanings` has name and meaning of each, and `no_shares`
    are not between 0 and 1.
    """
    every = over_all or {}
    return [
        Number(
            *meanings[key],
            shown(estimate, is_share=key not in no_shares),
            words.span(estimate, key not in no_shares),
            estimate,
            key not in no_shares,
            words.percent(every[key].value) if key in every else "",
        )
        for key, estimate in summary.items()
        if estimate is not None
    ]


def shown(estimate: Estimate, *, is_share: bool) -> str:
    """The number alone."""
    return words.percent(estimate.value) if is_share else f"{estimate.value:.3f}"
