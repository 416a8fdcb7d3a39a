"""Boxes: overlaps by hand."""

import pytest
import torch

from vitrail.nn.boxes import area, giou, iou


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
