"""DINO, iBOT, KoLeo: losses and steps against a plain reading of the papers, and lightly's."""

import copy
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from close import close, largest
from vitrail.data.batches.batch import Batch
from vitrail.data.targets import Nothing
from vitrail.data.views.canvas import Canvas
from vitrail.errors import UsageError
from vitrail.models import ViTConfig, build, model_config
from vitrail.tasks import EmbedConfig
from vitrail.tasks.dino import Dino, DinoConfig, agreement, koleo, patch_width, sinkhorn
from vitrail.tasks.momentum import momentum

TINY = ViTConfig(depth=2, width=16, heads=2, mlp=32, patch=(4, 4), image_size=(16, 16), classes=0)
SMALL = DinoConfig(
    prototypes=12, hidden=24, out=8, small_views=2, momentum=0.7, freeze_last=0.0,
    teacher_temperature=(0.05, 0.05),
)  # fmt: skip
ALL = replace(SMALL, ibot=1.0, koleo=0.1)
SUMS = [SMALL, ALL, replace(ALL, own_patch_head=True), replace(ALL, centring="sinkhorn")]


def task_of(config: DinoConfig = SMALL, model: ViTConfig = TINY) -> Dino:
    torch.manual_seed(0)
    return Dino(build(model), config, Nothing(5), EmbedConfig(), seed=3)


def batch_of(n: int = 8, seed: int = 1, small: int = 2, dtype: Any = torch.float32) -> Batch:
    torch.manual_seed(seed)
    sides = [16, 16] + [8] * small
    views = tuple(Canvas(torch.randn(n, 3, side, side, dtype=dtype), None) for side in sides)
    return Batch(views, {}, np.arange(n), seed)


class Plain:
    """DINO as its algorithm 1 says it, with iBOT's and DINOv2's additions: all in one place."""

    def __init__(self, task: Dino, rate: float) -> None:
        self.task = task  # for its masks
        self.config = task.config
        parts = {"model": task.model, "heads": task.heads}
        if task.mask is not None:
            parts["mask"] = task.mask
        self.student = nn.ModuleDict(copy.deepcopy(parts))
        self.teacher = copy.deepcopy(self.student)
        self.optimizer = torch.optim.SGD(self.student.parameters(), rate, 0.9)
        self.centre = torch.zeros(task.config.prototypes, dtype=torch.float64)
        self.patch_centre = self.centre.clone()

    def features(self, net: Any, x: Tensor, mask: Tensor | None = None) -> Any:
        if mask is None:
            return net["model"].features(x)
        # The ViT by hand, for the token goes in before positions.
        model = net["model"]
        tokens, grid = model.stem(x)
        tokens = torch.where(mask[:, :, None], net["mask"].token, tokens)
        prefix = model.prefix.expand(len(x), -1, -1)
        tokens, prefix = model.position(tokens, prefix, grid)
        out = model.encoder(torch.cat([prefix, tokens], dim=1), grid, None)
        return model.laid_out(out[:, 1:], out[:, :1], grid, (), out[:, 0])

    def chances(self, told: Tensor, centre: Tensor) -> Tensor:
        t = self.config.teacher_temperature[1]
        if self.config.centring == "mean":
            return ((told - centre) / t).softmax(-1)
        q = (told / t).exp().T
        q = q / q.sum()
        for _ in range(3):
            q = q / q.sum(dim=1, keepdim=True) / q.shape[0]
            q = q / q.sum(dim=0, keepdim=True) / q.shape[1]
        return (q * q.shape[1]).T

    def loss(self, batch: Batch) -> Tensor:
        config, n = self.config, len(batch.indices)
        large = [view.images for view in batch.views[:2]]
        masks: list[Any] = [None, None]
        if config.ibot:
            hidden = self.task._hidden(batch)
            flat = torch.zeros(2 * n * 16, dtype=torch.bool)
            flat[hidden.places] = True
            masks = list(flat.view(2, n, 16))
        seen = [self.features(self.student, x, mask) for x, mask in zip(large, masks, strict=True)]
        said = [self.student["heads"].images(each.pooled) for each in seen]
        for view in batch.views[2:]:
            pooled = self.features(self.student, view.images).pooled
            said.append(self.student["heads"].images(pooled))
        with torch.no_grad():
            shown = [self.features(self.teacher, x) for x in large]
            told = [self.teacher["heads"].images(each.pooled) for each in shown]
            chances = self.chances(torch.cat(told), self.centre).chunk(2)
        terms = [
            -(chances[t] * F.log_softmax(said[s] / config.temperature, -1)).sum(-1).mean()
            for t in range(2)
            for s in range(len(said))
            if s != t
        ]
        total = sum(terms) / len(terms)
        self.centre = 0.9 * self.centre + 0.1 * torch.cat(told).mean(0)
        if config.ibot:
            of = self.student["heads"].patches or self.student["heads"].images
            slow = self.teacher["heads"].patches or self.teacher["heads"].images
            with torch.no_grad():
                answers = torch.cat([slow(shown[v].patches[masks[v]]) for v in range(2)])
                sure = list(self.chances(answers, self.patch_centre).split(
                    [int(masks[v].sum()) for v in range(2)]
                ))  # fmt: skip
            for v in range(2):
                logits = F.log_softmax(of(seen[v].patches[masks[v]]) / config.temperature, -1)
                each = -(sure[v] * logits).sum(-1)
                rows = masks[v].nonzero()[:, 0]
                for i in rows.unique():
                    total = total + config.ibot * each[rows == i].mean() / (2 * n)
            self.patch_centre = 0.9 * self.patch_centre + 0.1 * answers.mean(0)
        if config.koleo:
            for each in seen:
                x = F.normalize(each.pooled, dim=1)
                apart = torch.cdist(x, x) + 9 * torch.eye(n)
                total = total - config.koleo * apart.min(dim=1).values.log().mean()
        return total

    def follow(self, m: float) -> None:
        pairs = zip(self.student.parameters(), self.teacher.parameters(), strict=True)
        for fast, slow in pairs:
            slow.data = slow.data * m + fast.data * (1 - m)


