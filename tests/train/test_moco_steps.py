"""MoCo v3 as the loop steps it: precision, what is frozen, where the teacher is."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from close import close, largest
from vitrail.data.batches.batch import Batch
from vitrail.data.targets import Nothing
from vitrail.data.views.canvas import Canvas
from vitrail.data.views.moco import moco_views
from vitrail.errors import DataError, UsageError
from vitrail.models import ViTConfig, build
from vitrail.planning.auto import Auto
from vitrail.runs import DataConfig, OptimConfig, TrainConfig, TuneConfig
from vitrail.tasks import EmbedConfig, Moco, MocoConfig
from vitrail.training.step import Learner

TINY = ViTConfig(depth=2, width=16, heads=2, mlp=32, patch=(8, 8), image_size=(16, 16), classes=0)
CONFIG = TrainConfig(
    data=DataConfig(path="x", batch_size=8),
    model=TINY,
    optim=OptimConfig(name="sgd", lr=0.1, weight_decay=0.0, clip=None),
    epochs=1,
)


def task_of() -> Moco:
    torch.manual_seed(0)
    return Moco(build(TINY), MocoConfig(hidden=24, out=8, momentum=0.5), Nothing(0), EmbedConfig())


def batch_of(step: int) -> Batch:
    torch.manual_seed(step + 10)
    views = tuple(Canvas(torch.randn(8, 3, 16, 16), None) for _ in range(2))
    return Batch(views, {}, np.arange(8))


def stepped(config: TrainConfig, steps: int = 3) -> Learner:
    learner = Learner(task_of(), config, torch.device("cpu"))
    for step in range(steps):
        learner.enter(step / steps)
        assert learner.gradients([batch_of(step)]).finite
        learner.update(0.1, step + 1, (step + 1) / steps)
    return learner


def test_the_loops_steps_are_plain_ones() -> None:
    found, task = stepped(CONFIG).task, task_of().train()
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], 0.1, 0.9)
    for step in range(3):
        optimizer.zero_grad()
        task.loss(batch_of(step)).total.backward()
        optimizer.step()
        task.after_step((step + 1) / 3)
    for name, value in task.state_dict().items():
        size = max(largest([value]), 0.1)
        close(found.state_dict()[name], value, 1e-3, size=size, msg=name)
    assert torch.equal(found.model.stem.proj.weight, task_of().model.stem.proj.weight)
    assert not torch.equal(found.projector[0].weight, found.teacher.projector[0].weight)


def test_in_bfloat16_the_copy_asks_the_teacher_of_now() -> None:
    learner = stepped(replace(CONFIG, precision="bfloat16"))
    mine, working = learner.task, learner.engine.working
    assert working is not mine
    slow = dict(mine.teacher.named_parameters())
    for name, rounded in working.teacher.named_parameters():
        assert torch.equal(rounded.float(), slow[name].to(rounded.dtype).float()), name
    # The average itself moves in float32, where a small share of a small step is not lost.
    assert all(p.dtype == torch.float32 for p in slow.values())
    before = task_of().teacher.projector[0].weight
    assert not torch.equal(slow["projector.0.weight"], before)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_teachers_norms_see_batches_although_nothing_of_it_learns(precision: str) -> None:
    learner = stepped(replace(CONFIG, precision=precision, tune=TuneConfig()))
    assert learner.task.teacher.projector[1].num_batches_tracked == 6
    assert learner.task.projector[1].num_batches_tracked == 6


def test_a_batch_is_never_cut(monkeypatch) -> None:
    """Not even where memory runs out: the loss looks across its images."""
    learner = stepped(CONFIG, 1)
    learner.enter(0.5)

    def full(batch: Batch) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(learner.task, "loss", full)
    with pytest.raises(DataError, match=r"a batch is not cut, .* batch_size=4"):
        learner.gradients([batch_of(0)])
    with pytest.raises(UsageError, match="its loss looks across the images"):
        Auto(micro_batch=True).start(replace(CONFIG, task="mocov3", augment=moco_views()[0]), 1)


def test_a_steps_weight_decay_is_the_schedules() -> None:
    optim = replace(CONFIG.optim, weight_decay=0.1, final_weight_decay=0.5)
    learner = stepped(replace(CONFIG, optim=optim))
    found = {(group["decayed"], group["weight_decay"]) for group in learner.optimizer.param_groups}
    assert found == {(True, 0.5), (False, 0.0)}  # as at the end
