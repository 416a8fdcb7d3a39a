"""Every head on every family: sizes, gradients, batches of one, and what is refused."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from close import close
from models.families import KINDS, VIT
from vitrail.errors import UsageError
from vitrail.heads import SegmentHeadConfig, build_segmenter
from vitrail.heads.backbone import quarters
from vitrail.models import DynamicViTConfig, ViTConfig, build
from vitrail.nn import BatchNorm
from vitrail.tasks.matching import SetLossConfig, objects_of, set_loss

PADDED = replace(VIT, depth=4, patch=(16, 16), indivisible="pad", registers=2)
BACKBONES = {
    **{name: kind.config for name, kind in KINDS.items() if name != "dynamicvit"},
    "vit": PADDED,
    "vit/14": replace(PADDED, patch=(14, 14), image_size=(28, 42)),
    "vit, rope": replace(PADDED, position="rope", layer_scale=0.1),
    "vit, two sizes": replace(PADDED, patch=(8, 8), scales="adaptive"),
    "vit, pooled": replace(PADDED, pool="map", representation=24, class_token=False, registers=0),
    "vit, pool_norm": replace(PADDED, pool="mean", pool_norm=True),
    "hybrid, padded": replace(KINDS["hybrid"].config, indivisible="pad"),
    "vit, peg": replace(PADDED, position="peg", class_token=False, registers=0, pool="mean"),
}
FIXED = {"mixer": (32, 48), "gmlp": (32, 48), "hybrid": (64, 80)}
"""Images of the families that do not take any."""
SIZE = (50, 75)
SMALL = {"width": 16, "low_width": 8, "queries": 6}
HEADS = {
    "linear": {"head": "linear"},
    "four": {"head": "linear", "taps": "four"},
    "deconv": {"head": "deeplab"},
    "side": {"head": "deeplab", "fine": "side"},
    "tap": {"head": "deeplab", "fine": "tap"},
    "queries": {"head": "queries", "joint_blocks": 2},
}


def possible(backbone: str, head: str) -> bool:
    config = BACKBONES[backbone]
    if head == "queries":
        return isinstance(config, ViTConfig) and config.scales == "one"
    if backbone in ("mixer", "gmlp"):
        return head not in ("four", "tap")
    return not ("hybrid" in backbone and head == "four")


def segmenter(backbone: str, head: str):
    config = replace(BACKBONES[backbone], classes=0)
    return build_segmenter(build(config), SegmentHeadConfig(**HEADS[head], **SMALL), 5)


PAIRS = [(b, h) for b in BACKBONES for h in HEADS if possible(b, h)]


@pytest.mark.parametrize("backbone, head", PAIRS)
def test_every_head_on_every_family(backbone, head, randomised):
    model = randomised(segmenter(backbone, head))
    size = FIXED.get(backbone, SIZE)
    x = torch.randn(3, 3, *size)
    p, q = model.stride
    logits = model(x)
    assert logits.shape == (3, 5, -(-size[0] // p), -(-size[1] // q))
    close(logits[1:2], model(x[1:2]), msg="an image is what it is alone")
    assert model.pixels(logits, size).shape == (3, 5, *size)
    model.train()
    for images in (x, x[:1]):
        model.zero_grad()
        if head == "queries":
            found = model.predictions(images)
            assert [one.masks.shape[1:] for one in found] == [(6, *logits.shape[2:])] * 3
            assert all(one.classes.shape == (len(images), 6, 6) for one in found)
            loss = sum(one.masks.square().mean() + one.classes.square().mean() for one in found)
        else:
            target = torch.randint(5, (len(images), *size))
            loss = F.cross_entropy(model.pixels(model(images), size), target)
        loss.backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
            assert parameter.grad is None or parameter.grad.isfinite().all(), name


FOUND = {
    ("vit", "linear"): (16, 16),
    ("vit", "four"): (16, 16),
    ("twins", "linear"): (8, 8),
    ("twins", "four"): (4, 4),
    ("mobilevit", "four"): (2, 2),  # it has but three maps here
    ("mobilevit", "deconv"): (4, 4),
    ("vit/14", "side"): (4, 4),
    ("vit/14", "queries"): (7, 7),
    ("vit", "queries"): (4, 4),
}


@pytest.mark.parametrize("pair", FOUND, ids=str)
def test_what_a_stride_is(pair):
    assert segmenter(*pair).stride == FOUND[pair]


def test_batch_norms_are_of_all_processes():
    for head in ("linear", "deconv", "side"):
        norms = [m for m in segmenter("vit", head).head.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms and all(isinstance(norm, BatchNorm) for norm in norms)


def scenes(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rectangles of four colours on black, and which of them each pixel is of."""
    labels = torch.zeros(count, 32, 48, dtype=torch.long)
    for i in range(count):
        for _ in range(2):
            y, x = torch.randint(20, (2,)).tolist()
            labels[i, y : y + 12, x : x + 20] = torch.randint(1, 5, ()).item()
    colours = torch.tensor([[0, 0, 0], [2, 0, 0], [0, 2, 0], [0, 0, 2], [2, 2, 0.0]])
    return colours[labels].permute(0, 3, 1, 2) - 0.5, labels


