"""The best and the worst predictions, as pictures."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor

from vitrail.evaluation import Evaluation
from vitrail.report.pictures import Picture, thumbnail
from vitrail.report.words import percent

_SHOWN = 12


class Exhibit(NamedTuple):
    """One image and what was said of it."""

    picture: Picture
    key: str
    true: str
    predicted: str
    sureness: str
    """The probability of what was predicted; nothing where an image has several labels."""


def best(evaluation: Evaluation) -> list[Exhibit]:
    """Right, and the surest of it; no class takes all the places."""
    right, sureness = _judged(evaluation)
    order = sureness.argsort(descending=True).tolist()
    chosen = [k for k in order if right[k]]
    if not evaluation.metrics.multi_label:
        chosen = list(_fairly(chosen, evaluation.rows["targets"].tolist()))
    return _exhibits(evaluation, chosen)


def worst(evaluation: Evaluation) -> list[Exhibit]:
    """Wrong, and the surest of it (of several labels: the least likely truth)."""
    right, sureness = _judged(evaluation)
    order = sureness.argsort(descending=not evaluation.metrics.multi_label).tolist()
    return _exhibits(evaluation, (k for k in order if not right[k]))


def _judged(evaluation: Evaluation) -> tuple[list[bool], Tensor]:
    """Which images are right; and how sure the model was, or how likely it found the truth."""
    p, targets = evaluation.rows["probabilities"], evaluation.rows["targets"]
    if evaluation.metrics.multi_label:
        truth = targets > 0
        right = ((p >= 0.5) == truth).all(dim=1)
        return right.tolist(), p.where(truth, 1 - p).clamp(min=1e-9).log().mean(dim=1)
    confidence, predicted = p.max(dim=1)
    return (predicted == targets).tolist(), confidence


def _fairly(order: Iterable[int], classes: list[int]) -> Iterator[int]:
    """The same images, those first that are among the first few of their class."""
    order = list(order)
    share = -(-_SHOWN // max(1, len({classes[k] for k in order})))
    seen: Counter[int] = Counter()
    later = []
    for k in order:
        seen[classes[k]] += 1
        if seen[classes[k]] <= share:
            yield k
        else:
            later.append(k)
    yield from later


def _exhibits(evaluation: Evaluation, chosen: Iterable[int]) -> list[Exhibit]:
    found: list[Exhibit] = []
    for k in chosen:
        if len(found) == _SHOWN:
            break
        i = int(evaluation.indices[k])
        picture = thumbnail(evaluation.source, i, evaluation.loaded.preprocess)
        if picture is not None:
            found.append(Exhibit(picture, evaluation.source.key(i), *_said(evaluation, k)))
    return found


def _said(evaluation: Evaluation, k: int) -> tuple[str, str, str]:
    classes, p = evaluation.loaded.names, evaluation.rows["probabilities"][k]
    if evaluation.metrics.multi_label:
        true = _labels(classes, (evaluation.rows["targets"][k] > 0).tolist())
        return true, _labels(classes, (p >= 0.5).tolist()), ""
    true = classes[int(evaluation.rows["targets"][k])]
    return true, classes[int(p.argmax())], percent(float(p.max()))


def _labels(classes: tuple[str, ...], there: list[bool]) -> str:
    return ", ".join(name for name, one in zip(classes, there, strict=True) if one) or "nothing"
