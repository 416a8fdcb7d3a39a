"""Metrics of features that no classes were learned with."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from close import close
from vitrail.errors import DataError
from vitrail.metrics.features import (
    alpha_req,
    judged,
    knn,
    leave_one_out,
    probe,
    rankme,
    rights,
    spread,
)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def one_hot(labels: list[int], c: int) -> torch.Tensor:
    return torch.eye(c)[labels]


def by_hand(
    queries: torch.Tensor, bank: torch.Tensor, classes: torch.Tensor, k: int, own: bool
) -> np.ndarray:
    """As DINO's script says it, one image at a time."""
    found = []
    for i, query in enumerate(queries.numpy()):
        votes = []
        for j, other in enumerate(bank.numpy()):
            if not (own and i == j):
                cosine = query @ other / np.linalg.norm(query) / np.linalg.norm(other)
                votes.append((cosine, j))
        total = np.zeros(classes.shape[1])
        for cosine, j in sorted(votes, reverse=True)[:k]:
            total += math.exp(cosine / 0.07) * classes[j].numpy()
        found.append(total / total.sum())
    return np.array(found)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(2, 12),
    m=st.integers(1, 12),
    c=st.integers(1, 4),
    k=st.integers(1, 15),
    several=st.booleans(),
    seed=st.integers(0, 99),
)
def test_votes_are_those_of_a_loop(
    n: int, m: int, c: int, k: int, several: bool, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    queries, bank = drawn(n, 5, seed=seed), drawn(m, 5, seed=seed + 100)
    classes = one_hot(draw.integers(0, c, m).tolist(), c)
    if several:
        classes = torch.from_numpy(draw.integers(0, 2, (m, c))).float()
        classes[:, 0] = 1  # an image that has nothing votes for nothing
    found = knn(queries, bank, classes, k=k)
    close(
        (found / found.sum(1, keepdim=True)).double(),
        by_hand(queries, bank, classes, k, False),
        1e-4,
    )
    if m > 1:
        found = leave_one_out(bank, classes, k=k)
        close(
            (found / found.sum(1, keepdim=True)).double(),
            by_hand(bank, bank, classes, k, True),
            1e-4,
        )


def test_many_images_are_asked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    features, classes = drawn(50, 6), one_hot([i % 3 for i in range(50)], 3)
    whole = leave_one_out(features, classes)
    monkeypatch.setattr("vitrail.metrics.features._AT_ONCE", 7)
    close(leave_one_out(features, classes), whole)


def test_right_is_any_class_that_the_image_has() -> None:
    votes = torch.tensor([[0.1, 0.9], [0.9, 0.1], [0.2, 0.8]])
    classes = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    assert rights(votes, classes).tolist() == [True, False, True]


def test_the_probe_leaves_each_image_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against as many fits as there are images, each without one."""
    monkeypatch.setattr("vitrail.metrics.features._STRENGTHS", (0.1,))
    n, d = 15, 4
    x, y = drawn(n, d), one_hot([i % 3 for i in range(n)], 3).double()
    centred = x - x.mean(0)
    strength = n * 0.1 * centred.square().sum().item() / n / d
    expected = []
    for i in range(n):
        rest = [j for j in range(n) if j != i]
        with_one = torch.cat([x[rest], torch.ones(n - 1, 1)], 1)
        held = strength * torch.eye(d + 1, dtype=torch.float64)
        held[d, d] = 0
        weights = torch.linalg.solve(with_one.T @ with_one + held, with_one.T @ y[rest])
        expected.append(torch.cat([x[i], torch.ones(1)]) @ weights)
    close(probe(x, y), torch.stack(expected), 1e-8)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_the_probe_takes_what_knows_nothing(n: int) -> None:
    told = probe(torch.ones(n, 3), one_hot([0] * n, 2))
    assert told.isfinite().all() and (n == 1 or (told.argmax(1) == 0).all())


def test_rankme_of_known_spectra() -> None:
    q, _ = torch.linalg.qr(drawn(200, 16))
    assert rankme(q) == pytest.approx(16, rel=1e-4)
    assert rankme(q[:, :3] @ drawn(3, 16)) < 3.001
    assert rankme(torch.ones(200, 16)) == pytest.approx(1, abs=1e-3)
    singular = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    p = singular / 8
    turn, _ = torch.linalg.qr(drawn(4, 4))
    expected = math.exp(-(p * p.log()).sum())
    assert rankme(q[:, :4] * singular @ turn) == pytest.approx(expected, rel=1e-4)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 20), d=st.integers(1, 12), seed=st.integers(0, 99))
def test_rankme_is_the_papers_formula(n: int, d: int, seed: int) -> None:
    x = drawn(n, d, seed=seed)
    singular = torch.linalg.svdvals(x)
    p = singular / singular.sum() + 1e-7
    assert rankme(x) == pytest.approx(math.exp(-(p * p.log()).sum()), rel=1e-5)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_alpha_req_is_the_power_of_the_spectrum(power: float) -> None:
    q, _ = torch.linalg.qr(drawn(300, 12) - drawn(300, 12).mean(dim=0))
    q, _ = torch.linalg.qr(q - q.mean(dim=0))
    values = torch.arange(1, 13, dtype=torch.float64) ** -power
    x = (q - q.mean(dim=0)) * values.sqrt() @ torch.linalg.qr(drawn(12, 12))[0] + 5
    assert alpha_req(x) == pytest.approx(power, rel=1e-3)
    close(alpha_req(x[:7]), alpha_req(x[:7] * 9), 1e-9)  # of fewer images than directions too
    found = judged(drawn(200, 16)).summary["alpha_req"]
    assert found is not None and found.low < found.value < found.high < 0.5  # noise is flat
    assert math.isnan(alpha_req(drawn(2, 8)))


def test_the_spread_is_one_everywhere_and_none_in_one_place() -> None:
    assert spread(drawn(4000, 32)).item() == pytest.approx(1, abs=0.02)
    assert spread(drawn(1, 32).expand(100, -1) * torch.rand(100, 1)).item() < 1e-6
    half = drawn(4000, 32)
    half[:, 16:] = 0
    assert spread(half).item() == pytest.approx(math.sqrt(0.5), abs=0.02)
    few = torch.nn.functional.normalize(drawn(9, 4), dim=1)
    close(spread(few), few.std(dim=0, correction=0).mean() * 2, 1e-9)


def test_all_numbers_have_intervals_around_them() -> None:
    labels = [i % 4 for i in range(120)]
    classes = one_hot(labels, 4)
    features = classes @ drawn(4, 10).float() + 0.4 * drawn(120, 10).float()
    metrics = judged(features, classes)
    assert list(metrics.summary) == ["knn", "probe", "std", "rankme", "alpha_req"]
    assert (metrics.headline, metrics.images, metrics.dimensions) == ("knn", 120, 10)
    assert metrics.chance == 0.25
    for name, each in metrics.summary.items():
        assert each is not None and each.low < each.high and each.low <= each.value <= each.high, (
            name
        )
    assert metrics.values()["knn"] > 0.9 and metrics.values()["probe"] > 0.9
    votes = leave_one_out(features, classes)
    assert metrics.values()["knn"] == rights(votes, classes).double().mean()
    assert metrics.to_dict()["rankme"]["value"] == metrics.values()["rankme"]
    assert judged(features, classes) == metrics


def test_without_classes_there_are_the_numbers_that_need_none() -> None:
    metrics = judged(drawn(60, 8))
    assert list(metrics.summary) == ["std", "rankme", "alpha_req"]
    assert metrics.headline == "rankme"
    assert metrics.chance is metrics.neighbours is metrics.temperature is None


def test_collapse_shows() -> None:
    metrics = judged(torch.ones(50, 8) / math.sqrt(8), one_hot([i % 2 for i in range(50)], 2))
    values = metrics.values()
    assert values["std"] < 1e-6 and values["rankme"] < 1.01 and values["knn"] < 0.6
    assert metrics.summary.pop("alpha_req") is None  # there are no directions left
    assert all(each is not None and each.high > each.low for each in metrics.summary.values())


@pytest.mark.parametrize("n", [1, 2])
def test_few_images_are_not_many(n: int) -> None:
    metrics = judged(drawn(n, 8), one_hot([0] * n, 3))
    assert (metrics.summary["knn"] is None) == (n == 1)
    for each in metrics.summary.values():
        assert each is None or each.low <= each.value <= each.high
    rank = metrics.summary["rankme"]
    assert rank is not None and rank.low == pytest.approx(1, abs=0.2)  # there are no fewer


def test_what_is_no_number_is_told() -> None:
    features = drawn(5, 3)
    features[2, 1] = math.nan
    with pytest.raises(DataError, match="1 of 5 images"):
        judged(features)
