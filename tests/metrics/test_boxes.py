"""Predicted boxes: equal to faster-coco-eval's numbers, and kinds of mistakes made by hand."""

import contextlib
import io
import json
import logging
from typing import NamedTuple

import numpy as np
import pytest
import torch
from faster_coco_eval import COCO, COCOeval_faster
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.errors import DataError
from vitrail.found import Found
from vitrail.metrics import DetectMetrics, average_precision, count_boxes, detection
from vitrail.metrics.matching import ANY
from vitrail.metrics.mistakes import KIND, KINDS


class Scene(NamedTuple):
    found: Found
    truth: dict[str, torch.Tensor]


def scene(found=(), truth=(), padding: int = 0) -> Scene:
    """From (box, score, label) of what is found and (box, label, ignored) of what is there."""
    boxes, scores, labels = zip(*found, strict=True) if found else ([], [], [])
    own, classes, ignored = zip(*truth, strict=True) if truth else ([], [], [])
    own, classes, ignored = (list(each) for each in (own, classes, ignored))
    return Scene(
        Found(
            np.array(boxes, np.float32).reshape(-1, 4),
            np.array(scores, np.float32),
            np.array(labels, np.int64),
        ),
        {
            "boxes": torch.tensor(own + [[0.0] * 4] * padding).float().reshape(-1, 4),
            "labels": torch.tensor(classes + [-1] * padding).long(),
            "ignored": torch.tensor(ignored + [-1] * padding, dtype=torch.int8),
            "size": torch.tensor([500, 600]),
        },
    )


def rows_of(scenes: list[Scene], c: int, most: int = 100) -> dict[str, torch.Tensor]:
    each = [count_boxes(one.found, one.truth, c, most) for one in scenes]
    return {name: torch.stack([row[name] for row in each]) for name in each[0]}


def judged(scenes: list[Scene], c: int, most: int = 100) -> DetectMetrics:
    return detection(rows_of(scenes, c, most), tuple(f"class {k}" for k in range(c)), most)


def random_scene(rng: np.random.Generator, c: int, m: int, d: int, whole: bool) -> Scene:
    """`d` boxes found, most of them near one of `m` objects of all classes but the last; some are
    crowds or regions. Where they are `whole` numbers many overlaps, and many scores, are equal.
    """

    def boxes(k: int) -> np.ndarray:
        place, side = rng.uniform(0, 400, (k, 2)), np.exp(rng.uniform(0, 5.3, (k, 2))) + 1
        both = np.concatenate([place, place + side], axis=1)
        return np.floor(both) if whole else both

    real = boxes(m)
    labels = rng.integers(0, max(1, c - 1), m)
    ignored = rng.random(m) < 0.15
    labels[ignored & (rng.random(m) < 0.4)] = ANY
    found = real[rng.integers(0, m, d)] if m else boxes(d)
    sides = np.tile(found[:, 2:] - found[:, :2], 2)
    moved = rng.normal(0, 0.12, found.shape) * sides * (rng.random((d, 1)) < 0.7)
    found = found + (moved.round() if whole else moved)
    found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
    scores = rng.integers(0, 12, d) / 12 if whole else rng.random(d)
    return Scene(
        Found(
            found.astype(np.float32),
            -np.sort(-scores.astype(np.float32)),
            rng.integers(0, c, d),
        ),
        {
            "boxes": torch.from_numpy(real).float(),
            "labels": torch.from_numpy(labels),
            "ignored": torch.from_numpy(ignored.astype(np.int8)),
        },
    )


def coco(scenes: list[Scene], c: int, most: int) -> dict[str, float]:
    """What faster-coco-eval says; -1 where there is no object."""
    truths: list[dict] = []
    found: list[dict] = []
    for i, (said, real) in enumerate(scenes, 1):
        for box, label, ignored in zip(*(real[k].tolist() for k in LAID), strict=True):
            for k in range(c) if label == ANY else [label]:
                sides = [box[2] - box[0], box[3] - box[1]]
                truths.append(
                    {
                        "id": len(truths) + 1,
                        "image_id": i,
                        "category_id": k + 1,
                        "bbox": [*box[:2], *sides],
                        "area": sides[0] * sides[1],
                        "iscrowd": ignored,
                    }
                )
        for box, score, label in zip(*(part[:most].tolist() for part in said), strict=True):
            bbox = [*box[:2], box[2] - box[0], box[3] - box[1]]
            found.append({"image_id": i, "category_id": label + 1, "bbox": bbox, "score": score})
    images = [{"id": i} for i in range(1, len(scenes) + 1)]
    categories = [{"id": k + 1, "name": str(k)} for k in range(c)]
    logging.getLogger("faster_coco_eval").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO({"images": images, "annotations": truths, "categories": categories})
        judge = COCOeval_faster(truth, truth.loadRes(found), "bbox")
        judge.params.maxDets = [1, 10, most]
        judge.run()
    stats = [*judge.stats[:6], judge.stats[8]]
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar")
    return dict(zip(names, map(float, stats), strict=True))