@pytest.mark.parametrize("config", SUMS)
def test_steps_are_the_papers(config: DinoConfig) -> None:
    task, steps = task_of(config).double(), 4
    plain = Plain(task, 0.5)
    learned = [p for p in task.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learned, 0.5, 0.9)
    for step in range(steps):
        batch = batch_of(seed=step, dtype=torch.float64)
        task.enter(step / steps)
        theirs, ours = plain.loss(batch), task.loss(batch).total
        close(ours, theirs, 1e-7)
        for one, loss in ((optimizer, ours), (plain.optimizer, theirs)):
            one.zero_grad()
            loss.backward()
            one.step()
        task.after_step((step + 1) / steps)
        plain.follow(momentum(0.7, (step + 1) / steps))
    for name in ("model", "heads"):
        for mine, its in (
            (getattr(task, name), plain.student[name]),
            (getattr(task.teacher, name), plain.teacher[name]),
        ):
            for key, value in its.state_dict().items():
                size = max(largest([value]), 0.1)
                close(mine.state_dict()[key], value, 1e-6, size=size, msg=key)
    if config.centring == "mean":
        close(task.centre, plain.centre, 1e-6)
        if config.ibot:
            assert task.patch_centre is not None
            close(task.patch_centre, plain.patch_centre, 1e-6)
    else:
        assert not task.centre.any()


@pytest.fixture
def lightly() -> Iterator[Any]:
    """Its losses, where it is installed: `pip install --no-deps lightly==1.6.0` will do."""
    pytest.importorskip("lightly")
    import lightly.loss

    yield lightly.loss


def test_the_loss_is_lightlys(lightly: Any) -> None:
    torch.manual_seed(0)
    theirs = lightly.DINOLoss(output_dim=12, teacher_temp=0.05, student_temp=0.1)
    task = task_of()
    for _ in range(3):
        told, said = torch.rand(2, 6, 12), list(torch.rand(5, 6, 12))
        chances = task._chances(told.flatten(0, 1), task.centre).view_as(told)
        found = agreement(said, chances, 0.1)
        close(found, theirs(list(told), said))
        task._move(task.centre, told.flatten(0, 1))
        close(task.centre, theirs.center[0, 0])


