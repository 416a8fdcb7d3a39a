"""Assignments are the cheapest there are; the set loss is transformers'."""

from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from transformers.models.eomt.modeling_eomt import EomtLoss

from close import close
from vitrail.errors import UsageError
from vitrail.heads import Prediction
from vitrail.tasks.matching import (
    Objects,
    SetLossConfig,
    assign,
    keyed_draw,
    matched,
    objects_of,
    set_loss,
)

COSTS = st.tuples(st.integers(0, 5), st.integers(0, 6)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.integers(-4, 4) | st.floats(-1e3, 1e3))
)


@settings(max_examples=60, deadline=None)
@given(COSTS)
def test_no_other_assignment_is_cheaper(cost):
    rows, columns = assign(cost)
    assert len(rows) == len(columns) == min(cost.shape)
    assert (np.diff(rows) > 0).all() and len(set(columns.tolist())) == len(columns)
    tall = cost if cost.shape[0] <= cost.shape[1] else cost.T
    every = permutations(range(tall.shape[1]), tall.shape[0])
    best = min(sum(tall[i, j] for i, j in enumerate(chosen)) for chosen in every)
    assert cost[rows, columns].sum() == pytest.approx(best, abs=1e-9 * max(1, abs(best)))


@pytest.mark.parametrize("shape", [(100, 30), (30, 100), (80, 80), (1, 1)])
def test_as_scipy(shape):
    optimize = pytest.importorskip("scipy.optimize")
    for seed in range(3):
        cost = np.random.default_rng(seed).normal(size=shape)
        rows, columns = optimize.linear_sum_assignment(cost)
        assert (assign(cost)[0] == rows).all() and (assign(cost)[1] == columns).all()


def test_what_is_no_number_is_taken_last():
    cost = np.array([[np.nan, 1.0, 2.0], [np.inf, 0.5, 0.0]])
    assert assign(cost)[1].tolist() == [1, 2]
    assert sorted(assign(np.full((2, 2), np.nan))[1].tolist()) == [0, 1]
    assert assign(np.array([[np.nan, 5.0], [np.inf, 1.0]]))[1].tolist() == [0, 1]


# --- the loss ---

CLASSES, QUERIES = 4, 6


def said(batch: int = 2) -> Prediction:
    return Prediction(
        torch.randn(batch, QUERIES, CLASSES + 1, requires_grad=True),
        torch.randn(batch, QUERIES, 8, 12, requires_grad=True),
    )


def things() -> list[Objects]:
    labels = F.interpolate(torch.rand(2, 1, 3, 4), (32, 48))[:, 0] * CLASSES
    return [objects_of(x.long()) for x in labels]


@pytest.mark.parametrize("points", [100, 12544])
def test_the_loss_is_transformers(points):
    shape = hf.EomtConfig(num_labels=CLASSES, train_num_points=points)
    weights = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
    theirs = EomtLoss(shape, weights)
    predictions, objects = [said(), said()], things()
    torch.manual_seed(3)
    expected = [
        theirs(p.masks, p.classes, [o.masks.float() for o in objects], [o.classes for o in objects])
        for p in predictions
    ]
    generator = torch.Generator().manual_seed(3)  # the same numbers in the same order
    found = set_loss(
        predictions,
        objects,
        SetLossConfig(points=points),
        lambda i, shape: torch.rand(shape, generator=generator),
    )
    for name, weight in weights.items():
        part = {"loss_cross_entropy": "classes", "loss_mask": "masks", "loss_dice": "dice"}[name]
        close(getattr(found, part), sum(weight * one[name] for one in expected))
    close(found.total, found.classes + found.masks + found.dice)
    inputs = [tensor for p in predictions for tensor in p]
    ours = torch.autograd.grad(found.total, inputs)
    total = sum(weight * one[name] for name, weight in weights.items() for one in expected)
    for a, b in zip(ours, torch.autograd.grad(total, inputs), strict=True):
        close(a, b)


