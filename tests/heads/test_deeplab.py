"""ASPP and decoder: by hand, restated in plain torch, and their parts' sizes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from close import close
from vitrail.heads import SegmentHeadConfig, build_segmenter
from vitrail.heads.deeplab import ASPP, Deconv, DeepLabHead, Side, rates_at
from vitrail.heads.maps import at_stride, cells
from vitrail.models import build


def plain(head: DeepLabHead) -> DeepLabHead:
    """Norms of one, kernels of zeros."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
    return head.eval()


@torch.no_grad()
def test_a_pyramid_by_hand():
    """One channel: a one is seen at each branch's distance, and by the mean."""
    aspp = plain(ASPP(1, 1, rates=(2, 3)))
    for branch in (aspp.near, *aspp.far, aspp.whole):
        nn.init.ones_(branch.conv.weight)
    aspp.project.conv.weight[0, :, 0, 0] = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    x = torch.zeros(1, 1, 7, 9)
    x[0, 0, 3, 4] = 1
    found = aspp(x)[0, 0]
    eps = 1 + 1e-5
    share = 1 / math.sqrt(eps)  # a norm of variance 1
    mean = 1000 / 63
    expected = torch.full((7, 9), mean)
    expected[3, 4] += 1
    for rate, weight in ((2, 10.0), (3, 100.0)):
        for i in (-rate, 0, rate):
            for j in (-rate, 0, rate):
                expected[3 + i, 4 + j] += weight
    close(found, expected * share * share)


@torch.no_grad()
def test_a_decoder_by_hand():
    """Identities all the way: the coarse map enlarged, and the fine one, channel by channel."""
    head = plain(DeepLabHead(1, 1, classes=2, width=2, low_width=1, rates=(1,)))
    head.aspp.near.conv.weight[0] = 1
    head.aspp.project.conv.weight[0, 0] = 1
    head.low.conv.weight[0] = 1
    head.refine[0].conv.weight[0, 0, 1, 1] = 1  # the coarse one to channel 0
    head.refine[0].conv.weight[1, 2, 1, 1] = 1  # the fine one to channel 1
    head.refine[1].conv.weight[:, :, 1, 1] = torch.eye(2)
    head.classifier.weight[:, :, 0, 0] = torch.eye(2)
    head.classifier.bias[:] = torch.tensor([0.5, -1.0])
    high, low = torch.rand(1, 1, 2, 3), torch.rand(1, 1, 8, 12)
    found = head(high, (16, 16), low, (32, 48))
    share = (1 + 1e-5) ** -0.5
    coarse = F.interpolate(high, (8, 12), mode="bilinear", align_corners=False)
    close(found[:, :1], coarse * share**4 + 0.5)
    close(found[:, 1:], low * share**3 - 1)


