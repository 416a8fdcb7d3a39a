"""What the report says of features: of a task that learns without labels."""

from typing import Any, NamedTuple

import torch

from vitrail.evaluation import Evaluation
from vitrail.metrics import Estimate
from vitrail.metrics.features import FeatureMetrics
from vitrail.report import words
from vitrail.report.numbers import numbers
from vitrail.report.pictures import Picture, thumbnail

_SHOWN = 8
_NEIGHBOURS = 5

_MEANINGS = {
    "knn": ("k-NN accuracy", "how often the most alike images tell an image's class"),
    "probe": ("Linear probe", "how often one matrix, solved on the other images, tells it"),
    "std": ("Spread", "of features of length 1, times the root of their number; 0 is collapse"),
    "rankme": ("RankMe", "how many directions the features use (2210.02885)"),
    "alpha_req": ("alpha-ReQ", "by which power their variances fall; about 1 serves best"),
}
_NO_SHARES = ("std", "rankme", "alpha_req")


class Neighbours(NamedTuple):
    """An image, and those that are most like it."""

    key: str
    picture: Picture
    classes: str
    """Its own, where they are known."""
    others: tuple["Other", ...]


class Other(NamedTuple):
    """An image that is like another."""

    key: str
    picture: Picture
    alike: str
    """The cosine of the two."""
    classes: str
    shared: bool
    """Whether it has one of the other's classes, where they are known."""


def content(evaluation: Evaluation) -> dict[str, Any]:
    """Everything that features.html.jinja names beside the shell's."""
    metrics: FeatureMetrics = evaluation.metrics
    name, headline = metrics.headline, metrics.summary[metrics.headline]
    return {
        "headline_words": f"{_MEANINGS[name][0]} {_said(headline, name)}",
        "headline_value": _said(headline, name),
        "headline_span": _span(headline, name),
        "numbers": numbers(metrics.summary, _MEANINGS, no_shares=_NO_SHARES),
        "neighbours": _neighbours(evaluation),
    }


def score(evaluation: Evaluation) -> str:
    """The title of what `Embed.score` gave in training."""
    return (
        "Held-out k-NN accuracy"
        if evaluation.learned_names
        else "Held-out directions in use (RankMe)"
    )


def _said(estimate: Estimate | None, name: str) -> str:
    if estimate is None:
        return "none"
    return f"{estimate.value:.1f}" if name in _NO_SHARES else words.percent(estimate.value)


def _span(estimate: Estimate | None, name: str) -> str:
    if estimate is None:
        return ""
    if name in _NO_SHARES:
        return f"{estimate.low:.1f} to {estimate.high:.1f}"
    return words.span(estimate)


def _neighbours(evaluation: Evaluation) -> list[Neighbours]:
    """Some images, evenly spread over those that were measured, each with the most alike."""
    features = evaluation.rows["features"].float()
    n = len(features)
    found = []
    for k in torch.linspace(0, n - 1, min(_SHOWN, n)).long().tolist():
        alike = features @ features[k]
        alike[k] = -2
        order = alike.argsort(descending=True)[: min(_NEIGHBOURS, n - 1)].tolist()
        own = _picture(evaluation, k)
        others = [(j, _picture(evaluation, j)) for j in order]
        if own is not None:
            found.append(
                Neighbours(
                    _key(evaluation, k),
                    own,
                    ", ".join(_classes(evaluation, k)),
                    tuple(
                        Other(
                            _key(evaluation, j),
                            picture,
                            f"{alike[j]:.2f}",
                            ", ".join(_classes(evaluation, j)),
                            bool({*_classes(evaluation, j)} & {*_classes(evaluation, k)}),
                        )
                        for j, picture in others
                        if picture is not None
                    ),
                )
            )
    return found


def _key(evaluation: Evaluation, k: int) -> str:
    return evaluation.source.key(int(evaluation.indices[k]))


def _classes(evaluation: Evaluation, k: int) -> list[str]:
    """The image's, where they are known."""
    if "classes" not in evaluation.rows:
        return []
    there = evaluation.rows["classes"][k].tolist()
    return [name for name, one in zip(evaluation.loaded.names, there, strict=True) if one]


def _picture(evaluation: Evaluation, k: int) -> Picture | None:
    i = int(evaluation.indices[k])
    return thumbnail(evaluation.source, i, evaluation.loaded.preprocess)
