"""Fine-tuning: what is frozen stays bit by bit, what learns has its own rate, LoRA is exact."""

import os
import re
import signal
from dataclasses import replace

import pytest
import torch
from torch import nn

from close import close
from parts import labelled, named
from train.striped import CLASSES, pictures
from vitrail.data.batches.batch import Batch
from vitrail.data.batches.loader import EvalLoader, TrainLoader
from vitrail.data.views.augment import AugmentConfig
from vitrail.errors import UsageError
from vitrail.models import ViTConfig, build
from vitrail.nn.lora import LoraLinear, add_lora, merged_state
from vitrail.runs import DataConfig, OptimConfig, Run, TrainConfig, TuneConfig, read_checkpoint
from vitrail.runs.config import from_dict, to_dict
from vitrail.runs.load import load
from vitrail.tasks import Classify, ClassifyConfig
from vitrail.training import Interrupted, fit
from vitrail.training.optim import build_optimizer
from vitrail.training.tune import Tuning, check_tuning, layer_of, lr_warning, prepare

BLOCKS = [f"encoder.blocks.{i}" for i in range(12)]


CONFIG = TrainConfig(
    data=DataConfig(path="arrays", batch_size=8),
    model=ViTConfig(
        depth=3, width=32, heads=2, mlp=64, patch=(4, 4), image_size=(16, 16), channels=1,
        classes=3, drop_path=0.2, stem="conv",
    ),
    augment=AugmentConfig(mixup=0.2),
    optim=OptimConfig(lr=1e-3),
    epochs=2,
    evaluations=2,
)  # fmt: skip


def tuned(**fields) -> TrainConfig:
    return replace(CONFIG, tune=TuneConfig(**fields))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))


def new_task(config: TrainConfig) -> Classify:
    torch.manual_seed(config.seed)
    model = build(config.model)
    nn.init.normal_(model.head.weight, std=0.1)  # at zero nothing flows back into the backbone
    return Classify(model, ClassifyConfig(), named(*CLASSES))


def train(config: TrainConfig, run: Run, **options) -> Classify:
    task = new_task(config)
    preprocess = config.preprocess()
    batch_size, seed = config.data.batch_size, config.seed
    loader = TrainLoader(
        pictures(48, 1), preprocess, config.augment, batch_size=batch_size, seed=seed
    )
    fit(task, loader, EvalLoader(pictures(12, 2), preprocess), config, run, **options)
    return task


def batch() -> Batch:
    targets = torch.eye(3).repeat(2, 1)
    return labelled(torch.randn(6, 1, 16, 16), targets)


def moved(before: dict, after: dict) -> set[str]:
    """The names of tensors that are not what they were, bit by bit."""
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_the_rate_of_every_layer_is_that_of_beit():
    model = replace(CONFIG.model, pool="mean", position="peg")
    tuning = Tuning(new_task(replace(CONFIG, model=model)), TuneConfig(layer_decay=0.5, head_lr=3))
    rates = {name: tuning.scale(name) for name, _ in tuning.task.model.named_parameters()}
    expected = {
        "stem.proj.weight": 0.5**4,
        "prefix": 0.5**4,
        "encoder.blocks.0.norm1.weight": 0.5**3,
        "encoder.peg.conv.weight": 0.5**3,
        "encoder.blocks.2.mlp.fc2.bias": 0.5,
        "encoder.norm.weight": 1.0,
        "head.weight": 3.0,
    }
    assert {name: rates[name] for name in expected} == expected
    optimizer = build_optimizer(tuning.task.model, CONFIG.optim, tuning.scale)
    names = {id(p): name for name, p in tuning.task.model.named_parameters()}
    grouped = {names[id(p)]: g["scale"] for g in optimizer.param_groups for p in g["params"]}
    assert grouped == rates
    assert layer_of("position.table", BLOCKS) == 0 and layer_of("pool.q.weight", BLOCKS) == 13


