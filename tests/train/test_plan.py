import json
import math
import mmap
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parts import labelled, named
from vitrail import cli
from vitrail.cli.plan import show_plan
from vitrail.data import Splits
from vitrail.data.batches.batch import Batch
from vitrail.data.batches.loader import EvalLoader, TrainLoader
from vitrail.data.sources.source import ArraySource
from vitrail.data.views.augment import AugmentConfig
from vitrail.data.views.mix import share_unit
from vitrail.errors import DataError, UsageError
from vitrail.models import ViTConfig, build, model_config
from vitrail.planning.auto import Auto, choose
from vitrail.planning.cluster import Cluster, layouts, share_out
from vitrail.planning.paper import (
    Held,
    Line,
    Sizes,
    Tally,
    count_sizes,
    count_step,
    held_by,
    teacher_on_paper,
    tensors_of,
)
from vitrail.planning.plan import Plan, Room, make_plan, run_time
from vitrail.planning.tryout import Makers, Meter, Tryout
from vitrail.runs import DataConfig, OptimConfig, Run, TrainConfig, TuneConfig
from vitrail.tasks import Classify, ClassifyConfig, Distill, DistillConfig, Teacher
from vitrail.training import fit
from vitrail.training.average import Average
from vitrail.training.engine import Engine
from vitrail.training.optim import build_optimizer
from vitrail.training.tune import Tuning

CPU = torch.device("cpu")
CLASSES = ("dark", "light", "striped")
SMALL = ViTConfig(
    depth=2, width=64, heads=2, mlp=128, patch=(4, 4), image_size=(16, 16), channels=1, classes=3,
)  # fmt: skip
CONFIG = TrainConfig(
    data=DataConfig(path="arrays", batch_size=8), model=SMALL, optim=OptimConfig(), epochs=20,
    ema=0.9,
)  # fmt: skip
AMPLE = Room(memory=2**40, device=None, disk=2**40)


def task_of(config: TrainConfig, device: str = "cpu") -> Classify:
    names = tuple(map(str, range(config.model.classes)))
    with torch.device(device):
        return Classify(build(config.model), config.classify, named(*names))


def pictures(labels: np.ndarray) -> ArraySource:
    images = np.random.default_rng(0).integers(0, 255, (len(labels), 16, 16), dtype=np.uint8)
    return ArraySource(images, labels, CLASSES, "train")


def splits(train: int = 48, val: int = 12) -> Splits:
    return Splits(pictures(np.arange(train) % 3), pictures(np.arange(val) % 3), None, ())


def makers(config: TrainConfig, parts: Splits) -> Makers:
    def train(batch: int) -> TrainLoader:
        preprocess = config.train_preprocess()
        return TrainLoader(parts.train, preprocess, config.augment, batch_size=batch, seed=0)

    def val(source, batch: int) -> EvalLoader:
        return EvalLoader(source, config.preprocess(), batch_size=batch)

    return Makers(lambda: task_of(config, "meta"), lambda: task_of(config), train, val)


def write_data(path: Path, side: int) -> Path:
    np.savez(
        path,
        train_images=np.random.default_rng(0).integers(0, 255, (40, side, side), dtype=np.uint8),
        train_labels=np.arange(40) % 2,
        val_images=np.zeros((8, side, side), np.uint8),
        val_labels=np.arange(8) % 2,
    )
    return path


def plan_of(config: TrainConfig, parts: Splits, room: Room = AMPLE, **options) -> Plan:
    cluster = options.pop("cluster", Cluster())
    return make_plan(
        config, parts, makers(config, parts), CPU, room, cluster, seconds=0.1, **options
    )


def nbytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


