import numpy as np
import pytest
import torch
from torch import nn

from close import close
from vitrail.nn import BatchNorm, DropPath, GroupNormReLU, StdConv2d
from vitrail.nn.conv import pad_same


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_same_padding_is_tensorflows(kernel, stride):
    """Outputs for every `stride` pixels begun; what is missing is split, the odd one behind."""
    for size in range(1, 12):
        x = torch.arange(1.0, size + 1).view(1, 1, 1, size).expand(1, 1, size, size)
        padded = pad_same(x, kernel, stride, value=-1.0)
        row = padded[0, 0, padded.shape[2] // 2].tolist()
        before, behind = row.index(1.0), len(row) - row.index(float(size)) - 1
        assert 0 <= behind - before <= 1
        assert row == [-1] * before + list(range(1, size + 1)) + [-1] * behind
        assert (len(row) - kernel) // stride + 1 == -(-size // stride)
        # Nothing that no window needs.
        assert before + behind == max((-(-size // stride) - 1) * stride + kernel - size, 0)


@pytest.mark.parametrize(
    "eps, divisor",
    [
        ("vision_transformer", lambda w: w.std() + 1e-5),
        ("big_transfer", lambda w: np.sqrt(w.var() + 1e-10)),
        ("timm", lambda w: np.sqrt(w.var() + 1e-8)),
    ],
)
@pytest.mark.parametrize("same", [False, True])
def test_kernels_are_standardised_each_for_itself(eps, divisor, same):
    conv = StdConv2d(5, 4, 3, 2, eps=eps, same=same)
    nn.init.normal_(conv.weight, mean=1e-3, std=1e-4)  # so small that an epsilon shows
    assert conv.bias is None
    kernels = conv.weight.detach().double().numpy()
    standard = np.stack([(w - w.mean()) / divisor(w) for w in kernels])
    x = torch.randn(2, 5, 9, 8, dtype=torch.float64)
    padded = nn.functional.pad(x, (0, 1, 1, 1) if same else (1, 1, 1, 1))
    expected = nn.functional.conv2d(padded, torch.from_numpy(standard), stride=2)
    close(conv(x.float()), expected.float(), 1e-4)


def test_the_scale_of_a_kernel_means_nothing():
    conv = StdConv2d(5, 4, 3, eps="big_transfer")
    x = torch.randn(2, 5, 9, 8)
    before = conv(x)
    with torch.no_grad():
        conv.weight.mul_(7).add_(3)
    close(conv(x), before, 1e-4)


def test_group_norm_has_32_groups_and_then_relu():
    norm, bare = GroupNormReLU(64, "timm"), GroupNormReLU(64, "timm", relu=False)
    x = torch.randn(2, 64, 3, 5)
    groups = bare(x).view(2, 32, -1)
    close(groups.mean(-1), torch.zeros(2, 32), size=1)
    close(groups.std(-1, correction=0), torch.ones(2, 32), 1e-4)
    assert torch.equal(norm(x), bare(x).relu())


def test_a_batch_norm_takes_one_number_a_channel(randomised):
    """Which torch refuses: an epoch may leave one small image over."""
    norm = randomised(BatchNorm(3))
    x = torch.randn(1, 3, 1, 1)
    alone = norm(x)
    before = {key: tensor.clone() for key, tensor in norm.state_dict().items()}
    norm.train()
    assert torch.equal(norm(x), alone)
    assert all(torch.equal(before[key], tensor) for key, tensor in norm.state_dict().items())
    theirs = nn.BatchNorm2d(3)
    theirs.load_state_dict(norm.state_dict())
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(norm(x), theirs(x))


def test_stochastic_depth_leaves_out_whole_images():
    kept = DropPath(0.5).train()(torch.ones(64, 3, 4, 5))
    assert {tuple(image.unique().tolist()) for image in kept} == {(0.0,), (2.0,)}
