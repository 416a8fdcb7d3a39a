import numpy as np
import pytest

from vitrail.data.keyed import permutation, uniform

N = 20_000


@pytest.fixture(autouse=True)
def every_overflow_is_an_error():
    with np.errstate(all="raise"):
        yield


def test_golden_values() -> None:
    """Runs are reproduced from their seed by any later version: these may never change."""
    indices = np.array([0, 1, 2**40])
    expected = [
        [0.28984427452087402, 0.15385794639587402],
        [0.11657756567001343, 0.41432875394821167],
        [0.96765017509460449, 0.44926995038986206],
    ]
    np.testing.assert_array_equal(uniform(0, 0, indices, "flip", 2), np.float32(expected))
    np.testing.assert_array_equal(permutation(0, 0, 10), [0, 2, 3, 8, 5, 1, 9, 7, 6, 4])


def test_a_sample_has_the_same_numbers_in_any_batch() -> None:
    indices = np.array([5, 3, 900, 3])
    together = uniform(1, 2, indices, "crop", 4)
    for row, index in zip(together, indices, strict=True):
        np.testing.assert_array_equal(row, uniform(1, 2, np.array([index]), "crop", 4)[0])
    np.testing.assert_array_equal(together[:, :2], uniform(1, 2, indices, "crop", 2))


def test_numbers_are_uniform_below_one() -> None:
    u = uniform(0, 0, np.arange(N), "test", 4)
    assert u.dtype == np.float32 and u.shape == (N, 4)
    assert u.min() >= 0 and u.max() < 1
    for column in u.T:
        counts = np.histogram(column, bins=64, range=(0, 1))[0]
        chi_squared = ((counts - N / 64) ** 2 / (N / 64)).sum()
        assert 25 < chi_squared < 115  # 63 degrees of freedom, 5 in 100,000 either way


def test_no_address_tells_of_another() -> None:
    indices = np.arange(N)
    here = uniform(0, 0, indices, "flip", 2)
    others = {
        "the next number": here[:, 1],
        "the next index": uniform(0, 0, indices + 1, "flip", 1)[:, 0],
        "a far index": uniform(0, 0, indices + 2**32, "flip", 1)[:, 0],
        "the next epoch": uniform(0, 1, indices, "flip", 1)[:, 0],
        "the next seed": uniform(1, 0, indices, "flip", 1)[:, 0],
        "seed and epoch exchanged": uniform(10, 1, indices, "flip", 1)[:, 0],
        "another purpose": uniform(0, 0, indices, "flop", 1)[:, 0],
    }
    for what, there in others.items():
        correlation = np.corrcoef(here[:, 0], there)[0, 1]
        assert abs(correlation) < 4 / np.sqrt(N), what


def test_a_permutation_holds_each_index_once_and_follows_its_key() -> None:
    order = permutation(3, 1, N)
    np.testing.assert_array_equal(np.sort(order), np.arange(N))
    assert abs(np.corrcoef(order, np.arange(N))[0, 1]) < 4 / np.sqrt(N)
    for other in (permutation(4, 1, N), permutation(3, 2, N)):
        assert (order == other).mean() < 0.001
    np.testing.assert_array_equal(order, permutation(3, 1, N))


def test_no_samples() -> None:
    assert uniform(0, 0, np.arange(0), "flip", 3).shape == (0, 3)
    assert permutation(0, 0, 0).shape == (0,)
