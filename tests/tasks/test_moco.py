"""MoCo v3: its loss and its steps against a plain reading of the authors' code."""

import copy
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from close import close, largest
from models.families import KINDS
from vitrail.data.batches.batch import Batch
from vitrail.data.targets import Classes, Nothing
from vitrail.data.views.canvas import Canvas
from vitrail.data.views.seen import Seen
from vitrail.errors import UsageError
from vitrail.models import ViT, ViTConfig, build
from vitrail.tasks.embed import Embed, EmbedConfig
from vitrail.tasks.moco import Moco, MocoConfig, contrast, draw_as_moco, pooled_width
from vitrail.tasks.momentum import momentum

TINY = ViTConfig(
    depth=2,
    width=16,
    heads=2,
    mlp=32,
    patch=(8, 8),
    image_size=(16, 16),
    classes=0,
    position="sincos_moco",
)
SMALL = MocoConfig(hidden=24, out=8)
NEAR = EmbedConfig(neighbours=3)


def task_of(config: MocoConfig = SMALL, model: ViTConfig = TINY, seed: int = 0) -> Moco:
    torch.manual_seed(seed)
    return Moco(build(model), config, Nothing(5), NEAR)


def batch_of(n: int = 8, seed: int = 1, classes: int = 0) -> Batch:
    torch.manual_seed(seed)
    views = tuple(Canvas(torch.randn(n, 3, 16, 16), None) for _ in range(2))
    known = {"classes": torch.eye(classes)[torch.arange(n) % classes]} if classes else {}
    return Batch(views, known, np.arange(n))


class Plain:
    """MoCo v3 as its algorithm 1 and builder.py say it: for one process, all in one place."""

    def __init__(self, task: Moco, rate: float) -> None:
        self.base = nn.Sequential(copy.deepcopy(task.model), copy.deepcopy(task.projector))
        self.predictor = copy.deepcopy(task.predictor)
        self.slow = copy.deepcopy(self.base)
        self.learned = [*self.base.parameters(), *self.predictor.parameters()]
        self.optimizer = torch.optim.SGD([p for p in self.learned if p.requires_grad], rate, 0.9)

    def loss(self, batch: Batch, m: float, temperature: float) -> Tensor:
        x1, x2 = (view.images for view in batch.views)
        q1, q2 = self.predictor(self.base(x1)), self.predictor(self.base(x2))
        with torch.no_grad():
            for fast, slow in zip(self.base.parameters(), self.slow.parameters(), strict=True):
                slow.data = slow.data * m + fast.data * (1 - m)
            k1, k2 = self.slow(x1), self.slow(x2)
        return self.ctr(q1, k2, temperature) + self.ctr(q2, k1, temperature)

    def ctr(self, q: Tensor, k: Tensor, temperature: float) -> Tensor:
        q, k = q / q.norm(dim=1, keepdim=True), k / k.norm(dim=1, keepdim=True)
        logits = torch.einsum("nc,mc->nm", q, k) / temperature
        chances = logits.exp() / logits.exp().sum(1, keepdim=True)
        return -2 * temperature * chances.diagonal().log().mean()


def test_steps_are_the_authors() -> None:
    task, steps = task_of(replace(SMALL, momentum=0.7)).double(), 4
    plain = Plain(task, 0.5)
    learned = [p for p in task.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learned, 0.5, 0.9)
    for step in range(steps):
        views = [Canvas(images.double(), None) for images, _ in batch_of(seed=step).views]
        batch = Batch((views[0], views[1]), {}, np.arange(8))
        m = 1 - 0.5 * (1 + math.cos(math.pi * step / steps)) * (1 - 0.7)
        theirs = plain.loss(batch, m, 0.2)
        ours = task.loss(batch).total
        close(ours, theirs, 1e-8)
        for one, loss in ((optimizer, ours), (plain.optimizer, theirs)):
            one.zero_grad()
            loss.backward()
            one.step()
        task.after_step((step + 1) / steps)
    mine = nn.Sequential(task.model, task.projector).state_dict()
    slow = nn.Sequential(task.teacher.model, task.teacher.projector).state_dict()
    for found, expected in ((mine, plain.base.state_dict()), (slow, plain.slow.state_dict())):
        for name, value in expected.items():
            close(found[name], value, 1e-6, size=max(largest([value]), 0.1), msg=name)
    # The teacher's statistics are of what it saw, not an average of the model's.
    assert not torch.equal(mine["1.1.running_mean"], slow["1.1.running_mean"])
    assert slow["1.1.num_batches_tracked"] == 2 * steps