def restated(head: DeepLabHead, high, low):
    """DeepLabV3+ as the usual code has it, from the head's tensors."""

    def conv(part, x, dilation=1):
        kernel = part.conv.weight
        x = F.conv2d(x, kernel, padding=dilation * (kernel.shape[2] // 2), dilation=dilation)
        n = part.norm
        x = (x - n.running_mean[:, None, None]) / (n.running_var[:, None, None] + n.eps).sqrt()
        return F.relu(x * n.weight[:, None, None] + n.bias[:, None, None])

    aspp = head.aspp
    size = high.shape[2:]
    branches = [conv(aspp.near, high)]
    branches += [conv(far, high, rate) for far, rate in zip(aspp.far, (6, 12, 18), strict=True)]
    pooled = conv(aspp.whole, F.adaptive_avg_pool2d(high, 1))
    branches.append(F.interpolate(pooled, size, mode="bilinear", align_corners=False))
    x = conv(aspp.project, torch.cat(branches, 1))
    x = F.interpolate(x, low.shape[2:], mode="bilinear", align_corners=False)
    x = torch.cat([x, conv(head.low, low)], 1)
    x = conv(head.refine[1], conv(head.refine[0], x))
    return F.conv2d(x, head.classifier.weight, head.classifier.bias)


@torch.no_grad()
def test_as_restated(randomised):
    head = randomised(DeepLabHead(6, 5, classes=3, width=8, low_width=4))
    high, low = torch.randn(2, 6, 20, 22), torch.randn(2, 5, 80, 88)
    close(head(high, (16, 16), low, (320, 352)), restated(head, high, low))


def test_as_many_weights_as_published():
    """Of ASPP on ResNet-50's 2,048 channels, and the decoder's first parts."""
    aspp = ASPP(2048, 256)
    convolutions = 2048 * 256 * (1 + 3 * 9 + 1) + 5 * 256 * 256
    assert sum(p.numel() for p in aspp.parameters()) == convolutions + 6 * 2 * 256
    head = DeepLabHead(2048, 256, classes=21)
    assert head.low.conv.weight.shape == (48, 256, 1, 1)
    assert head.refine[0].conv.weight.shape == (256, 304, 3, 3)


def test_rates_reach_as_far_at_every_stride():
    assert rates_at((6, 12, 18), 16.0) == (6, 12, 18)
    assert rates_at((6, 12, 18), 8.0) == (12, 24, 36)
    assert rates_at((6, 12, 18), 14.0) == (7, 14, 21)
    model = build_segmenter(build("resnet18", classes=0), SegmentHeadConfig(head="deeplab"), 3)
    assert [far.conv.dilation for far in model.head.aspp.far] == [(3, 3), (6, 6), (9, 9)]
    assert model.head.low.conv.weight.shape == (48, 64, 1, 1), "layer1's channels"


def test_which_map_is_fine():
    for name, channels in (("twins_svt_s", 64), ("mobilevit_s", 64), ("r_ti16", 64)):
        model = build_segmenter(build(name, classes=0), SegmentHeadConfig(head="deeplab"), 3)
        assert model.head.low.conv.in_channels == channels, name
        assert model.head.fine is None


@pytest.mark.parametrize("patch", [(4, 4), (8, 8), (14, 14), (16, 16), (32, 32), (8, 32)], ids=str)
def test_the_fine_map_has_a_cell_for_every_four_pixels(patch):
    size = (patch[0] * 3 - 2, patch[1] * 2 - 1)
    deconv = Deconv(32, patch)
    x = torch.randn(2, 32, *cells(size, patch))
    assert deconv(x, size).shape == (2, deconv.width, *cells(size, (4, 4)))
    assert Side(3)(torch.randn(2, 3, *size)).shape == (2, 16, *cells(size, (4, 4)))


def test_one_image_of_one_cell_trains(randomised):
    """The mean of one image is one number a channel: no batch norm has statistics of that."""
    head = randomised(DeepLabHead(6, 5, classes=3, width=8, low_width=4)).train()
    before = head.aspp.whole.norm.running_mean.clone()
    loss = head(torch.randn(1, 6, 1, 1), (16, 16), torch.randn(1, 5, 4, 4), (16, 16)).square().sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())
    assert torch.equal(head.aspp.whole.norm.running_mean, before)


# --- maps ---


@pytest.mark.parametrize(
    "old, new",
    [
        *(((16, 16), new) for new in ((4, 4), (1, 1), (16, 16), (32, 32))),
        *(((3.5, 3.5), new) for new in ((4, 4), (1, 1))),
        *(((14, 8), new) for new in ((4, 4), (1, 1), (16, 16))),
        ((4, 4), (1, 1)),
    ],
    ids=str,
)
def test_a_map_is_read_at_its_cells_centres(old, new):
    """Of a map that is linear in the pixels, within its first and last centre."""
    size = (53, 47)
    rows, columns = (math.ceil(side / step) for side, step in zip(size, old, strict=True))
    y, x = (
        (torch.arange(count, dtype=torch.float64) + 0.5) * step - 0.5
        for count, step in zip((rows, columns), old, strict=True)
    )
    found = at_stride((y[:, None] + 100 * x)[None, None], old, new, size)
    assert found.shape[2:] == cells(size, new)
    v, u = (
        ((torch.arange(count) + 0.5) * step - 0.5).double().clamp(first[0], first[-1])
        for count, step, first in zip(found.shape[2:], new, (y, x), strict=True)
    )
    close(found[0, 0], v[:, None] + 100 * u)


def test_whole_cells_are_torchs_own():
    x = torch.randn(2, 3, 4, 5)
    expected = F.interpolate(x, (16, 20), mode="bilinear")
    close(at_stride(x, (16, 16), (4, 4), (64, 80)), expected)