def test_at_all_pixels_it_is_the_mean_over_them():
    objects = [Objects(torch.tensor([1, 3]), torch.rand(2, 32, 48) > 0.5)]
    found = said(1)
    config = SetLossConfig(points=None)
    ((rows, columns),) = matched(found, objects, config, None)
    losses = set_loss([found], objects, config)
    logits = F.interpolate(found.masks[:, rows], (32, 48), mode="bilinear")[0]
    true = objects[0].masks[columns].float()
    close(losses.masks, 5 * F.binary_cross_entropy_with_logits(logits, true))
    p = logits.sigmoid()
    dice = 1 - (2 * (p * true).sum((1, 2)) + 1) / (p.sum((1, 2)) + true.sum((1, 2)) + 1)
    close(losses.dice, 5 * dice.mean())
    # The points' expectation is that, where none is preferred, and masks have no border.
    many = SetLossConfig(points=200_000, importance=0.0, oversample=1.0)
    drawn = set_loss([found], objects, many, keyed_draw(0, 0, np.array([5])))
    close(drawn.masks, losses.masks, 0.05)


def test_a_perfect_answer_costs_nothing():
    objects = things()
    masks = torch.full((2, QUERIES, 32, 48), -50.0)
    classes = torch.zeros(2, QUERIES, CLASSES + 1)
    classes[..., CLASSES] = 50
    for i, one in enumerate(objects):
        for j, (label, mask) in enumerate(zip(one.classes, one.masks, strict=True)):
            masks[i, QUERIES - 1 - j][mask] = 50
            classes[i, QUERIES - 1 - j] = 50 * F.one_hot(label, CLASSES + 1)
    found = Prediction(classes, masks)
    assert set_loss([found], objects, SetLossConfig(points=None)).total < 1e-4
    rows, columns = matched(found, objects, SetLossConfig(points=None), None)[0]
    assert rows.tolist() == [QUERIES - 1 - j for j in columns]


def test_an_image_without_objects_has_but_its_classes():
    none = Objects(torch.zeros(0, dtype=torch.long), torch.zeros(0, 32, 48, dtype=torch.bool))
    for config in (SetLossConfig(points=20), SetLossConfig(points=None)):
        found = said()
        losses = set_loss([found], [none, none], config, keyed_draw(0, 0, np.array([1, 2])))
        assert losses.masks == losses.dice == 0
        losses.total.backward()
        assert found.classes.grad.any() and not found.masks.grad.any()


def test_more_objects_than_queries():
    many = Objects(torch.arange(9) % CLASSES, torch.rand(9, 32, 48) > 0.5)
    losses = set_loss([said(1)], [many], SetLossConfig(points=30), keyed_draw(0, 0, np.array([1])))
    assert losses.total.isfinite()


def test_points_of_an_image_do_not_depend_on_its_batch():
    objects, config = things(), SetLossConfig(points=50)
    found = said()
    one = Prediction(found.classes[1:], found.masks[1:])
    counted = {"config": config, "count": 1.0}
    both = set_loss([found], objects, draw=keyed_draw(7, 2, np.array([4, 9])), **counted)
    first = set_loss(
        [Prediction(found.classes[:1], found.masks[:1])],
        objects[:1],
        draw=keyed_draw(7, 2, np.array([4])),
        **counted,
    )
    second = set_loss([one], objects[1:], draw=keyed_draw(7, 2, np.array([9])), **counted)
    close(both.masks, first.masks + second.masks)
    other = set_loss([one], objects[1:], draw=keyed_draw(7, 3, np.array([9])), **counted)
    assert other.masks != second.masks


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"points": 0}, "points must be at least 1"),
        ({"oversample": 0.5}, "oversample must be at least 1"),
        ({"importance": 1.5}, r"importance must be in \[0, 1\]"),
        ({"no_object": -1.0}, "no_object cannot be negative"),
    ],
)
def test_configs_that_make_no_sense(changes, words):
    with pytest.raises(UsageError, match=words):
        SetLossConfig(**changes)
    with pytest.raises(UsageError, match="give draw=, or points=None"):
        set_loss([said()], things())