LAID = ("boxes", "labels", "ignored")


def check_equal(seed: int) -> None:
    rng = np.random.default_rng(seed)
    c, most = int(rng.integers(1, 6)), int(rng.choice([5, 100, 300]))
    scenes = [
        random_scene(rng, c, rng.choice([0, 1, 3, 20, 150]), rng.choice([1, 40, 200]), seed % 2 > 0)
        for _ in range(rng.integers(1, 7))
    ]
    expected = coco(scenes, c, most)
    rows = rows_of(scenes, c, most)
    found = detection(rows, tuple(map(str, range(c))), most).values()
    named = {name: -1.0 if found[name] is None else found[name] for name in expected}
    assert named == pytest.approx(expected, abs=1e-9)
    if expected["ap"] >= 0:
        assert average_precision(rows) == pytest.approx(expected["ap"], abs=1e-9)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6))
def test_equal_to_faster_coco_eval(seed: int) -> None:
    check_equal(seed)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(st.integers(0, 10**9))
def test_equal_to_faster_coco_eval_a_thousand_times(seed: int) -> None:
    check_equal(seed)


def test_more_than_100_objects_are_all_found_where_so_many_count() -> None:
    boxes = [[20.0 * (k % 20), 20.0 * (k // 20), 20.0 * (k % 20) + 15, 20.0 * (k // 20) + 15]
             for k in range(200)]  # fmt: skip
    whole = scene([(b, 0.9, 0) for b in boxes], [(b, 0, 0) for b in boxes])
    assert judged([whole], 1, 200).values()["ap"] == pytest.approx(1)
    few = judged([whole], 1, 100)
    assert few.values()["ar"] == 0.5 and few.crowded == 1 and few.max_detections == 100
    assert few.values()["ap"] == pytest.approx(coco([whole], 1, 100)["ap"], abs=1e-9)


SQUARE = [0.0, 0.0, 100.0, 100.0]


def moved(by: float, box=SQUARE) -> list[float]:
    return [box[0] + by, box[1], box[2] + by, box[3]]


def test_a_crowd_takes_any_number_and_none_of_them_is_right_or_wrong() -> None:
    inside = [([10.0 * k, 0.0, 10.0 * k + 9, 9.0], 0.9, 0) for k in range(9)]
    own = ([200.0, 0, 300, 100], 0.5, 0)
    one = scene([*inside, own], [(SQUARE, 0, 1), (own[0], 0, 0)], padding=3)
    assert judged([one], 1).values()["ap"] == pytest.approx(1)
    region = scene([*inside, own], [(SQUARE, ANY, 1), (own[0], 0, 0)])
    assert judged([region], 1).values()["ap"] == pytest.approx(1)
    other = scene([*inside, own], [(SQUARE, 1, 1), (own[0], 0, 0)])
    assert judged([other], 2).values()["ap"] == pytest.approx(0.1)


def kinds_of(one: Scene, c: int) -> list[str]:
    kinds = count_boxes(one.found, one.truth, c, 100)["kinds"]
    return [KINDS[kind & KIND] for kind in kinds.tolist() if kind & KIND]


def test_each_kind_of_mistake_has_its_name() -> None:
    real = [(SQUARE, 0, 0), ([300.0, 0, 400, 100], 1, 0), ([0.0, 300, 50, 350], 0, 1)]
    said = [
        (SQUARE, 0.9, 0),
        (moved(10), 0.8, 0),
        (moved(50), 0.7, 0),
        ([300.0, 0, 400, 100], 0.6, 0),
        ([350.0, 0, 450, 100], 0.5, 0),
        ([600.0, 0, 700, 100], 0.4, 0),
        ([0.0, 300, 20, 320], 0.3, 0),
    ]
    found = ["right", "doubled", "misplaced", "misnamed", "both", "background", "ignored"]
    assert kinds_of(scene(said, real), 2) == found
    metrics = judged([scene(said, real)], 2)
    assert {each.kind: each.all for each in metrics.mistakes} == {
        **dict.fromkeys(("misplaced", "misnamed", "doubled", "background", "both"), 1),
        "missed": 0,  # the second object is misnamed
    }


def test_what_a_mistake_costs_is_what_mending_it_alone_would_give() -> None:
    names = ("misplaced", "misnamed", "doubled", "background", "both", "missed")

    def costs(*said, real=((SQUARE, 0, 0),), c=2) -> dict[str, float | None]:
        found = judged([scene(list(said), list(real))], c)
        return {each.kind: each.cost for each in found.mistakes if each.cost}

    assert {each.kind for each in judged([scene()], 1).mistakes} == set(names)
    assert costs((moved(50), 0.9, 0)) == pytest.approx({"misplaced": 1})
    assert costs((SQUARE, 0.9, 1)) == pytest.approx({"misnamed": 1})
    # Wrong before right: half of what is said, until it is gone.
    far = [500.0, 0.0, 600.0, 100.0]
    assert costs((far, 0.9, 0), (SQUARE, 0.5, 0)) == pytest.approx({"background": 0.5})
    two = ((SQUARE, 0, 0), (far, 0, 0))
    before = 51 / 101  # of two objects one is found: recall 0.5, at a precision of 1
    assert costs((SQUARE, 0.9, 0), real=two) == pytest.approx({"missed": 1 - before})
    doubled = ((SQUARE, 0.9, 0), (moved(1), 0.8, 0), (far, 0.7, 0))
    assert costs(*doubled, real=two) == pytest.approx({"doubled": 1 - (51 + 50 * 2 / 3) / 101})
    # Of two that are misplaced on one object only the better can be mended; the other goes.
    both = ((moved(50), 0.9, 0), (moved(-50), 0.8, 0))
    assert costs(*both) == pytest.approx({"misplaced": 1})


def plain_f1(scenes: list[Scene], iou: float) -> tuple[float, float]:
    """The best F1 of one class without anything to ignore, and the score from which on."""
    boxes = sorted(
        (
            (score, i, box)
            for i, (said, _) in enumerate(scenes)
            for box, score, _ in zip(*(part.tolist() for part in said), strict=True)
        ),
        key=lambda each: -each[0],
    )
    taken: set[tuple[int, int]] = set()
    total = sum(len(real["labels"]) for _, real in scenes)
    best, right = (0.0, 1.0), 0
    for place, (score, i, box) in enumerate(boxes, 1):
        shares = []
        for k, own in enumerate(scenes[i].truth["boxes"].tolist()):
            w = min(box[2], own[2]) - max(box[0], own[0])
            h = min(box[3], own[3]) - max(box[1], own[1])
            shared = max(w, 0) * max(h, 0)
            area = sum((e[2] - e[0]) * (e[3] - e[1]) for e in (box, own))
            if (i, k) not in taken and shared / (area - shared) >= iou:
                shares.append((shared / (area - shared), k))
        if shares:
            taken.add((i, max(shares)[1]))
            right += 1
        if place == len(boxes) or boxes[place][0] < score:
            best = max(best, (2 * right / (place + total), score))
    return best


@pytest.mark.parametrize("seed", range(3))
def test_the_best_threshold_gives_the_best_f1_and_says_what_it_costs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng, 1, 12, 25, whole=False) for _ in range(6)]
    for one in scenes:
        one.truth["ignored"][:] = 0
        one.truth["labels"][:] = 0
    found = judged(scenes, 1)
    for best in (found.best, found.best_loose):
        assert best is not None
        assert (best.f1.value, best.threshold) == pytest.approx(plain_f1(scenes, best.iou))
        p, r = best.precision.value, best.recall.value
        assert best.f1.value == pytest.approx(2 * p * r / (p + r))
        assert (best.right / best.found, best.right / (6 * 12)) == pytest.approx((p, r))
        assert best.f1.low < best.f1.value < best.f1.high
    assert found.best is not None and found.best_loose is not None
    assert (found.best.iou, found.best_loose.iou) == (0.5, 0.4)
    assert found.best_loose.f1.value >= found.best.f1.value
    # The same at every score, for a chart.
    assert len(found.thresholds) == 101
    assert max(each.f1 for each in found.thresholds) <= found.best.f1.value + 1e-12
    nearest = found.thresholds[int(found.best.threshold * 100)]
    assert nearest.f1 == pytest.approx(found.best.f1.value, abs=0.05)
    kept = {each.kind: each.kept for each in found.mistakes}
    wrong = sum(n for kind, n in kept.items() if kind != "missed")
    assert wrong == found.best.found - found.best.right
    assert found.per_class[0].found == found.best.right
    assert kept["missed"] <= 6 * 12 - found.best.right