def test_a_decayed_rate_is_what_a_step_moves_by(tmp_path):
    config = replace(
        tuned(layer_decay=0.5, head_lr=2.0),
        optim=OptimConfig(name="sgd", lr=0.1, beta1=0.0, weight_decay=0.0, clip=None, warmup=0.0,
                          schedule="constant"),
    )  # fmt: skip
    task = new_task(config)
    tuning = Tuning(task, config.tune)
    optimizer = build_optimizer(task.model, config.optim, tuning.scale)
    before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    for settings in optimizer.param_groups:
        settings["lr"] = 0.1 * settings["scale"]
    tuning.enter(0.5)
    task.loss(batch()).total.backward()
    optimizer.step()
    for name, parameter in task.model.named_parameters():
        expected = before[name] - 0.1 * tuning.scale(name) * parameter.grad
        close(parameter, expected)


def test_what_is_frozen_has_no_gradient_no_state_and_no_noise():
    config = TuneConfig(freeze=("stem.*", "prefix", "position.*", "encoder.blocks.[01].*"))
    task = new_task(CONFIG)
    tuning = Tuning(task, config)
    optimizer = build_optimizer(task.model, CONFIG.optim, tuning.scale)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(tuning.trained)
    tuning.enter(0.0)
    blocks = task.model.encoder.blocks
    assert task.training and blocks[2].training and not blocks[1].training
    assert not task.model.stem.convs[0][1].training
    needs = {}
    for i, block in enumerate(blocks):
        block.register_forward_hook(lambda m, x, y, i=i: needs.__setitem__(i, y.requires_grad))
    task.loss(batch()).total.backward()
    # Autograd has recorded nothing before the third block.
    assert needs == {0: False, 1: False, 2: True}
    without = {name for name, p in task.model.named_parameters() if p.grad is None}
    assert without == {name for name, _ in task.model.named_parameters()} - set(tuning.trained)


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_what_is_frozen_is_bit_equal_after_training(tmp_path, optimizer, ema):
    config = replace(
        tuned(last_blocks=1), ema=ema, optim=OptimConfig(name=optimizer, lr=1e-2), accumulate=2
    )
    before = new_task(config).model.state_dict()
    run = Run.create(tmp_path / "run", config)
    train(config, run)
    changed = moved(before, read_checkpoint(run.checkpoint("last")).tensors["model"])
    assert {name.split(".")[0] for name in changed} == {"encoder", "head"}
    assert {layer_of(name, BLOCKS[:3]) for name in changed} == {3, 4}


def test_no_last_block_is_the_norm_and_the_head(tmp_path):
    config = tuned(last_blocks=0)
    before = new_task(config).model.state_dict()
    after = train(config, Run.create(tmp_path / "run", config)).model.state_dict()
    assert moved(before, after) == {
        *("encoder.norm.weight", "encoder.norm.bias", "head.weight", "head.bias")
    }


def test_while_the_head_warms_up_the_backbone_stays(tmp_path):
    config = replace(tuned(head_warmup=0.5), epochs=4, evaluations=4, ema=0.9)  # 24 steps
    config = replace(config, keep_checkpoints=9)
    before = new_task(config).model.state_dict()
    run = Run.create(tmp_path / "run", config)
    train(config, run)
    seen = {}
    for step in (6, 18):
        tensors = read_checkpoint(run.checkpoint(f"step-{step}")).tensors
        seen[step] = {key: moved(before, tensors[key]) for key in ("model", "weights")}
    assert seen[6]["model"] == seen[6]["weights"] == {"head.weight", "head.bias"}
    assert "stem.proj.weight" in seen[18]["weights"] and "encoder.norm.bias" in seen[18]["model"]
    rates = [event["lr"] for event in run.metrics() if "lr" in event]
    # Two schedules, each from its own warm-up down to its end.
    assert rates[10] < 0.1 * max(rates[:11]) and rates[-1] < 0.1 * max(rates[12:])
    assert max(rates[:11]) > 0.9e-3 and max(rates[12:]) > 0.9e-3


