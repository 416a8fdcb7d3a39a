"""Predicted masks: against a plain count of pixels, and the published definition of a boundary."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.metrics import SegmentMetrics, count, mean_iou, segmentation
from vitrail.metrics.masks import MOST_CONFUSED

Pairs = list[tuple[np.ndarray, np.ndarray]]


def names(c: int) -> tuple[str, ...]:
    return tuple(f"class {k}" for k in range(c))


def rows_of(pairs: Pairs, c: int) -> dict[str, torch.Tensor]:
    found = [count(torch.from_numpy(p), torch.from_numpy(t), c) for p, t in pairs]
    return {name: torch.stack([one[name] for one in found]) for name in found[0]}


def judged(pairs: Pairs, c: int) -> SegmentMetrics:
    return segmentation(rows_of(pairs, c), names(c), "whole")


def drawn_pairs(seed: int, n: int, c: int, used: int, size: tuple[int, int]) -> Pairs:
    """Blobs of the first `used` of `c` classes, some pixels ignored; predictions of all classes."""
    generator = np.random.default_rng(seed)
    pairs = []
    for _ in range(n):
        coarse = generator.integers(-1, used, (size[0] // 3 + 1, size[1] // 3 + 1))
        truth = np.kron(coarse, np.ones((3, 3), int))[: size[0], : size[1]]
        wrong = generator.random(size) < 0.3
        predicted = np.where(wrong | (truth < 0), generator.integers(0, c, size), truth)
        pairs.append((predicted, truth))
    return pairs


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 7), st.data())
def test_against_a_plain_count(seed: int, n: int, c: int, data: st.DataObject) -> None:
    used = data.draw(st.integers(1, c))
    pairs = drawn_pairs(seed, n, c, used, (7, 11))
    predicted = np.concatenate([p.ravel() for p, _ in pairs])
    truth = np.concatenate([t.ravel() for _, t in pairs])
    predicted, truth = predicted[truth >= 0], truth[truth >= 0]
    if not len(truth):
        return
    ious, recalls = [], []
    for k in range(c):
        both, either = ((truth == k) & (predicted == k)).sum(), (truth == k) | (predicted == k)
        if either.any():
            ious.append(both / either.sum())
        if (truth == k).any():
            recalls.append(both / (truth == k).sum())
    found = judged(pairs, c)
    assert found.values() == pytest.approx(
        {
            "miou": np.mean(ious),
            "pixel_accuracy": (truth == predicted).mean(),
            "mean_accuracy": np.mean(recalls),
            "boundary_iou": found.values()["boundary_iou"],
        }
    )
    assert mean_iou(rows_of(pairs, c)) == pytest.approx(np.mean(ious))
    assert found.confusion is not None
    assert np.array(found.confusion).sum() == len(truth)
    assert found.confusion[0][c - 1] == ((truth == 0) & (predicted == c - 1)).sum()
    for each in found.per_class:
        assert each.iou is None or each.iou.low < each.iou.high


def test_a_class_that_is_only_predicted_counts_0_and_one_that_is_nowhere_does_not_count() -> None:
    truth, predicted = np.zeros((4, 4), int), np.zeros((4, 4), int)
    predicted[0] = 1
    found = judged([(predicted, truth)], 3)
    assert [each.iou and each.iou.value for each in found.per_class] == [0.75, 0.0, None]
    assert found.values()["miou"] == 0.375
    assert found.values()["mean_accuracy"] == 0.75  # a class without a pixel has no recall
    assert found.absent == (1, 2)


def eroded(mask: np.ndarray, iterations: int) -> np.ndarray:
    """By 3 x 3, as often; a border of one pixel of nothing, and no more than that, around it."""
    mask = np.pad(mask, 1)
    for _ in range(iterations):
        wide = np.pad(mask, 1, constant_values=True)
        shifts = [
            wide[y : y + mask.shape[0], x : x + mask.shape[1]] for y in range(3) for x in range(3)
        ]
        mask = np.logical_and.reduce(shifts)
    return mask[1:-1, 1:-1]


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([(9, 9), (1, 12), (40, 100), (130, 90), (2, 2), (61, 210)]),
    st.integers(1, 4),
)
def test_boundaries_are_masks_less_their_erosion(seed: int, size: tuple[int, int], c: int) -> None:
    ((predicted, truth),) = drawn_pairs(seed, 1, c, c, size)
    if seed % 2:  # large areas, so that something is inside
        truth = np.where(np.arange(size[1]) > size[1] // 3, truth.max(), truth.min() + 0 * truth)
    found = count(torch.from_numpy(predicted), torch.from_numpy(truth), c)
    distance = max(1, round(0.02 * (size[0] ** 2 + size[1] ** 2) ** 0.5))
    for k in range(c):
        masks = (truth == k), (predicted == k) & (truth >= 0)
        own, said = (mask & ~eroded(mask, distance) for mask in masks)
        assert found["boundary_hits"][k] == (own & said).sum()
        assert found["boundary_union"][k] == (own | said).sum()


def test_the_inside_of_a_large_area_is_no_boundary() -> None:
    square = torch.zeros(100, 100, dtype=torch.long)
    found = count(square, square, 1)
    assert found["boundary_union"].tolist() == [100**2 - 94**2]  # 2% of 141.4 is 3


def test_what_is_predicted_where_the_truth_ignores_changes_nothing() -> None:
    ((predicted, truth),) = drawn_pairs(0, 1, 4, 4, (30, 40))
    other = np.where(truth < 0, (predicted + 1) % 4, predicted)
    found = [count(torch.from_numpy(p), torch.from_numpy(truth), 4) for p in (predicted, other)]
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert (truth < 0).any()


def test_many_classes_keep_no_confusion_and_give_the_same_numbers() -> None:
    c = MOST_CONFUSED + 1
    pairs = drawn_pairs(1, 4, 5, 5, (20, 30))
    few, many = judged(pairs, 5), judged(pairs, c)
    assert "confusion" not in rows_of(pairs, c)
    assert many.confusion is None
    assert many.values() == pytest.approx(few.values())
    assert many.per_class[:5] == few.per_class


def test_intervals_come_from_images_and_never_lack_width() -> None:
    perfect = [(t, t) for _, t in drawn_pairs(2, 6, 3, 3, (12, 12))]
    few, more = judged(perfect, 3).summary, judged(perfect * 10, 3).summary
    for name, estimate in few.items():
        larger = more[name]
        assert estimate is not None
        assert larger is not None
        assert estimate.value == estimate.high == 1
        assert estimate.low < larger.low < 1  # pixels are as many as they are; images count
    mixed = judged(drawn_pairs(3, 40, 3, 3, (12, 12)), 3).summary["miou"]
    assert mixed is not None
    assert 0 < mixed.low < mixed.value < mixed.high < 1


def test_what_is_kept_is_json_and_says_the_mode() -> None:
    found = judged(drawn_pairs(4, 2, 3, 2, (6, 6)), 3)
    content = json.loads(json.dumps(found.to_dict()))
    assert content["mode"] == "whole"
    assert content["miou"]["value"] == found.values()[found.headline]
    assert content["per_class"][0]["iou"].keys() == {"value", "low", "high"}


def test_where_nothing_counts_no_number_is_made_up() -> None:
    nothing = np.full((3, 3), -1)
    found = judged([(nothing, nothing)] * 2, 3)
    assert set(found.values().values()) == {None} and found.absent == (0, 1, 2)
    assert all(each.iou is each.accuracy is None for each in found.per_class)
    with pytest.raises(ValueError, match="3 classes do not fit 2 names"):
        segmentation(rows_of(drawn_pairs(0, 1, 3, 3, (4, 4)), 3), names(2), "whole")
