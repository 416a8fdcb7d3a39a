"""Detection as a task: who answers for what, what it costs, and boxes in the image's own pixels."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vitrail.data import UnreadableImage
from vitrail.data.batches.batch import Batch
from vitrail.data.sources.source import ArraySource
from vitrail.data.sources.tiled import Tiled
from vitrail.data.targets import ANY, NO_BOXES, Boxes, Said, stacked
from vitrail.data.views.canvas import canvas_of
from vitrail.data.views.preprocess import Preprocess
from vitrail.errors import UsageError
from vitrail.heads.dense import Dense, DenseHead, decode
from vitrail.nn.boxes import Candidates
from vitrail.tasks import Detect, DetectConfig
from vitrail.tasks.dense_boxes import Truth, by_alignment, by_centre, dense_loss, objects_of


def cells(size: int, *strides: int) -> Dense:
    """What a head says of nothing, of a square view."""
    head = DenseHead(8, 2, levels=len(strides), convs=0)
    maps = tuple(torch.zeros(1, 8, size // s, size // s) for s in strides)
    return head(maps, tuple((s, s) for s in strides))


def truth(*boxes: tuple[float, ...], labels: list[int] | None = None, ignored: Any = None) -> Truth:
    m = len(boxes)
    return Truth(
        torch.tensor(boxes, dtype=torch.float32).reshape(m, 4),
        torch.tensor(labels or [0] * m, dtype=torch.int64),
        torch.tensor(ignored or [False] * m, dtype=torch.bool),
    )


def test_cells_near_the_centre_answer_on_the_map_of_its_size() -> None:
    found = cells(64, 8, 16)
    # 16 pixels: the finest map, of whose cells four have their centres within 12 of (24, 24).
    small = by_centre(found, truth((16, 16, 32, 32)))
    assert found.points[small.object == 0].tolist() == [[20, 20], [28, 20], [20, 28], [28, 28]]
    # A point is up to 100 pixels from its sides: the coarser map's, within 24 of its centre.
    large = by_centre(found, truth((-68, -68, 132, 132)))
    assert set(found.strides[large.object == 0].flatten().tolist()) == {16}


def test_of_two_objects_the_smaller_has_the_cell_and_none_has_no_cell() -> None:
    found = cells(64, 8)
    both = by_centre(found, truth((0, 0, 60, 60), (24, 24, 40, 40)))
    at = (found.points == torch.tensor([28.0, 28.0])).all(dim=1)
    assert both.object[at].item() == 1
    # Between the cells' centres, so that none is inside of it.
    tiny = by_centre(found, truth((5, 5, 7, 7)))
    assert found.points[tiny.object == 0].tolist() == [[4, 4]]
    assert (by_centre(found, truth()).object == -1).all()


def test_what_says_best_where_it_is_answers_for_it() -> None:
    found = cells(64, 8)
    object_ = truth((0, 0, 40, 40), labels=[1])
    good = (found.points == torch.tensor([12.0, 28.0])).all(dim=1)
    sides = found.sides.detach().clone()
    sides[0, good] = torch.tensor([12.0, 28, 28, 12])  # just that box
    said = found._replace(sides=sides, centred=None)
    given = by_alignment(said, 0, object_)
    assert given.weight[good].item() == pytest.approx(1)
    assert given.weight.sum() == pytest.approx(1, abs=0.05)  # the others are far off
    assert (given.object >= 0).sum() == 13


def test_an_object_that_nothing_says_yet_is_learned_all_the_same() -> None:
    found = cells(64, 8, 16, 32)._replace(centred=None)
    # Inside of no cell's centre: the nearest cell of the finest map answers for it.
    tiny = by_alignment(found, 0, truth((9, 9, 11, 11), labels=[1]))
    assert found.points[tiny.object >= 0].tolist() == [[12.0, 12.0]]
    assert tiny.weight.sum() == pytest.approx(0.1)
    # As large as the view, where all boxes are small.
    small = found._replace(sides=torch.full_like(found.sides, 0.5))
    large = by_alignment(small, 0, truth((0, 0, 64, 64)))
    assert large.weight.max() == pytest.approx(0.1)
    loss = dense_loss(found, [truth((9, 9, 11, 11), labels=[1])], "aligned")
    (grad,) = torch.autograd.grad(loss.boxes, found.sides, allow_unused=True)
    assert grad is not None and grad.abs().max() > 1e-5


@pytest.mark.parametrize("assign", ["centre", "aligned"])
def test_parts_of_a_batch_add_up_to_it(assign: str) -> None:
    torch.manual_seed(0)
    head = DenseHead(8, 2, levels=2, convs=1, centred=assign == "centre")
    maps = torch.randn(3, 8, 8, 8), torch.randn(3, 8, 4, 4)
    truths = [
        truth((4, 4, 30, 20), (30, 30, 60, 63), labels=[0, 1]),
        truth(),
        truth((0, 0, 50, 50), (10, 10, 20, 20), labels=[ANY, 1], ignored=[True, False]),
    ]

    def loss(rows: list[int]) -> Tensor:
        found = head(tuple(m[rows] for m in maps), ((8, 8), (16, 16)))
        return sum(dense_loss(found, [truths[i] for i in rows], assign), start=torch.zeros(()))

    whole = loss([0, 1, 2])
    wanted = torch.autograd.grad(whole, [*head.parameters()])
    weights = [objects_of([one]) for one in truths]
    assert weights == [2, 1, 1]
    parts = sum(loss([i]) * w for i, w in enumerate(weights)) / sum(weights)
    found = torch.autograd.grad(parts, [*head.parameters()])
    largest = max(each.abs().max().item() for each in wanted)  # a bias before a norm has none
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max() + 1e-6 * largest


@pytest.mark.parametrize("label", [ANY, 0])
def test_what_is_ignored_is_neither_right_nor_wrong(label: int) -> None:
    found = cells(64, 8)
    logits = torch.zeros_like(found.logits).requires_grad_()
    said = found._replace(logits=logits)
    region = truth((0, 0, 32, 64), labels=[label], ignored=[True])
    dense_loss(said, [region], "centre").classes.backward()
    assert logits.grad is not None
    left = found.points[:, 0] < 32
    of_class = logits.grad[0, left, 0]
    other = logits.grad[0, left, 1]
    assert (of_class == 0).all() and (logits.grad[0, ~left] != 0).all()
    assert (other == 0).all() == (label == ANY)


class Bright(nn.Module):
    """Finds the bright rectangle of class 1 that a view shows."""

    doubles = True

    def candidates(self, x: Tensor, most: int) -> Candidates:
        return decode(self(x), (x.shape[2], x.shape[3]), most)

    def forward(self, x: Tensor) -> Dense:
        boxes = []
        for view in x:
            rows, columns = torch.nonzero(view[0] > 0.5, as_tuple=True)
            if len(rows):
                ends = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
                boxes.append(torch.stack(ends).float())
            else:
                boxes.append(torch.zeros(4))
        found = torch.stack(boxes)[:, None]
        points = torch.zeros(1, 2)
        sides = torch.cat([-found[..., :2], found[..., 2:]], dim=-1)
        logits = torch.tensor([-20.0, 4.0]).expand(len(x), 1, 2)
        return Dense(logits, sides, None, points, torch.ones(1, 2), torch.zeros(1).long())


def shown(boxes: Boxes, images: list[np.ndarray], preprocess: Preprocess) -> tuple[Batch, Detect]:
    task = Detect.__new__(Detect)
    nn.Module.__init__(task)
    Detect.__init__(task, Bright(), DetectConfig(), boxes, preprocess)  # type: ignore[arg-type]
    source = ArraySource(np.stack(images), np.zeros(len(images), int), ("x",), "a")
    canvas = canvas_of(preprocess, [preprocess.view(source.load(i)) for i in range(len(images))])
    said = stacked([boxes.target(i, None) for i in range(len(images))])
    batch = Batch(
        (canvas,),
        {name: torch.from_numpy(values) for name, values in said.items()},
        np.arange(len(images)),
    )
    return batch, task


def picture(size: tuple[int, int], box: tuple[int, int, int, int]) -> np.ndarray:
    image = np.zeros((*size, 3), np.uint8)
    image[box[1] : box[3], box[0] : box[2]] = 255
    return image


@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess(size=(64, 64), resize="letterbox", background=0, interpolation="nearest"),
        Preprocess(size=(64, 96), resize="squash", interpolation="nearest"),
        Preprocess(size=(96, 96), resize="tiles", background=0, patch=(8, 8)),
        Preprocess(size=(96, 96), resize="tiles", tile=48, background=0, interpolation="nearest"),
    ],
    ids=["letterbox", "squash", "tiles", "larger tiles"],
)
@pytest.mark.parametrize("box", [(4, 8, 24, 20), (40, 44, 60, 60), (0, 0, 8, 8)])
def test_boxes_come_back_to_the_images_own_pixels(
    preprocess: Preprocess, box: tuple[int, int, int, int]
) -> None:
    size = (64, 128)
    unit = np.array([box]) / np.tile(size[::-1], 2)
    one = Said(unit, np.array([1]), np.array([False]))
    boxes = Boxes.listed(("a", "b"), [one, NO_BOXES], lambda i: size)
    batch, task = shown(boxes, [picture(size, box), np.zeros((*size, 3), np.uint8)], preprocess)
    first, second = task.answer(batch, [preprocess.seen(*size)] * 2)
    assert first.boxes.tolist() == [pytest.approx(box, abs=1e-3)]
    assert first.labels.tolist() == [1] and not len(second.boxes)
    rows = task.measure(batch)
    assert task.score(rows) == pytest.approx(1)
    assert list(task.table(rows)) == [("objects", "missed"), ("1", "0"), ("0", "0")]
    metrics = task.judge(rows)
    assert metrics.max_detections == 100 and "AP" in task.summary(metrics, "images")[0]
    assert task.notes(metrics, "images") == ["1 of 2 classes is in none of these images: a"]


def test_tiles_are_images_of_their_own() -> None:
    size = (64, 100)
    image = picture(size, (30, 10, 50, 30))
    unit = np.array([[30, 10, 50, 30]]) / np.tile(size[::-1], 2)
    source: Any = ArraySource(image[None], np.zeros(1, int), ("x",), "train")
    said = Said(unit, np.array([0]), np.array([False]))
    source.targets = Boxes.listed(("a",), [said], lambda i: size)
    tiles = Tiled(source, 64)
    assert [tile.box for tile in tiles.tiles] == [(0, 0, 64, 64), (36, 0, 100, 64)]
    whole, cut = (tiles.targets.target(i, None) for i in range(2))
    assert whole["boxes"].tolist() == [[30, 10, 50, 30]]
    assert cut["boxes"].tolist() == [[0, 10, 14, 30]]
    assert tiles.load(1).size == (64, 64) and np.asarray(tiles.load(1))[20, 5].all()
    assert len({tiles.key(i) for i in range(2)}) == len({tiles.stamp(i) for i in range(2)}) == 2


def test_what_cannot_be_judged_is_refused() -> None:
    boxes = Boxes.listed(("a",), [NO_BOXES], lambda i: (8, 8))
    for preprocess in (Preprocess(size=(8, 8)), Preprocess(size=(8, 8), resize="native")):
        with pytest.raises(UsageError, match="letterbox"):
            Detect(Bright(), DetectConfig(), boxes, preprocess)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="tta"):
        letterbox = Preprocess(size=(8, 8), resize="letterbox")
        Detect(Bright(), DetectConfig(), boxes, letterbox, tta="flip")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="max"):
        DetectConfig(max_detections=0)


def test_boxes_of_two_sources_stay_with_their_images() -> None:
    def of(left: float, label: int, side: int) -> Boxes:
        said = Said(np.array([[left, 0, 1, 1]]), np.array([label]), np.array([False]))
        return Boxes.listed(("a", "b"), [said, NO_BOXES], lambda i: (side, side))

    both = Boxes.joined([of(0.5, 0, 10), of(0.25, 1, 40).rows(np.array([1, 0]))])
    assert [both.text(i) for i in range(4)] == ["a 1", "", "", "b 1"]
    assert both.target(3, None)["boxes"].tolist() == [[10, 0, 40, 40]]
    assert both.target(0, None)["boxes"].tolist() == [[5, 0, 10, 10]]


def test_an_image_of_which_nobody_knows_the_size_is_a_tile_that_cannot_be_read() -> None:
    def size(i: int) -> tuple[int, int]:
        raise UnreadableImage("it is cut off", "a.png")

    source: Any = ArraySource(np.zeros((1, 8, 8), np.uint8), np.zeros(1, int), ("x",), "train")
    said = Said(np.array([[0.0, 0, 1, 1]]), np.array([0]), np.array([False]))
    source.targets = Boxes.listed(("a",), [said], size)
    tiles = Tiled(source, 4)
    assert len(tiles) == 1 and not len(tiles.targets.of(0).labels)