def test_curves_end_where_the_numbers_are() -> None:
    rng = np.random.default_rng(5)
    scenes = [random_scene(rng, 3, 10, 30, whole=True) for _ in range(5)]
    found = judged(scenes, 3)
    recalls, half, every = np.array(found.precision_recall).T
    assert recalls.tolist() == pytest.approx(np.linspace(0, 1, 101).tolist())
    assert half.mean() == pytest.approx(found.values()["ap50"])
    assert every.mean() == pytest.approx(found.values()["ap"])
    assert (np.diff(half) <= 1e-12).all() and (np.diff(every) <= 1e-12).all()


def test_the_order_of_images_and_what_the_model_says_besides_change_nothing() -> None:
    rng = np.random.default_rng(6)
    scenes = [random_scene(rng, 3, 10, 30, whole=False) for _ in range(5)]
    straight, turned = judged(scenes, 3), judged(scenes[::-1], 3)
    assert straight.values() == pytest.approx(turned.values())
    few = [one._replace(found=Found(*(part[:7] for part in one.found))) for one in scenes]
    assert judged(scenes, 3, 7).values() == judged(few, 3, 7).values()
    rows = rows_of(scenes, 3)
    shapes = {name: row.shape for name, row in count_boxes(*scene(), 3, 100).items()}
    assert shapes == {name: row.shape[1:] for name, row in rows.items()}