# --- Sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["adamw", "sgd", "muon", "lamb", "adafactor"])
def test_sizes_are_those_of_a_real_run_after_a_step(name, state):
    config = replace(CONFIG, optim=OptimConfig(name=name, state=state), precision="bfloat16")
    held = count_sizes(task_of(config, "meta"), config).held
    task = task_of(config)
    tuning = Tuning(task, config.tune)
    engine = Engine(task, config, CPU)
    optimizer = build_optimizer(task.model, config.optim, tuning.scale)
    average = Average(task, config.ema)
    tuning.enter(1.0)
    engine.enter()
    engine.gradients([labelled(torch.randn(2, 1, 16, 16), torch.eye(3)[:2])], 2)
    optimizer.step()
    states = [v for each in optimizer.state.values() for v in each.values()]
    assert held == Held(
        weights=nbytes([*task.parameters(), *task.buffers()]),
        copy=nbytes(engine.working.parameters()),
        gradients=nbytes(p.grad for p in task.parameters()),
        copy_gradients=nbytes(engine.working.parameters()),
        optimizer=nbytes(states),
        average=nbytes(average.values.values()),
        teacher=0,
    )


def test_only_what_learns_has_gradients_and_states():
    whole = count_sizes(task_of(CONFIG, "meta"), CONFIG)
    config = replace(CONFIG, tune=TuneConfig(last_blocks=0))
    head = count_sizes(task_of(config, "meta"), config)
    assert head.parameters == whole.parameters
    assert head.learning == 2 * SMALL.width + SMALL.width * 3 + 3  # the last norm, the head
    assert head.held.gradients == 4 * head.learning
    assert head.held.weights == whole.held.weights
    assert whole.held.optimizer == 8 * whole.parameters + 4 * 32  # a count for each tensor


def test_a_teacher_is_held_and_its_own_weights_stay_where_they_are():
    teacher = Teacher(build(SMALL), CONFIG.preprocess(), CONFIG.preprocess())
    with torch.device("meta"):
        shadow = teacher_on_paper(teacher)
        task = Distill(
            build(SMALL), ClassifyConfig(), named(*CLASSES), shadow,
            DistillConfig(teacher="x"),
        )  # fmt: skip
    sizes = count_sizes(task, CONFIG)
    assert sizes.held.teacher == nbytes(teacher.model.parameters())
    alone = count_step(task_of(CONFIG, "meta"), CONFIG, 4, checkpointing=False)
    taught = count_step(task, CONFIG, 4, checkpointing=False)
    # A teacher has a forward pass, and leaves nothing for a backward pass but its logits.
    assert taught.forward_flops == 2 * alone.forward_flops
    assert taught.flops - alone.flops == alone.forward_flops
    assert taught.saved < 1.05 * alone.saved
    assert all(p.device == CPU for p in teacher.model.parameters())


@pytest.mark.parametrize("lora, ema", [(0, 0.0), (0, 0.9), (2, 0.0), (2, 0.9)])
def test_the_size_of_a_checkpoint_is_that_of_one(tmp_path, lora, ema):
    config = replace(CONFIG, epochs=0.1, ema=ema, tune=TuneConfig(lora_rank=lora))
    parts, run = splits(), Run.create(tmp_path / "run", config)
    made = makers(config, parts)
    fit(made.task(), made.train(8), made.val(parts.val, 12), config, run)
    files = run.checkpoint("last").iterdir()
    real = sum(file.stat().st_size for file in files if file.suffix == ".safetensors")
    assert count_sizes(made.on_paper(), config).checkpoint == pytest.approx(real, rel=0.03)


# --- One step ------------------------------------------------------------------------------------


def saved_for_backward(task: Classify, batch: Batch) -> int:
    """What autograd keeps, each storage once, without what was there before."""
    before = [*task.parameters(), *task.buffers(), *tensors_of(batch)]
    known = {each.untyped_storage()._cdata for each in before}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = task.loss(batch).total
    assert loss.requires_grad  # the graph lives, and with it all that it keeps
    return sum(kept.values())


def batch_of(images: int) -> Batch:
    return labelled(torch.randn(images, 1, 16, 16), torch.ones(images, 3) / 3)


def test_a_tally_counts_what_autograd_keeps():
    task = task_of(CONFIG).train()
    batch = batch_of(4)
    with Tally([*task.parameters(), *task.buffers(), *tensors_of(batch)]) as tally:
        loss = task.loss(batch).total
    # Within a hundredth: the loss itself, and what its own function keeps beside the tensors.
    assert tally.now == pytest.approx(saved_for_backward(task, batch), rel=0.01)
    assert loss.requires_grad
    del loss
    assert tally.now == 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_few_images_tell_what_many_take(precision, checkpointing):
    config = replace(CONFIG, precision=precision)
    few, twice, many = (
        count_step(task_of(config, "meta"), config, n, checkpointing=checkpointing)
        for n in (4, 8, 64)
    )
    # Within a twentieth: of few images gradients on their way are as large as activations.
    assert Line.through(few, twice).at(64) == pytest.approx(many.peak, rel=0.05)
    assert many.saved <= many.peak


