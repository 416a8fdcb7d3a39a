"""How good boxes are, every number with the interval that chance could explain.

`count` makes of each image the few numbers that are kept of it; `detection` judges all images.

Average precision is COCO's (Lin et al., arXiv 1405.0312; pycocotools): of each class and each IoU
from 0.5 to 0.95, detections of all images are sorted by score; one is right that overlaps an object
which no better one has taken, and precision, made to fall with recall, is read at 101 recalls.
Means are over the classes that have objects. Sizes are the box's own, width by height in the
image's pixels: small below 32^2, large above 96^2.

What is ignored (crowds, difficult ones, regions) is no object, and what is found mostly inside of
it, by the share of the detection, is neither right nor wrong. The intervals come from drawing the
images again: the objects of one image are no trials of their own.

The matching is our own because the intervals, and the kinds of mistakes, need the matches of each
image. The numbers equal faster-coco-eval's (tests/metrics/test_boxes.py).

Letters: n images, c classes, d detections of an image, m objects of one, t IoU thresholds, a sizes,
r draws at a time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from vitrail.data.targets import ANY
from vitrail.metrics.draws import weights
from vitrail.metrics.intervals import Estimate, from_draws
from vitrail.nn.boxes import Found

THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))
LOOSE = 0.4
"""The IoU of deepforest's protocol for trees (Weinstein et al., 2019)."""
SIZES = ("all", "small", "medium", "large")
_AREAS = np.array([[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]])
KINDS = ("correct", "misplaced", "misnamed", "both", "doubled", "background", "ignored")
"""What a detection is at an IoU of 0.5 (TIDE, Bolya et al., 2008.08115): misplaced, of an object of
its class that it overlaps by 0.1 to 0.5; misnamed, of another class's object that it fits; both;
doubled, of an object that a better one has taken; or nothing is there."""
_ALL = (*THRESHOLDS, LOOSE)
_RECALLS = torch.linspace(0, 1, 101, dtype=torch.float64)
_MOST_DRAWS, _LEAST_DRAWS = 1000, 100
_ROOM = 3 * 10**8
"""Detections x thresholds x sizes x draws that take about ten seconds on one core."""


def count(found: Found, truth: Mapping[str, Tensor], classes: int, most: int) -> dict[str, Tensor]:
    """What is kept of one image, whatever it holds, of its `most` best detections.

    scores [most]         -1 where there is no detection
    labels [most]
    matched [most 4]      bits: at which of the 10 IoUs, and of 0.4, it has an object, by sizes
    left_out [most 4]     bits: at which it counts for nothing
    kinds [most]          its place in KINDS; -1 where there is none
    objects [classes 4]   by sizes
    missed [classes]      objects that no detection has at an IoU of 0.5

    `truth` has `boxes [m 4]` in the image's pixels, `labels [m]` and `ignored [m]`, which is below
    0 where a row only fills up a batch.
    """
    there = (truth["ignored"] >= 0).cpu().numpy()
    boxes = truth["boxes"].double().cpu().numpy()[there]
    labels = truth["labels"].cpu().numpy()[there]
    ignored = truth["ignored"].cpu().numpy()[there] > 0
    said = Found(*(part[:most].cpu() for part in found))
    own, of = said.boxes.double().numpy(), said.labels.numpy()
    d = len(of)
    matched = np.zeros((d, len(_ALL), len(SIZES)), bool)
    left_out = np.zeros_like(matched)
    objects = np.zeros((classes, len(SIZES)), np.int32)
    missed = np.zeros(classes, np.int32)
    taken_at = np.zeros(len(labels), bool)
    for label in np.unique(np.concatenate([labels[labels >= 0], of])).tolist():
        mine = np.flatnonzero(of == label)
        real = np.flatnonzero((labels == label) & ~ignored)
        regions = np.flatnonzero(((labels == label) | (labels == ANY)) & ignored)
        outside = _outside(boxes[real])
        match = _match(own[mine], boxes[real], outside, boxes[regions])
        matched[mine], left_out[mine] = match.matched, match.left_out
        objects[label] = (~outside).sum(axis=0)
        missed[label] = len(real) - match.taken.sum()
        taken_at[real] = match.taken
    at_half = _ALL.index(0.5)
    kinds = _kinds(own, of, boxes, labels, ignored, matched[:, at_half, 0], left_out[:, at_half, 0])
    rows = {
        "scores": _filled(said.scores.float().numpy(), most, -1),
        "labels": _filled(of.astype(np.int32), most, 0),
        "matched": _filled(_bits(matched), most, 0),
        "left_out": _filled(_bits(left_out), most, 0),
        "kinds": _filled(kinds, most, -1),
        "objects": objects,
        "missed": missed,
    }
    return {name: torch.from_numpy(row).to(found.boxes.device) for name, row in rows.items()}


