"""How good predicted masks are, every number with the interval that chance could explain.

`count` makes of each image the few numbers that are kept of it; `segmentation` judges all images.
Intersections and unions are summed over all images before they are divided (as in mmsegmentation
and DINOv3; a mean of each image's own IoU is another number), and pixels that the truth says to
ignore are out of everything. The intervals come from drawing the images again: the pixels of one
image are no trials of their own.

Letters: h w pixels, n images, c classes, r draws at a time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int32, Int64
from torch import Tensor

from vitrail.metrics.draws import weights
from vitrail.metrics.estimate import Estimate
from vitrail.metrics.intervals import estimates, mean_of_classes

MOST_CONFUSED = 64
"""With more classes the rows of an image hold no confusion matrix, which would be the larger part
of them by far, but its diagonal and the sums of its rows and columns."""
_BOUNDARY_WIDTH = 0.02
"""Of an image's diagonal (Cheng 2021, arXiv 2103.16562)."""
_MOST_DRAWS, _LEAST_DRAWS = 1000, 200
_ROOM = 2 * 10**8
"""Images x classes x draws that take about two seconds on one core."""


def count(
    predicted: Int[Tensor, "h w"], truth: Int[Tensor, "h w"], classes: int
) -> dict[str, Int32[Tensor, "..."]]:
    """What is kept of one image, in int32: pixels, without those that `truth` ignores (below 0).

    confusion [c c]                     by [true class][predicted class]; of more than
                                        MOST_CONFUSED classes hits, predicted and truth [c] instead
    errors [3]                          pixels near a border of the truth (or of the image), those
                                        of them that are wrong, and all that are wrong
    boundary_hits, boundary_union [c]   of the boundaries of the two masks of a class: its pixels
                                        less d erosions by 3 x 3, with nothing around the image, d
                                        being 2% of the diagonal

    What is ignored is taken out of both masks before boundaries are drawn, so its own edge is one.
    Indices of classes must be below `classes`.
    """
    ignored = truth < 0
    truth = truth.long()
    predicted = torch.where(ignored, truth, predicted.long())
    found: dict[str, Tensor] = {}
    if classes <= MOST_CONFUSED:
        both = _counted(truth * classes + predicted, ignored, classes**2)
        found["confusion"] = both.reshape(classes, classes)
    else:
        found["hits"] = _counted(truth, ignored | (truth != predicted), classes)
        found["predicted"] = _counted(predicted, ignored, classes)
        found["truth"] = _counted(truth, ignored, classes)
    height, width = truth.shape
    distance = max(1, round(_BOUNDARY_WIDTH * (height**2 + width**2) ** 0.5))
    own = _boundary(truth, distance) & ~ignored
    said = _boundary(predicted, distance) & ~ignored
    hits = _counted(truth, ~(own & said & (truth == predicted)), classes)
    either = _counted(truth, ~own, classes) + _counted(predicted, ~said, classes)
    wrong = (truth != predicted) & ~ignored
    found["errors"] = torch.stack([own.sum(), (own & wrong).sum(), wrong.sum()]).int()
    return found | {"boundary_hits": hits, "boundary_union": either - hits}


def _counted(
    values: Int64[Tensor, "h w"], left_out: Bool[Tensor, "h w"], most: int
) -> Int32[Tensor, " m"]:
    """How often each of the first `most` numbers occurs."""
    kept = torch.where(left_out, most, values).flatten()
    return torch.bincount(kept, minlength=most + 1)[:most].int()


def _boundary(labels: Int64[Tensor, "h w"], distance: int) -> Bool[Tensor, "h w"]:
    """The pixels that have one of another label, or the edge, within `distance` along both axes.

    That is where the square around a pixel holds two neighbours that differ. All classes are done
    at once, in a time that does not depend on `distance`.
    """
    around = F.pad(labels, (1, 1, 1, 1), value=-2)  # which is no label
    beside = around[:, 1:] != around[:, :-1]
    below = around[1:] != around[:-1]
    sides = labels.shape
    return _near(_near(beside, distance, 0, sides), distance, 1, sides) | _near(
        _near(below, distance, 0, sides), distance, 1, sides
    )