@pytest.mark.parametrize("head", HEADS)
def test_a_new_head_learns(head):
    torch.manual_seed(0)
    config = replace(PADDED, patch=(8, 8), image_size=(32, 48), classes=0)
    model = build_segmenter(build(config), SegmentHeadConfig(**HEADS[head], **SMALL), 5).train()
    step = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x, labels = scenes(3)
    objects = [objects_of(one) for one in labels]
    losses = []
    for i in range(25):
        model.enter(i / 25)
        if head == "queries":
            loss = set_loss(model.predictions(x), objects, SetLossConfig(points=None)).total
        else:
            loss = F.cross_entropy(model.pixels(model(x), (32, 48)), labels)
        step.zero_grad()
        loss.backward()
        step.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0], losses


def test_the_blocks_are_the_backbones():
    model = segmenter("vit", "linear")
    assert model.block_names() == [f"backbone.encoder.blocks.{i}" for i in range(4)]
    assert all(model.get_submodule(name) for name in model.block_names())
    assert model.config is model.backbone.config


def test_logits_lie_where_their_pixels_do():
    """What is beyond the image changes nothing, and a cell is above its pixels."""
    model = segmenter("vit", "linear")
    centres = 16 * torch.arange(4.0) + 7.5
    ramp = centres[:, None].expand(1, 5, 4, 5)
    pixels = model.pixels(ramp, SIZE)
    rows = torch.arange(50.0).clamp(7.5)  # and no further up than the first cell's centre
    close(pixels, rows[:, None].expand_as(pixels))


def test_four_taps_are_after_every_quarter(randomised):
    vit = randomised(build(replace(PADDED, depth=8, classes=0)))
    x = torch.randn(2, 3, *SIZE)
    assert quarters(8) == (1, 3, 5, 7)
    maps = vit.taps(x, quarters(8))
    assert torch.equal(maps[3], vit.features(x).maps[-1])
    shallow = build(replace(PADDED, depth=4, classes=0)).eval()
    shallow.load_state_dict(vit.state_dict(), strict=False)
    assert torch.equal(maps[1], shallow.features(x).maps[-1])


REFUSED = {
    "a classifier": (VIT, {}, r"no classifier of its own: build it with classes=0"),
    "a dynamicvit": (DynamicViTConfig(classes=0), {}, "drops patches"),
    "queries of stages": ("twins", {"head": "queries"}, "a ViT's blocks .* this is a twins"),
    "one map": ("mixer", {"taps": "four"}, "a mixer has one map: use taps='last'"),
    "an early map": ("mixer", {"head": "deeplab", "fine": "tap"}, "use fine='deconv' or side"),
    "too few blocks": (replace(VIT, classes=0), {"taps": "four"}, "3 blocks has no four quarters"),
    "too many": (
        replace(VIT, classes=0),
        {"head": "queries", "joint_blocks": 4},
        "joint_blocks=4: the backbone has 3 blocks",
    ),
    "merged": (replace(VIT, classes=0, merge=2), {"head": "queries"}, "merge=0 and scales='one'"),
    "odd patches": (
        replace(VIT, classes=0, patch=(9, 9), image_size=(36, 36)),
        {"head": "queries"},
        "divisible by 2, not 9x9",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    config, changes, words = REFUSED[case]
    if isinstance(config, str):
        config = replace(BACKBONES[config], classes=0)
    with pytest.raises(UsageError, match=words):
        build_segmenter(build(config), SegmentHeadConfig(**changes), 5)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"head": "deeplabv3"}, "unknown head 'deeplabv3': did you mean 'deeplab'"),
        ({"taps": "fore"}, "unknown taps 'fore': did you mean 'four'"),
        ({"fine": "deconvs"}, "did you mean 'deconv'"),
        ({"queries": 0}, "queries must be at least 1, not 0"),
        ({"joint_blocks": 0}, "joint_blocks must be at least 1"),
        ({"rates": ()}, r"rates are dilations from 1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), not 1.0"),
    ],
)
def test_configs_that_make_no_sense(changes, words):
    with pytest.raises(UsageError, match=words):
        SegmentHeadConfig(**changes)


def test_no_logits_apart_and_no_extent():
    model = segmenter("vit", "linear")
    with pytest.raises(UsageError, match="those are of head='queries'"):
        model.predictions(torch.zeros(1, 3, *SIZE))
    with pytest.raises(UsageError, match="use resize='squash'"):
        model(torch.zeros(1, 3, *SIZE), torch.tensor([[1, 1]]))
