"""EoMT's head: its size, what its masks hide, and what is left at the end.

That it computes what transformers' does is in tests/weights/test_eomt.py.
"""

from dataclasses import replace

import pytest
import torch

from close import close
from models.families import VIT
from vitrail.errors import UsageError
from vitrail.heads import Prediction, SegmentHeadConfig, build_segmenter
from vitrail.heads.queries import masked_shares, semantic
from vitrail.models import build, count_parameters, model_config

CONFIG = replace(VIT, depth=4, patch=(16, 16), indivisible="pad", registers=2, classes=0)
HEAD = SegmentHeadConfig(head="queries", queries=6, joint_blocks=2)

# dense prediction's published counts: the head's of patches of 16, of 14, and the whole at 512
COUNTS = {
    "vit_ti16": (459_031, None, None),
    "dinov2_s14_reg": (1_728_919, 1_134_487, 23_722_903),
    "dinov2_b14_reg": (6_701_719, 4_333_207, 93_157_015),
    "dinov2_l14_reg": (11_819_159, None, 316_020_887),
}


@pytest.mark.parametrize("name", COUNTS)
def test_as_many_weights_as_published(name):
    row = replace(model_config(name), classes=0, prefix_position=False)
    head, head14, whole = COUNTS[name]
    with torch.device("meta"):
        config = replace(row, patch=(16, 16), image_size=(512, 512))
        model = build_segmenter(build(config), SegmentHeadConfig(head="queries"), 150)
        assert model.head.blocks == (4 if config.width == 1024 else 3)
        assert count_parameters(model.head) == head
        assert whole is None or count_parameters(model) == whole
        if head14:
            config = replace(row, patch=(14, 14), image_size=(518, 518))
            model = build_segmenter(build(config), SegmentHeadConfig(head="queries"), 150)
            assert count_parameters(model.head) == head14


def test_giants_have_five_joint_blocks():
    with torch.device("meta"):
        vit = build("dinov2_g14_reg", depth=6)
        assert build_segmenter(vit, SegmentHeadConfig(head="queries"), 2).head.blocks == 5


@pytest.fixture
def model(randomised):
    return randomised(build_segmenter(build(CONFIG), HEAD, 5))


def test_only_patches_outside_a_mask_are_hidden_and_only_from_its_query(model):
    head = model.head
    masks = torch.full((2, 6, 8, 12), -1.0)
    masks[1, 2, :4, :4] = 1  # the first cell of a grid of 2x3
    masked = torch.tensor([[False] * 6, [False, True, True, False, False, False]])
    seen = head.seen(masks, (2, 3), tokens=6 + 3 + 6, masked=masked)
    expected = torch.ones(2, 15, 15, dtype=torch.bool)
    expected[1, 1, 9:] = False
    expected[1, 2, 10:] = False
    assert torch.equal(seen, expected)
    assert seen.any(dim=2).all(), "there is always something to look at"


def test_queries_that_see_everything_are_a_plain_pass(model):
    x = torch.randn(2, 3, 50, 75)
    plain = model.predictions(x)
    assert len(plain) == 1
    model.train()
    model.enter(1.0)
    assert model.head.shares.tolist() == [0, 0]
    close(model.predictions(x)[-1].masks, plain[0].masks)
    model.enter(0.0)
    hidden = model.predictions(x)[-1].masks
    assert (hidden - plain[0].masks).abs().max() > 0.01
    ones = torch.ones(2, 2, 6)
    close(model.predictions(x, ones * 0.999)[-1].masks, hidden)
    model.enter(0.3)  # the first block's share is below 1, the second's still 1
    first = model.predictions(x, torch.stack([ones[0], ones[0] * 0]))
    model.enter(1.0)
    assert not torch.allclose(first[-1].masks, plain[0].masks, atol=1e-3)
    close(first[1].masks, model.predictions(x)[1].masks, msg="before the second block")


def test_the_logits_are_of_the_last_prediction(model):
    x = torch.randn(2, 3, 50, 75)
    (found,) = model.predictions(x)
    close(model(x), semantic(found))
    assert model.train()(x).shape == (2, 5, 13, 19)


def test_nothing_of_the_head_is_in_the_weights_but_weights(model):
    names = {name for name, _ in model.head.named_parameters()}
    assert {name for name in model.head.state_dict()} == names


def test_semantic_by_hand():
    classes = torch.tensor([[[2.0, 1.0, 0.0], [0.0, 0.0, 9.0]]]).log_softmax(-1)
    masks = torch.tensor([0.0, 100.0]).view(1, 2, 1, 1).expand(1, 2, 3, 4)
    found = semantic(Prediction(classes, masks))
    first, second = classes.exp()[0, :, :2]
    close(found[0, :, 1, 2], 0.5 * first + second)
    assert found.shape == (1, 2, 3, 4)


def test_masks_go_the_first_block_first():
    """ADE20K's for L, of about 39,000 steps: 6520 to 13040, to 19560, to 26080, to 32600."""
    whole = 6520 * 6
    for i, start in enumerate((6520, 13040, 19560, 26080)):
        assert masked_shares(start / whole, 4)[i] == 1
        assert masked_shares((start + 6520) / whole, 4)[i] == 0
        middle = masked_shares((start + 3260) / whole, 4)[i]
        assert middle == pytest.approx(0.5**0.9)
    assert masked_shares(0.0, 3) == (1, 1, 1)
    assert masked_shares(1.0, 3) == (0, 0, 0)


@pytest.mark.parametrize("changes", [{"position": "rope"}, {"layer_scale": 0.5}, {"peg": True}])
def test_a_prefix_and_positions_of_any_kind(changes, randomised):
    """Patches alone have places, and padding is of no account."""
    if changes.pop("peg", False):
        changes["position"] = "peg"
    config = replace(CONFIG, **changes)
    model = randomised(build_segmenter(build(config), HEAD, 5))
    x = torch.randn(1, 3, 50, 75)
    padded = torch.nn.functional.pad(x, (0, 5, 0, 14))
    close(model(padded)[:, :, :13, :19], model(x))


def test_in_bfloat16_too(model):
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        found = model.predictions(torch.randn(2, 3, 50, 75))
    sum(one.masks.float().square().mean() for one in found).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_queries_need_whole_tokens():
    vit = build(replace(CONFIG, merge=2))
    with pytest.raises(UsageError, match="a token for each patch in every block: use merge=0"):
        vit.joined(torch.zeros(1, 3, 32, 48), torch.zeros(6, 32), 2)
    with pytest.raises(UsageError, match="taps of a ViT need a token for each patch"):
        vit.taps(torch.zeros(1, 3, 32, 48), (0, 1))
    fine = build(replace(CONFIG, patch=(8, 8), scales="hierarchical"))
    with pytest.raises(UsageError, match="patches of one size: use scales='one'"):
        fine.joined(torch.zeros(1, 3, 32, 48), torch.zeros(6, 32), 2)