def test_lora_starts_as_the_base_and_merges_into_it(randomised):
    base = randomised(build(CONFIG.model))
    model = randomised(build(CONFIG.model))
    model.load_state_dict(base.state_dict())
    x = torch.randn(4, 1, 16, 16)
    prepare(model, TuneConfig(lora_rank=2, lora_alpha=6.0, lora_targets=("qkv", "fc2")))
    assert torch.equal(model(x), base(x))
    assert not moved(base.state_dict(), merged_state(model))
    layer = model.encoder.blocks[1].attn.qkv
    assert isinstance(layer, LoraLinear) and layer.lora_up.count_nonzero() == 0
    for module in model.modules():
        if isinstance(module, LoraLinear):
            nn.init.normal_(module.lora_up, std=0.1)
    # y = W x + b + (alpha / r) B A x, written out
    row = torch.randn(5, 32)
    expected = row @ layer.weight.T + layer.bias + 3 * row @ layer.lora_down.T @ layer.lora_up.T
    close(layer(row), expected)
    merged = build(CONFIG.model).eval()
    merged.load_state_dict(merged_state(model))
    assert not torch.allclose(model(x), base(x), atol=1e-2)
    close(merged(x), model(x))


def test_lora_keeps_the_names_and_learns_nothing_but_itself_and_the_head():
    model = build(CONFIG.model)
    plain = set(model.state_dict())
    prepare(model, TuneConfig(lora_rank=2, freeze=("encoder.blocks.0.*",)))
    extra = set(model.state_dict()) - plain
    assert plain < set(model.state_dict())
    assert extra == {
        f"encoder.blocks.{i}.attn.{layer}.lora_{way}"
        for i in (1, 2) for layer in ("qkv", "proj") for way in ("down", "up")
    }  # fmt: skip
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == extra | {"head.weight", "head.bias"}


@pytest.mark.parametrize("ema", [0.0, 0.8])
def test_a_run_with_lora_leaves_a_plain_checkpoint(tmp_path, ema):
    config = replace(tuned(lora_rank=2), ema=ema, precision="bfloat16", optim=OptimConfig(lr=1e-2))
    before = new_task(config).model.state_dict()
    run = Run.create(tmp_path / "run", config)
    task = train(config, run)
    tensors = read_checkpoint(run.checkpoint("last")).tensors
    assert moved(before, tensors["model"]) == {
        *("head.weight", "head.bias"),
        *(f"encoder.blocks.{i}.attn.{n}.weight" for i in range(3) for n in ("qkv", "proj")),
    }
    loaded = load(run).model
    if not ema:
        x = batch().images
        close(loaded(x), task.model.eval()(x))


def test_a_layer_without_bias_and_a_base_in_place():
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    base = model[0]
    down, up = add_lora(model, ["0"], rank=1, alpha=1.0)
    assert model[0].weight is base.weight and model[0].bias is None
    assert down.shape == (1, 4) and up.shape == (3, 1)
    assert set(merged_state(model)) == {"0.weight"}


RESUMED = {
    "lora and ema": replace(tuned(lora_rank=2, head_lr=2.0), ema=0.9),
    "lora": tuned(lora_rank=2),
    "head warm-up": replace(tuned(head_warmup=0.5, layer_decay=0.7), ema=0.9),
    "lora, warm-up, ema": replace(tuned(lora_rank=1, head_warmup=0.5), ema=0.9),
    "frozen, sgd": replace(
        tuned(freeze=("stem.*",), layer_decay=0.8),
        optim=OptimConfig(name="sgd", lr=1e-2, weight_decay=0.0),
    ),
    "probed head": tuned(head_init="probe"),
}


