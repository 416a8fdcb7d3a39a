"""What is known of an image in the end, and how it is read from what a model says.

A task says in arrays, by name, what its model makes of views of one size (`Task.outputs`), here or
in a graph that was exported. What becomes of them is the same wherever they were computed:

- classify: logits, probabilities [b c]; a `Prediction`
- segment: scores [b c rows columns], at the head's stride; a `Segmentation`
- detect: boxes [b k 4] in the view's pixels, scores and labels [b k], the likeliest first;
  `Detections`
- features: features [b d], of length 1; an `Embedding`

Nothing here imports torch: a model that was exported answers without it.

Letters: b views, c classes, d boxes found (of features: dimensions), k candidates, h w pixels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Float64, Int16, Int64, Num

from vitrail.data.sources.tiled import starts as tiles
from vitrail.data.views.seen import Seen
from vitrail.found import LEAST_SCORE, Found, best_of, merged

View = Num[np.ndarray, "c _h _w"]
Outputs = Mapping[str, np.ndarray]
Look = Callable[[Sequence[Any]], Outputs]
"""What a model says of views, each `[c h w]`, of one size unless the model takes several."""
AS_THEY_ARE = ("{}",)
"""Of labels in words that say all themselves: the template that they are put into."""

_AT_ONCE = 8
"""Windows of an image that are looked at together."""
_STRIDE = 2 / 3
"""From one window to the next, as a share of its side (DINOv2's evaluation: 341 of 512)."""
_ROOM = 2**24
"""Numbers that are read at once from a map of scores."""


class Prediction(NamedTuple):
    """What a classifier says of one image."""

    label: str
    """The likeliest class."""
    probability: float
    probabilities: dict[str, float]
    """Every class, likeliest first. With several labels an image they do not add up to 1."""


class Segmentation(NamedTuple):
    """What a model says of the pixels of one image."""

    mask: Int16[np.ndarray, "h w"]
    """The class of each pixel, at the image's own size."""
    names: tuple[str, ...]

    @property
    def shares(self) -> dict[str, float]:
        """How much of the image each class has, the most first; those that it has."""
        counts = np.bincount(self.mask.ravel(), minlength=len(self.names)) / self.mask.size
        return {self.names[k]: float(counts[k]) for k in np.argsort(-counts) if counts[k]}


class Detections(NamedTuple):
    """What a model finds in one image, the best first."""

    boxes: Float64[np.ndarray, "d 4"]
    """(left, top, right, bottom) in the image's own pixels, upright."""
    labels: Int64[np.ndarray, " d"]
    """Indices into `names`."""
    scores: Float64[np.ndarray, " d"]
    """0 to 1: to sort by, no probabilities."""
    names: tuple[str, ...]

    def above(self, least: float) -> "Detections":
        """Those of at least this score."""
        kept = self.scores >= least
        return Detections(self.boxes[kept], self.labels[kept], self.scores[kept], self.names)


class Embedding(NamedTuple):
    """What is known of one image where nothing was named."""

    features: Float32[np.ndarray, " d"]
    """Of length 1: the product of two is how alike the images are, 1 at most."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a task's arrays are read: plain values, which an export keeps beside the graph."""

    kind: str
    """classify, segment, detect or features."""
    names: tuple[str, ...]
    """Of the classes."""
    several: bool = False
    """Whether an image may have several labels."""
    window: tuple[int, int] | None = None
    """(height, width) in pixels of windows that views are looked at in. None: whole."""
    stride: tuple[int, int] = (1, 1)
    """Of masks: pixels (vertical, horizontal) of a view for a cell of the scores."""
    summed: bool = False
    """Of masks: whether scores may be averaged as they are, and not as probabilities."""
    most: int = 100
    """Of boxes: how many of an image, at most."""
    doubles: bool = True
    """Of boxes: whether several may be one object's."""

    def answers(self, look: Look, views: Sequence[Any], seen: Sequence[Seen]) -> list[Any]:
        """What is known of each image, of which `seen` is how its view lies in it."""
        match self.kind:
            case "classify":
                return [read_classes(row, self.names) for row in look(views)["probabilities"]]
            case "segment":
                return [
                    Segmentation(classes_of(scores, stride, one), self.names)
                    for (scores, stride), one in zip(self._scores(look, views), seen, strict=True)
                ]
            case "detect":
                return [
                    Detections(found.boxes, found.labels, found.scores.astype(float), self.names)
                    for found in self.boxes(look, views, seen)
                ]
        return [Embedding(row) for row in look(views)["features"]]

    def boxes(self, look: Look, views: Sequence[Any], seen: Sequence[Seen]) -> list[Found]:
        """What is found in each image, in its own pixels, the best first."""
        if self.window is None:
            found = self._found(look(views)) if len(views) else []
        else:
            found = [self._in_windows(look, view) for view in views]
        return [in_image(each, one) for each, one in zip(found, seen, strict=True)]

    def _found(self, outputs: Outputs) -> list[Found]:
        """Of each view, in its pixels."""
        rows = zip(outputs["boxes"], outputs["scores"], outputs["labels"], strict=True)
        found = [Found(boxes, scores, labels.astype(np.int64)) for boxes, scores, labels in rows]
        if not self.doubles:
            return [each.of(slice(self.most)).whole() for each in found]
        return [best_of(each.of(each.scores >= LEAST_SCORE), self.most) for each in found]

    def _in_windows(self, look: Look, view: Any) -> Found:
        assert self.window is not None
        (height, width), window = view.shape[1:], self.window
        places = [(y, x) for y in tiles(height, window[0]) for x in tiles(width, window[1])]
        parts = [
            found
            for outputs in looked(look, view, places, window)
            for found in self._found(outputs)
        ]
        return merged(parts, places, window, (height, width), self.most)

    def _scores(
        self, look: Look, views: Sequence[Any]
    ) -> Iterator[tuple[Float[np.ndarray, "c _h _w"], tuple[int, int]]]:
        """Of each view what speaks for each class, in cells of so many pixels."""
        if self.window is None:
            yield from ((scores, self.stride) for scores in look(views)["scores"])
            return
        for view in views:
            sides = view.shape[1:]
            window = min(self.window[0], sides[0]), min(self.window[1], sides[1])
            places = [
                (y, x) for y in starts(sides[0], window[0]) for x in starts(sides[1], window[1])
            ]
            total, times = np.zeros((len(self.names), *sides), np.float32), np.zeros(sides)
            said = (row for some in looked(look, view, places, window) for row in some["scores"])
            for (y, x), scores in zip(places, said, strict=True):
                spoken = scores if self.summed else softmax(scores)
                rows, columns = (
                    (np.arange(n) + 0.5) / step - 0.5
                    for n, step in zip(window, self.stride, strict=True)
                )
                here = slice(y, y + window[0]), slice(x, x + window[1])
                total[:, *here] += bilinear(spoken, rows, columns)
                times[here] += 1
            yield (total / times).astype(np.float32), (1, 1)


def looked(
    look: Look, view: Any, places: Sequence[tuple[int, int]], window: tuple[int, int]
) -> Iterator[Outputs]:
    """What a model says of windows at `places` (y, x) of a view `[c h w]`, some at a time."""
    for first in range(0, len(places), _AT_ONCE):
        some = places[first : first + _AT_ONCE]
        yield look([view[:, y : y + window[0], x : x + window[1]] for y, x in some])


def read_classes(probabilities: Float[np.ndarray, " c"], names: Sequence[str]) -> Prediction:
    """Of an image, all classes and the likeliest."""
    pairs = sorted(zip(names, probabilities.tolist(), strict=True), key=lambda pair: -pair[1])
    return Prediction(*pairs[0], dict(pairs))


def in_image(found: Found, seen: Seen) -> Found:
    """Boxes of a view in the image's own pixels, cut to it; what lies beside it is dropped."""
    height, width = seen.image
    corners = found.boxes.astype(np.float64).reshape(-1, 2)
    unit = seen.back(corners).reshape(-1, 4).clip(0, 1)
    return found._replace(boxes=unit * [width, height, width, height]).whole()


def classes_of(
    scores: Float[np.ndarray, "c _rows _columns"], stride: tuple[float, float], seen: Seen
) -> Int16[np.ndarray, "h w"]:
    """The class of each of an image's own pixels: the one that most speaks for, bilinearly."""
    height, width = seen.image
    (a, b, c), (d, e, f) = seen.matrix[:2].tolist()
    assert b == d == 0, "views that are judged are not turned"
    columns = (a * (np.arange(width) + 0.5) / width + c) / stride[1] - 0.5
    rows = (e * (np.arange(height) + 0.5) / height + f) / stride[0] - 0.5
    at_once = max(1, _ROOM // (len(scores) * width))
    parts = [
        bilinear(scores, rows[first : first + at_once], columns).argmax(axis=0)
        for first in range(0, height, at_once)
    ]
    return np.concatenate(parts).astype(np.int16)


def bilinear(
    values: Float[np.ndarray, "c _h _w"],
    rows: Float64[np.ndarray, " h"],
    columns: Float64[np.ndarray, " w"],
) -> Float32[np.ndarray, "c h w"]:
    """Values between cells, whose centres are at whole numbers; beyond the last, that one's."""
    for axis, places in ((1, rows), (2, columns)):
        places = places.clip(0, values.shape[axis] - 1)
        before = places.astype(np.int64)
        after = np.minimum(before + 1, values.shape[axis] - 1)
        share = (places - before).astype(np.float32)
        share = share[:, None] if axis == 1 else share
        values = values.take(before, axis) * (1 - share) + values.take(after, axis) * share
    return values.astype(np.float32, copy=False)


def softmax(scores: Float[np.ndarray, "c *_n"]) -> Float32[np.ndarray, "c *_n"]:
    """Probabilities of classes."""
    powers = np.exp(scores - scores.max(axis=0))
    return (powers / powers.sum(axis=0)).astype(np.float32, copy=False)


def starts(side: int, window: int) -> list[int]:
    """Where windows for masks begin along a side: evenly, none beyond it, the last at its end.

    >>> starts(512, 512), starts(700, 512), starts(300, 512)
    ([0], [0, 188], [0])
    """
    step = max(1, int(window * _STRIDE))
    return sorted({min(place, max(0, side - window)) for place in range(0, max(1, side), step)})
