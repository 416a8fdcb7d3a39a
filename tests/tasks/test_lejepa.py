"""LeJEPA: its loss against a plain reading of the paper, and against lightly's."""

import copy
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from close import close, largest
from vitrail.data.batches.batch import Batch
from vitrail.data.targets import Nothing
from vitrail.data.views.canvas import Canvas
from vitrail.errors import UsageError
from vitrail.models import ViTConfig, build
from vitrail.tasks.embed import EmbedConfig
from vitrail.tasks.lejepa import Lejepa, LejepaConfig, nearness, sigreg

TINY = ViTConfig(depth=1, width=16, heads=2, mlp=32, patch=(8, 8), image_size=(16, 16), classes=0)
SMALL = LejepaConfig(hidden=24, out=6, directions=12, weight=0.1, locals=1)
SIZES = ((16, 16), (16, 16), (8, 8))
"""Of two global views and a local one."""


def task_of(config: LejepaConfig = SMALL, seed: int = 0) -> Lejepa:
    torch.manual_seed(seed)
    return Lejepa(build(TINY), config, Nothing(5), EmbedConfig(), seed)


def batch_of(n: int = 8, seed: int = 1) -> Batch:
    torch.manual_seed(seed)
    views = tuple(Canvas(torch.randn(n, 3, *size), None) for size in SIZES)
    return Batch(views, {}, np.arange(n))


def directions(d: int, a: int) -> Tensor:
    drawn = torch.randn(d, a, dtype=torch.float64)
    return drawn / drawn.norm(dim=0)


def plain_sigreg(z: Tensor, along: Tensor) -> Tensor:
    """The integral from -3 to 3 of one view, with complex numbers, direction by direction."""
    t = torch.linspace(-3, 3, 33, dtype=torch.float64)
    found = []
    for a in along.T:
        x = z @ a
        phi = torch.exp(1j * t[:, None] * x[None]).mean(dim=1)
        apart = (phi - torch.exp(-(t**2) / 2)).abs() ** 2 * torch.exp(-(t**2) / 2)
        found.append(len(z) * torch.trapezoid(apart, t))
    return torch.stack(found).mean()


def test_sigreg_is_the_integral_written_out() -> None:
    z, along = torch.randn(3, 20, 6, dtype=torch.float64) * 2 + 0.5, directions(6, 10)
    expected = torch.stack([plain_sigreg(view, along) for view in z]).mean()
    close(sigreg(z, along), expected, 1e-10)


def test_sigreg_tells_a_gaussian_from_others() -> None:
    torch.manual_seed(0)
    along, n = directions(4, 32).float(), 1000
    normal = torch.randn(20, n, 4)
    found = {
        "normal": sigreg(normal, along),
        "narrow": sigreg(0.5 * normal, along),
        "shifted": sigreg(normal + 0.5, along),
        "flat": sigreg(normal * torch.tensor([1.0, 1, 1, 0]), along),
        "a point": sigreg(torch.zeros(20, n, 4), along),
    }
    assert all(found["normal"] < value / 10 for name, value in found.items() if name != "normal")
    # Of a sample of a Gaussian the test's expectation does not grow with the sample: it is
    # int e^{-t^2/2} (1 - e^{-t^2}) dt = sqrt(2 pi) (1 - 1 / sqrt 3), but for what is beyond 3.
    assert found["normal"].item() == pytest.approx(math.sqrt(2 * math.pi) * (1 - 3**-0.5), rel=0.2)


class Plain:
    """The task's loss in one place, in float64."""

    def __init__(self, task: Lejepa) -> None:
        self.model, self.projector = copy.deepcopy(task.model), copy.deepcopy(task.projector)

    def loss(self, batch: Batch, along: Tensor, weight: float) -> Tensor:
        z = [self.projector(self.model(images)) for images, _ in batch.views]
        c = (z[0] + z[1]) / 2
        near = sum(((each - c) ** 2).mean() for each in z) / 3
        spread = sum(plain_sigreg(each, along) for each in z) / 3
        return (1 - weight) * near + weight * spread


def test_a_step_is_a_plain_one() -> None:
    task, batch = task_of().double(), batch_of()
    batch = batch._replace(views=tuple(Canvas(x.double(), None) for x, _ in batch.views))
    plain, along = Plain(task), task._directions(torch.zeros(1, dtype=torch.float64))
    found, expected = task.loss(batch), plain.loss(batch, along, 0.1)
    close(found.total.double(), expected, 1e-5)  # the last sums are in float32
    close(0.9 * found.parts["near"] + 0.1 * found.parts["gaussian"], found.total)
    found.total.backward()
    expected.backward()
    mine = [*task.model.parameters(), *task.projector.parameters()]
    its = [*plain.model.parameters(), *plain.projector.parameters()]
    size = largest(p.grad for p in its if p.grad is not None)
    for one, other in zip(mine, its, strict=True):
        if other.grad is not None:
            close(one.grad, other.grad, 1e-5, size=size)


