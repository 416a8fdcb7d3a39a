"""Features distilled from a teacher: three forms written out, the queue, mixing, the teacher."""

import copy
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from close import close, largest
from vitrail.data import keyed
from vitrail.data.batches.batch import Batch
from vitrail.data.targets import Nothing
from vitrail.data.views.canvas import Canvas
from vitrail.data.views.preprocess import Preprocess
from vitrail.errors import UsageError
from vitrail.models import ViTConfig, build
from vitrail.tasks.distill import Teacher
from vitrail.tasks.distill_features import (
    DistillFeatures,
    DistillFeaturesConfig,
    at_grid,
    divergence,
    mixed,
    queue_for,
)
from vitrail.tasks.embed import EmbedConfig

STUDENT = ViTConfig(
    depth=1, width=16, heads=2, mlp=32, patch=(8, 8), image_size=(16, 16), classes=0
)
TEACHER = replace(STUDENT, depth=3, width=24, heads=3, patch=(4, 4), image_size=(12, 12))
SEES, SHOWN = Preprocess(size=(16, 16), patch=(8, 8)), Preprocess(size=(12, 12), patch=(4, 4))
PLAIN = DistillFeaturesConfig(mixup=False, queue=12)


def task_of(config: DistillFeaturesConfig = PLAIN, teacher: ViTConfig = TEACHER) -> DistillFeatures:
    torch.manual_seed(0)
    asked = Teacher(build(teacher), SHOWN, SEES)
    task = DistillFeatures(build(STUDENT), config, Nothing(1455), EmbedConfig(), asked, seed=0)
    for layer in (task.image, task.patches):
        if layer is not None:
            torch.nn.init.normal_(layer.weight, std=0.5)
    return task


def batch_of(n: int = 6, seed: int = 1) -> Batch:
    torch.manual_seed(seed)
    return Batch((Canvas(torch.randn(n, 3, 16, 16), None),), {}, np.arange(n))


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Of rows of logits, a mean over rows."""
    p, q = teacher.softmax(-1), student.softmax(-1)
    return (p * (p / q).log()).sum(-1).mean()


def taught(task: DistillFeatures, images: Tensor):
    """The teacher's features of images at its own size."""
    shown = F.interpolate(images * 0.5 + 0.5, (12, 12), mode="bicubic", antialias=True)
    return task.teacher.model.features((shown.clamp(0, 1) - 0.5) / 0.5)


def test_v1_is_a_classifier_of_the_teachers_last_vectors() -> None:
    task = task_of(replace(PLAIN, form="v1"))
    queue = torch.zeros(12, 24)
    for step in range(3):
        batch = batch_of(seed=step)
        t = unit(taught(task, batch.images).pooled)
        queue = torch.cat([t, queue])[:12]
        s = unit(task.image(task.model.features(batch.images).pooled))
        found = task.loss(batch)
        close(found.total, kl(t @ queue.T / 0.07, s @ queue.T / 0.07), 1e-4)
        close(task.queue, queue)
    assert found.parts == {} and task.patches is None
    # The third batch has pushed the first one out.
    assert not torch.allclose(queue[6:], torch.zeros(6, 24))


def test_v3_adds_how_the_patches_of_an_image_lie_to_each_other() -> None:
    task, batch = task_of(replace(PLAIN, local=0.5)), batch_of()
    student, teacher = task.model.features(batch.images), taught(task, batch.images)
    s = task.patches(student.patches).transpose(1, 2).unflatten(2, (2, 2))
    s = unit(F.interpolate(s, (3, 3), mode="bilinear").flatten(2).transpose(1, 2))
    t = unit(teacher.patches)
    local = kl(t @ t.transpose(1, 2) / 0.07, s @ s.transpose(1, 2) / 0.07)
    found = task.loss(batch)
    close(found.parts["patches"], local, 1e-4)
    close(found.total, found.parts["image"] + 0.5 * local, 1e-4)
    assert found.parts["image"] > 0


def test_v2_is_the_squared_error_to_the_last_two_blocks() -> None:
    task, batch = task_of(replace(PLAIN, form="v2")), batch_of()
    shown = F.interpolate(batch.images * 0.5 + 0.5, (12, 12), mode="bicubic", antialias=True)
    shown, model = (shown.clamp(0, 1) - 0.5) / 0.5, task.teacher.model
    x, maps = model.embed(shown)[0], []
    for block in model.encoder.blocks:
        x = block(x)
        maps.append(model.encoder.norm(x)[:, 1:])
    wanted = torch.cat(maps[-2:], dim=2)
    s = task.patches(task.model.features(batch.images).patches)
    s = F.interpolate(s.transpose(1, 2).unflatten(2, (2, 2)), (3, 3), mode="bilinear")
    close(task.loss(batch).total, (s.flatten(2).transpose(1, 2) - wanted).square().mean())
    assert task.image is None and "queue" not in task.state_dict()