class _Match(NamedTuple):
    matched: Bool[np.ndarray, "d t a"]
    left_out: Bool[np.ndarray, "d t a"]
    taken: Bool[np.ndarray, " m"]
    """Objects that have a detection at an IoU of 0.5."""


def _match(
    found: Float64[np.ndarray, "d 4"],
    objects: Float64[np.ndarray, "m 4"],
    outside: Bool[np.ndarray, "m a"],
    regions: Float64[np.ndarray, "k 4"],
) -> _Match:
    """Of one class, the best detection first: each takes the object that it overlaps most of those
    that are left, and of equal ones the last. `outside`: objects that are not of a size are, for
    it, to be ignored; a detection takes one only if nothing else is left.
    """
    t, a = len(_ALL), len(SIZES)
    matched, left_out = (np.zeros((len(found), t, a), bool) for _ in range(2))
    taken = np.zeros((t, a, len(objects)), bool)
    least = np.minimum(np.array(_ALL), 1 - 1e-10)[:, None, None]
    alike = _iou(found, objects)
    within = _share_within(found, regions).max(axis=1, initial=0.0)
    own_outside = _outside(found)
    for i in range(len(found)):
        near = np.flatnonzero(alike[i] >= least.min())
        free = ~taken[:, :, near] & (alike[i, near] >= least)  # [t a near]
        inside = free & ~outside[near].T
        # Ties go to the last one, as in pycocotools.
        order = alike[i, near] + 1e-12 * np.arange(len(near))
        for allowed, counts in ((inside, True), (free & outside[near].T, False)):
            open_ = allowed.any(axis=2) & ~matched[i] & ~left_out[i]
            if not open_.any():
                continue
            best = np.where(allowed, order, -1.0).argmax(axis=2)
            rows, sizes = np.nonzero(open_)
            taken[rows, sizes, near[best[rows, sizes]]] = True
            (matched if counts else left_out)[i][open_] = True
        left_out[i] |= ~matched[i] & (within[i] >= least[:, :, 0])
        left_out[i] |= ~matched[i] & own_outside[i]
    return _Match(matched, left_out, taken[_ALL.index(0.5), 0])


def _kinds(
    found: Float64[np.ndarray, "d 4"],
    of: Int64[np.ndarray, " d"],
    boxes: Float64[np.ndarray, "m 4"],
    labels: Int64[np.ndarray, " m"],
    ignored: Bool[np.ndarray, " m"],
    matched: Bool[np.ndarray, " d"],
    left_out: Bool[np.ndarray, " d"],
) -> np.ndarray:
    """Places in KINDS."""
    alike = _iou(found, boxes[~ignored])
    same = of[:, None] == labels[~ignored]
    own = np.where(same, alike, 0.0).max(axis=1, initial=0.0)
    other = np.where(same, 0.0, alike).max(axis=1, initial=0.0)
    kinds = np.select(
        [matched, left_out, own >= 0.5, own >= 0.1, other >= 0.5, other >= 0.1],
        [
            KINDS.index(k)
            for k in ("correct", "ignored", "doubled", "misplaced", "misnamed", "both")
        ],
        KINDS.index("background"),
    )
    return kinds.astype(np.int8)


def _iou(
    first: Float64[np.ndarray, "d 4"], second: Float64[np.ndarray, "m 4"]
) -> Float64[np.ndarray, "d m"]:
    shared = _shared(first, second)
    either = _area(first)[:, None] + _area(second) - shared
    return np.divide(shared, either, out=np.zeros_like(shared), where=either > 0)


def _share_within(
    first: Float64[np.ndarray, "d 4"], second: Float64[np.ndarray, "m 4"]
) -> Float64[np.ndarray, "d m"]:
    """Which share of each of the first lies in each of the second."""
    shared, whole = _shared(first, second), _area(first)[:, None]
    return np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0)


def _shared(
    first: Float64[np.ndarray, "d 4"], second: Float64[np.ndarray, "m 4"]
) -> Float64[np.ndarray, "d m"]:
    least = np.maximum(first[:, None, :2], second[:, :2])
    most = np.minimum(first[:, None, 2:], second[:, 2:])
    return (most - least).clip(min=0).prod(axis=2)


