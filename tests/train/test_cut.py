"""A batch that is computed in pieces: its gradients and statistics, or a word on what they are not.

By `--micro-batch`, by `--micro-batch auto`, or because memory ran out.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.families import KINDS, RESNET, VIT
from parts import labelled, named
from vitrail.data.batches.batch import Batch
from vitrail.models import build
from vitrail.planning.paper import Line, count_step
from vitrail.runs import DataConfig, TrainConfig, TuneConfig
from vitrail.tasks import Classify
from vitrail.training.engine import Engine
from vitrail.training.tune import Tuning

CONV = replace(VIT, stem="conv", position="rope")
MODELS = {name: kind.config for name, kind in KINDS.items()} | {
    "conv": CONV,
    "conv, dropping": replace(KINDS["dynamicvit"].config, stem="conv"),
    "conv, two sizes": replace(CONV, scales="hierarchical", image_size=(32, 32)),
}
APART = {"mobilevit", "resnet", "resnet, basic", "conv, two sizes"}
"""Of batch norms elsewhere than in a stem that sees the image first and alone."""


def config_of(model, **changes) -> TrainConfig:
    return TrainConfig(data=DataConfig(path="x", batch_size=10), model=model, epochs=1, **changes)


def task_of(config: TrainConfig, device: str = "cpu") -> Classify:
    torch.manual_seed(0)
    classes = config.model.classes
    with torch.device(device):
        model = build(config.model)
        for head in (model.head, getattr(model, "head_distilled", None)):
            if head is not None:
                nn.init.normal_(head.weight, std=0.2)
        names = tuple(map(str, range(classes)))
        return Classify(model, config.classify, named(*names))


def batch_of(config: TrainConfig, images: int = 10, extent: torch.Tensor | None = None) -> Batch:
    torch.manual_seed(1)
    size = (min(side, 64) for side in config.model.image_size)
    shown = torch.randn(images, config.model.channels, *size)
    targets = F.one_hot(torch.arange(images) % config.model.classes, config.model.classes)
    return labelled(shown, targets.float(), extent=extent)


def learned(config: TrainConfig, extent: torch.Tensor | None = None):
    """Gradients, running statistics, and what was said."""
    task, said = task_of(config), []
    Tuning(task, config.tune).enter(1.0)
    engine = Engine(task, config, torch.device("cpu"), notify=said.append)
    engine.enter()
    loss = engine.gradients([batch_of(config, extent=extent)], 10)
    found = {name: p.grad for name, p in task.named_parameters() if p.grad is not None}
    found |= {name: b.double() for name, b in task.named_buffers()}
    return found | {"loss": torch.tensor(loss.total)}, said


def differ(one, other) -> list[str]:
    """What is not the same, within rounding, on the scale of all gradients of the model."""
    scale = max(float(value.norm()) for name, value in one.items() if "running" not in name)
    return [
        name
        for name, value in one.items()
        if (value - other[name]).norm() > 1e-4 * value.norm() + 1e-6 * scale
    ]


@pytest.fixture(autouse=True)
def certain(monkeypatch):
    """Which patches a DynamicViT keeps is drawn, and no two passes draw the same."""

    def likeliest(logits, **options):
        return logits.softmax(-1) + (F.one_hot(logits.argmax(-1), 2) - logits.softmax(-1)).detach()

    monkeypatch.setattr(F, "gumbel_softmax", likeliest)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_that_is_cut_is_the_whole_one_or_says_what_is_not(name):
    config = config_of(replace(MODELS[name], drop_path=0.0))
    whole, silent = learned(config)
    cut, said = learned(replace(config, micro_batch=4))
    assert silent == [] and set(whole) == set(cut)
    if name in APART:
        norms = sum(isinstance(m, nn.BatchNorm2d) for m in task_of(config, "meta").modules())
        (note,) = said
        assert f"4 images of a batch are computed at once, and {norms} batch norms" in note
        assert differ(whole, cut)  # or the note would be false
    else:
        assert said == [] and differ(whole, cut) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpointing": True},
        {"tune": TuneConfig(freeze=("stem.*",))},
        {"tune": TuneConfig(freeze=("stem.convs.0.*", "head.*"))},
    ],
)
def test_what_else_a_run_does_changes_nothing_of_that(changes):
    config = config_of(CONV, **changes)
    whole, cut = learned(config)[0], learned(replace(config, micro_batch=3))[0]
    assert set(whole) == set(cut) and differ(whole, cut) == []


def test_images_of_several_sizes_too():
    rows, columns = (side // 8 for side in CONV.image_size)
    extent = torch.tensor([(1 + i % rows, 1 + i % columns) for i in range(10)])
    config = config_of(CONV)
    whole, cut = learned(config, extent)[0], learned(replace(config, micro_batch=4), extent)[0]
    assert differ(whole, cut) == []


def test_norms_that_do_not_learn_need_no_word():
    config = config_of(RESNET, tune=TuneConfig(freeze=("*norm*",)))
    (whole, _), (cut, said) = learned(config), learned(replace(config, micro_batch=4))
    assert said == [] and differ(whole, cut) == []


@pytest.mark.parametrize("model", [CONV, RESNET])
def test_memory_that_runs_out_is_told_and_moves_no_statistics_twice(model, monkeypatch):
    loss = Classify.loss

    def tight(self, batch):
        found = loss(self, batch)
        if len(batch.indices) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    whole = learned(config_of(model))[0]
    cut = learned(config_of(model, micro_batch=5))[0]
    monkeypatch.setattr(Classify, "loss", tight)
    halved, said = learned(config_of(model))
    assert differ(cut, halved) == []
    assert "not enough memory for 10 images at once" in said[0] and "--micro-batch 5" in said[0]
    if model is CONV:
        assert len(said) == 1 and differ(whole, halved) == []
    else:
        assert len(said) == 2 and "12 batch norms" in said[1]


@pytest.mark.parametrize("model", [VIT, CONV])
def test_the_memory_of_a_batch_that_is_cut_is_foreseen(model):
    config = config_of(replace(model, width=64))

    def step(images: int, at_once: int | None = None):
        task = task_of(config, "meta")
        return count_step(task, config, images, checkpointing=False, at_once=at_once)

    line = Line.through(step(8), step(16), step(16, 8))
    found = line.at(4, 64)
    assert found == pytest.approx(step(64, 4).peak, rel=0.1)
    # What the stem has made of the others is most of it, where the stem must see them all.
    assert (found > 2 * line.at(4)) == (model is CONV)
    assert line.most(found + 1, 64) == 4
    room = line.at(100, 64)
    assert line.most(room, 64) == line.most(room) in (99, 100)