@pytest.mark.parametrize("form", ["v1", "v2", "v3"])
def test_what_says_the_same_as_its_teacher_has_no_loss(form: str) -> None:
    """The student is the teacher, and what it is taught through changes nothing."""
    torch.manual_seed(0)
    model = build(TEACHER)
    teacher = Teacher(copy.deepcopy(model), SHOWN, SHOWN)
    task = DistillFeatures(
        model, replace(PLAIN, form=form), Nothing(9), EmbedConfig(), teacher, seed=0
    )
    images = torch.randn(4, 3, 12, 12)
    with torch.no_grad():
        for layer in (task.image, task.patches):
            if layer is not None:
                layer.weight.copy_(torch.eye(24).repeat(len(layer.weight) // 24, 1))
        if form == "v2":  # whose first half is of the block before
            task.patches.weight[:24] = 0
            last = task.loss(Batch((Canvas(images, None),), {}, np.arange(4))).total
            first = task.teacher.taps(Batch((Canvas(images, None),), {}, np.arange(4)), 2)[0]
            close(last, first.square().mean() / 2)
        else:
            assert task.loss(Batch((Canvas(images, None),), {}, np.arange(4))).total < 1e-6


@pytest.mark.parametrize("form", ["v1", "v2", "v3"])
def test_only_the_student_learns(form: str) -> None:
    task = task_of(replace(PLAIN, form=form))
    task.loss(batch_of()).total.backward()
    assert all(p.grad is None for p in task.teacher.model.parameters())
    learned = {name.split(".")[0] for name, p in task.named_parameters() if p.grad is not None}
    assert learned == {"model", *({"image"} if form != "v2" else ())} | (
        {"patches"} if form != "v1" else set()
    )
    assert not any(name.startswith("teacher") for name in task.state_dict())
    assert not task.train().teacher.model.training


@pytest.mark.parametrize("form", ["v1", "v2", "v3"])
def test_all_that_learns_has_a_gradient_for_which_processes_wait(form: str) -> None:
    torch.manual_seed(0)
    model, teacher = build(replace(STUDENT, pool="map")), Teacher(build(TEACHER), SHOWN, SEES)
    config = replace(PLAIN, form=form)
    task = DistillFeatures(model, config, Nothing(9), EmbedConfig(), teacher, seed=0)
    task.loss(batch_of()).total.backward()
    without = [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_pairs_are_mixed_by_one_share_of_the_step_for_both_to_see() -> None:
    task, batch = task_of(replace(PLAIN, mixup=True)), batch_of(5)
    share = float(keyed.uniform(0, 0, np.array([0]), "share", 1)[0, 0])
    assert 0 < share < 1
    images = batch.images
    by_hand = torch.stack(
        [images[i] * (1 - share) + images[j] * share for i, j in enumerate((1, 0, 3, 2, 4))]
    )
    close(mixed(images, share), by_hand)
    found = task.loss(batch).total
    plain = task_of().loss(batch._replace(views=(Canvas(by_hand, None),))).total
    close(found, plain, 1e-4)
    task.after_step(0.1)
    assert task._share(images) != share
    again = task_of(replace(PLAIN, mixup=True))
    again.load_state_dict(task.state_dict())  # as a run does that goes on
    assert again._share(images) == task._share(images)
    assert torch.equal(again.loss(batch).total, task.loss(batch).total)
    # Measured images are as they are, and leave no trace.
    before = task.queue.clone()
    task.eval()
    close(task.loss(batch).total, task.loss(batch).total)
    assert torch.equal(task.queue, before)


def test_the_queue_suits_the_data() -> None:
    sizes = {1: 16, 50: 16, 51: 32, 1455: 512, 20_000: 4096, 20_001: 8192}
    assert {images: queue_for(images) for images in sizes} == sizes
    assert task_of(replace(PLAIN, queue=None)).queue.shape == (512, 24)


def test_a_batch_larger_than_the_queue_fills_it() -> None:
    task, batch = task_of(replace(PLAIN, queue=4)), batch_of()
    assert task.loss(batch).total.isfinite()
    close(task.queue, unit(taught(task, batch.images).pooled)[:4])


def test_divergence_is_zero_for_equals_and_for_none() -> None:
    x, queue = unit(torch.randn(3, 5)), unit(torch.randn(7, 5))
    assert divergence(x, x, queue, 0.07) < 1e-6
    assert divergence(x[:0], x[:0], queue, 0.07) == 0
    assert divergence(unit(torch.randn(3, 5)), x, queue, 0.07) > 0.1


def test_a_grid_of_another_size_is_interpolated() -> None:
    patches = torch.arange(8.0).view(1, 4, 2)
    assert torch.equal(at_grid(patches, (2, 2), (2, 2)), patches)
    found = at_grid(patches, (2, 2), (3, 3))
    close(found[0, 4], patches[0].mean(dim=0))
    close(found[0, 0], patches[0, 0])


def test_one_image_duplicates_and_bfloat16_pass() -> None:
    for form in ("v1", "v2", "v3"):
        config = replace(PLAIN, form=form, mixup=True)
        assert task_of(config).loss(batch_of(1)).total.isfinite()
        same = task_of(config).loss(batch_of().rows(np.zeros(6, int)))
        same.total.backward()
        assert same.total.isfinite()
        with torch.autocast("cpu", torch.bfloat16):
            rough = task_of(config).loss(batch_of()).total
        close(rough, task_of(config).loss(batch_of()).total, 0.1)


def test_a_step_can_be_had_on_paper() -> None:
    for form in ("v1", "v2", "v3"):
        with torch.device("meta"):
            teacher = Teacher(build(TEACHER), SHOWN, SEES)
            config = DistillFeaturesConfig(form=form)
            task = DistillFeatures(
                build(STUDENT), config, Nothing(9), EmbedConfig(), teacher, seed=0
            )
            view = Canvas(torch.empty(4, 3, 16, 16), None)
            task.loss(Batch((view,), {}, np.arange(4))).total.backward()
        task.after_step(0.5)
        assert task.model.stem.proj.weight.grad.is_meta


def test_v2_is_of_vits() -> None:
    teacher = Teacher(build("resnet18", classes=0), SEES, SEES)
    with pytest.raises(UsageError, match=r"v2.*take v1 or v3"):
        DistillFeatures(
            build(STUDENT), replace(PLAIN, form="v2"), Nothing(9), EmbedConfig(), teacher, 0
        )
    task = DistillFeatures(build(STUDENT), PLAIN, Nothing(9), EmbedConfig(), teacher, 0)
    assert task.queue.shape == (12, 512)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"local": -1.0}, "local cannot be negative"),
        ({"queue": 0}, "queue must be at least 1"),
    ],
)
def test_a_wrong_value_is_named(changes: dict[str, float], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        DistillFeaturesConfig(**changes)


def test_it_learns_what_its_teacher_says() -> None:
    task = task_of(replace(PLAIN, queue=24))
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], 3e-3)
    batch, losses = batch_of(24), []
    for _ in range(50):
        total = task.loss(batch).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < 0.5 * losses[1]  # in the first step the queue is not full


def _share(rank: int, folder: Path, sizes: tuple[int, int]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/met", rank=rank, world_size=2)
    for count, size in enumerate(sizes):
        # Pairs are of one process, as batches of several are shared.
        task, batch = task_of(replace(PLAIN, mixup=size % 2 == 0)), batch_of()
        mine = batch.rows(slice(0, size) if rank == 0 else slice(size, 6))
        total = task.loss(mine).total * len(mine.indices) / 6
        total.backward()
        said = {"loss": total.detach(), "queue": task.queue}
        said |= {f"grad.{n}": p.grad for n, p in task.named_parameters() if p.grad is not None}
        torch.save(said, folder / f"{count}-{rank}.pt")
    none = Batch((Canvas(torch.zeros(1, 3, 16, 16), None),), {}, np.arange(0))
    losses = task_of().loss(batch_of() if rank == 0 else none)
    (losses.total * (1 - rank)).backward()
    assert losses.total.isfinite()
    dist.destroy_process_group()
    os._exit(0)


def test_two_processes_have_the_loss_the_queue_and_the_gradients_of_one(tmp_path: Path) -> None:
    start = torch.multiprocessing.start_processes
    start(_share, (tmp_path, (4, 3)), nprocs=2, start_method="fork")
    for count, mixup in enumerate((True, False)):
        task = task_of(replace(PLAIN, mixup=mixup))
        losses = task.loss(batch_of())
        losses.total.backward()
        first, second = (torch.load(tmp_path / f"{count}-{rank}.pt") for rank in range(2))
        close(first["loss"] + second["loss"], losses.total.detach(), 1e-6)
        assert torch.equal(first["queue"], second["queue"])
        close(first["queue"], task.queue)
        size = largest(p.grad for p in task.parameters() if p.grad is not None)
        for name, parameter in task.named_parameters():
            if parameter.grad is not None:
                ours = first[f"grad.{name}"] + second[f"grad.{name}"]
                close(ours, parameter.grad, 1e-4, size=size, msg=name)
