"""Boxes from queries: the attention against loops, and what a head promises of its queries."""

from dataclasses import replace

import pytest
import torch

from close import close
from vitrail.errors import UsageError
from vitrail.heads.deformable import (
    BoxPrediction,
    QueryBoxes,
    QueryBoxesConfig,
    decode,
    deformable_attention,
)
from vitrail.nn.boxes import iou
from vitrail.tasks.box_matching import Truths, box_loss

SMALL = QueryBoxesConfig(
    queries=6, groups=3, layers=2, width=32, heads=2, cross_heads=4, mlp=48, bottlenecks=1
)


def read(value: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """A map `[e h w]` at (x, y) in 0..1, bilinearly between the centres of its cells."""
    height, width = value.shape[1:]
    x, y = x * width - 0.5, y * height - 0.5
    found = torch.zeros(len(value))
    left, top = int(torch.floor(torch.tensor(x))), int(torch.floor(torch.tensor(y)))
    for row in (top, top + 1):
        for column in (left, left + 1):
            if 0 <= row < height and 0 <= column < width:
                share = (1 - abs(x - column)) * (1 - abs(y - row))
                found += share * value[:, row, column]
    return found


def test_attention_is_what_loops_give():
    b, q, heads, points, e = 2, 3, 2, 4, 5
    values = [torch.randn(b, heads, e, h, w) for h, w in ((4, 7), (2, 3))]
    places = torch.rand(b, q, heads, 2, points, 2) * 1.4 - 0.2  # some beyond the edges
    weights = torch.randn(b, q, heads, 2 * points).softmax(-1).unflatten(3, (2, points))
    expected = torch.zeros(b, q, heads, e)
    for i in range(b):
        for j in range(q):
            for k in range(heads):
                for level, value in enumerate(values):
                    for p in range(points):
                        x, y = places[i, j, k, level, p].tolist()
                        share = weights[i, j, k, level, p]
                        expected[i, j, k] += share * read(value[i, k], x, y)
    close(deformable_attention(values, places, weights), expected.flatten(2))


def maps_of(size: tuple[int, int], batch: int = 2) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(batch, 16, *size) for _ in range(2))


def head_of(config: QueryBoxesConfig = SMALL) -> QueryBoxes:
    return QueryBoxes((16, 16), 4, config)


def test_groups_are_for_training(randomised):
    """All are learned from; what is said later is what the first alone says."""
    head = randomised(head_of())
    maps = maps_of((4, 5))
    later = head.predictions(maps)
    found = head.train().predictions(maps)
    assert [one.logits.shape for one in found] == [(2, 18, 4)] * 3
    assert [one.boxes.shape for one in later] == [(2, 6, 4)] * 3
    for one, first in zip(found, later, strict=True):
        close(one.logits[:, :6], first.logits)
        close(one.boxes[:, :6], first.boxes)


def test_every_weight_is_learned(randomised):
    """Of what all predictions of a step say there is a gradient for each of the weights."""
    head = randomised(head_of(replace(SMALL, scales=(2.0, 1.0, 0.5))))
    found = head.train().predictions(maps_of((4, 6)))
    sum(one.logits.square().mean() + one.boxes.square().mean() for one in found).backward()
    without = [name for name, tensor in head.named_parameters() if tensor.grad is None]
    assert not without


def test_a_new_head_expects_little_and_starts_at_the_cells():
    head = head_of().eval()
    first, *_, last = head.predictions(maps_of((4, 4)))
    assert last.logits.sigmoid().mean() < 0.05
    close(last.boxes, first.boxes)
    close(first.boxes[..., 2:], torch.full((2, 6, 2), 0.05))


def test_small_maps_have_fewer_queries(randomised):
    head = randomised(head_of())
    assert head(maps_of((1, 4))).boxes.shape == (2, 4, 4)
    assert head.train().predictions(maps_of((1, 4)))[-1].boxes.shape == (2, 12, 4)


def test_oblong_images_are_read_at_their_own_places():
    """The cells of a new head's first stage are where they are in the image."""
    found = head_of(replace(SMALL, queries=8)).eval().predictions(maps_of((2, 4), 1))[0]
    assert sorted(found.boxes[0].tolist()) == [
        pytest.approx([x, y, 0.05, 0.05])
        for x in (0.125, 0.375, 0.625, 0.875)
        for y in (0.25, 0.75)
    ]


def test_a_few_steps_teach_it_one_image():
    """The loss of all groups, stages and layers goes down, and what it says is what there is."""
    head = head_of(replace(SMALL, groups=2)).train()
    maps = maps_of((6, 8), 1)
    truths = Truths.of(
        {
            "boxes": torch.tensor([[[8.0, 8, 40, 40], [64, 32, 120, 80]]]),
            "labels": torch.tensor([[1, 3]]),
            "ignored": torch.zeros(1, 2, dtype=torch.int8),
        },
        (96, 128),
    )
    optimiser = torch.optim.AdamW(head.parameters(), 3e-3)
    losses = []
    for _ in range(80):
        loss = box_loss(head.predictions(maps), truths, head.groups).total
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    found = decode(head.eval()(maps), (96, 128), 2)
    order = found.labels[0].argsort()
    assert found.labels[0, order].tolist() == [1, 3]
    assert (
        iou(found.boxes[0, order], truths.boxes[0] * torch.tensor([128, 96, 128, 96])) > 0.8
    ).all()


def test_decoding_gives_pixels_of_the_view():
    logits = torch.full((2, 3, 2), -9.0)
    logits[0, 1, 0], logits[0, 1, 1], logits[0, 2, 1] = 3.0, 1.0, 2.0
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.5, 0.5], [0.9, 0.5, 0.4, 1.0]])
    found = decode(BoxPrediction(logits, boxes.expand(2, -1, -1)), (100, 200), 3)
    assert found.labels[0].tolist() == [0, 1, 1]
    close(found.scores[0], torch.tensor([3.0, 2.0, 1.0]).sigmoid())
    close(found.boxes[0], torch.tensor([[0.0, 25, 100, 75], [140, 0, 200, 100], [0, 25, 100, 75]]))
    assert found.boxes.shape == (2, 3, 4)


def test_what_no_head_could_be():
    with pytest.raises(UsageError, match="queries"):
        QueryBoxesConfig(queries=0)
    with pytest.raises(UsageError, match="cross_heads"):
        QueryBoxesConfig(width=256, cross_heads=7)
    with pytest.raises(UsageError, match="scales"):
        QueryBoxesConfig(scales=(4.0,))
    with pytest.raises(UsageError, match="dropout"):
        QueryBoxesConfig(dropout=1.0)