def _area(boxes: Float64[np.ndarray, "d 4"]) -> Float64[np.ndarray, " d"]:
    return (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)


def _outside(boxes: Float64[np.ndarray, "d 4"]) -> Bool[np.ndarray, "d a"]:
    """Which sizes each box is not of."""
    area = _area(boxes)[:, None]
    return (area < _AREAS[:, 0]) | (area > _AREAS[:, 1])


def _bits(flags: Bool[np.ndarray, "d t a"]) -> np.ndarray:
    """[d a], int16: one bit for each threshold."""
    places = 1 << np.arange(flags.shape[1])
    return (flags * places[:, None]).sum(axis=1).astype(np.int16)


def _filled(rows: np.ndarray, most: int, value: int) -> np.ndarray:
    whole = np.full((most, *rows.shape[1:]), value, rows.dtype)
    whole[: len(rows)] = rows
    return whole


class ClassAP(NamedTuple):
    """One class; without objects it has no scores."""

    name: str
    objects: int
    images: int
    """That have any."""
    found: int
    """Objects that a detection has, at an IoU of 0.5."""
    ap: Estimate | None
    ap50: Estimate | None


class Point(NamedTuple):
    """Where one threshold for all classes gives the best F1: what is given up for what."""

    iou: float
    threshold: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class DetectMetrics:
    """What predicted boxes are worth."""

    images: int
    draws: int
    """How many bootstrap draws the intervals are made of."""
    max_detections: int
    """The most boxes of an image that were judged."""
    summary: dict[str, Estimate | None]
    """ap (IoU 0.5 to 0.95), ap50, ap75; ap_small, ap_medium, ap_large; ar, the recall, also 0.5 to
    0.95; f1, at an IoU of 0.5 and the best threshold. None: there is no such object."""
    per_class: tuple[ClassAP, ...]
    curve: tuple[float, ...]
    """Precision at 101 recalls from 0 to 1, at an IoU of 0.5, the mean over the classes."""
    curve_mean: tuple[float, ...]
    """The same of all IoUs."""
    best: Point
    """At an IoU of 0.5."""
    best_loose: Point
    """At an IoU of 0.4, the protocol of deepforest's trees."""
    kinds: dict[str, int]
    """How many detections of each of KINDS, of a score of at least `best.threshold`; and how many
    objects are `missed` there."""

    @property
    def headline(self) -> str:
        """The name of the one number that stands for all."""
        return "ap"

    def values(self) -> dict[str, float | None]:
        """The summary without its intervals."""
        return {name: None if each is None else each.value for name, each in self.summary.items()}

    def to_dict(self) -> dict[str, Any]:
        """What metrics.json holds: the summary's numbers on top, then the parts."""
        return {name: each and each._asdict() for name, each in self.summary.items()} | {
            "images": self.images,
            "draws": self.draws,
            "max_detections": self.max_detections,
            "iou": [THRESHOLDS[0], THRESHOLDS[-1]],
            "per_class": [
                each._asdict()
                | {name: v and v._asdict() for name, v in (("ap", each.ap), ("ap50", each.ap50))}
                for each in self.per_class
            ],
            "best": self.best._asdict(),
            "best_loose": self.best_loose._asdict(),
            "kinds": self.kinds,
            "curve": self.curve,
            "curve_mean": self.curve_mean,
        }


def average_precision(rows: Mapping[str, Tensor]) -> float:
    """The number alone that `detection` calls ap, of the same rows; NaN without any object."""
    counted = _Counted.of(rows)
    precision, _ = _curves(counted, counted.once, (0,))
    return precision.mean(dim=(2, 3)).nanmean().item()


