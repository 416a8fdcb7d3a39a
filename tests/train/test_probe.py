"""The linear probe: the one solution, on features that are never stale."""

import csv
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from close import close
from parts import counted
from train.striped import CLASSES, pictures
from vitrail import job
from vitrail.data import FolderSource
from vitrail.data.batches.loader import EvalLoader, TrainLoader
from vitrail.data.pixels.decode import UnreadableImage
from vitrail.data.sources.source import ArraySource, Subset
from vitrail.data.views.augment import AugmentConfig
from vitrail.data.views.preprocess import Preprocess
from vitrail.errors import DataError, UsageError
from vitrail.models import ViTConfig, build
from vitrail.runs import DataConfig, Run, TrainConfig, TuneConfig, read_checkpoint
from vitrail.runs.load import load
from vitrail.tasks import Classify, ClassifyConfig
from vitrail.training import fit, fit_probe
from vitrail.training.features import head_inputs
from vitrail.training.probe import Linear, solve, solve_head
from vitrail.training.tune import check_tuning

MODEL = ViTConfig(
    depth=2, width=32, heads=2, mlp=64, patch=(4, 4), image_size=(16, 16), channels=1, classes=3
)
CONFIG = TrainConfig(
    data=DataConfig(path="arrays", batch_size=8),
    model=MODEL,
    augment=AugmentConfig.off(),
    method="probe",
    epochs=1,
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


def several(n: int, seed: int) -> ArraySource:
    """Images with any number of labels: bright above, bright below."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (n, 3), dtype=np.uint8)
    images = rng.integers(0, 60, (n, 16, 16), dtype=np.uint8)
    for i, rows in enumerate((slice(0, 5), slice(5, 10), slice(10, 16))):
        images[:, rows] += 150 * labels[:, i, None, None]
    return ArraySource(images, labels, CLASSES, "train")


class Sitting:
    """A task and its images, as `job` builds them."""

    def __init__(self, config=CONFIG, source=None, model=None, counts=(16, 16, 16)):
        self.config = config
        source = source or pictures(48, 1)
        torch.manual_seed(0)
        multi_label = source.targets.several
        model = model or build(config.model)
        self.task = Classify(model, config.classify, counted(CLASSES, counts, multi_label))
        self.train = TrainLoader(
            source, config.preprocess(), config.augment, batch_size=8, seed=config.seed
        )
        val = several(12, 2) if multi_label else pictures(12, 2)
        self.val = EvalLoader(val, config.preprocess())

    def logits(self, loader):
        with torch.no_grad():
            return torch.cat([self.task.model.eval()(b.images) for b in loader])


def moments(x, y, head, strength, criterion):
    """The gradient of the regularised loss at `head`, for features standardised by hand."""
    v, c = head.weight.clone().requires_grad_(), head.bias.clone().requires_grad_()
    (criterion(x @ v.T + c, y) + strength / 2 * (v**2).sum()).backward()
    return v.grad.abs().max().item(), c.grad.abs().max().item()


@pytest.mark.parametrize("kind", ["classes", "balanced and smooth", "several labels"])
def test_the_solution_is_where_the_gradient_is_zero(kind):
    x = torch.randn(60, 7, dtype=torch.float64)
    x[:, 6] = x[:, 5] + 1e-3 * x[:, 6]  # nearly the same feature twice
    y = F.one_hot(torch.arange(60) % 3, 3).double()
    config = ClassifyConfig()
    if kind == "balanced and smooth":
        config = ClassifyConfig(class_weights="balanced", label_smoothing=0.1)
    if kind == "several labels":
        y = (torch.rand(60, 3) > 0.5).double()
    said = counted(CLASSES, (40, 15, 5), kind == "several labels")
    task = Classify(build(MODEL), config, said)
    for strength in (1.0, 1e-2, 1e-4):
        head = solve(x, y, task.criterion, strength)
        assert max(moments(x, y, head, strength, task.criterion)) < 2e-6
        start = Linear(torch.randn(3, 7).double(), torch.zeros(3).double())
        elsewhere = solve(x, y, task.criterion, strength, start)
        # All classes' logits may be shifted alike: that is the same answer.
        answers = [h(x) - h(x).mean(dim=1, keepdim=True) for h in (head, elsewhere)]
        close(answers[0], answers[1], 1e-3)


def test_two_classes_in_one_dimension_are_as_worked_out_by_hand():
    # x = +-1 with its sign as class: by symmetry V = (-w, w), c = 0, and for the logit margin
    # m = 2w of an image the condition is sigmoid(-m) = strength * w.
    x, y = torch.tensor([[1.0], [-1.0]]).double(), torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double()
    head = solve(x, y, F.cross_entropy, 0.1)
    w = head.weight[1, 0]
    close(head.weight[0, 0], -w, 1e-4)
    close(head.bias, torch.zeros(2).double(), 1e-4, size=w.item())
    close(torch.sigmoid(-2 * w), 0.1 * w, 1e-4)


def test_separable_images_are_all_right_and_the_run_is_a_run(tmp_path):
    sitting = Sitting()
    before = {name: t.clone() for name, t in sitting.task.model.state_dict().items()}
    run = Run.create(tmp_path / "run", CONFIG)
    events = []
    at = fit_probe(sitting.task, sitting.train, sitting.val, CONFIG, run, listen=events.append)
    assert at.best == 1.0 and at.evaluations == 1
    assert [e["val_accuracy"] for e in run.metrics() if "val_accuracy" in e] == [1.0]
    assert sum("inner_loss" in e for e in run.metrics()) == at.step >= 2
    assert events[-1]["val_accuracy"] == 1.0 and events[0]["done"] == pytest.approx(48 / 60)
    loaded = load(run)
    changed = {n for n, t in loaded.model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {"head.weight", "head.bias"}
    with torch.no_grad():
        logits = torch.cat([loaded.model(b.images) for b in sitting.val])
    assert logits.argmax(1).tolist() == sitting.val.source.targets.values.tolist()
    assert set(read_checkpoint(run.checkpoint("best")).tensors) == {"model"}


def test_the_standardisation_is_in_the_head_and_a_dead_feature_is_left_alone():
    sitting = Sitting()
    model = sitting.task.model
    with torch.no_grad():
        model.encoder.norm.weight[3] = 0.0  # the same for every image
        model.encoder.norm.bias[3] = 5.0
        model.encoder.norm.weight[4] *= 1000.0
    solve_head(sitting.task, sitting.train, CONFIG)
    assert model.head.weight[:, 3].abs().max() == 0
    assert model.head.weight[:, 4].abs().max() < 0.01 * model.head.weight.abs().max()
    loader = EvalLoader(sitting.train.source, sitting.train.preprocess)
    assert sitting.logits(loader).argmax(1).tolist() == sitting.train.source.targets.values.tolist()


def test_several_labels_an_image(tmp_path):
    config = replace(CONFIG, classify=ClassifyConfig(class_weights="balanced"))
    sitting = Sitting(config, several(120, 1), counts=(60.0, 60.0, 60.0))
    run = Run.create(tmp_path / "run", config)
    at = fit_probe(sitting.task, sitting.train, sitting.val, config, run)
    right = ((sitting.logits(sitting.val) > 0).numpy() == sitting.val.source.targets.values).mean()
    assert at.best == pytest.approx(right) and right > 0.9


def test_two_heads_share_one_solution(tmp_path):
    config = replace(CONFIG, model=replace(MODEL, distilled=True))
    sitting = Sitting(config)
    run = Run.create(tmp_path / "run", config)
    assert fit_probe(sitting.task, sitting.train, sitting.val, config, run).best == 1.0
    right = sitting.logits(sitting.val).argmax(1).numpy() == sitting.val.source.targets.values
    assert right.all() and sitting.task.model.head_distilled.weight.abs().max() > 0


def test_a_head_without_bias_is_refused(tmp_path):
    config = replace(CONFIG, model=replace(MODEL, head_bias=False))
    sitting = Sitting(config)
    with pytest.raises(UsageError, match="head_bias"):
        solve_head(sitting.task, sitting.train, config)
    with pytest.raises(UsageError, match="head_bias"):  # before there is a run folder
        check_tuning(config, build(config.model))


def test_mirror_images_count_where_augmentation_allows_them(tmp_path, cache):
    config = replace(CONFIG, augment=replace(AugmentConfig.off(), hflip=0.5))
    sitting = Sitting(config)
    run = Run.create(tmp_path / "run", config)
    fit_probe(sitting.task, sitting.train, sitting.val, config, run)
    loader = EvalLoader(sitting.train.source, config.preprocess())
    both = head_inputs(sitting.task.model, loader, precision="float32", mirrored=True)
    assert (
        both.values.shape == (2, 48, 32) and len(list(cache.iterdir())) == 2
    )  # and the held-out ones
    with torch.no_grad():
        images = torch.cat([b.images for b in loader]).flip(-1)
        expected = sitting.task.model.features(images).pooled
    close(both.values[1], expected)


class Counting(nn.Module):
    """Counts how often a model runs."""

    def __init__(self, model):
        super().__init__()
        self.times = 0
        model.stem.register_forward_hook(self.count)

    def count(self, *_):
        self.times += 1


def looked(model, loader, **options) -> int:
    """How many batches the model has to look at for its features."""
    counter = Counting(model)
    head_inputs(model, loader, **{"precision": "float32", **options})
    return counter.times


def test_features_are_computed_once(cache):
    model = build(MODEL)
    loader = EvalLoader(pictures(48, 1), CONFIG.preprocess())
    first = head_inputs(model, loader, precision="float32")
    again = head_inputs(model, loader, precision="float32")
    assert torch.equal(first.values, again.values) and (first.indices == again.indices).all()
    assert looked(model, loader) == 0
    # The head, and what acts in training only, make no other features.
    other_head = build(replace(MODEL, classes=7, drop_path=0.3))
    other_head.load_state_dict(model.state_dict() | dict(other_head.head.named_parameters("head")))
    assert looked(other_head, loader) == 0


def test_what_makes_other_features_is_never_served_stale(cache):
    model, preprocess = build(MODEL), CONFIG.preprocess()
    source = pictures(48, 1)
    assert looked(model, EvalLoader(source, preprocess)) == 1
    for other in (
        Subset(source, np.arange(40)),  # another split
        pictures(48, 2),  # the same keys, other pixels
    ):
        assert looked(model, EvalLoader(other, preprocess)) == 1
    for changes in ({"crop": 0.9}, {"mean": (0.4,)}, {"interpolation": "bilinear"}):
        assert looked(model, EvalLoader(source, replace(preprocess, **changes))) == 1
    assert looked(model, EvalLoader(source, preprocess), precision="bfloat16") == 1
    assert looked(model, EvalLoader(source, preprocess), mirrored=True) == 2
    wider = build(replace(MODEL, norm_eps=1e-3))
    wider.load_state_dict(model.state_dict())
    assert looked(wider, EvalLoader(source, preprocess)) == 1
    with torch.no_grad():
        model.encoder.blocks[1].mlp.fc2.bias[0] += 1e-6
    assert looked(model, EvalLoader(source, preprocess)) == 1
    assert looked(model, EvalLoader(source, preprocess)) == 0


def test_a_changed_file_is_looked_at_again(tmp_path):
    for i, name in enumerate(("a", "b")):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("L", (16, 16), 100 * i).save(tmp_path / "data" / name / "1.png")
    model, preprocess = build(MODEL), Preprocess(size=(16, 16), mean=(0.5,), std=(0.5,))
    loader = EvalLoader(FolderSource(tmp_path / "data"), preprocess)
    assert looked(model, loader) == 1 and looked(model, loader) == 0
    file = tmp_path / "data" / "a" / "1.png"
    Image.new("L", (16, 16), 50).save(file)
    os.utime(file, ns=(1, 1))  # the clock may be coarser than this test
    assert looked(model, EvalLoader(FolderSource(tmp_path / "data"), preprocess)) == 1
    file.unlink()
    assert loader.source.stamp(0) == ""


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "empty"])
def test_a_damaged_cache_is_computed_anew(cache, damage):
    model, loader = build(MODEL), EvalLoader(pictures(48, 1), CONFIG.preprocess())
    expected = head_inputs(model, loader, precision="float32").values
    (file,) = cache.iterdir()
    content = bytearray(file.read_bytes())
    match damage:
        case "cut":
            content = content[:-10]
        case "flipped":
            content[-100] ^= 1
        case "foreign":
            content = bytearray(b"not safetensors at all")
        case "empty":
            content = bytearray()
    file.write_bytes(content)
    assert looked(model, loader) == 1  # and written again:
    assert torch.equal(head_inputs(model, loader, precision="float32").values, expected)
    assert looked(model, loader) == 0


def test_without_a_place_for_a_cache_it_only_takes_longer(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "file"))
    model, loader = build(MODEL), EvalLoader(pictures(48, 1), CONFIG.preprocess())
    assert looked(model, loader) == looked(model, loader) == 1


class Damaged(ArraySource):
    """Image 5 cannot be read."""

    def load(self, i):
        if i == 5:
            raise UnreadableImage("cut short")
        return super().load(i)


def damaged(n: int) -> Damaged:
    good = pictures(n, 1)
    return Damaged(good._images, good.targets.values, CLASSES, "train")


def test_damaged_images_are_left_out_cache_or_no_cache(tmp_path):
    for attempt in range(2):
        sitting = Sitting(source=damaged(300))
        run = Run.create(tmp_path / str(attempt), CONFIG)
        assert fit_probe(sitting.task, sitting.train, sitting.val, CONFIG, run).best == 1.0
        assert sitting.train.skipped == {"train/5": "cut short"}
    few = Sitting(source=damaged(30))
    with pytest.raises(DataError, match="1 of 30 images cannot be read"):
        solve_head(few.task, few.train, CONFIG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment": replace(AugmentConfig.off(), mixup=0.2)}, r"augment\.mixup"),
        ({"augment": AugmentConfig()}, r"augment\.crop_scale, augment\.crop_ratio: leave"),
        ({"tune": TuneConfig(layer_decay=0.5)}, "cannot follow tune"),
    ],
)
def test_what_a_probe_would_have_to_ignore_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        replace(CONFIG, **changes)


def test_fine_tuning_starts_from_the_probes_head(tmp_path):
    config = replace(CONFIG, method="gradient", tune=TuneConfig(head_init="probe"))
    sitting = Sitting(config)
    run = Run.create(tmp_path / "run", config)
    fit(sitting.task, sitting.train, sitting.val, config, run)
    steps = [event for event in run.metrics() if "loss" in event]
    # At zero it would be log 3 = 1.0986; and the head's time is in the run's.
    assert steps[0]["loss"] < 0.5
    per_step = steps[-1]["seconds"] - steps[0]["seconds"]
    assert steps[0]["seconds"] > per_step / len(steps)


@pytest.mark.filterwarnings("error")
def test_the_main_job_from_images_to_report(tmp_path):
    source = pictures(60, 1)
    with open(tmp_path / "labels.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "label"))
        for i in range(60):
            source.load(i).save(tmp_path / f"{i}.png")
            writer.writerow((f"{i}.png", CLASSES[source.targets.values[i]]))
    config = replace(CONFIG, data=DataConfig(path=str(tmp_path / "labels.csv"), batch_size=8))
    outcome = job.train(config, tmp_path / "run")
    assert outcome.evaluation.metrics.summary["top1"].value == 1.0
    assert "linear probe: the head alone" in outcome.report.read_text()
    again = job.resume(outcome.run)
    assert again.evaluation.metrics.values() == outcome.evaluation.metrics.values()
    lines = list(outcome.run.metrics())
    assert sum("val_accuracy" in line for line in lines) == 1