def test_lightlys_loss_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = pytest.importorskip("lightly.loss.lejepa_loss")
    z, along = torch.randn(4, 30, 6) * 1.5, directions(6, 20).float()
    theirs = loss.SIGReg(num_vectors=20)
    monkeypatch.setattr(theirs, "_generate_unit_vectors", lambda *args, **named: along)
    close(sigreg(z, along), torch.stack([theirs(view) for view in z]).mean())
    close(nearness(z, z[:2]), loss.lejepa_invariance_loss(all_proj=z, global_proj=z[:2]))


def test_directions_are_of_length_one_and_follow_from_seed_and_step() -> None:
    task, like = task_of(), torch.zeros(1)
    first = task._directions(like)
    close(first.norm(dim=0), torch.ones(12))
    assert first.shape == (6, 12) and torch.equal(first, task._directions(like))
    task.after_step(0.1)
    second = task._directions(like)
    assert not torch.equal(first, second)
    again = task_of()
    again.load_state_dict(task.state_dict())  # as a run does that goes on
    assert torch.equal(again._directions(like), second)
    other = task_of()
    other.seed = 1
    assert not torch.equal(other._directions(like), first)


def test_it_neither_collapses_nor_needs_a_teacher() -> None:
    task = task_of(replace(SMALL, weight=0.05))
    assert {name.split(".")[0] for name in task.state_dict()} == {"model", "projector", "steps"}
    optimizer = torch.optim.AdamW(task.parameters(), 2e-3)
    torch.manual_seed(3)
    images, found = torch.randn(24, 3, 16, 16), []
    for _ in range(60):
        views = [images + 0.3 * torch.randn_like(images) for _ in range(2)]
        views.append(views[0][:, :, :8, :8])
        losses = task.loss(Batch(tuple(Canvas(x, None) for x in views), {}, np.arange(24)))
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        task.after_step(0.0)
        found.append(losses)
    assert found[-1].total < 0.5 * found[0].total
    assert found[-1].parts["gaussian"] < 0.5 * found[0].parts["gaussian"]
    assert found[-1].parts["spread"] > 0.8


def test_one_image_duplicates_and_bfloat16_pass() -> None:
    assert task_of().loss(batch_of(1)).total.isfinite()
    same = batch_of().rows(np.zeros(8, int))
    losses = task_of().loss(same)
    losses.total.backward()
    assert losses.total.isfinite() and losses.parts["spread"] < 1e-3
    with torch.autocast("cpu", torch.bfloat16):
        rough = task_of().loss(batch_of()).total
    close(rough, task_of().loss(batch_of()).total, 0.05)
    along, z = directions(6, 10).float(), torch.randn(1, 9, 6)
    exact = sigreg(z, along)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sigreg(z, along), exact)


def test_a_step_can_be_had_on_paper() -> None:
    with torch.device("meta"):
        task = Lejepa(build(TINY), SMALL, Nothing(0), EmbedConfig(), 0)
        views = tuple(Canvas(torch.empty(4, 3, *size), None) for size in SIZES)
        task.loss(Batch(views, {}, np.arange(4))).total.backward()
    task.after_step(0.5)
    assert task.projector[6].bias.grad.is_meta


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"weight": 0.0}, r"lejepa.weight must be in \(0, 1\)"),
        ({"directions": 0}, "directions must be at least 1"),
        ({"out": 0}, "out must be at least 1"),
    ],
)
def test_a_wrong_value_is_named(changes: dict[str, float], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        LejepaConfig(**changes)


def _share(rank: int, folder: Path, sizes: tuple[int, int]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/met", rank=rank, world_size=2)
    for count, size in enumerate(sizes):
        task, batch = task_of(), batch_of()
        mine = batch.rows(slice(0, size) if rank == 0 else slice(size, 8))
        losses = task.loss(mine)
        total = losses.total * len(mine.indices) / 8
        total.backward()
        said = {"loss": total.detach(), "gaussian": losses.parts["gaussian"].detach()}
        said |= {f"grad.{n}": p.grad for n, p in task.named_parameters() if p.grad is not None}
        torch.save(said, folder / f"{count}-{rank}.pt")
    blank = Batch(tuple(Canvas(torch.zeros(1, 3, *x), None) for x in SIZES), {}, np.arange(0))
    losses = task_of().loss(batch_of() if rank == 0 else blank)
    (losses.total * (1 - rank)).backward()  # which weighs nothing
    assert losses.total.isfinite() and all(part.isfinite() for part in losses.parts.values())
    dist.destroy_process_group()
    os._exit(0)


def test_two_processes_have_the_loss_and_the_gradients_of_one(tmp_path: Path) -> None:
    start = torch.multiprocessing.start_processes
    start(_share, (tmp_path, (4, 5)), nprocs=2, start_method="fork")
    task = task_of()
    losses = task.loss(batch_of())
    losses.total.backward()
    for count in range(2):
        first, second = (torch.load(tmp_path / f"{count}-{rank}.pt") for rank in range(2))
        close(first["loss"] + second["loss"], losses.total.detach(), 1e-6)
        assert torch.equal(first["gaussian"], second["gaussian"])
        size = largest(p.grad for p in task.parameters() if p.grad is not None)
        for name, parameter in task.named_parameters():
            if parameter.grad is not None:
                ours = first[f"grad.{name}"] + second[f"grad.{name}"]
                close(ours, parameter.grad, 1e-4, size=size, msg=name)
