"""What int8 may lose, and the search for the least that has to stay in float, of made-up models."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitrail.deploy.export.budget import (
    Attempt,
    Bounds,
    Variant,
    lost,
    search,
)
from vitrail.deploy.export.int8 import Layer
from vitrail.errors import DataError, UsageError
from vitrail.metrics import paired

N = 2000


def hits(right, n=N):
    return (np.arange(n) < right).astype(float)


class Made:
    """A model of which each layer, where it is int8, gets some images wrong that were right."""

    def __init__(self, harm, floor=0, speed=1.0):
        self.harm, self.floor, self.speed = harm, floor, speed
        self.quantised = []

    def variant(self, name="static"):
        layers = [Layer(node, node.partition("/")[2]) for node in self.harm]
        return Variant(
            name=name, layers=layers, quantise=self.quantise, measure=self.measure, far=self.far
        )

    def quantise(self, floats):
        self.quantised.append(sorted(floats))
        return Path("|".join(sorted(floats)))

    def wrong(self, file):
        floats = str(file).split("|")
        return self.floor + sum(n for node, n in self.harm.items() if node not in floats)

    def measure(self, file):
        floats = [node for node in str(file).split("|") if node in self.harm]
        return Attempt(file, hits(N - self.wrong(file)), self.speed * (1 + len(floats)), 1000)

    def far(self, file):
        return float(self.wrong(file))


def network(**harm):
    """Of six blocks with two layers each, whose harm is 0 but for those given: b3_a=40."""
    names = [f"b{i}_{part}" for i in range(6) for part in "ab"]
    return {f"n/blocks.{name[1]}.{name[3]}": harm.get(name, 0) for name in names}


def found(model, budget=0.5, bounds=None, told=None):
    lines = [] if told is None else told
    extra = () if bounds is None else (bounds,)
    return search([model.variant()], hits(N), budget, lines.append, *extra)


def test_nothing_stays_in_float_where_nothing_is_lost():
    model = Made(network())
    assert found(model).floats == ()
    assert model.quantised == [[]]


def test_one_bad_layer_is_found():
    told = []
    trial = found(Made(network(b3_b=60)), told=told)
    assert trial.floats == ("blocks.3.b",)
    assert trial.int8 == 11
    assert "nothing in float: 3.00 points lost" in told[0]
    assert "blocks.3.b in float: 0.00 points lost" in told[-1]


def test_several_bad_blocks_are_found_the_worst_first():
    trial = found(Made(network(b3_b=60, b1_a=40, b5_a=20, b5_b=20)))
    assert trial.floats[0] == "blocks.3"
    assert {name[:8] for name in trial.floats} == {"blocks.1", "blocks.3", "blocks.5"}
    assert trial.lost.high <= 0.005


def test_a_larger_budget_leaves_less_in_float():
    harm = network(b3_b=60, b1_a=40, b5_a=20)
    sizes = [found(Made(harm), budget).int8 for budget in (0.5, 3, 8)]
    assert sizes == sorted(sizes)
    assert sizes[-1] == 12


def test_the_search_keeps_within_its_bounds():
    told = []
    with pytest.raises(DataError, match=r"none of 2 int8 models .*10.00 points lost"):
        found(Made(network(b3_b=200, b4_b=0), floor=0), bounds=Bounds(trials=2), told=told)
    assert len(told) == 2
    model = Made(network(b3_b=200))
    with pytest.raises(DataError):
        found(model, bounds=Bounds(seconds=0.0))


def test_fewer_tokens_and_int8_are_chosen_together():
    whole = Made(network(b2_a=60), speed=3.0).variant("none")
    quick = Made(network(), speed=1.0).variant("tome:r=8")
    bad = Made(network(), floor=100, speed=0.5)
    told = []
    trial = search(
        [bad.variant("tome:r=13"), quick, whole], hits(N), 0.5, told.append, Bounds(trials=40)
    )
    assert trial.name == "tome:r=8"
    assert len(bad.quantised) == 2, "whose float model loses too much is not searched"


def test_a_model_all_in_float_is_not_int8():
    harm = network(**{f"b{i}_{part}": 30 for i in range(6) for part in "ab"})
    with pytest.raises(DataError, match="Give a larger budget"):
        found(Made(harm), budget=0.4)


@pytest.mark.parametrize("budget", [0.0, -1.0, 100.0, float("nan")])
def test_a_budget_that_is_none_is_refused(budget):
    with pytest.raises(UsageError, match=r"budget=0\.5"):
        found(Made(network()), budget)


@given(st.lists(st.sampled_from([-1, 0, 0, 0, 1]), min_size=1, max_size=60))
def test_of_hits_the_interval_is_that_of_pairs(changes):
    changes = np.array(changes)
    before = np.where(changes > 0, 1.0, 0.0)
    after = np.where(changes < 0, 1.0, 0.0)
    gained, gone = int((changes > 0).sum()), int((changes < 0).sum())
    assert lost(before, after) == pytest.approx(paired(gained, gone, len(changes)))