def test_intervals_come_from_images_and_never_lack_width() -> None:
    one = scene([(SQUARE, 0.9, 0)], [(SQUARE, 0, 0)])
    few, more = judged([one] * 6, 1).summary, judged([one] * 60, 1).summary
    for name in ("ap", "ap50", "ap75", "ap_large", "ar", "f1"):
        small, large = few[name], more[name]
        assert small is not None and large is not None
        assert small.value == small.high == pytest.approx(1)
        assert small.low < large.low < 1
    assert few["ap_small"] is few["ap_medium"] is None
    rng = np.random.default_rng(7)
    mixed = judged([random_scene(rng, 2, 8, 20, whole=False) for _ in range(40)], 2)
    for name, each in mixed.summary.items():
        assert each is not None, name
        assert 0 <= each.low < each.value < each.high < 1
    assert mixed.draws == 1000


def test_what_is_kept_is_json_and_names_its_limits() -> None:
    rng = np.random.default_rng(8)
    found = judged([random_scene(rng, 3, 8, 20, whole=False) for _ in range(4)], 3)
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert list(content)[:8] == [
        *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar", "f1")
    ]
    assert content["ap"].keys() == {"value", "low", "high"}
    assert content["ap"]["value"] == found.values()[found.headline]
    assert content["max_detections"] == 100 and content["iou"] == "0.50:0.95"
    last = content["per_class"][2]
    assert (last["name"], last["objects"], last["ap"], last["found"]) == ("class 2", 0, None, 0)
    assert last["said"] > 0
    assert found.absent == (2,)
    assert content["best"]["precision"].keys() == {"value", "low", "high"}


def test_nothing_found_is_0_and_nothing_there_is_no_number() -> None:
    blind = judged([scene(truth=[(SQUARE, 0, 0)])] * 3, 1)
    assert blind.values()["ap"] == blind.values()["f1"] == blind.values()["ar"] == 0
    assert average_precision(rows_of([scene(truth=[(SQUARE, 0, 0)])], 1)) == 0
    assert blind.best is None and blind.summary["ap"].high > 0
    assert {each.kind: each.cost for each in blind.mistakes if each.all} == {"missed": None}
    empty = judged([scene([(SQUARE, 0.9, 0)]), scene()], 2)
    assert set(empty.values().values()) == {None} and empty.absent == (0, 1)
    assert np.isnan(average_precision(rows_of([scene([(SQUARE, 0.9, 0)])], 1)))
    assert json.dumps(empty.to_dict(), allow_nan=False)


def test_what_cannot_be_is_refused() -> None:
    broken = scene([([0.0, 0.0, float("nan"), 5.0], 0.9, 0), (SQUARE, 0.8, 0)])
    with pytest.raises(DataError, match="1 of 2 boxes"):
        count_boxes(*broken, 1, 100)
    with pytest.raises(DataError, match="not numbers"):
        count_boxes(*scene([(SQUARE, float("nan"), 0)]), 1, 100)
    for wrong in (scene([(SQUARE, 0.9, 3)]), scene(truth=[(SQUARE, 3, 0)])):
        with pytest.raises(ValueError, match="labels of boxes must be below 3"):
            count_boxes(*wrong, 3, 100)
    with pytest.raises(ValueError, match="do not fit"):
        detection(rows_of([scene()], 2), ("one",), 100)