def test_on_paper_a_step_keeps_what_a_real_one_does():
    # In float32 a CPU's fused attention keeps the same tensors as a GPU's.
    config = replace(CONFIG, model=replace(SMALL, width=128, heads=2))
    real = saved_for_backward(task_of(config).train(), batch_of(4))
    paper = count_step(task_of(config, "meta"), config, 4, checkpointing=False)
    assert paper.saved == pytest.approx(real, rel=0.05)


def test_a_real_step_takes_what_is_counted_on_paper():
    config = replace(CONFIG, model=replace(SMALL, width=128, heads=2))
    task = task_of(config)
    Tuning(task, config.tune).enter(1.0)
    engine = Engine(task, config, CPU)
    engine.enter()
    held, batch = held_by(engine), batch_of(16)
    with Tally([*held, *tensors_of(batch)]) as tally:
        engine.gradients([batch], 16)
    paper = count_step(task_of(config, "meta"), config, 16, checkpointing=False)
    assert tally.peak == pytest.approx(paper.peak, rel=0.05)


def test_where_images_change_their_size_the_largest_are_counted():
    told: list[str] = []
    changing = replace(CONFIG, data=replace(CONFIG.data, multiscale=(0.5, 1.5)))
    whole = replace(CONFIG, data=replace(CONFIG.data, train_size=(24, 24)))
    counted, expected = (
        count_step(task_of(config, "meta"), config, 8, checkpointing=False)
        for config in (changing, whole)
    )
    assert counted == expected
    plan = plan_of(changing, splits(), notify=told.append)
    assert any("the largest, 24x24, so the run takes less" in sentence for sentence in told)
    assert plan.tryout is not None
    tried, fixed = plan.tryout.activations, plan_of(whole, splits()).tryout
    assert fixed is not None and tried.each == pytest.approx(fixed.activations.each, rel=0.05)


def test_flops_of_a_vit_are_the_published_ones():
    config = TrainConfig(data=DataConfig(path="x"), model=model_config("vit_b16"), epochs=1)
    plain, again = (
        count_step(task_of(config, "meta"), config, 2, checkpointing=each) for each in (False, True)
    )
    assert plain.forward_flops == 2 * 2 * 17_563_828_224
    assert plain.flops / plain.forward_flops == pytest.approx(3, rel=0.01)
    # The last product of a block is not computed again: nothing of its backward pass needs it.
    blocks = 12 * 197 * (4 * 768**2 + 768 * 3072) + 12 * 2 * 197**2 * 768
    assert again.flops - plain.flops == 2 * 2 * blocks


def test_a_depthwise_convolution_counts_each_channel_by_itself():
    conv = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8, device="meta")
    x = torch.empty(1, 8, 10, 10, device="meta", requires_grad=True)
    with Tally([x, *conv.parameters()]) as tally:
        conv(x).sum().backward()
    assert tally.flops == 3 * 2 * 8 * 100 * 9


# --- On a cluster --------------------------------------------------------------------------------


