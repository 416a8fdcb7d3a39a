"""The linear head is a matrix on normed channels; which maps it reads."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from close import close
from models.families import TWINS, VIT
from vitrail.heads import SegmentHeadConfig, build_segmenter
from vitrail.heads.linear import LinearHead
from vitrail.models import build


def test_it_is_a_matrix_on_normed_channels():
    head = LinearHead((4, 3), classes=5, dropout=0.0).train()
    a, b = torch.randn(2, 4, 3, 5), torch.randn(2, 3, 3, 5) * 10 + 1
    both = torch.cat([a, b], 1)
    mean = both.mean((0, 2, 3), keepdim=True)
    normed = (both - mean) / (both.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
    weight, bias = head.classifier.weight[:, :, 0, 0], head.classifier.bias
    close(head((a, b)), torch.einsum("bchw,oc->bohw", normed, weight) + bias[:, None, None])


def test_its_first_values():
    torch.manual_seed(0)
    head = LinearHead((384, 384), classes=150)
    assert 0.0098 < head.classifier.weight.std() < 0.0102
    assert not head.classifier.bias.any()


def test_it_drops_whole_channels_in_training():
    head = LinearHead((200,), classes=2, dropout=0.5).train()
    dropped = head.drop(torch.ones(1, 200, 2, 2))[0].flatten(1)
    assert (dropped == dropped[:, :1]).all()
    assert 60 < (dropped[:, 0] == 0).sum() < 140


def test_four_maps_of_a_vit_lie_beside_each_other(randomised):
    vit = randomised(build(replace(VIT, depth=4, classes=0)))
    model = build_segmenter(vit, SegmentHeadConfig(taps="four"), 5).eval()
    x = torch.randn(2, 3, 32, 48)
    close(model(x), model.head(vit.taps(x, (0, 1, 2, 3))))
    assert model.head.classifier.in_channels == 4 * 32


def test_the_maps_of_stages_are_brought_to_the_finest(randomised):
    twins = randomised(build(replace(TWINS, classes=0)))
    model = build_segmenter(twins, SegmentHeadConfig(taps="four"), 5).eval()
    x = torch.randn(1, 3, 64, 32)
    fine, coarse = twins.features(x).maps
    up = F.interpolate(coarse, fine.shape[2:], mode="bilinear")
    close(model(x), model.head((fine, up)))
