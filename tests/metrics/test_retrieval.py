"""Images and texts that find each other: ranks pair by pair, chance by drawing, ties, classes."""

import pytest
import torch
import torch.nn.functional as F

from vitrail.errors import DataError
from vitrail.metrics import retrieval
from vitrail.metrics.retrieval import NUMBERS, judged, ranks


def some(n=30, m=40, d=4, seed=0):
    """Images of one to three texts, some of which are several images'."""
    torch.manual_seed(seed)
    images, texts = (F.normalize(torch.randn(k, d), dim=1) for k in (n, m))
    own = torch.full((n, 3), -1)
    for j in range(m):  # every text has an image, in the first places that are free
        i = j % n
        own[i, (own[i] >= 0).sum()] = j
    own[0, 2], own[15, 1] = 7, 6
    return images, texts, own


def by_hand(images, texts, own, k):
    alike = (images @ texts.T).tolist()
    pairs = {(i, j) for i, row in enumerate(own.tolist()) for j in row if j >= 0}
    n, m = len(images), len(texts)

    def found(asked, among, belongs, likeness):
        hits = 0
        for a in range(asked):
            best = max(likeness(a, b) for b in range(among) if belongs(a, b))
            others = sum(likeness(a, b) >= best for b in range(among) if not belongs(a, b))
            hits += others < k
        return hits / asked

    return (
        found(n, m, lambda i, j: (i, j) in pairs, lambda i, j: alike[i][j]),
        found(m, n, lambda j, i: (i, j) in pairs, lambda j, i: alike[i][j]),
    )


@pytest.mark.parametrize("at_once", [1024, 7])
def test_ranks_are_those_of_pair_by_pair(at_once, monkeypatch):
    monkeypatch.setattr(retrieval, "_AT_ONCE", at_once)
    images, texts, own = some()
    values = judged(images, texts, own).values()
    assert tuple(values) == NUMBERS[:-1]
    for k in (1, 5, 10):
        one, other = by_hand(images, texts, own, k)
        assert values[f"image_to_text_r{k}"] == pytest.approx(one)
        assert values[f"text_to_image_r{k}"] == pytest.approx(other)


def test_a_model_to_which_all_is_alike_finds_nothing():
    same = torch.ones(30, 4) / 2
    values = judged(same, same, torch.arange(30)[:, None]).values()
    assert set(values.values()) == {0.0}
    perfect = judged(torch.eye(4), torch.eye(4), torch.arange(4)[:, None])
    assert set(perfect.values().values()) == {1.0}
    assert perfect.summary["image_to_text_r1"].low < 1


def test_chance_is_that_of_draws():
    images, texts, own = some(200, 50)
    own = torch.arange(200)[:, None] % 50
    own[:, 0] = torch.where(torch.arange(200) < 120, own[:, 0] % 10, own[:, 0])
    own[:50, 0] = torch.arange(50)
    told = judged(images, texts, own).chance
    drawn = {name: [] for name in told}
    for seed in range(60):
        torch.manual_seed(seed)
        images, texts = F.normalize(torch.randn(200, 4)), F.normalize(torch.randn(50, 4))
        order = torch.randperm(200), torch.randperm(50)
        for name, value in judged(images[order[0]], texts[order[1]], own).values().items():
            drawn[name].append(value)
    for name, chance in told.items():
        assert sum(drawn[name]) / 60 == pytest.approx(chance, abs=0.05), name


def test_words_name_classes():
    images = torch.eye(4)
    classes = torch.zeros(4, 3)
    classes[[0, 1, 2], [0, 1, 1]] = 1  # the last one is of none
    named = torch.eye(4)[[0, 1, 3]]
    found = judged(images, images, torch.arange(4)[:, None], named=named, classes=classes)
    assert found.summary["zero_shot"].value == pytest.approx(2 / 3)
    assert found.chance["zero_shot"] == pytest.approx(2 / 3)
    content = found.to_dict()
    assert content["zero_shot"].keys() == {"value", "low", "high"} and content["texts"] == 4
    none = judged(images, images, torch.arange(4)[:, None], named=named, classes=0 * classes)
    assert none.summary["zero_shot"] is None and none.to_dict()["zero_shot"] is None


def test_what_is_no_number_is_told():
    broken = torch.eye(3)
    broken[1, 1] = torch.nan
    with pytest.raises(DataError, match="1 of 3 images"):
        judged(broken, torch.eye(3), torch.arange(3)[:, None])


def test_ranks_have_as_many_rows_as_there_are():
    images, texts, own = some()
    found = ranks(images, texts, own)
    assert found.of_images.shape == (30,) and found.of_texts.shape == (40,)
