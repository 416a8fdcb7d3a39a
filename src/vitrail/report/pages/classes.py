"""Class by class: what was right, what was taken for what."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vitrail.evaluation import Evaluation
from vitrail.metrics import ClassScores
from vitrail.report.words import percent

CLASSES_IN_A_MATRIX = 30
"""More do not fit on a page: the most confused pairs are listed instead."""
_CARDS = 12
_PAIRS = 20
_SQUARES = 120
"""The most squares a class has; with more images a square stands for several."""
_COLUMNS = 30


class Confused(NamedTuple):
    """`images` of class `true` were taken for `predicted`: `share` of the class."""

    true: str
    predicted: str
    images: int
    share: str


@dataclass(frozen=True)
class ClassRow:
    """One class, as a card and as a row of the table."""

    name: str
    scores: ClassScores
    right: int
    taken_for: tuple[tuple[str, int], ...]
    """What its images were taken for instead, most often first."""
    false_alarms: int
    """Images that were said to be of the class and are not."""
    right_squares: str
    """SVG path data."""
    wrong_squares: str
    columns: int
    lines: int


class Cell(NamedTuple):
    """One field of the confusion matrix."""

    images: int
    share: float
    """Of the row's images, 0 to 1: how strong its colour is."""
    title: str


class MatrixRow(NamedTuple):
    """One true class of the confusion matrix."""

    name: str
    cells: tuple[Cell, ...]


def class_rows(evaluation: Evaluation) -> list[ClassRow]:
    """All classes, in the model's order."""
    names, metrics = evaluation.loaded.names, evaluation.metrics
    most = max(each.support for each in metrics.per_class)
    images_per_square = max(1, -(-most // _SQUARES))
    rows = []
    for k, (name, scores) in enumerate(zip(names, metrics.per_class, strict=True)):
        recall = scores.scores["recall"]
        right = round(scores.support * recall.value) if recall else 0
        taken_for: list[tuple[str, int]] = []
        if metrics.confusion is not None:
            counts = enumerate(metrics.confusion[k])
            taken_for = [(names[j], count) for j, count in counts if count and j != k]
            taken_for.sort(key=lambda pair: -pair[1])
        squares = _squares(scores.support, right, images_per_square)
        rows.append(
            ClassRow(name, scores, right, tuple(taken_for[:3]), scores.predicted - right, *squares)
        )
    return rows


def images_per_square(evaluation: Evaluation) -> int:
    """How many images a square stands for."""
    return max(1, -(-max(each.support for each in evaluation.metrics.per_class) // _SQUARES))


def cards(rows: Sequence[ClassRow]) -> list[ClassRow]:
    """The classes that the page tells of, best first; of very many, those with most mistakes."""
    there = [row for row in rows if row.scores.support]
    if len(there) > CLASSES_IN_A_MATRIX:
        there = sorted(there, key=lambda row: row.right - row.scores.support)[:_CARDS]
    return sorted(there, key=lambda row: -row.right / row.scores.support)


def matrix(evaluation: Evaluation) -> list[MatrixRow]:
    """The confusion matrix to print; empty where there is none, or too large a one."""
    counts, names = evaluation.metrics.confusion, evaluation.loaded.names
    if counts is None or len(names) > CLASSES_IN_A_MATRIX:
        return []
    return [
        MatrixRow(
            name,
            tuple(
                Cell(
                    count,
                    count / max(1, sum(row)),
                    f"{count} of {sum(row)} images of {name} were taken for {other}",
                )
                for count, other in zip(row, names, strict=True)
            ),
        )
        for name, row in zip(names, counts, strict=True)
    ]


def most_confused(evaluation: Evaluation) -> list[Confused]:
    """The pairs of classes that are mixed up most often."""
    counts, names = evaluation.metrics.confusion or (), evaluation.loaded.names
    pairs = [
        Confused(names[i], names[j], count, percent(count / sum(row)))
        for i, row in enumerate(counts)
        for j, count in enumerate(row)
        if i != j and count
    ]
    return sorted(pairs, key=lambda pair: -pair.images)[:_PAIRS]


def _squares(support: int, right: int, per_square: int) -> tuple[str, str, int, int]:
    """Path data of the squares of right and of wrong images; and columns and lines of all."""
    squares = -(-support // per_square)
    filled = round(squares * right / max(1, support))
    paths = ["", ""]
    for square in range(squares):
        line, column = divmod(square, _COLUMNS)
        paths[square >= filled] += f"M{column * 10} {line * 10}h8v8h-8z"
    return paths[0], paths[1], _COLUMNS, max(1, -(-squares // _COLUMNS))