def test_vit_b16_on_eight_gpus_by_hand():
    config = TrainConfig(
        data=DataConfig(path="x", batch_size=4096), model=model_config("vit_b16"), epochs=300,
        precision="bfloat16", ema=0.9999,
    )  # fmt: skip
    sizes = count_sizes(task_of(config, "meta"), config)
    p = 86_567_656
    assert sizes.parameters == sizes.learning == p
    # qkv, projection and the two layers of the MLP, their biases, two norms.
    assert sizes.largest_block == 12 * 768**2 + (3 + 1 + 4 + 1) * 768 + 4 * 768 == 7_087_872
    assert sizes.outside_blocks == p - 12 * 7_087_872
    cluster = Cluster(gpus=8, memory=80, tflops=1000, utilisation=0.5, price=2)
    load = share_out(config, cluster, 1_281_167)
    assert (load.batch, load.each, load.at_once) == (4096, 512, 512)
    assert load.steps == 312 * 300  # 312 whole batches an epoch
    assert load.images == 383_385_600
    line = {False: Line(0, 60e6), True: Line(1e9, 10e6)}
    ddp, ddp_again, fsdp, fsdp_again = layouts(
        sizes, line, {False: 1e11, True: 1.25e11}, load, cluster, half=True
    )
    classes = 4 * 1000  # the classes' weights in the loss
    # 4 weights, 2 copy, 4 and 2 gradients, 8 AdamW (and its count, of 152 tensors), 4 average, and
    # 2 that DDP exchanges.
    assert ddp.memory == 26 * p + classes + 4 * 152 + 512 * 60e6
    assert ddp_again.memory == 26 * p + classes + 4 * 152 + 1e9 + 512 * 10e6
    shared = (20 * p + classes + 4 * 152) / 8
    gathered = 2 * (1_513_192 + 2 * 7_087_872) + 6 * 7_087_872
    assert fsdp.memory == shared + gathered + 512 * 60e6
    assert all(each.fits for each in (ddp, ddp_again, fsdp, fsdp_again))
    assert ddp.most_at_once == int((72e9 - (ddp.memory - 512 * 60e6)) // 60e6)
    # 8 GPUs x 10^15 x 0.5 / 10^11
    assert ddp.images_per_second == fsdp.images_per_second == 40_000
    assert ddp.hours == 383_385_600 / 40_000 / 3600
    assert fsdp_again.hours == 1.25 * ddp.hours
    assert ddp.cost == 2 * ddp.gpu_hours == 2 * 8 * ddp.hours


def test_zero_s_table_of_seven_and_a_half_billion_parameters():
    # arXiv 1910.02054, figure 1: 16 bytes a parameter of model states, divided by 64 GPUs: 1.9 GB.
    p = 7_500_000_000
    held = Held(4 * p, 2 * p, 4 * p, 2 * p, 8 * p, 0, 0)
    sizes = Sizes(p, p, 0, 0, held, 0)
    cluster = Cluster(gpus=64)
    load = share_out(replace(CONFIG, data=DataConfig(path="x", batch_size=64)), cluster, 64)
    nothing = {again: Line(0, 1) for again in (False, True)}
    flops = {again: 1.0 for again in (False, True)}
    *_, fsdp = layouts(sizes, nothing, flops, load, cluster, half=True)
    assert fsdp.memory / 1e9 == pytest.approx(1.9, abs=0.03)


def test_one_gpu_has_nothing_to_divide():
    sizes = count_sizes(task_of(CONFIG, "meta"), CONFIG)
    config = replace(CONFIG, epochs=None, minutes=30)
    load = share_out(config, Cluster(), 48)
    line = {again: Line(0, 1000) for again in (False, True)}
    flops = {again: 1e12 for again in (False, True)}
    ways = layouts(sizes, line, flops, load, Cluster(memory=1e-3), half=False)
    assert [(way.parallel, way.checkpointing) for way in ways] == [
        ("alone", False),
        ("alone", True),
    ]
    assert ways[0].memory == sizes.held.alone + 8000
    assert ways[0].hours == 0.5 and ways[0].cost is None
    # 989 TFLOP/s at 0.4 for half an hour
    assert ways[0].images == pytest.approx(989 * 0.4 * 1800)
    assert [way.fits for way in ways] == [sizes.held.alone + 8000 <= 0.9e6] * 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"gpus": 0}, {"gpus": -8}, {"utilisation": 0}, {"utilisation": 2},
        {"utilisation": math.nan}, {"price": -1}, {"price": math.nan}, {"memory": 0},
        {"tflops": math.inf}, {"images": 0},
    ],
)  # fmt: skip
def test_an_impossible_cluster_is_refused(wrong):
    with pytest.raises(UsageError, match=f"cluster.{next(iter(wrong))}"):
        Cluster(**wrong)


