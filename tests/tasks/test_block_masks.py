"""Which patches are hidden: exactly as many as were drawn, in blocks, the same for everyone."""

from typing import Any

import numpy as np
import pytest

from vitrail.tasks.block_masks import block_masks


def masks(n: int = 400, grid: tuple[int, int] = (14, 14), **changes: Any) -> np.ndarray:
    how: dict[str, Any] = {"seed": 0, "epoch": 3, "view": 0, "chance": 0.5, "shares": (0.1, 0.5)}
    return block_masks(grid, np.arange(n), **how | changes)


@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (3, 3), (2, 9), (1, 1)])
def test_as_many_as_the_share_says(grid: tuple[int, int]) -> None:
    n = grid[0] * grid[1]
    for share in (0.1, 0.37, 0.5, 1.0):
        found = masks(30, grid, chance=1.0, shares=(share, share))
        assert found.shape == (30, n) and (found.sum(axis=1) == round(share * n)).all()


def test_half_of_the_views_have_some_in_the_range() -> None:
    counts = masks().sum(axis=1)
    chosen = counts[counts > 0]
    assert 160 < len(chosen) < 240
    assert chosen.min() >= round(19.6) and chosen.max() <= 98 and 54 < chosen.mean() < 64
    assert not masks(chance=0.0).any()


def test_they_are_blocks() -> None:
    found = masks(200, chance=1.0, shares=(0.3, 0.3)).reshape(-1, 14, 14)
    together = (found[:, 1:] & found[:, :-1]).sum() / found.sum()
    rng = np.random.default_rng(0)
    scattered = rng.permuted(found.reshape(200, -1), axis=1).reshape(-1, 14, 14)
    by_chance = (scattered[:, 1:] & scattered[:, :-1]).sum() / scattered.sum()
    assert together > 0.6 > 2 * by_chance


def test_a_view_is_its_number_alone() -> None:
    whole = masks(20)
    how: Any = {"seed": 0, "epoch": 3, "view": 0, "chance": 0.5, "shares": (0.1, 0.5)}
    assert np.array_equal(block_masks((14, 14), np.array([7, 3]), **how), whole[[7, 3]])
    for other in ({"seed": 1}, {"epoch": 4}, {"view": 1}):
        assert not np.array_equal(masks(20, **other), whole)
