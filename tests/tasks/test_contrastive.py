"""Losses between images and texts: open_clip's, plain formulas, and several processes."""

import math
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from close import close
from vitrail.tasks import contrastive
from vitrail.tasks.contrastive import sigmoid_loss, softmax_loss


def vectors(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    made = [F.normalize(torch.randn(n, 6, dtype=torch.float64), dim=1).float() for _ in range(2)]
    return made[0].requires_grad_(), made[1].requires_grad_()


def number(value: float) -> Tensor:
    return torch.tensor(value, requires_grad=True)


def test_they_are_open_clips():
    loss = pytest.importorskip("open_clip.loss")
    images, texts = vectors(7)
    scale, bias, codes = number(12.0), number(-3.0), torch.arange(7)
    theirs = loss.ClipLoss()(images, texts, scale), loss.SigLipLoss()(images, texts, scale, bias)
    ours = (
        softmax_loss(images, texts, codes, scale).loss,
        sigmoid_loss(images, texts, codes, scale, bias),
    )
    for one, other in zip(ours, theirs, strict=True):
        close(one.detach(), other.detach(), 1e-6)
        wanted = [images, texts, scale, bias]
        mine = torch.autograd.grad(one, wanted, allow_unused=True)
        its = torch.autograd.grad(other, wanted, allow_unused=True)
        for a, b in zip(mine, its, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                close(a, b, 1e-5)


def plain(images: Tensor, texts: Tensor, codes: Tensor, scale: Tensor, bias: Tensor):
    """Both losses as their formulas stand, pair by pair."""
    n, logits = len(images), scale * images @ texts.T
    soft, sigmoid, hits = 0.0, 0.0, 0
    for i in range(n):
        own = [j for j in range(n) if codes[j] == codes[i]]
        for rows in (logits, logits.T):
            soft = soft - rows[i].log_softmax(0)[own].mean() / 2
        hits += int(logits[i].argmax()) in own
        for j in range(n):
            y = 1 if j in own else -1
            sigmoid = sigmoid - F.logsigmoid(y * (logits[i, j] + bias))
    return soft / n, sigmoid / n, hits / n


CODES = torch.tensor([0, 1, 2, 1, 3, 0, 0, 4])


def test_the_same_words_are_right_for_all_their_images():
    images, texts = vectors(8)
    scale, bias = number(5.0), number(-2.0)
    soft, sigmoid, hits = plain(images, texts, CODES, scale, bias)
    found = softmax_loss(images, texts, CODES, scale)
    close(found.loss.detach(), soft.detach(), 1e-6)
    assert found.accuracy.item() == pytest.approx(hits)
    close(sigmoid_loss(images, texts, CODES, scale, bias).detach(), sigmoid.detach(), 1e-6)
    # Who is asked for all of three equal texts at once can do no better than say a third each.
    same = torch.ones(3, 4) / 2
    assert softmax_loss(same, same, torch.zeros(3, dtype=int), scale).loss.item() == pytest.approx(
        math.log(3)
    )
    assert softmax_loss(same, same, torch.zeros(3, dtype=int), scale).accuracy == 1


def test_chunks_change_nothing(monkeypatch):
    images, texts = vectors(8)
    scale, bias = number(5.0), number(-2.0)
    wanted = [images, texts, scale, bias]

    def found() -> list[Tensor]:
        loss = sigmoid_loss(images, texts, CODES, scale, bias)
        return [loss.detach(), *torch.autograd.grad(loss, wanted)]

    whole = found()
    expected = plain(images, texts, CODES, scale, bias)[1]
    for mine, its in zip(whole[1:], torch.autograd.grad(expected, wanted), strict=True):
        close(mine, its, 1e-5)
    monkeypatch.setattr(contrastive, "_CHUNK", 17)  # two rows
    for one, other in zip(whole, found(), strict=True):
        close(one, other, 1e-6)


def test_no_image_and_half_precision_pass():
    images, texts = (each[:0] for each in vectors(2))
    none, one = torch.zeros(0, dtype=torch.int64), torch.tensor(1.0)
    assert softmax_loss(images, texts, none, one).loss == 0
    assert sigmoid_loss(images, texts, none, one, one) == 0
    images, texts = vectors(8)
    soft, sigmoid, _ = plain(images, texts, CODES, one, -one)
    with torch.autocast("cpu", torch.bfloat16):
        close(softmax_loss(images, texts, CODES, one).loss.detach(), soft.detach(), 1e-6)
        close(sigmoid_loss(images, texts, CODES, one, -one).detach(), sigmoid.detach(), 1e-6)


def _share(rank: int, folder: Path, counts: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/met", rank=rank, world_size=len(counts)
    )
    start = sum(counts[:rank])
    rows = slice(start, start + counts[rank])
    images, texts = vectors(8)
    scale, bias = number(5.0), number(-2.0)
    said = {}
    for name, loss in (
        ("softmax", lambda: softmax_loss(images[rows], texts[rows], CODES[rows], scale).loss),
        ("sigmoid", lambda: sigmoid_loss(images[rows], texts[rows], CODES[rows], scale, bias)),
    ):
        share = loss() * counts[rank] / 8
        grads = torch.autograd.grad(share, [images, texts, scale, bias], allow_unused=True)
        said[name] = [share.detach(), *(torch.zeros(()) if g is None else g for g in grads)]
    torch.save(said, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's thread may still let go of a tensor, for which it needs the interpreter


@pytest.mark.parametrize("counts", [(4, 4), (3, 5), (8, 0), (2, 5, 1)])
def test_several_processes_have_the_loss_of_one(counts: tuple[int, ...], tmp_path: Path) -> None:
    start = torch.multiprocessing.start_processes
    start(_share, (tmp_path, counts), nprocs=len(counts), start_method="fork")
    images, texts = vectors(8)
    scale, bias = number(5.0), number(-2.0)
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(counts))]
    for name, loss in (
        ("softmax", softmax_loss(images, texts, CODES, scale).loss),
        ("sigmoid", sigmoid_loss(images, texts, CODES, scale, bias)),
    ):
        grads = torch.autograd.grad(loss, [images, texts, scale, bias], allow_unused=True)
        expected = [loss.detach(), *(torch.zeros(()) if g is None else g for g in grads)]
        for k, whole in enumerate(expected):
            close(
                sum(each[name][k] for each in shares),
                whole,
                1e-6,
                size=max(1.0, whole.abs().max().item()),
            )