def test_the_loss_of_what_knows_nothing_is_2_t_ln_n() -> None:
    same = torch.ones(10, 4)
    found = contrast(same, same, 0.2)
    assert found.loss.item() == pytest.approx(0.4 * math.log(10), rel=1e-5)
    apart = contrast(torch.eye(10), torch.eye(10), 0.01)
    assert apart.loss.item() < 1e-6 and apart.accuracy == 1


def test_parts_tell_of_collapse() -> None:
    task, batch = task_of(), batch_of()
    parts = task.loss(batch).parts
    assert 0 <= parts["accuracy"] <= 1 and 0.7 < parts["spread"] <= 1
    nn.init.zeros_(task.teacher.projector[6].weight)
    task.teacher.projector[7].eval()
    with torch.no_grad():
        task.teacher.projector[7].running_mean.fill_(-1)  # one and the same key for all
    task.eval()
    assert task.loss(batch).parts["spread"] < 1e-6


def test_nothing_of_the_teacher_and_of_the_patches_learns() -> None:
    task = task_of()
    task.loss(batch_of()).total.backward()
    still = {name for name, p in task.named_parameters() if not p.requires_grad}
    assert {name for name in still if not name.startswith("teacher.")} == {
        "model.stem.proj.weight",
        "model.stem.proj.bias",
    }
    assert {name for name, _ in task.named_parameters() if name.startswith("teacher.")} <= still
    for name, parameter in task.named_parameters():
        assert (parameter.grad is None) == (name in still), name
        if parameter.grad is not None and "norm" not in name and "bias" not in name:
            assert parameter.grad.abs().sum() > 0, name


def test_only_a_patch_projection_stays() -> None:
    learning = task_of(replace(SMALL, freeze_patch=False)).model
    assert all(p.requires_grad for p in learning.parameters())
    conv = task_of(model=replace(TINY, stem="conv")).model
    assert all(p.requires_grad for p in conv.parameters())


def test_the_teachers_norms_are_of_the_batch_in_training_alone() -> None:
    task, batch = task_of(), batch_of()
    for module in task.teacher.modules():  # as what does not learn is put
        module.eval()
    before = task.teacher.projector[1].running_mean.clone()
    task.loss(batch)
    assert not torch.equal(task.teacher.projector[1].running_mean, before)
    before = task.teacher.projector[1].running_mean.clone()
    task.eval()
    task.loss(batch)
    assert torch.equal(task.teacher.projector[1].running_mean, before)


def test_momentum_goes_from_its_start_to_one() -> None:
    for done in (0.0, 0.3, 1.0):
        expected = 1 - 0.5 * (1 + math.cos(math.pi * done)) * (1 - 0.99)
        assert momentum(0.99, done) == pytest.approx(expected)
    assert momentum(0.9, 1.2) == 1
    task = task_of()
    with torch.no_grad():
        task.projector[0].weight.add_(1)
    before = task.teacher.projector[0].weight.clone()
    task.after_step(0.0)
    close(task.teacher.projector[0].weight - before, torch.full_like(before, 0.01), 1e-4)
    after = task.teacher.projector[0].weight.clone()
    task.after_step(1.0)
    assert torch.equal(task.teacher.projector[0].weight, after)


def test_a_copy_is_one_of_its_own() -> None:
    task, batch = task_of(), batch_of()
    other = copy.deepcopy(task)
    assert torch.equal(task.loss(batch).total, other.loss(batch).total)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert not torch.equal(task.model.encoder.norm.weight, other.model.encoder.norm.weight)
    kept = task.state_dict()
    other.load_state_dict(kept)
    assert torch.equal(task.loss(batch).total, other.loss(batch).total)


def test_bfloat16_and_one_image_pass() -> None:
    task = task_of()
    with torch.autocast("cpu", torch.bfloat16):
        close(task.loss(batch_of()).total, task_of().loss(batch_of()).total, 0.05)
    assert task.loss(batch_of(1)).total.isfinite()
    unit = torch.eye(8, 16) + 0.01
    with torch.autocast("cpu", torch.bfloat16):
        halved = contrast(unit, unit, 0.05).loss
    close(halved, contrast(unit, unit, 0.05).loss)  # likenesses keep all their digits