@pytest.mark.parametrize(
    "batch, images, gpus, mixup, mend",
    [
        (64, 1000, 3, 0.0, "data.batch_size to 63 or 66$"),
        (64, 1000, 64, 0.8, "data.batch_size to 128$"),  # pairs
        (8, 1000, 64, 0.0, "data.batch_size to 64$"),
        (8, 10, 64, 0.0, "take fewer processes"),
    ],
)
def test_a_batch_that_gpus_cannot_share_is_refused(batch, images, gpus, mixup, mend):
    config = replace(
        CONFIG, data=DataConfig(path="x", batch_size=batch), augment=AugmentConfig(mixup=mixup)
    )
    with pytest.raises(UsageError, match=mend):
        share_out(config, Cluster(gpus=gpus), images)


# --- The whole plan ------------------------------------------------------------------------------


def test_times_by_hand():
    config = replace(CONFIG, accumulate=2, epochs=3, evaluations=4)
    tried = Tryout(
        images=4, read=0.02, read_again=0.01, warm=5.0, compute=0.1, update=0.4, judge=0.05,
        judge_read=0.03, judge_read_again=0.0, rate=1e9, activations=Line(0, 1), estimated=1,
        measured=None,
    )  # fmt: skip
    parts = splits(train=50, val=10)
    time = run_time(config, parts, tried, CPU, 1e7, cached=(1.0, 1.0))
    assert time.steps_per_epoch == 3 and time.steps == 9  # 6 batches of 8, two a step
    assert time.step == pytest.approx(16 * (0.02 + 0.1) + 0.4)
    assert time.data == pytest.approx(16 * 0.02)
    assert time.later_step == pytest.approx(16 * (0.01 + 0.1) + 0.4)
    assert time.training == pytest.approx(5 + 3 * time.step + 6 * time.later_step)
    # Four times for the log, once for the report; read for the first of both.
    assert time.evaluation == pytest.approx(10 * (5 * 0.05 + 2 * 0.03))
    assert time.share_of_peak == pytest.approx(16 * 1e7 / 2.0 / 1e9)
    none_kept = run_time(config, parts, tried, CPU, 1e7, cached=(0.0, 0.0))
    assert none_kept.training == pytest.approx(5 + 9 * time.step)
    minutes = run_time(
        replace(config, epochs=None, minutes=1), parts, tried, CPU, 1e7, cached=(1.0, 1.0)
    )
    assert minutes.steps == 3 + math.ceil((55 - 3 * time.step) / time.later_step)
    both = run_time(replace(config, minutes=1), parts, tried, CPU, 1e7, cached=(1.0, 1.0))
    assert both.steps == 9


def test_a_run_without_problems_has_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    plan = plan_of(CONFIG, splits())
    # How long a step waits for images is measured, and another thing on a machine with other work.
    assert [each for each in plan.problems if "waiting for images" not in each.text] == []
    assert plan.time is not None and plan.tryout is not None
    assert plan.time.steps == 120
    assert plan.disk.kept == CONFIG.keep_checkpoints + 2
    shown = show_plan(plan)
    assert json.loads(json.dumps(shown))["plan"]["time"]["steps"] == 120
    assert "120 steps" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_step_of_the_run_is_tried_as_it_is_configured(precision):
    config = replace(
        CONFIG, precision=precision, checkpointing=True, accumulate=2, micro_batch=3,
        tune=TuneConfig(lora_rank=2, head_warmup=0.1), optim=OptimConfig(name="muon"),
        augment=AugmentConfig(policy="randaugment", mixup=0.5),
    )  # fmt: skip
    if precision == "bfloat16":
        config = replace(config, tune=TuneConfig())
    else:
        config = replace(config, optim=OptimConfig())
    plan = plan_of(config, splits())
    assert plan.tryout is not None and plan.memory.at_once == 3


def problems_of(config: TrainConfig, parts: Splits, room: Room = AMPLE, **options) -> str:
    found = plan_of(config, parts, room, **options).problems
    return "\n".join(f"{each.level} {each.text} -> {each.mend}" for each in found)


def test_what_would_go_wrong_is_said_with_the_flag_that_mends_it():
    batch = DataConfig(path="x", batch_size=64)
    labels = np.array([0] * 30 + [1] * 17 + [2])
    parts = Splits(pictures(labels), pictures(np.array([0, 1] * 6)), None, ())
    config, cluster = replace(CONFIG, data=batch, epochs=0.7), Cluster(memory=1e-6)
    said = problems_of(config, parts, replace_room(disk=1000), cluster=cluster)
    for text in (
        "only 1 step:",
        "--epochs 100 or --data.batch-size 8",
        "64 is more than the 48 training images",
        "--data.batch-size 6",
        "of disk",
        "--out on another disk",
        "one training image of 1 class: striped",
        "no held-out image, by which it would be judged, of 1 class",
        "no layout fits",
    ):
        assert text in said
    assert "not every image" in problems_of(replace(CONFIG, epochs=0.7), splits())


