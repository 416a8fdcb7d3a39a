"""What the report says of features: of a task that learns without labels."""

from typing import Any, NamedTuple

import torch

from vitrail.evaluation import Evaluation
from vitrail.metrics.features import FeatureMetrics
from vitrail.report import words
from vitrail.report.numbers import numbers, shown
from vitrail.report.pictures import Picture, thumbnail

_SHOWN = 8
_NEIGHBOURS = 5

_MEANINGS = {
    "knn": ("k-NN accuracy", "how often the most alike images tell an image's class"),
    "probe": ("Linear probe", "how often one matrix, solved on the other images, tells it"),
    "std": ("Spread", "of features of length 1, times the root of their number; 0 is collapse"),
    "rankme": ("RankMe", "how many directions the features use (2210.02885)"),
}
_NO_SHARES = ("std", "rankme")


class Neighbours(NamedTuple):
    """An image, and those that are most like it."""

    key: str
    picture: Picture
    others: tuple[tuple[str, Picture, str], ...]
    """Key, picture and likeness of each."""


def content(evaluation: Evaluation) -> dict[str, Any]:
    """Everything that features.html.jinja names beside the shell's."""
    metrics: FeatureMetrics = evaluation.metrics
    headline, is_share = metrics.summary[metrics.headline], metrics.headline not in _NO_SHARES
    value = shown(headline, is_share=is_share) if headline else "none"
    return {
        "headline_words": f"{metrics.headline} {value}",
        "headline_value": value,
        "headline_span": words.span(headline, is_share) if headline else "",
        "numbers": numbers(metrics.summary, _MEANINGS, no_shares=_NO_SHARES),
        "neighbours": _neighbours(evaluation),
    }


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
                    tuple(
                        (_key(evaluation, j), picture, f"{alike[j]:.2f}")
                        for j, picture in others
                        if picture is not None
                    ),
                )
            )
    return found


def _key(evaluation: Evaluation, k: int) -> str:
    return evaluation.source.key(int(evaluation.indices[k]))


def _picture(evaluation: Evaluation, k: int) -> Picture | None:
    i = int(evaluation.indices[k])
    return thumbnail(evaluation.source, i, evaluation.loaded.preprocess)
