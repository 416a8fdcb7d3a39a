"""The learning-rate range test says a rate, and touches nothing."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.cli import main
from vitrail.data.batches.loader import TrainLoader
from vitrail.data.sources.source import ArraySource
from vitrail.data.views.augment import AugmentConfig
from vitrail.models import ViTConfig, build
from vitrail.planning.sweep import find_lr, suggest
from vitrail.runs import DataConfig, OptimConfig, TrainConfig, TuneConfig
from vitrail.tasks import Classify, ClassifyConfig

CONFIG = TrainConfig(
    data=DataConfig(path="arrays"),
    model=ViTConfig(
        depth=2, width=32, heads=2, mlp=64, patch=(4, 4), image_size=(16, 16), channels=1, classes=2
    ),
    augment=AugmentConfig.off(),
    epochs=1,
)


def setting(config: TrainConfig) -> tuple[Classify, TrainLoader]:
    labels = np.arange(64) % 2
    images = np.random.default_rng(0).integers(0, 60, (64, 16, 16), dtype=np.uint8)
    images[labels == 1] += 50
    source = ArraySource(images, labels, ("dark", "light"), "train")
    task = Classify(build(config.model), ClassifyConfig(), source.targets)
    return task, TrainLoader(source, config.preprocess(), config.augment, batch_size=16, seed=0)


@pytest.mark.parametrize(("name", "lowest", "highest"), [("adamw", 1e-6, 1.0), ("sgd", 1e-5, 10.0)])
def test_a_sweep_finds_a_rate_and_leaves_the_task_alone(name, lowest, highest):
    config = replace(CONFIG, optim=OptimConfig(name=name), tune=TuneConfig(lora_rank=2))
    task, loader = setting(config)
    before = {key: tensor.clone() for key, tensor in task.state_dict().items()}
    found = find_lr(task, loader, config)
    assert found.rates[0] == pytest.approx(lowest) and found.rates[-1] <= highest * 1.001
    ratios = np.diff(np.log10(found.rates))
    assert ratios == pytest.approx(ratios[0]) and len(found.losses) == len(found.rates) <= 60
    assert found.suggestion is None or lowest <= found.suggestion <= highest / 10
    assert task.state_dict().keys() == before.keys()
    assert all(torch.equal(before[key], tensor) for key, tensor in task.state_dict().items())


def test_time_bounds_it_and_the_suggestion_is_sound():
    task, loader = setting(CONFIG)
    assert len(find_lr(task, loader, CONFIG, seconds=0.0).rates) <= 20
    found = find_lr(task, loader, CONFIG)
    assert found.suggestion is not None and 1e-5 < found.suggestion < 3e-2
    assert min(found.losses) < 0.5 < found.losses[0]


def test_the_suggestion_is_a_tenth_of_where_the_loss_rises_for_good():
    rates = np.logspace(-6, 0, 61).tolist()
    noise = 0.02 * np.random.default_rng(0).standard_normal(61)
    decade = np.arange(61) / 10  # of the rate, from 1e-6
    falls_then_rises = 2.0 - np.clip(decade - 2, 0, 2) * 0.5 + np.clip(decade - 4.5, 0, None) * 2
    assert 10**-2.7 < suggest(rates, falls_then_rises + noise) < 10**-2.2
    # A probed head leaves nothing to fall: only the rise is there.
    rises = 0.5 + np.clip(decade - 3, 0, None) ** 2
    assert 10**-4.2 < suggest(rates, rises + noise) < 10**-3.4
    # A bump on the way is no rise for good; one wild batch neither.
    bump = falls_then_rises + noise
    bump[20] += 3.0
    assert 10**-2.7 < suggest(rates, bump) < 10**-2.2
    assert suggest(rates, 2.0 - decade / 10) is None
    assert suggest(rates[:3], [1.0, 2.0, 3.0]) is None


def test_the_command_prints_a_rate_and_writes_nothing(tmp_path, monkeypatch, capsys):
    labels = np.arange(24) % 2
    for i, label in enumerate(labels):
        folder = tmp_path / "data" / "ab"[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16), int(40 + 150 * label + i)).save(folder / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    no_shift = ["--augment.shift", "0"]  # a probe looks at images as they are
    options = ["--model.depth", "1", "--precision", "float32", "--find-lr", "--json"]
    assert main(["train", str(tmp_path / "data"), *options]) == 0
    out = capsys.readouterr().out.splitlines()
    found = json.loads(out[-1])
    assert found.keys() == {"lr", "losses", "suggestion"}
    assert len(found["lr"]) == len(found["losses"]) > 10
    assert out[0].split() == ["learning", "rate", "loss"] and out[-2].startswith("suggested")
    assert sorted(tmp_path.rglob("*")) == before
    assert main(["train", "data", "--find-lr", "--method", "probe", *no_shift]) == 2
    assert "no learning rate" in capsys.readouterr().err