def replace_room(**changes) -> Room:
    return AMPLE._replace(**changes)


def test_memory_that_does_not_suffice_is_said_before_it_is_needed():
    needed = plan_of(CONFIG, splits()).memory
    few = plan_of(CONFIG, splits(), replace_room(memory=10_000))
    assert few.tryout is None and few.time is None  # not even tried
    assert "no room for a single image" in few.problems[0].text
    assert "--checkpointing True" in few.problems[0].mend
    json.dumps(few.to_dict())
    show_plan(few)
    # Room for all but half of the activations.
    room = replace_room(memory=round((needed.needed - needed.activations / 2) / 0.9))
    less = plan_of(CONFIG, splits(), room)
    assert less.memory.most_at_once is not None
    if less.memory.most_at_once:
        assert f"--micro-batch {less.memory.most_at_once}" in less.problems[0].mend


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["False", "True"])
def test_memory_is_foreseen_as_it_is_measured(tmp_path, checkpointing):
    # In a process of its own: what another test has freed could be taken again.
    data = write_data(tmp_path / "d.npz", side=64)
    asked = f"train {data} --plan --json --model vit_s16 --model.image-size 224 224 --epochs 1"
    asked += f" --data.batch-size 8 --precision float32 --checkpointing {checkpointing}"
    done = subprocess.run(
        [sys.executable, "-m", "vitrail", *asked.split()],
        capture_output=True,
        text=True,
        check=True,
    )
    tried = json.loads(done.stdout.splitlines()[-1])["plan"]["tryout"]
    # Libraries have memory of their own, and not all gradients are there with all activations.
    assert abs(tried["error"]) < 0.2


def test_what_takes_no_steps_has_no_plan():
    with pytest.raises(UsageError, match="takes no steps"):
        plan_of(replace(CONFIG, method="probe", augment=AugmentConfig.off()), splits())
    with pytest.raises(UsageError, match="set accumulate 6"):
        plan_of(replace(CONFIG, accumulate=7), splits())


@pytest.mark.skipif(not Meter(CPU).works, reason="the system does not tell its peak")
def test_memory_is_measured():
    size = 64 * 2**20
    meter = Meter(CPU)
    with mmap.mmap(-1, size) as there:
        for start in range(0, size, mmap.PAGESIZE):
            there[start] = 1
    grown = meter.grown()
    assert grown is not None and 0.9 * size < grown < 1.5 * size


def test_the_command_plans_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "d.npz", side=16)
    asked = ["train", "d.npz", "--epochs", "2", "--data.batch-size", "8", "--model.depth", "1"]
    asked += ["--plan", "--json"]
    assert cli.main([*asked, "--cluster.gpus", "4", "--cluster.price", "2"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])["plan"]
    assert {way["parallel"] for way in said["layouts"]} == {"ddp", "fsdp"}
    assert [path.name for path in tmp_path.iterdir()] == ["d.npz"]
    assert cli.main([*asked, "--cluster.gpus", "3"]) == 2
    assert cli.main([*asked, "--cluster.gpus", "0"]) == 2
    assert cli.main(["train", "d.npz", "--cluster.gpus", "4"]) == 2


# --- auto ----------------------------------------------------------------------------------------


def auto_of(config: TrainConfig, parts: Splits, memory: int | None, auto: Auto) -> TrainConfig:
    room = Room(memory=memory, device=None, disk=2**40)
    made = makers(config, parts)
    return make_plan(
        config, parts, made, CPU, room, Cluster(), auto=auto, seconds=0.1
    ).config  # fmt: skip


BATCH, AT_ONCE = Auto(batch_size=True), Auto(micro_batch=True)


