"""Detectors: published counts, every family, and boxes that are where the cells say."""

import pytest
import torch

from vitrail.errors import UsageError
from vitrail.found import Found, best_of
from vitrail.heads.dense import Dense, DenseHead, decode
from vitrail.heads.detector import DetectHeadConfig, build_detector
from vitrail.heads.pyramid import FeaturePyramid, SimplePyramid
from vitrail.models import build

SMALL = DetectHeadConfig(width=32, convs=1, levels=3)


@pytest.mark.parametrize(("classes", "count"), [(80, 4_920_666), (10, 4_759_316), (1, 4_738_571)])
def test_the_head_has_as_many_parameters_as_fcos(classes: int, count: int) -> None:
    with torch.device("meta"):
        head = DenseHead(256, classes, levels=5)
    assert sum(p.numel() for p in head.parameters()) == count


@pytest.mark.parametrize(
    "row",
    ["vit_nano8", "mixer_s16", "resnet18", "twins_pcpvt_s", "mobilevit_xxs", "r_ti16"],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_family_finds_boxes_in_oblong_images(row: str, batch: int) -> None:
    fixed = row.startswith("mixer")
    size = (224, 224) if fixed else (64, 96)
    changes = {} if fixed else {"image_size": size}
    backbone = build(row, num_classes=0, **changes)
    model = build_detector(backbone, SMALL, 4).eval()
    with torch.no_grad():
        found = model(torch.randn(batch, 3, *size))
    points = sum(
        -(-size[0] // int(p)) * -(-size[1] // int(q))
        for p, q in model.neck.strides
        if p == int(p) and q == int(q)
    )
    assert found.logits.shape == (batch, len(found.points), 4)
    assert len(found.points) == points
    assert found.boxes.shape == (batch, len(found.points), 4)
    edge = torch.tensor(size[::-1], dtype=torch.float32)
    assert (found.points > 0).all()
    # The last cell of a map may reach beyond the image, its centre by less than half of it.
    assert (found.points < edge + found.strides / 2).all()


def test_patches_of_14_have_strides_of_7_14_and_28() -> None:
    maps = SimplePyramid(8, (14, 14), 4, levels=3)
    assert maps.strides == ((7, 7), (14, 14), (28, 28))


def test_a_pyramid_of_stages_goes_on_beyond_them() -> None:
    pyramid = FeaturePyramid((4, 8), ((8, 8), (16, 16)), 4, levels=4)
    found = pyramid((torch.zeros(1, 4, 7, 9), torch.zeros(1, 8, 4, 5)), (56, 72))
    assert pyramid.strides == ((8, 8), (16, 16), (32, 32), (64, 64))
    assert [each.shape[2:] for each in found] == [(7, 9), (4, 5), (2, 3), (1, 2)]


def test_a_cells_box_lies_around_its_centre() -> None:
    head = DenseHead(4, 1, levels=1, convs=0)
    torch.nn.init.zeros_(head.sides.weight)
    with torch.no_grad():
        head.sides.bias.copy_(torch.tensor([0.0, 2.0, 1.0, 0.0]).clamp(min=1e-9).log())
        found = head((torch.zeros(1, 4, 2, 2),), ((10, 20),))
    # From (30, 5), the second cell's centre: 0, 2, 1 and 0 cells of 20 by 10 pixels.
    assert found.boxes[0, 1].tolist() == pytest.approx([30, -15, 50, 5], abs=1e-3)


def test_of_one_object_one_box_is_kept() -> None:
    points = torch.tensor([[5.0, 5], [15, 5], [40, 40]])
    boxes = torch.tensor([[0.0, 0, 20, 20], [1, 0, 20, 20], [-5, 30, 50, 70]])
    sides = torch.cat([points - boxes[:, :2], boxes[:, 2:] - points], dim=1)
    logits = torch.tensor([[2.0, -9], [3.0, -9], [-9, 0.0]])
    found = Dense(
        logits[None], sides[None], None, points, torch.full((3, 2), 10.0), torch.zeros(3).long()
    )
    said = decode(found, (60, 48), most=10)
    rows = (row.detach().numpy() for row in (said.boxes[0], said.scores[0], said.labels[0]))
    one = best_of(Found(*rows).of(slice(3)), 10)
    assert one.boxes.tolist() == [[1, 0, 20, 20], [0, 30, 48, 60]]  # cut to the view
    assert one.labels.tolist() == [0, 1]
    assert one.scores.tolist() == pytest.approx(torch.tensor([3.0, 0.0]).sigmoid().tolist())


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match="head"):
        DetectHeadConfig(head="anchors")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="classifier of its own"):
        build_detector(build("vit_nano8", num_classes=3), SMALL, 3)
    with pytest.raises(UsageError, match="DynamicViT"):
        build_detector(build("dynamicvit_ti16", num_classes=0), SMALL, 3)
    model = build_detector(build("vit_nano8", num_classes=0), SMALL, 3)
    with pytest.raises(UsageError, match="letterbox"):
        model(torch.zeros(1, 3, 32, 32), torch.ones(1, 2).long())