def test_ibots_and_koleos_are_lightlys(lightly: Any) -> None:
    task, batch = task_of(ALL), batch_of()
    masks = task._hidden(batch)
    said, told = torch.rand(2, len(masks.places), 12)
    shape = torch.zeros(16 * 16, dtype=torch.bool)
    shape[masks.places] = True
    theirs = lightly.IBOTPatchLoss(output_dim=12, teacher_temp=0.05, student_temp=0.1)
    for _ in range(2):
        close(task._of_patches(said, told, masks, 8), theirs(told, said, shape.view(16, 4, 4)))
        assert task.patch_centre is not None
        close(task.patch_centre, theirs.center.value[0])
    x = torch.randn(9, 7)
    close(koleo(x), lightly.KoLeoLoss()(x))


def test_sinkhorns_sums() -> None:
    torch.manual_seed(0)
    q = sinkhorn(torch.rand(64, 12, dtype=torch.float64) * 2 - 1, 0.1, rounds=60)
    close(q.sum(dim=1), torch.ones(64, dtype=torch.float64), 1e-9)
    close(q.sum(dim=0), torch.full((12,), 64 / 12, dtype=torch.float64), 1e-6)
    few = sinkhorn(torch.rand(64, 12), 0.04)
    close(few.sum(dim=1), torch.ones(64))
    assert (few.sum(dim=0) * 12 / 64 - 1).abs().max() < 0.6  # after three rounds
    same = sinkhorn(torch.full((5, 4), 0.3), 0.01)
    close(same, torch.full((5, 4), 0.25))
    assert sinkhorn(torch.zeros(0, 4), 0.04).shape == (0, 4)


def test_koleo_parts_all_but_the_same_picture() -> None:
    twice = torch.randn(1, 8).expand(4, -1).clone().requires_grad_()
    koleo(twice).backward()
    assert twice.grad is not None and twice.grad.isfinite().all()
    assert koleo(torch.randn(1, 8)) == 0
    x = torch.randn(6, 8, requires_grad=True)
    before = koleo(x)
    before.backward()
    assert x.grad is not None and koleo(x - 0.1 * x.grad) < before


def test_the_loss_of_what_knows_nothing_is_ln_k() -> None:
    none = torch.zeros(4, 12)
    found = agreement([none] * 4, torch.full((2, 4, 12), 1 / 12), 0.1)
    assert found.item() == pytest.approx(math.log(12), rel=1e-5)


def test_nothing_of_the_teacher_learns_and_prototypes_wait() -> None:
    task = task_of(replace(ALL, freeze_last=0.3, own_patch_head=True))
    task.enter(0.1)
    task.loss(batch_of()).total.backward()
    still = {name for name, p in task.named_parameters() if p.grad is None}
    ours = {name for name in still if not name.startswith("teacher.")}
    assert ours == {"heads.images.last.weight", "heads.patches.last.weight"}
    assert {name for name, _ in task.named_parameters() if name.startswith("teacher.")} <= still
    assert task.mask is not None and task.mask.token.grad is not None
    assert task.mask.token.grad.abs().sum() > 0
    task.enter(0.3)
    task.loss(batch_of()).total.backward()
    assert task.heads.images.last.weight.grad is not None


def test_the_teacher_grows_less_sure() -> None:
    task = task_of(replace(SMALL, teacher_temperature=(0.04, 0.07), teacher_warmup=0.5))
    found = []
    for done in (0.0, 0.25, 0.5, 1.0):
        task.enter(done)
        found.append(task.sharpness.item())
    assert found == pytest.approx([0.04, 0.055, 0.07, 0.07])