def test_the_largest_batch_that_fits_is_taken():
    parts, config = splits(train=600), replace(CONFIG, model=replace(SMALL, depth=1))
    ample = auto_of(config, parts, 2**40, BATCH)
    assert ample.data.batch_size == 64  # more would be no faster
    few = auto_of(config, splits(train=160), 2**40, BATCH)
    assert few.data.batch_size == 16  # an epoch keeps its eight steps
    # What one image takes on top of all that is there anyway, as the plan itself says it.
    one, other = (
        plan_of(replace(config, data=replace(config.data, batch_size=n)), parts).memory
        for n in (16, 32)
    )
    between = round((one.needed + other.needed) / 2 / 0.9)
    tight = auto_of(config, parts, between, BATCH)
    assert tight.data.batch_size == 16 and tight.micro_batch is None
    whole = replace(config, data=replace(config.data, batch_size=32))
    pieces = auto_of(whole, parts, between, AT_ONCE)
    assert pieces.data.batch_size == 32 and pieces.micro_batch == 16


def test_where_not_even_one_image_fits_that_is_said():
    with pytest.raises(DataError, match=r"1 would take .* checkpointing=True"):
        auto_of(CONFIG, splits(), 10_000, BATCH)
    with pytest.raises(DataError, match="how much memory is free on cpu"):
        auto_of(CONFIG, splits(), None, BATCH)


@settings(deadline=None)
@given(
    room=st.integers(1, 4000),
    images=st.integers(1, 3000),
    devices=st.integers(1, 6),
    accumulate=st.integers(1, 4),
    mixes=st.booleans(),
)
def test_a_batch_can_be_shared_fits_and_no_larger_one_would(
    room, images, devices, accumulate, mixes
):
    augment = AugmentConfig(mixup=0.5 if mixes else 0.0)
    config = replace(CONFIG, devices=devices, accumulate=accumulate, augment=augment)
    unit = share_unit(augment, devices)

    def needed(config: TrainConfig) -> int:  # 10 bytes an image, and 100 in any case
        batch = config.data.batch_size // devices
        return 100 + 10 * min(config.micro_batch or batch, batch)

    try:
        chosen, notes = choose(
            Auto(True, True), config, needed, room, images=images, unit=unit, device="cpu"
        )
    except DataError:
        assert needed(replace(config, data=replace(config.data, batch_size=unit))) > room
        return
    batch = chosen.data.batch_size
    assert batch % unit == 0 and (batch // unit).bit_count() == 1
    assert batch <= max(unit, min(images, 64 * devices)) and needed(chosen) <= room
    assert chosen.micro_batch == min(batch, images) // devices or batch > images
    assert len(notes) == 2
    more = replace(chosen, data=replace(chosen.data, batch_size=2 * batch), micro_batch=None)
    enough = min(64 * devices, images, max(4, images // 8 // accumulate))
    assert 2 * batch > enough or needed(more) > room


def test_a_run_writes_the_numbers_that_it_found_and_is_the_run_with_them(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "d.npz", side=16)
    (tmp_path / "auto.yaml").write_text("batch_size: auto\n")
    asked = ["train", "d.npz", "--epochs", "1", "--evaluations", "1", "--config", "auto.yaml"]
    asked += ["--model.depth", "1", "--model.width", "32", "--model.heads", "2"]
    assert cli.main([*asked, "--micro_batch=auto", "--out", "found"]) == 0
    assert "batch size 4 (auto)" in capsys.readouterr().err
    config = Run("found").config()
    assert (config.data.batch_size, config.micro_batch) == (4, 4)
    given = ["--data.batch-size", "4", "--micro-batch", "4"]
    assert cli.main([*asked, *given, "--out", "given"]) == 0
    assert "auto" not in capsys.readouterr().err
    last, other = (
        Run(name).checkpoint("last") / "model.safetensors" for name in ("found", "given")
    )
    assert last.read_bytes() == other.read_bytes()
    assert cli.main(["train", "--resume", "found", "--micro-batch", "auto"]) == 2
    assert "leave out auto" in capsys.readouterr().err
    assert cli.main(["train", "d.npz", "--data.batch-size", "autos"]) == 2
    assert cli.main([*asked, "--plan", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out.splitlines()[-1])["plan"]
    assert (planned["batch_size"], planned["micro_batch"]) == (4, None)