def detection(rows: Mapping[str, Tensor], names: tuple[str, ...], most: int) -> DetectMetrics:
    """Metrics of boxes, from what `count` says of each image: each `[n ...]`.

    Raises `ValueError` where shapes do not fit.
    """
    n, c = rows["missed"].shape
    if not n or c != len(names):
        raise ValueError(f"rows of {n} images and {c} classes do not fit {len(names)} names")
    counted = _Counted.of(rows)
    sizes = tuple(range(len(SIZES)))
    precision, recall = _curves(counted, counted.once, sizes)  # [a c t 101 1], [a c t 1]
    work = max(1, len(counted.scores)) * len(THRESHOLDS) * len(SIZES)
    draws = min(max(_ROOM // work, _LEAST_DRAWS), _MOST_DRAWS)
    value = _scores(precision, recall)
    blocks = [_scores(*_curves(counted, w, sizes)) for w in weights(n, draws)]
    drawn = {name: torch.cat([block[name] for block in blocks], dim=-1) for name in value}
    objects = counted.objects  # [n c a]
    holding = (objects > 0).double()
    images = {
        **dict.fromkeys(("ap", "ap50", "ap75", "ar"), holding[:, :, 0].amax(1).sum()),
        **{f"ap_{size}": holding[:, :, i].amax(1).sum() for i, size in enumerate(SIZES) if i},
    }
    summary = {
        name: _estimate(value[name].mean(dim=-1), drawn[name], images[name]) for name in images
    }
    best, best_loose = (_best(counted, iou) for iou in (0.5, LOOSE))
    summary["f1"] = _f1(counted, best, draws)
    shown = counted.kinds[counted.scores >= best.threshold]
    kinds = {name: int((shown == k).sum()) for k, name in enumerate(KINDS)}
    kinds["missed"] = int(objects[:, :, 0].sum()) - kinds["correct"]
    of_class, of_class_drawn = (
        _by_class(precision),
        [_by_class(_curves(counted, w, (0,))[0]) for w in weights(n, draws)],
    )
    return DetectMetrics(
        n,
        draws,
        most,
        summary,
        tuple(
            ClassAP(
                name,
                int(objects[:, k, 0].sum()),
                int(holding[:, k, 0].sum()),
                int(objects[:, k, 0].sum() - rows["missed"][:, k].sum()),
                *(
                    _estimate(
                        of_class[score][k, 0],
                        torch.cat([each[score][k] for each in of_class_drawn]),
                        holding[:, k, 0].sum(),
                    )
                    for score in ("ap", "ap50")
                ),
            )
            for k, name in enumerate(names)
        ),
        tuple(precision[0, :, 0, :, 0].nanmean(dim=0).nan_to_num(0).tolist()),
        tuple(precision[0, :, :, :, 0].mean(dim=1).nanmean(dim=0).nan_to_num(0).tolist()),
        best,
        best_loose,
        kinds,
    )


class _Counted(NamedTuple):
    """The detections of all images, the best first; those of one image in their order."""

    scores: Float[Tensor, " d"]
    labels: Int64[Tensor, " d"]
    image: Int64[Tensor, " d"]
    matched: Bool[Tensor, "d t a"]
    left_out: Bool[Tensor, "d t a"]
    kinds: Tensor
    objects: Float[Tensor, "n c a"]

    @classmethod
    def of(cls, rows: Mapping[str, Tensor]) -> "_Counted":
        kept = {name: row.detach().cpu() for name, row in rows.items()}
        there = kept["scores"] >= 0
        image = torch.arange(len(there))[:, None].expand_as(there)[there]
        order = kept["scores"][there].argsort(descending=True, stable=True)
        bits = 1 << torch.arange(len(_ALL), dtype=torch.int16)
        matched, left_out = (
            (kept[name][there][order][:, None] & bits[:, None]) != 0
            for name in ("matched", "left_out")
        )
        return cls(
            kept["scores"][there][order],
            kept["labels"][there][order].long(),
            image[order],
            matched,
            left_out,
            kept["kinds"][there][order],
            kept["objects"].double(),
        )

    @property
    def once(self) -> Float[Tensor, "n 1"]:
        """Each image, once."""
        return torch.ones(len(self.objects), 1, dtype=torch.float64)


def _curves(
    counted: _Counted, weight: Float[Tensor, "n r"], sizes: tuple[int, ...]
) -> tuple[Float[Tensor, "a c t 101 r"], Float[Tensor, "a c t r"]]:
    """Precision at 101 recalls and the last recall, of images that count so often each; NaN of a
    class without objects.
    """
    classes, draws, t = counted.objects.shape[1], weight.shape[1], len(THRESHOLDS)
    precision = torch.full((len(sizes), classes, t, 101, draws), torch.nan, dtype=torch.float64)
    recall = torch.full((len(sizes), classes, t, draws), torch.nan, dtype=torch.float64)
    objects = torch.einsum("nca,nr->acr", counted.objects, weight)
    for k in range(classes):
        mine = counted.labels == k
        times = weight[counted.image[mine]]  # [d r]
        for row, a in enumerate(sizes):
            all_ = objects[a, k]
            if not (all_ > 0).any():
                continue
            matched = counted.matched[mine][:, :t, a]
            counts = ~counted.left_out[mine][:, :t, a]
            for i in range(t):
                right = (times * (matched[:, i] & counts[:, i])[:, None]).cumsum(dim=0).T
                said = (times * counts[:, i][:, None]).cumsum(dim=0).T  # [r d]
                found = right / all_[:, None]
                exact = right / said.clamp(min=torch.finfo(torch.float64).eps)
                curve, last = _read(found, exact)
                curve[all_ == 0], last[all_ == 0] = torch.nan, torch.nan
                precision[row, k, i], recall[row, k, i] = curve.T, last
    return precision, recall


def _read(
    recall: Float[Tensor, "r d"], precision: Float[Tensor, "r d"]
) -> tuple[Float[Tensor, "r 101"], Float[Tensor, " r"]]:
    """Precision, made to fall, at 101 recalls; and the last recall."""
    draws, d = recall.shape
    if not d:
        return recall.new_zeros(draws, 101), recall.new_zeros(draws)
    falling = precision.flip(1).cummax(dim=1).values.flip(1)
    at = torch.searchsorted(recall.contiguous(), _RECALLS.expand(draws, 101).contiguous())
    padded = torch.cat([falling, falling.new_zeros(draws, 1)], dim=1)
    return padded.gather(1, at), recall[:, -1]


def _scores(
    precision: Float[Tensor, "a c t 101 r"], recall: Float[Tensor, "a c t r"]
) -> dict[str, Tensor]:
    """By name `[r]`: means over the classes that have objects."""
    of_threshold = precision.mean(dim=3)  # [a c t r]
    of_class = of_threshold.mean(dim=2)
    half, three = THRESHOLDS.index(0.5), THRESHOLDS.index(0.75)
    return {
        "ap": of_class[0].nanmean(dim=0),
        "ap50": of_threshold[0, :, half].nanmean(dim=0),
        "ap75": of_threshold[0, :, three].nanmean(dim=0),
        **{f"ap_{size}": of_class[i].nanmean(dim=0) for i, size in enumerate(SIZES) if i},
        "ar": recall[0].mean(dim=1).nanmean(dim=0),
    }


def _by_class(precision: Float[Tensor, "a c t 101 r"]) -> dict[str, Float[Tensor, "c r"]]:
    of_threshold = precision[0].mean(dim=2)
    return {"ap": of_threshold.mean(dim=1), "ap50": of_threshold[:, THRESHOLDS.index(0.5)]}


def _estimate(
    value: Float[Tensor, ""], drawn: Float[Tensor, " r"], trials: Float[Tensor, ""]
) -> Estimate | None:
    if value.isnan():
        return None
    low, high = from_draws(value, drawn, trials)
    return Estimate(value.item(), low.item(), high.item())


def _best(counted: _Counted, iou: float) -> Point:
    """By one threshold for all classes; of equal ones the highest."""
    i = _ALL.index(iou)
    right = (counted.matched[:, i, 0] & ~counted.left_out[:, i, 0]).double().cumsum(0)
    said = (~counted.left_out[:, i, 0]).double().cumsum(0)
    objects = counted.objects[:, :, 0].sum()
    if not len(said) or not objects:
        return Point(iou, 1.0, 0.0, 0.0, 0.0)
    f1 = 2 * right / (said + objects)
    # A threshold takes all of a score or none.
    last = torch.cat([counted.scores[1:] != counted.scores[:-1], torch.tensor([True])])
    at = f1.masked_fill(~last, -1.0).argmax()
    precision = right[at] / said[at].clamp(min=1)
    return Point(
        iou,
        counted.scores[at].item(),
        precision.item(),
        (right[at] / objects).item(),
        f1[at].item(),
    )


def _f1(counted: _Counted, best: Point, draws: int) -> Estimate | None:
    """At that threshold, whichever images are drawn."""
    of_image = counted.objects[:, :, 0].sum(dim=1)
    if not of_image.sum():
        return None
    i, n = _ALL.index(best.iou), len(of_image)
    shown = (counted.scores >= best.threshold) & ~counted.left_out[:, i, 0]
    said = torch.bincount(counted.image[shown], minlength=n).double()
    right = torch.bincount(counted.image[shown & counted.matched[:, i, 0]], minlength=n).double()
    drawn = torch.cat(
        [2 * (right @ w) / ((said + of_image) @ w) for w in weights(n, draws)]
    ).nan_to_num(0)
    value = torch.tensor(best.f1, dtype=torch.float64)
    return _estimate(value, drawn, (said + of_image > 0).sum().double())