def test_a_hidden_patch_is_not_seen() -> None:
    task, batch = task_of(replace(ALL, hidden_views=1.0)), batch_of()
    masks, large = task._hidden(batch), batch.views[0].images
    both = torch.cat([large, batch.views[1].images])
    changed = both.clone()
    patches = changed.view(16, 3, 4, 4, 4, 4).permute(0, 2, 4, 1, 3, 5)
    for place in masks.places.tolist():
        i, row, column = place // 16, place % 16 // 4, place % 4
        patches[i, row, column] = 7.0
    assert not torch.equal(both, changed)
    with torch.no_grad():
        with task._hiding(masks):
            first, second = task.model(both), task.model(changed)
        assert torch.equal(first, second)
        assert not torch.equal(task.model(both), task.model(changed))  # and it is over


@pytest.mark.parametrize("config", SUMS[1:])
def test_what_computes_may_be_a_copy(config: DinoConfig) -> None:
    task = task_of(config)
    other = copy.deepcopy(task)
    assert torch.equal(task.loss(batch_of()).total, other.loss(batch_of()).total)
    kept = task.state_dict()
    assert {"centre", "usual", "patch_centre"} <= kept.keys()
    fresh = task_of(config)
    fresh.load_state_dict(kept)
    assert torch.equal(task.loss(batch_of()).total, fresh.loss(batch_of()).total)


def test_bfloat16_and_one_image_pass() -> None:
    for config in SUMS:
        with torch.autocast("cpu", torch.bfloat16):
            close(
                task_of(config).loss(batch_of()).total, task_of(config).loss(batch_of()).total, 0.05
            )
        assert task_of(config).loss(batch_of(1)).total.isfinite()
        alone = task_of(replace(config, small_views=0))
        assert alone.loss(batch_of(small=0)).total.isfinite()


@pytest.mark.parametrize("config", SUMS)
def test_a_step_can_be_had_on_paper(config: DinoConfig) -> None:
    with torch.device("meta"):
        task = Dino(build(TINY), config, Nothing(0), EmbedConfig(), 0)
        views = tuple(Canvas(torch.empty(4, 3, side, side), None) for side in (16, 16, 8, 8))
        task.loss(Batch(views, {}, np.arange(4))).total.backward()
    task.after_step(0.5)
    assert task.heads.images.mlp[0].weight.grad is not None


def test_what_has_collapsed_says_so() -> None:
    rows, task = {"features": torch.randn(9, 16)}, task_of()
    task.enter(0.5)
    assert task.collapsed(rows) is None
    assert "features of all images have become one" in (
        task.collapsed({"features": torch.ones(9, 16)}) or ""
    )
    with torch.no_grad():
        task.teacher.heads.images.last.weight.fill_(1.0)  # any image is as like to any prototype
    for _ in range(60):
        task.loss(batch_of())
    assert "as like to each of the 12 prototypes" in (task.collapsed(rows) or "")
    task.enter(0.1)  # early nothing has to have been learned
    assert task.collapsed(rows) is None

    one = task_of(replace(SMALL, centre_momentum=1.0, teacher_temperature=(0.01, 0.01)))
    one.enter(0.5)
    with torch.no_grad():
        head = one.teacher.heads.images
        head.mlp[4].weight.zero_()  # any image is the fourth prototype itself
        head.mlp[4].bias.copy_(head.last.weight[3])
    for _ in range(60):
        one.loss(batch_of())
    assert "all images to be of one prototype" in (one.collapsed(rows) or "")