def test_a_step_can_be_had_on_paper() -> None:
    with torch.device("meta"):
        task = Moco(build(TINY), SMALL, Nothing(0), NEAR)
        view = Canvas(torch.empty(4, 3, 16, 16), None)
        task.loss(Batch((view, view), {}, np.arange(4))).total.backward()
    task.after_step(0.5)
    assert task.predictor[0].weight.grad.is_meta


def test_what_is_measured_and_said_of_images() -> None:
    task, batch = task_of().eval(), batch_of(9, classes=3)
    rows = task.measure(batch)
    assert rows["features"].shape == (9, 16) and rows["features"].dtype == torch.float32
    close(rows["features"].norm(dim=1), torch.ones(9))
    with torch.no_grad():
        close(rows["features"], F.normalize(task.model(batch.images), dim=1))
    metrics = task.judge(rows)
    assert metrics.headline == "knn" and task.score(rows) == metrics.values()["knn"]
    assert metrics.neighbours == 3
    bare = task.measure(batch_of(9))
    assert list(bare) == ["features"]
    assert task.judge(bare).headline == "rankme"
    assert task.score(bare) == pytest.approx(task.judge(bare).values()["rankme"] / 16)
    with torch.no_grad():
        answers = task.answer(batch, [Seen(np.eye(3), (16, 16), (16, 16))] * 9)
    assert len(answers) == 9 and answers[0].features.shape == (16,)
    assert task.state() == {"classes": [], "multi_label": False} and len(task.targets) == 0
    # The same is said without what taught it.
    bare_task = Embed(task.model, Nothing(0), NEAR)
    assert torch.equal(bare_task.measure(batch)["features"], rows["features"])
    assert bare_task.judge(rows) == metrics
    assert [*bare_task.state_dict()] == [k for k in task.state_dict() if k.startswith("model.")]


def test_what_a_reader_is_told() -> None:
    names = ("cat", "dog", "owl")
    task = Moco(build(TINY), SMALL, Classes(names, np.arange(9) % 3), NEAR).eval()
    assert task.state() == {"classes": list(names), "multi_label": False} and len(task.targets) == 0
    with torch.no_grad():
        rows = task.measure(batch_of(9, classes=3))
    lines = task.summary(task.judge(rows), "images")
    assert [line.split()[0] for line in lines] == [
        *("k-NN", "baseline", "probe", "RankMe", "spectrum", "spread")
    ]
    assert "(k 3, temperature 0.07)" in lines[0]
    assert "33.3%" in lines[1] and "of 16 directions" in lines[3]
    first, *table = task.table(rows)
    assert first == ("label", "predicted", "nearest", "likeness")
    alike = rows["features"] @ rows["features"].T - 2 * torch.eye(9)
    for i, (label, predicted, which, likeness) in enumerate(table):
        assert label == names[i % 3] and predicted in names
        assert int(which) == alike[i].argmax()
        assert float(likeness) == pytest.approx(alike[i].max().item(), abs=1e-5)
    bare = {"features": rows["features"]}
    assert [row[-2:] for row in table] == list(task.table(bare))[1:]
    told = [line.split()[0] for line in task.summary(task.judge(bare), "x")]
    assert told == ["RankMe", "spectrum", "spread"]
    assert task.notes(task.judge(bare), "images") == []
    same = {"features": torch.ones(9, 16) / 4}
    assert "has collapsed" in task.notes(task.judge(same), "images")[0]
    assert "it has collapsed" in (task.collapsed(same) or "") and task.collapsed(bare) is None


def test_it_learns_which_views_are_of_one_image() -> None:
    task = task_of(model=replace(TINY, depth=1))
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], 2e-3)
    torch.manual_seed(3)
    images = torch.randn(24, 3, 16, 16)
    losses = []
    for step in range(40):
        views = tuple(Canvas(images + 0.3 * torch.randn_like(images), None) for _ in range(2))
        found = task.loss(Batch(views, {}, np.arange(24)))
        optimizer.zero_grad()
        found.total.backward()
        optimizer.step()
        task.after_step((step + 1) / 40)
        losses.append(found.total.item())
    assert losses[-1] < 0.6 * losses[0] and found.parts["accuracy"] > 0.2  # by chance 0.04


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_has_a_width(kind: str) -> None:
    config = replace(KINDS[kind].config, classes=0)
    model = build(config).eval()
    with torch.no_grad():
        x = torch.randn(1, config.channels, *config.image_size)
        assert model(x).shape == (1, pooled_width(model))


