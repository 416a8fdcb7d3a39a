"""Found boxes: suppression as one would do it box by box, and windows put together by hand."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.found import Found, cut, merged, suppress
from vitrail.nn.boxes import iou


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(0, 2**31), st.floats(0.1, 0.9))
def test_suppression_is_that_of_one_box_after_another(count: int, seed: int, most: float) -> None:
    draw = np.random.default_rng(seed)
    corner = draw.random((count, 2)) * 20
    boxes = np.concatenate([corner, corner + 5 + 10 * draw.random((count, 2))], axis=1)
    scores = (draw.random(count) * 8).round() / 8  # with ties
    labels = draw.integers(2, size=count)
    wanted: list[int] = []
    for i in (-scores).argsort(kind="stable").tolist():
        rivals = [k for k in wanted if labels[k] == labels[i]]
        if all(iou(*torch.from_numpy(boxes[[i, k]])) <= most for k in rivals):
            wanted.append(i)
    assert suppress(boxes, scores, labels, most).tolist() == wanted


def test_a_window_leaves_to_another_what_its_edge_cuts() -> None:
    boxes = np.array([[80.0, 10, 100, 30], [0, 10, 20, 30], [50, 10, 100, 30]])
    found = Found(boxes, np.array([0.9, 0.8, 0.7]), np.zeros(3, np.int64))
    # The middle window of a row: the first is whole in the next one, the second in the one before;
    # the third is wider than what two windows share.
    is_cut, left = cut(found, (0, 75), (100, 100), (100, 250))
    assert left.boxes.tolist() == boxes[2:].tolist() and is_cut.tolist() == [True]
    is_cut, alone = cut(found, (0, 0), (100, 100), (100, 100))
    assert alone.boxes.tolist() == boxes.tolist() and not is_cut.any()


def test_a_part_of_what_another_window_has_whole_goes() -> None:
    first = Found(np.array([[0.0, 0, 90, 40]]), np.array([0.5]), np.array([0]))
    boxes = np.array([[0.0, 0, 30, 40], [0, 0, 30, 40]])  # at x = 60: both are cut by the window
    second = Found(boxes, np.array([0.9, 0.8]), np.array([0, 1]))
    places = [(0, 0), (0, 60)]
    left = merged([first, second], places, (100, 100), (100, 160), most=10)
    assert left.boxes.tolist() == [[60, 0, 90, 40], [0, 0, 90, 40]]  # of another class
    assert left.labels.tolist() == [1, 0]
