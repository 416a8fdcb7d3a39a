"""Losses between images and texts, over all processes of a run.

With x_i and t_j of length 1, s the scale, c the bias, b images of this process and n of all:

    softmax (CLIP, 2103.00020, figure 3)       1/2 mean_i [CE(s x_i . t, P_i) + CE(s t_i . x, P_i)]
    sigmoid (SigLIP, 2303.15343, algorithm 1)  -1/b sum_ij log sigmoid(y_ij (s x_i . t_j + c))

The same words may stand under several images of a batch. Then each of these texts is right for each
of these images: P_i gives them equal shares (UniCL, 2204.03610), and y_ij is 1 for all of them. In
a batch without such texts P_i is one place and y the identity, as in the papers.

Softmax needs the vectors of all processes, which are gathered, and its gradient goes back to them.
Sigmoid needs one pair at a time: blocks of texts go round the ring of processes (section 3.3), and
no process ever holds more than one block and some rows of likenesses.

Letters: b images here, n of all processes, d what is compared.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from vitrail.nn import full_precision
from vitrail.tasks.gathering import alone, gathered, gathered_with_gradient

_CHUNK = 2**22
"""Likenesses of the sigmoid loss that are there at once: 16 MB."""
_NOBODY = -1
"""The code of a row that fills up a block."""


class Matched(NamedTuple):
    """What a loss says of a batch."""

    loss: Float[Tensor, ""]
    accuracy: Float[Tensor, ""]
    """The share of images that a right text is the most alike of all."""


def softmax_loss(
    images: Float[Tensor, "b d"],
    texts: Float[Tensor, "b d"],
    codes: Int64[Tensor, " b"],
    scale: Float[Tensor, ""],
) -> Matched:
    """CLIP's loss of this process's images and texts among those of all; 0 where it has none.

    Vectors are of length 1; texts of one code are the same words.
    """
    images, texts = images.float(), texts.float()
    every, _ = gathered_with_gradient(torch.cat([images, texts], dim=1))
    others, _ = gathered(codes[:, None])
    right = (codes[:, None] == others[None, :, 0]).to(every.dtype)
    shares = right / right.sum(dim=1, keepdim=True)
    all_images, all_texts = every.chunk(2, dim=1)
    with full_precision(images.device):
        of_images = scale.float() * images @ all_texts.T
        of_texts = scale.float() * texts @ all_images.T
    loss = (
        F.cross_entropy(of_images, shares, reduction="sum")
        + F.cross_entropy(of_texts, shares, reduction="sum")
    ) / 2
    count = max(len(images), 1)
    best = of_images.argmax(dim=1, keepdim=True) if len(images) else codes[:, None]
    return Matched(loss / count, right.gather(1, best).sum() / count)


def sigmoid_loss(
    images: Float[Tensor, "b d"],
    texts: Float[Tensor, "b d"],
    codes: Int64[Tensor, " b"],
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """SigLIP's loss of this process's images with the texts of all; 0 where it has none."""
    vectors = images.float(), texts.float()
    summed: Any = _Ring.apply(*vectors, codes, scale.float(), bias.float())  # type: ignore[no-untyped-call]
    return summed / max(len(images), 1)


class _Ring(torch.autograd.Function):
    """The sum of the sigmoid loss of this process's images with everybody's texts.

    Nothing of it is kept but the vectors: blocks go round once in each pass, and in the backward
    pass each has with it what the processes that it has visited have found for its texts.
    """

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, texts: Tensor, codes: Tensor, scale: Tensor, bias: Tensor
    ) -> Tensor:
        ctx.save_for_backward(images, texts, codes, scale, bias)
        total = images.new_zeros(())
        block = _block(texts, codes)
        for hop in range(_size()):
            for rows in _chunks(images, block):
                logits, y = _pairs(images[rows], codes[rows], block, scale, bias)
                kept = (block.codes != _NOBODY).to(logits.dtype)
                total -= (F.logsigmoid(y * logits) * kept).sum()
            if hop + 1 < _size():
                block = _passed_on(block)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        images, texts, codes, scale, bias = ctx.saved_tensors
        of_images = torch.zeros_like(images)
        of_scale, of_bias = torch.zeros_like(scale), torch.zeros_like(bias)
        block = _block(texts, codes)
        for _ in range(_size()):
            for rows in _chunks(images, block):
                logits, y = _pairs(images[rows], codes[rows], block, scale, bias)
                # -d log sigmoid(y z) / dz = -y sigmoid(-y z)
                kept = (block.codes != _NOBODY).to(logits.dtype)
                slope = -y * torch.sigmoid(-y * logits) * kept * grad
                of_images[rows] += scale * slope @ block.texts
                block.found.add_(scale * slope.T @ images[rows])
                of_scale += (slope * (logits - bias)).sum() / scale
                of_bias += slope.sum()
            block = _passed_on(block)  # and after the last hop it is at home
        return of_images, block.found[: len(texts)], None, of_scale, of_bias


class _Block(NamedTuple):
    """Texts of one process, on their way."""

    texts: Float[Tensor, "m d"]
    found: Float[Tensor, "m d"]
    """Their gradient, as far as it is known."""
    codes: Int64[Tensor, " m"]


def _block(texts: Tensor, codes: Tensor) -> _Block:
    """This process's own, as large as the largest."""
    most = len(texts)
    if not alone():
        largest = torch.tensor([most], device=texts.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        most = int(largest)
    missing = most - len(texts)
    padded = F.pad(texts, (0, 0, 0, missing)).contiguous()
    return _Block(padded, torch.zeros_like(padded), F.pad(codes, (0, missing), value=_NOBODY))


def _size() -> int:
    return dist.get_world_size() if not alone() else 1


def _passed_on(block: _Block) -> _Block:
    """The block of the process before this one, to whom the next one sends its own."""
    if alone():
        return block
    rank, size = dist.get_rank(), dist.get_world_size()
    came = _Block(*(torch.empty_like(each) for each in block))
    steps = [
        step
        for mine, theirs in zip(block, came, strict=True)
        for step in (
            dist.P2POp(dist.isend, mine.contiguous(), (rank + 1) % size),
            dist.P2POp(dist.irecv, theirs, (rank - 1) % size),
        )
    ]
    for waiting in dist.batch_isend_irecv(steps):
        waiting.wait()
    return came


def _chunks(images: Tensor, block: _Block) -> list[slice]:
    """Rows of images, so many that their likenesses to a block have room."""
    size = max(1, _CHUNK // max(1, len(block.texts)))
    return [slice(start, start + size) for start in range(0, len(images), size)]


def _pairs(
    images: Tensor, codes: Tensor, block: _Block, scale: Tensor, bias: Tensor
) -> tuple[Float[Tensor, "r m"], Float[Tensor, "r m"]]:
    """Logits of some images with a block's texts, and 1 where they belong together, else -1."""
    with full_precision(images.device):
        logits = scale * images @ block.texts.T + bias
    same: Bool[Tensor, "r m"] = codes[:, None] == block.codes
    return logits, 2 * same.to(logits.dtype) - 1
