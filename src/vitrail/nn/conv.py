"""Convolutions as Google's ResNets have them: standardised kernels, group norms, no bias; and the
batch norm of everybody else's.

Weight standardisation (Qiao et al., arXiv 1903.10520) gives every kernel mean 0 and deviation 1
whenever it is used; with group norms it trains at any batch size, as no batch norm does. BiT
(1912.11370) and the hybrids R+ViT (2010.11929) are built so, of different parts: BiT pads on both
sides alike, the hybrids as TensorFlow does.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Eps = Literal["vision_transformer", "big_transfer", "timm"]
"""Whose epsilons: Google's two repositories' own, or timm's, which transformers has too."""


class Epsilons(NamedTuple):
    """What keeps a division by a deviation from one by zero: `sqrt(variance + under) + beside`."""

    norm: float
    """Under the root of a group norm."""
    under: float
    """Under the root of a standardised kernel."""
    beside: float
    """Beside that root."""


EPSILONS: dict[Eps, Epsilons] = {
    "vision_transformer": Epsilons(norm=1e-6, under=0.0, beside=1e-5),
    "big_transfer": Epsilons(norm=1e-5, under=1e-10, beside=0.0),
    "timm": Epsilons(norm=1e-5, under=1e-8, beside=0.0),
}

_SIDE_BY_SIDE = 64


def channels_last(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """The same images with a pixel's channels side by side, and so all maps that follow.

    Convolutions and batch norms are then faster, on a CPU a step of ResNet-50 by 1.3; standardised
    kernels are not (docs/decisions.md). Small images stay as they are: where a map is one cell,
    torch 2.13 leaves bfloat16 gradients unwritten.
    """
    if min(images.shape[-2:]) < _SIDE_BY_SIDE:
        return images
    return images.contiguous(memory_format=torch.channels_last)


GROUPS = 32
"""Of every group norm: its channels must be a multiple."""


def pad_same(
    x: Float[Tensor, "b c h w"], kernel: int, stride: int, value: float = 0.0
) -> Float[Tensor, "b c _h _w"]:
    """Pad to TensorFlow's SAME: `ceil(size / stride)` outputs, an odd pixel right and below.

    >>> tuple(pad_same(torch.zeros(1, 1, 8, 9), kernel=3, stride=2).shape)
    (1, 1, 9, 11)
    """
    h, w = (
        max((math.ceil(size / stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:]
    )
    sides = (w // 2, w - w // 2, h // 2, h - h // 2)
    return F.pad(x, sides, value=value) if any(sides) else x


class StdConv2d(nn.Conv2d):
    """A convolution whose kernels have mean 0 and deviation 1, each over its inputs and pixels."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int,
        stride: int = 1,
        *,
        eps: Eps,
        same: bool = False,
    ) -> None:
        """`same`: padding as TensorFlow's, else `kernel // 2` pixels all round."""
        # At stride 1 the two are one.
        self.same = same and stride > 1
        padding = 0 if self.same else kernel // 2
        super().__init__(c_in, c_out, kernel, stride=stride, padding=padding, bias=False)
        self.epsilons = EPSILONS[eps]

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d _h _w"]:
        if self.same:
            x = pad_same(x, self.kernel_size[0], self.stride[0])
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        deviation = (variance + self.epsilons.under).sqrt() + self.epsilons.beside
        return F.conv2d(x, (self.weight - mean) / deviation, None, self.stride, self.padding)


class GroupNormReLU(nn.GroupNorm):
    """A group norm of 32 groups; then ReLU, unless a sum comes first."""

    def __init__(self, channels: int, eps: Eps, relu: bool = True) -> None:
        super().__init__(GROUPS, channels, eps=EPSILONS[eps].norm)
        self.relu = relu

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        x = super().forward(x)
        return F.relu(x) if self.relu else x


class BatchNorm(nn.BatchNorm2d):
    """A batch norm over the images of all processes, so that a run is the same on any number.

    It also trains where there is one number a channel: one image of one cell. Such a batch has no
    statistics, and torch refuses it: the running ones stand in. It happens when an epoch leaves
    one small image over.
    """

    of_all = True
    """False where one of the processes computes alone: it would wait for the others for ever."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        together = self.of_all and dist.is_initialized() and dist.get_world_size() > 1
        if self.training and together:
            return self._of_all(x)
        if self.training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(x)

    def _of_all(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Torch has this for GPUs alone (SyncBatchNorm)."""
        values = x.float()
        count = _sum_of_all(values.new_tensor([values[:, 0].numel()]))
        mean = _sum_of_all(values.sum(dim=(0, 2, 3))) / count
        centred = values - mean[:, None, None]
        variance = _sum_of_all(centred.square().sum(dim=(0, 2, 3))) / count
        with torch.no_grad():
            assert self.running_mean is not None and self.running_var is not None
            assert self.num_batches_tracked is not None and self.momentum is not None
            self.num_batches_tracked += 1
            unbiased = variance * count / (count - 1).clamp(min=1)
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)
        scale = (variance + self.eps).rsqrt()
        if not self.affine:
            return (centred * scale[:, None, None]).to(x.dtype)
        scale = self.weight * scale
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def _sum_of_all(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    return _SumOfAll.apply(x)  # type: ignore[no-untyped-call]


class _SumOfAll(torch.autograd.Function):
    """The sum over all processes; so is its gradient, for each of them uses it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad
