"""Boxes: overlaps by hand, and suppression as one would do it box by box."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.nn.boxes import area, giou, iou, suppress


@pytest.mark.parametrize(
    ("first", "second", "wanted", "general"),
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1.0, 1.0),
        ((0, 0, 2, 2), (1, 0, 3, 2), 1 / 3, 1 / 3),
        ((0, 0, 1, 1), (3, 0, 4, 1), 0.0, -0.5),  # the box around both is half empty
        ((0, 0, 2, 2), (1, 1, 1, 1), 0.0, 0.0),  # no inside
    ],
)
def test_overlaps(first: tuple, second: tuple, wanted: float, general: float) -> None:
    one, other = torch.tensor(first, dtype=torch.float64), torch.tensor(second).double()
    assert iou(one, other).item() == pytest.approx(wanted)
    assert giou(one, other).item() == pytest.approx(general)


def test_what_has_no_inside_has_no_area() -> None:
    assert area(torch.tensor([[3.0, 0, 1, 2], [0, 0, 0, 5]])).tolist() == [0, 0]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(0, 2**31), st.floats(0.1, 0.9))
def test_suppression_is_that_of_one_box_after_another(count: int, seed: int, most: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=draw) * 20
    boxes = torch.cat([corner, corner + 5 + 10 * torch.rand(count, 2, generator=draw)], dim=1)
    scores = (torch.rand(count, generator=draw) * 8).round() / 8  # with ties
    labels = torch.randint(2, (count,), generator=draw)
    wanted: list[int] = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        rivals = [k for k in wanted if labels[k] == labels[i]]
        if all(iou(boxes[i], boxes[k]) <= most for k in rivals):
            wanted.append(i)
    assert suppress(boxes, scores, labels, most).tolist() == wanted