@pytest.mark.parametrize(
    ("kind", "stop_at"),
    [
        *((kind, 8 if "warm-up" in kind else 2) for kind in RESUMED),
        *(
            pytest.param(kind, 2 if "warm-up" in kind else 8, marks=pytest.mark.slow)
            for kind in RESUMED
        ),
    ],
)
def test_a_run_that_was_stopped_goes_on_as_if_nothing_had_happened(tmp_path, kind, stop_at):
    config = RESUMED[kind]
    whole = Run.create(tmp_path / "whole", config)
    train(config, whole)

    def stop(event):
        if event.get("step") == stop_at and "loss" in event:
            os.kill(os.getpid(), signal.SIGTERM)

    parts = Run.create(tmp_path / "parts", config)
    with pytest.raises(Interrupted):
        train(config, parts, listen=stop)
    train(config, parts, resume=True)
    losses = [[e["loss"] for e in run.metrics() if "loss" in e] for run in (whole, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 12
    expected, found = (read_checkpoint(run.checkpoint("last")).tensors for run in (whole, parts))
    assert expected.keys() == found.keys()
    for part in expected:
        assert expected[part].keys() == found[part].keys()
        assert not moved(expected[part], found[part]), part


def test_the_papers_sgd_is_sayable(tmp_path):
    # ViT, arXiv 2010.11929, appendix B.1.1
    optim = OptimConfig(name="sgd", lr=0.03, beta1=0.9, weight_decay=0.0, clip=1.0, final_lr=0.0)
    optimizer = build_optimizer(build(CONFIG.model), optim)
    assert isinstance(optimizer, torch.optim.SGD)
    assert {(g["momentum"], g["weight_decay"]) for g in optimizer.param_groups} == {(0.9, 0.0)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"freeze": ("stm.*",)}, r"'stm\.\*': did you mean 'stem\.\*'\?.*encoder\.\*.*prefix"),
        ({"freeze": ("*",)}, "freezes every parameter"),
        ({"freeze": ("head.*",), "head_warmup": 0.1}, "needs a head that learns"),
        ({"last_blocks": 4}, "last_blocks is 4, but the model has 3 blocks"),
        ({"lora_rank": 2, "lora_targets": ("qvk",)}, "'qvk': did you mean 'qkv'"),
    ],
)
def test_what_the_model_has_not_is_refused(fields, message):
    with pytest.raises(UsageError, match=message):
        config = tuned(**fields)
        check_tuning(config, build(config.model))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_decay": 0.0}, "layer_decay must be above 0"),
        ({"layer_decay": 1.1}, r"layer_decay must be in \(0, 1\], not 1.1"),
        ({"head_lr": float("nan")}, "head_lr must be above 0"),
        ({"head_warmup": 1.0}, r"head_warmup must be in \[0, 1\)"),
        ({"last_blocks": -1}, "last_blocks cannot be negative"),
        ({"lora_rank": -2}, "lora_rank cannot be negative"),
        ({"lora_rank": 2, "lora_targets": ()}, "lora_targets is empty"),
        ({"lora_rank": 2, "lora_alpha": 0.0}, "lora_alpha must be above 0"),
    ],
)
def test_values_out_of_range_are_refused(fields, message):
    with pytest.raises(UsageError, match=message):
        TuneConfig(**fields)


def test_it_is_one_value_in_a_file():
    config = tuned(freeze=("stem.*",), last_blocks=2, lora_rank=4, head_init="probe")
    assert from_dict(to_dict(config), "x") == config
    with pytest.raises(UsageError, match=re.escape("tune: tune.layer_decay must be in (0, 1]")):
        from_dict(to_dict(CONFIG) | {"tune": {"layer_decay": 2}}, "x")


def test_a_rate_that_ruins_weights_is_told():
    assert "5e-05" not in (lr_warning(replace(CONFIG, optim=OptimConfig(lr=3e-3))) or "5e-05")
    assert lr_warning(replace(CONFIG, optim=OptimConfig(lr=1e-3))) is None
    assert lr_warning(replace(CONFIG, optim=OptimConfig(name="sgd", lr=0.03))) is None
