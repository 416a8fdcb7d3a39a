"""What the report says of images and texts that are to find each other."""

from typing import Any, NamedTuple

import torch

from vitrail.evaluation import Evaluation
from vitrail.metrics.retrieval import KS, RetrievalMetrics, ranks
from vitrail.report import words
from vitrail.report.numbers import numbers
from vitrail.report.pictures import Picture, thumbnail
from vitrail.tasks import Pair

_SHOWN = 12
_TEXTS = 5

_MEANINGS = {
    **{
        f"{way}_r{k}": (f"{title} R@{k}", f"{what} among the {k} most alike" if k > 1 else what)
        for way, title, what in (
            ("image_to_text", "Image to text", "how many images have a text of theirs"),
            ("text_to_image", "Text to image", "how many texts have their image"),
        )
        for k in KS
    },
    "zero_shot": ("Zero-shot", "how often the name of an image's class is most alike"),
}


class Found(NamedTuple):
    """An image, and the texts that are most like it."""

    key: str
    picture: Picture
    own: str
    rank: int
    """Of the best of its own texts, from 1."""
    texts: tuple["Text", ...]


class Text(NamedTuple):
    """A text that an image is like."""

    words: str
    alike: str
    """The cosine of the two."""
    own: bool


def content(evaluation: Evaluation) -> dict[str, Any]:
    """Everything that pairs.html.jinja names beside the shell's."""
    metrics: RetrievalMetrics = evaluation.metrics
    found, headline = _found(evaluation), metrics.summary[metrics.headline]
    assert headline is not None
    return {
        "headline_words": f"image to text R@1 {words.percent(headline.value)}",
        "numbers": numbers(metrics.summary, _MEANINGS),
        "right": [each for each in found if each.rank == 1],
        "wrong": [each for each in found if each.rank > 1],
    }


def _found(evaluation: Evaluation) -> list[Found]:
    """Some images that find a text of theirs at once, evenly spread, and some that find another
    first, the worst of them.
    """
    task = evaluation.loaded.task
    assert isinstance(task, Pair)
    vectors, own, texts = task.found(evaluation.rows)
    images = evaluation.rows["vectors"].float()
    places = ranks(images, vectors, own).of_images + 1
    right, wrong = (places == 1).nonzero()[:, 0], places.argsort(descending=True, stable=True)
    chosen = [
        *right[torch.linspace(0, len(right) - 1, min(_SHOWN, len(right))).long()].tolist(),
        *(k for k in wrong[:_SHOWN].tolist() if places[k] > 1),
    ]
    found = []
    for k in chosen:
        i = int(evaluation.indices[k])
        picture = thumbnail(evaluation.source, i, evaluation.loaded.preprocess)
        if picture is None:
            continue
        mine = {j for j in own[k].tolist() if j >= 0}
        alike = vectors @ images[k]
        order = alike.argsort(descending=True)[:_TEXTS].tolist()
        found.append(
            Found(
                evaluation.source.key(i),
                picture,
                texts[min(mine)],
                int(places[k]),
                tuple(Text(texts[j], f"{alike[j]:.2f}", j in mine) for j in order),
            )
        )
    return found