def _near(
    found: Bool[Tensor, "_h _w"], distance: int, dim: int, sides: torch.Size
) -> Bool[Tensor, "_h2 _w2"]:
    """Whether any is true within `distance` of each pixel along `dim`.

    `found` lies there over the pixels and one more at both ends, or over the steps between those.
    """
    pixels, size = sides[dim], found.shape[dim]
    place = torch.arange(pixels, device=found.device)
    first = (place + 1 - distance).clamp(min=0)
    end = (place + distance + size - pixels).clamp(max=size)
    front = (0, 0, 1, 0) if dim == 0 else (1, 0)
    before = F.pad(found.cumsum(dim, dtype=torch.int32), front)
    return before.index_select(dim, end) > before.index_select(dim, first)


class ClassIoU(NamedTuple):
    """One class. A score that no pixel defines is None."""

    name: str
    images: int
    """Those that show it."""
    pixels: int
    """Of it, in all images."""
    predicted: int
    """Pixels said to be of it."""
    iou: Estimate | None
    accuracy: Estimate | None
    """The share of its pixels that were found: recall."""
    boundary_iou: Estimate | None


@dataclass(frozen=True)
class SegmentMetrics:
    """What predicted masks are worth."""

    images: int
    draws: int
    """How many bootstrap draws the intervals are made of."""
    mode: str
    """How the images were shown, "whole" or "slide": only numbers of one mode compare."""
    summary: dict[str, Estimate | None]
    """miou, pixel_accuracy, mean_accuracy, boundary_iou.

    Means are over classes, each counting the same. A class that is neither in the images nor
    predicted has no score and is left out; one that is predicted and not there has an IoU of 0, and
    no accuracy.
    """
    per_class: tuple[ClassIoU, ...]
    confusion: tuple[tuple[int, ...], ...] | None
    """Pixels by [true class][predicted class]; None of more than MOST_CONFUSED classes."""

    @property
    def absent(self) -> tuple[int, ...]:
        """The classes that no image shows."""
        return tuple(k for k, each in enumerate(self.per_class) if not each.pixels)

    @property
    def headline(self) -> str:
        """The name of the one number that stands for all."""
        return "miou"

    def values(self) -> dict[str, float | None]:
        """The summary without its intervals."""
        return {name: None if each is None else each.value for name, each in self.summary.items()}

    def to_dict(self) -> dict[str, Any]:
        """What metrics.json holds: the summary's numbers on top, then the parts."""
        classes = [
            {name: _plain(value) for name, value in each._asdict().items()}
            for each in self.per_class
        ]
        return {name: _plain(each) for name, each in self.summary.items()} | {
            "images": self.images,
            "draws": self.draws,
            "mode": self.mode,
            "per_class": classes,
            "confusion": self.confusion,
        }


def hits(rows: Mapping[str, Tensor]) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " n"]]:
    """Of each image the pixels that are right, and all that have a class."""
    if "confusion" in rows:
        confusion = rows["confusion"]
        return confusion.diagonal(dim1=1, dim2=2).sum(dim=1), confusion.sum(dim=(1, 2))
    return rows["hits"].sum(dim=1), rows["truth"].sum(dim=1)


def mean_iou(rows: Mapping[str, Tensor]) -> float:
    """The number alone that `segmentation` calls miou, of the same rows; NaN without any pixel."""
    sums = _Sums(*(each.sum(0, keepdim=True).T for each in _per_image(rows)))
    return _scores(sums)["iou"].nanmean().item()


