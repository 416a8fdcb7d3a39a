"""Queries against objects: who answers for what, and what is nobody's mistake."""

import time

import hypothesis.extra.numpy as npst
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from close import close
from vitrail.data.targets.boxes import ANY
from vitrail.errors import UsageError
from vitrail.heads.deformable import BoxPrediction
from vitrail.tasks.box_matching import BoxLossConfig, Truths, box_loss, matched
from vitrail.tasks.matching import assign

SIZE = (100, 200)
SURE, UNSURE = 6.0, -6.0


def truths_of(*rows: tuple[list[float], int, int]) -> Truths:
    """Of one view: a box in pixels, its label, and whether it is ignored."""
    boxes, labels, ignored = zip(*rows, strict=True) if rows else ([], [], [])
    targets = {
        "boxes": torch.tensor([*boxes, [0.0] * 4])[None],
        "labels": torch.tensor([[*labels, -1]]),
        "ignored": torch.tensor([[*ignored, -1]], dtype=torch.int8),
    }
    return Truths.of(targets, SIZE)


def said(*rows: tuple[list[float], list[float]]) -> BoxPrediction:
    """Of one view, by each query: a box in pixels, and logits."""
    boxes, logits = zip(*rows, strict=True)
    least, most = torch.tensor([boxes]).float().div(torch.tensor([200.0, 100] * 2)).chunk(2, dim=2)
    shares = torch.cat([(least + most) / 2, most - least], dim=2)
    return BoxPrediction(torch.tensor([logits]), shares)


CAT, DOG = [10.0, 10, 50, 60], [120.0, 20, 180, 90]
RIGHT = said((DOG, [UNSURE, SURE]), ([0.0, 0, 5, 5], [UNSURE, UNSURE]), (CAT, [SURE, UNSURE]))


def test_each_object_gets_the_query_that_says_it():
    truths = truths_of((CAT, 0, 0), ([0.0, 0, 200, 100], ANY, 1), (DOG, 1, 0))
    pairs = matched(RIGHT, truths, 1, BoxLossConfig())
    assert pairs.query.tolist() == [0, 2] and pairs.object.tolist() == [2, 0]


def test_each_group_has_an_answer_of_its_own():
    both = BoxPrediction(*(torch.cat([part, part.flip(1)], dim=1) for part in RIGHT))
    pairs = matched(both, truths_of((CAT, 0, 0), (DOG, 1, 0)), 2, BoxLossConfig())
    assert pairs.query.tolist() == [0, 2, 3, 5] and pairs.object.tolist() == [1, 0, 0, 1]
    one = box_loss([RIGHT], truths_of((CAT, 0, 0), (DOG, 1, 0)))
    close(box_loss([both], truths_of((CAT, 0, 0), (DOG, 1, 0)), 2).total, one.total)


def test_the_parts_by_hand():
    """One query, one object that it misses by 20 of 40 pixels."""
    found = said(([30.0, 10, 70, 60], [1.0, -2.0]))
    loss = box_loss([found], truths_of((CAT, 0, 0)))
    chance, iou = torch.tensor([1.0, -2.0]).sigmoid(), 1 / 3
    quality = chance[0] ** 0.25 * iou**0.75
    right = -quality * chance[0].log() - (1 - quality) * (1 - chance[0]).log()
    close(loss.classes, right - chance[1] ** 2 * (1 - chance[1]).log())
    close(loss.l1, torch.tensor(5 * 20 / 200))
    close(loss.giou, torch.tensor(2 * (1 - iou)))
    close(loss.total, loss.classes + loss.l1 + loss.giou)
    twice = box_loss([found, found], truths_of((CAT, 0, 0)))
    close(twice.total, 2 * loss.total)


def test_the_quality_of_a_box_is_what_its_class_is_to_say():
    near = said(([12.0, 10, 52, 60], [0.0, UNSURE])).boxes
    far = said(([30.0, 10, 70, 60], [0.0, UNSURE])).boxes
    steps = []
    for boxes in (near, far):
        logits = torch.tensor([[[2.0, UNSURE]]], requires_grad=True)
        box_loss([BoxPrediction(logits, boxes)], truths_of((CAT, 0, 0))).total.backward()
        steps.append(float(logits.grad[0, 0, 0]))
    assert steps[0] < 0.05 < steps[1]


@pytest.mark.parametrize(
    ("label", "excused"), [(0, [True, False]), (1, [False, True]), (ANY, [True, True])]
)
def test_what_lies_in_an_ignored_region_is_no_mistake(label, excused):
    """Of its class, or of all; the query is not taught to say it, either."""
    logits = torch.full((1, 1, 2), 2.0, requires_grad=True)
    found = BoxPrediction(logits, said((CAT, [0.0, 0.0])).boxes)
    loss = box_loss([found], truths_of(([0.0, 0, 100, 100], label, 1)))
    loss.total.backward()
    assert [step == 0 for step in logits.grad[0, 0].tolist()] == excused
    assert loss.l1 == loss.giou == 0


def test_what_lies_mostly_beside_it_is_one():
    logits = torch.full((1, 1, 2), 2.0, requires_grad=True)
    found = BoxPrediction(logits, said((CAT, [0.0, 0.0])).boxes)
    box_loss([found], truths_of(([0.0, 0, 25, 100], ANY, 1))).total.backward()
    assert (logits.grad > 0).all()


def test_an_object_within_an_ignored_region_is_learned():
    logits = torch.full((1, 1, 2), -2.0, requires_grad=True)
    found = BoxPrediction(logits, said((CAT, [0.0, 0.0])).boxes)
    truths = truths_of((CAT, 0, 0), ([0.0, 0, 100, 100], ANY, 1))
    box_loss([found], truths).total.backward()
    assert logits.grad[0, 0, 0] < 0 and logits.grad[0, 0, 1] == 0


def test_images_without_objects_teach_what_is_none():
    logits = torch.full((1, 3, 2), 0.0, requires_grad=True)
    boxes = RIGHT.boxes.clone().requires_grad_()
    loss = box_loss([BoxPrediction(logits, boxes)], truths_of())
    loss.total.backward()
    assert (logits.grad > 0).all() and (boxes.grad == 0).all() and loss.total.isfinite()


def test_more_objects_than_queries():
    truths = truths_of(*(([x, 0.0, x + 5, 20], 0, 0) for x in range(0, 100, 10)))
    loss = box_loss([RIGHT], truths)
    assert len(matched(RIGHT, truths, 1, BoxLossConfig()).query) == 3
    assert loss.total.isfinite()


@settings(max_examples=100, deadline=None)
@given(npst.arrays(np.float32, (3, 4), elements=st.floats(-300, 300, width=32)))
def test_whatever_boxes_are_said_the_loss_is_a_number(boxes):
    """And so is its gradient: of boxes without an inside, turned, and far outside."""
    shares = torch.from_numpy(boxes)[None].requires_grad_()
    loss = box_loss([BoxPrediction(torch.zeros(1, 3, 2), shares)], truths_of((CAT, 0, 0)))
    loss.total.backward()
    assert loss.total.isfinite() and shares.grad.isfinite().all()


def test_matching_a_full_image_takes_no_time():
    """Of 300 queries and 200 objects, a hundredth of a second."""
    cost = np.random.default_rng(0).random((300, 200))
    started = time.perf_counter()
    rows, columns = assign(cost)
    assert time.perf_counter() - started < 2
    assert len(set(rows)) == len(set(columns)) == 200


def test_weights_are_not_negative():
    with pytest.raises(UsageError, match="l1_weight"):
        BoxLossConfig(l1_weight=-1)
