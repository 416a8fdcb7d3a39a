"""How well images find their texts and texts their images, and how well words name classes.

An image may have several texts, and a text several images: captions that are the same words are one
text. Of an image's texts, and of a text's images, any that is found counts. A rank is how many that
are not its own are at least as alike as the best of its own: a model to which all is alike finds
nothing.

    image_to_text_rK   of the images, for how many one of their texts is among the K most alike
    text_to_image_rK   of the texts, for how many one of their images is
    zero_shot          of the images of a known class, for how many the words for it are most alike

Letters: n images, m texts, d what is compared, c classes, k texts of an image at most.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vitrail.errors import DataError
from vitrail.metrics.estimate import Estimate
from vitrail.metrics.intervals import share

KS = (1, 5, 10)
NUMBERS = (*(f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in KS), "zero_shot")
"""The names of all numbers."""
_AT_ONCE = 1024
"""Rows of likenesses that are there at once."""


@dataclass(frozen=True)
class RetrievalMetrics:
    """What images and texts are to each other. `summary` is in the order of `NUMBERS`."""

    images: int
    texts: int
    """Different ones, of these images: what an image's own are found among."""
    chance: dict[str, float]
    """What not knowing anything gives, by the name of the number."""
    summary: dict[str, Estimate | None]
    """zero_shot only where classes are known."""

    @property
    def headline(self) -> str:
        """The hardest of them that there always is."""
        return "image_to_text_r1"

    def values(self) -> dict[str, float | None]:
        """The summary without its intervals."""
        return {name: None if each is None else each.value for name, each in self.summary.items()}

    def to_dict(self) -> dict[str, Any]:
        """What metrics.json holds: the summary's numbers on top, then the parts."""
        numbers = {
            name: None if each is None else each._asdict() for name, each in self.summary.items()
        }
        return {**numbers, "images": self.images, "texts": self.texts, "chance": self.chance}


class Ranks(NamedTuple):
    """How many are as alike as the best of one's own, at least; 0 is found at once."""

    of_images: Int64[Tensor, " n"]
    of_texts: Int64[Tensor, " m"]


def ranks(
    images: Float[Tensor, "n d"], texts: Float[Tensor, "m d"], own: Int64[Tensor, "n k"]
) -> Ranks:
    """Of vectors of length 1; `own` are each image's texts, as rows of `texts`, and -1 for none.

    Every image has a text and every text an image.

    >>> eye = torch.eye(2)
    >>> ranks(eye, eye, torch.tensor([[1], [0]])).of_images.tolist()
    [1, 1]
    """
    n, m = len(images), len(texts)
    rows, places = own.ge(0).nonzero(as_tuple=True)
    columns = own[rows, places]
    of_images = _ranks(images, texts, rows, columns)
    return Ranks(of_images[:n], _ranks(texts, images, columns, rows)[:m])


def judged(
    images: Float[Tensor, "n d"],
    texts: Float[Tensor, "m d"],
    own: Int64[Tensor, "n k"],
    *,
    named: Float[Tensor, "c d"] | None = None,
    classes: Float[Tensor, "n c"] | None = None,
) -> RetrievalMetrics:
    """Metrics of at least one image; arguments as of `ranks`.

    `named` are the words for each class, `classes` which each image is of: zeros for none.
    Raises `DataError` when a vector is not a number.
    """
    if broken := sum(int((~x.isfinite()).any(dim=1).sum()) for x in (images, texts)):
        raise DataError(
            f"the model's vectors are not numbers for {broken} of {len(images)} images and "
            f"{len(texts)} texts: its weights are damaged, or training went astray. Use an earlier "
            f"checkpoint"
        )
    found, (n, m) = ranks(images, texts, own), (len(images), len(texts))
    summary: dict[str, Estimate | None] = {}
    chance: dict[str, float] = {}
    mine = (own >= 0).sum(dim=1).double()
    shared = torch.bincount(own[own >= 0], minlength=m).double()
    # Texts of one image stand or fall together: they are no more evidence than the image is.
    for way, rank, right, among, trials in (
        ("image_to_text", found.of_images, mine, m, n),
        ("text_to_image", found.of_texts, shared, n, min(n, m)),
    ):
        for k in KS:
            value = (rank < k).double().mean().item()
            summary[f"{way}_r{k}"] = share(value, trials)
            chance[f"{way}_r{k}"] = _by_chance(right, among, k)
    if named is not None and classes is not None:
        known = (classes > 0).any(dim=1)
        summary["zero_shot"] = None
        if known.any():
            best = (images[known] @ named.T).argmax(dim=1, keepdim=True)
            hits = (classes[known].gather(1, best) > 0).double().mean().item()
            summary["zero_shot"] = share(hits, int(known.sum()))
            chance["zero_shot"] = (classes[known] > 0).double().mean(dim=0).max().item()
    return RetrievalMetrics(n, m, chance, summary)


def _ranks(
    asked: Tensor, among: Tensor, rows: Int64[Tensor, " p"], columns: Int64[Tensor, " p"]
) -> Int64[Tensor, " a"]:
    """Of each that is asked; (rows, columns) are the pairs that belong together."""
    order = rows.argsort(stable=True)
    rows, columns = rows[order], columns[order]
    found = []
    for start in range(0, len(asked), _AT_ONCE):
        alike = asked[start : start + _AT_ONCE] @ among.T
        first, last = torch.searchsorted(rows, torch.tensor([start, start + len(alike)])).tolist()
        here = rows[first:last] - start, columns[first:last]
        best = alike.new_full((len(alike),), -torch.inf)
        best = best.scatter_reduce(0, here[0], alike[here], "amax")
        alike[here] = -torch.inf
        found.append((alike >= best[:, None]).sum(dim=1))
    return torch.cat(found)


def _by_chance(right: Float[Tensor, " a"], among: int, k: int) -> float:
    """The mean chance that any of so many right ones is among k of all, drawn without looking."""
    missed = torch.ones_like(right)
    for drawn in range(min(k, among)):
        missed = missed * ((among - drawn - right).clamp(min=0) / (among - drawn))
    return (1 - missed).mean().item()