def segmentation(rows: Mapping[str, Tensor], names: tuple[str, ...], mode: str) -> SegmentMetrics:
    """Metrics of predicted masks, from what `count` says of each image: each `[n ...]`.

    Where no pixel of the images counts, every score is None. Raises `ValueError` where shapes do
    not fit.

    >>> truth, predicted = torch.tensor([[0, 0, 1, -1]]), torch.tensor([[0, 1, 1, 1]])
    >>> rows = {name: row[None] for name, row in count(predicted, truth, 3).items()}
    >>> scores = segmentation(rows, ("sky", "sea", "ship"), "whole")
    >>> scores.summary["miou"].value, scores.confusion
    (0.5, ((1, 1, 0), (0, 1, 0), (0, 0, 0)))
    """
    of_image = _per_image(rows)
    n, c = of_image.truth.shape
    if not n or c != len(names):
        raise ValueError(f"rows of {n} images and {c} classes do not fit {len(names)} names")
    sums = _Sums(*(each.sum(0, keepdim=True).T for each in of_image))
    draws = min(max(_ROOM // (n * c), _LEAST_DRAWS), _MOST_DRAWS)
    value = {name: score[..., 0] for name, score in _scores(sums).items()}
    blocks = [_scores(_Sums(*(each.T @ w for each in of_image))) for w in weights(n, draws)]
    drawn = {name: torch.cat([block[name] for block in blocks], dim=-1) for name in value}
    shown = of_image.truth > 0
    trials = {  # how many images decide a class's score
        "iou": (shown | (of_image.predicted > 0)).sum(0),
        "accuracy": shown.sum(0),
        "boundary_iou": (of_image.boundary_union > 0).sum(0),
    }
    by_class = {
        name: estimates(value[name], drawn[name], decide.double())
        for name, decide in trials.items()
    }
    counted = torch.tensor(float(shown.any(1).sum()), dtype=torch.float64)
    means = {
        name: mean_of_classes(value[name], drawn[name], trials[name], counted) for name in trials
    }
    right = estimates(value["right"], drawn["right"], counted)
    confusion = rows["confusion"].sum(0, dtype=torch.int64).tolist() if _confused(rows) else None
    images, truth, predicted = (
        each.long().tolist() for each in (shown.sum(0), sums.truth[:, 0], sums.predicted[:, 0])
    )
    return SegmentMetrics(
        images=n,
        draws=draws,
        mode=mode,
        summary={
            "miou": means["iou"],
            "pixel_accuracy": right[0],
            "mean_accuracy": means["accuracy"],
            "boundary_iou": means["boundary_iou"],
        },
        per_class=tuple(
            ClassIoU(
                *(name, images[k], truth[k], predicted[k]),
                *(by_class[score][k] for score in trials),
            )
            for k, name in enumerate(names)
        ),
        confusion=None if confusion is None else tuple(map(tuple, confusion)),
    )


class _Sums(NamedTuple):
    """Pixels by class: `[n c]` of each image, or `[c r]` of all, in float64, exact below 2^53."""

    hits: Float[Tensor, "..."]
    predicted: Float[Tensor, "..."]
    truth: Float[Tensor, "..."]
    boundary_hits: Float[Tensor, "..."]
    boundary_union: Float[Tensor, "..."]


def _confused(rows: Mapping[str, Tensor]) -> bool:
    return "confusion" in rows


def _per_image(rows: Mapping[str, Tensor]) -> _Sums:
    kept = {name: row.detach().cpu() for name, row in rows.items()}
    if _confused(rows):
        both = kept["confusion"]
        kept["hits"] = both.diagonal(dim1=1, dim2=2)
        kept["predicted"], kept["truth"] = both.sum(1), both.sum(2)
    return _Sums(*(kept[name].double() for name in _Sums._fields))


def _scores(sums: _Sums) -> dict[str, Tensor]:
    """Of sums `[c r]`: by class `[c r]`, and `right [r]`; NaN where no pixel defines one."""
    hits, predicted, truth, boundary_hits, boundary_union = sums
    return {
        "iou": hits / (predicted + truth - hits),
        "accuracy": hits / truth,
        "boundary_iou": boundary_hits / boundary_union,
        "right": hits.sum(0) / truth.sum(0),
    }


def _plain(value: object) -> object:
    return value._asdict() if isinstance(value, Estimate) else value