def test_a_fresh_vit_is_drawn_as_the_authors_do() -> None:
    model = ViT(replace(TINY, width=64, mlp=64))
    draw_as_moco(model)
    bound = math.sqrt(6 / (3 * 8 * 8 + 64))
    weight = model.stem.proj.weight
    assert 0.99 * bound < weight.abs().max() <= bound
    assert abs(weight.std().item() / (bound / math.sqrt(3)) - 1) < 0.05
    assert 0 < model.prefix.abs().max() < 1e-5
    for matrix in model.encoder.blocks[0].attn.qkv.weight.chunk(3):
        assert 0.9 < matrix.abs().max() / math.sqrt(6 / 128) <= 1
    assert not model.stem.proj.bias.any()
    draw_as_moco(ViT(replace(TINY, class_token=False, pool="mean")))  # and warns of nothing


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"momentum": 1.1}, "momentum must be in"),
        ({"hidden": 0}, "hidden must be at least 1"),
    ],
)
def test_a_wrong_value_is_named(changes: dict[str, float], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        MocoConfig(**changes)


@pytest.mark.parametrize("changes", [{"neighbours": 0}, {"temperature": 0.0}])
def test_a_wrong_way_to_judge_is_named(changes: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=f"embed.{next(iter(changes))}"):
        EmbedConfig(**changes)


def test_a_model_with_a_head_is_refused() -> None:
    with pytest.raises(UsageError, match="classes=0"):
        Moco(build(replace(TINY, classes=3)), SMALL, Nothing(0), NEAR)


def _share(rank: int, folder: Path, sizes: tuple[int, int]) -> None:
    """One of two processes: its part of the batch, its loss and its gradients."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/met", rank=rank, world_size=2)
    for count, size in enumerate(sizes):
        task, batch = task_of(), batch_of()
        mine = batch.rows(slice(0, size) if rank == 0 else slice(size, 8))
        losses = task.loss(mine)
        total = losses.total * len(mine.indices) / 8
        total.backward()
        said = {"loss": total.detach(), "mean": task.projector[1].running_mean}
        said |= {name: part * len(mine.indices) / 8 for name, part in losses.parts.items()}
        said |= {f"grad.{n}": p.grad for n, p in task.named_parameters() if p.grad is not None}
        torch.save(said, folder / f"{count}-{rank}.pt")
    # One that is handed an image of no weight: the others need not wait.
    one = Canvas(torch.zeros(1, 3, 16, 16), None)
    none = Batch((one, one), {}, np.arange(0))
    losses = task_of().loss(batch_of() if rank == 0 else none)
    losses.total.backward()
    assert losses.total.isfinite() and (rank == 0 or losses.total == 0)
    assert all(part.isfinite() for part in losses.parts.values())
    dist.destroy_process_group()
    os._exit(0)  # gloo's thread may still let go of a tensor, for which it needs the interpreter


def test_two_processes_have_the_loss_of_one(tmp_path: Path) -> None:
    start = torch.multiprocessing.start_processes
    start(_share, (tmp_path, (4, 5)), nprocs=2, start_method="fork")  # torch is imported once
    task, batch = task_of(), batch_of()
    losses = task.loss(batch)
    losses.total.backward()
    for count in range(2):
        first, second = (torch.load(tmp_path / f"{count}-{rank}.pt") for rank in range(2))
        close(first["loss"] + second["loss"], losses.total.detach())
        close(first["accuracy"] + second["accuracy"], losses.parts["accuracy"])
        close(first["mean"], task.projector[1].running_mean)
        size = largest([p.grad for p in task.parameters() if p.grad is not None])
        for name, parameter in task.named_parameters():
            if parameter.grad is not None:
                ours = first[f"grad.{name}"] + second[f"grad.{name}"]
                close(ours, parameter.grad, 1e-4, size=size, msg=name)