def test_it_learns_what_views_of_an_image_have_in_common() -> None:
    config = replace(
        SMALL, prototypes=32, momentum=0.9, centring="sinkhorn", teacher_temperature=(0.04, 0.04)
    )
    task = task_of(config, replace(TINY, depth=1))
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], 3e-3)
    torch.manual_seed(3)
    images = torch.randn(24, 3, 16, 16)
    losses = []
    for step in range(80):
        large = [Canvas(images + 0.3 * torch.randn_like(images), None) for _ in range(2)]
        small = [Canvas(images[:, :, 4:12, 4:12], None)] * 2
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 20)
        task.enter(step / 80)
        found = task.loss(Batch((*large, *small), {}, np.arange(24)))
        optimizer.zero_grad()
        found.total.backward()
        optimizer.step()
        task.after_step((step + 1) / 80)
        losses.append(found.total.item())
    assert losses[-1] < 0.5 * losses[0]
    assert found.parts["variety"] - found.parts["entropy"] > 1.5  # nats, of ln 24 = 3.2 at most


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prototypes": 1}, "prototypes"),
        ({"hidden": 0}, "hidden must be at least 1"),
        ({"small_views": -1}, "small_views cannot be negative"),
        ({"momentum": 1.1}, "momentum must be in"),
        ({"teacher_warmup": 1.0}, "teacher_warmup"),
        ({"temperature": 0.0}, "temperature"),
        ({"teacher_temperature": (0.04, 0.0)}, "teacher_temperature"),
        ({"small_scale": (0.5, 0.1)}, "small_scale"),
        ({"hidden_share": (0.0, 0.5)}, "hidden_share"),
        ({"koleo": -1.0}, "koleo cannot be negative"),
    ],
)
def test_a_wrong_value_is_named(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        DinoConfig(**changes)


def test_what_has_no_single_patches_hides_none() -> None:
    config = replace(model_config("mobilevit_xxs"), classes=0)
    torch.manual_seed(0)
    model = build(config)
    with pytest.raises(UsageError, match="ibot"):
        patch_width(model)
    with pytest.raises(UsageError, match="ibot"):
        Dino(model, ALL, Nothing(0), EmbedConfig(), 0)
    Dino(model, SMALL, Nothing(0), EmbedConfig(), 0)


_SHARED = replace(ALL, koleo=0.3)


def _share(rank: int, folder: Path, sizes: tuple[int, int]) -> None:
    """One of two processes: its part of the batch, its losses and its gradients."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/met", rank=rank, world_size=2)
    for kind in ("mean", "sinkhorn"):
        for count, size in enumerate(sizes):
            task, batch = task_of(replace(_SHARED, centring=kind)), batch_of()
            mine = batch.rows(slice(0, size) if rank == 0 else slice(size, 8))
            losses = task.loss(mine)
            total = losses.total * len(mine.indices) / 8
            total.backward()
            said = {"loss": total.detach(), "centre": task.centre, "patch": task.patch_centre}
            said |= {name: losses.parts[name] for name in ("entropy", "variety")}
            grads = {n: p.grad for n, p in task.named_parameters() if p.grad is not None}
            torch.save(said | {f"grad.{n}": grad for n, grad in grads.items()},
                       folder / f"{kind}-{count}-{rank}.pt")  # fmt: skip
    # One that is handed an image of no weight: the others need not wait.
    none = batch_of(1)._replace(indices=np.arange(0))
    losses = task_of(_SHARED).loss(batch_of() if rank == 0 else none)
    losses.total.backward()
    assert losses.total.isfinite() and (rank == 0 or losses.total == 0)
    assert all(part.isfinite() for part in losses.parts.values())
    dist.destroy_process_group()
    os._exit(0)  # gloo's thread may still let go of a tensor, for which it needs the interpreter


def test_two_processes_have_the_loss_of_one(tmp_path: Path) -> None:
    start = torch.multiprocessing.start_processes
    start(_share, (tmp_path, (4, 5)), nprocs=2, start_method="fork")  # torch is imported once
    for kind in ("mean", "sinkhorn"):
        task = task_of(replace(_SHARED, centring=kind))
        losses = task.loss(batch_of())
        losses.total.backward()
        for count in range(2):
            first, second = (torch.load(tmp_path / f"{kind}-{count}-{r}.pt") for r in range(2))
            close(first["loss"] + second["loss"], losses.total.detach(), 1e-6)
            for name in ("entropy", "variety"):
                close(first[name], losses.parts[name])
                assert torch.equal(first[name], second[name])
            close(first["centre"], task.centre)
            close(first["patch"], task.patch_centre)
            size = largest([p.grad for p in task.parameters() if p.grad is not None])
            for name, parameter in task.named_parameters():
                if parameter.grad is not None:
                    ours = first[f"grad.{name}"] + second[f"grad.{name}"]
                    close(ours, parameter.grad, 1e-4, size=size, msg=name)
