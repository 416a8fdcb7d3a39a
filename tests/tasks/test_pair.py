"""Images and texts: what a task of two towers computes, in parts, once, and with several texts."""

import copy
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from close import close, largest
from vitrail.data.batches.batch import Batch
from vitrail.data.batches.loader import EvalLoader
from vitrail.data.sources.source import ArraySource
from vitrail.data.targets import Classes, Texts
from vitrail.data.views.canvas import Canvas
from vitrail.data.views.preprocess import Preprocess
from vitrail.data.views.seen import Seen
from vitrail.errors import DataError, UsageError
from vitrail.models import ViTConfig, build
from vitrail.runs import DataConfig, OptimConfig, TrainConfig
from vitrail.runs.world import World
from vitrail.tasks import TASKS, Pair, PairConfig
from vitrail.tasks.pair import spoken
from vitrail.tasks.zero_shot import ZeroShot
from vitrail.text import open_tokenizer, text_config
from vitrail.text.two_towers import TwoTowers
from vitrail.training.engine import Engine
from vitrail.training.step import Learner

TINY = ViTConfig(depth=2, width=16, heads=2, mlp=32, patch=(8, 8), image_size=(16, 16), classes=0)
TEXT = text_config("clip_s32_alt", depth=1, width=16, heads=2, mlp=32, context=12)
WORDS = ("a cat", "a dog", "a red car", "two owls", "a pet")


def config_of(task: str = "clip", **changes) -> TrainConfig:
    pair = {"siglip": PairConfig(loss="sigmoid", scale=10.0)}.get(task, PairConfig())
    return TrainConfig(
        **{
            "data": DataConfig(path="pairs.csv", batch_size=8),
            "model": TINY,
            "text": TEXT,
            "task": task,
            "pair": replace(pair, width=8),
            "optim": OptimConfig(lr=1e-2),
            "epochs": 1,
        }
        | changes
    )


def texts_of(n: int = 8, classes: bool = False) -> Texts:
    """Several of an image, and the same of several images."""
    rows = [(WORDS[i % 4], *(("a pet",) if i % 4 < 2 else ())) for i in range(n)]
    labels = Classes(("animal", "road_vehicle"), (np.arange(n) % 4 == 2).astype(np.int64))
    return Texts.written(rows, labels if classes else None)


def task_of(task: str = "clip", targets: Texts | None = None, **changes) -> Pair:
    torch.manual_seed(0)
    config, targets = config_of(task, **changes), targets or texts_of()
    model = TASKS[task].model(config, targets)
    model.words.keep(open_tokenizer(model.text.config))
    return TASKS[task].learn(model, config, targets, None)


def batch_of(targets: Texts, n: int = 8, epoch: int = 0, seed: int = 1) -> Batch:
    torch.manual_seed(seed)
    said = [targets.target(i, None) for i in range(n)]
    rows = {name: torch.from_numpy(np.stack([each[name] for each in said])) for name in said[0]}
    return Batch((Canvas(torch.randn(n, 3, 16, 16), None),), rows, np.arange(n), epoch)


def gradients(task: Pair) -> dict[str, Tensor]:
    return {name: p.grad for name, p in task.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("task", ["clip", "siglip"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(task, precision):
    targets, found = texts_of(), []
    for micro in (None, 3, 1):
        config = config_of(task, micro_batch=micro, precision=precision)
        one = task_of(task, targets, micro_batch=micro, precision=precision)
        engine = Engine(one, config, torch.device("cpu"))
        one.train()
        engine.enter()
        loss = engine.gradients([batch_of(targets)], 8.0)
        found.append((loss, gradients(one)))
    whole, tol = found[0], 1e-5 if precision == "float32" else 0.05
    size = largest(whole[1].values())
    for loss, grads in found[1:]:
        assert loss.total == pytest.approx(whole[0].total, rel=tol)
        assert loss.parts == pytest.approx(whole[0].parts, rel=0.02)
        assert grads.keys() == whole[1].keys()
        for name, grad in grads.items():
            close(grad, whole[1][name], tol, size=size, msg=name)


def test_what_is_dropped_is_the_same_both_times():
    """With dropout, the second pass over a part has to be the first one again."""
    model = replace(TINY, drop_path=0.5)
    task, config = task_of(model=model), config_of(micro_batch=4, model=model)
    learner = Learner(task, config, torch.device("cpu"))
    learner.enter(0.5)
    calls = []
    vectors = task.vectors

    def heard(batch: Batch):
        calls.append(vectors(batch))
        return calls[-1]

    task.vectors = heard
    learner.gradients([batch_of(texts_of())])
    assert len(calls) == 4
    for first, second in zip(calls[:2], calls[2:], strict=True):
        assert torch.equal(first.images, second.images)
    assert not torch.equal(calls[0].images, calls[1].images)


def test_one_of_several_texts_is_drawn_for_each_epoch():
    targets = texts_of(64)
    task = task_of(targets=targets)
    drawn = [task.drawn(batch_of(targets, 64, epoch)) for epoch in (0, 1, 0)]
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])
    own = torch.from_numpy(targets.own).long()
    assert ((own == drawn[0][:, None]) & (own >= 0)).any(dim=1).all()
    # Whatever else is in the batch, and in whatever order.
    batch = batch_of(targets, 64)
    some = np.array([9, 3, 40])
    assert torch.equal(task.drawn(batch.rows(some)), drawn[0][some])
    pets = drawn[0][own[:, 1] >= 0] == own[0, 1]
    assert 0.2 < pets.double().mean() < 0.8


def test_it_learns_which_text_is_whose():
    targets = Texts.written([(word,) for word in WORDS[:4]] * 2)
    for name in ("clip", "siglip"):
        task, config = task_of(name, targets), config_of(name)
        learner, losses = Learner(task, config, torch.device("cpu")), []
        images = torch.randn(4, 3, 16, 16).repeat(2, 1, 1, 1)
        for step in range(30):
            batch = batch_of(targets)
            batch = batch._replace(views=(Canvas(images, None),))
            learner.enter(step / 30)
            losses.append(learner.gradients([batch]).loss.total)
            learner.update(1e-2, step + 1, step / 30)
        assert losses[-1] < losses[0]
        task.eval()
        with torch.no_grad():
            rows = task.measure(batch)
        metrics = task.judge(rows)
        assert metrics.texts == 4 and metrics.values()["image_to_text_r1"] == 1, (name, losses)
        assert task.score(rows) == 1


def test_the_scale_stays_between_1_and_100():
    task = task_of()
    for value, expected in ((7.0, 100.0), (-3.0, 1.0)):
        with torch.no_grad():
            task.model.scale.fill_(value)
        task.after_step(0.5)
        assert task.model.scale.exp().item() == pytest.approx(expected, rel=1e-5)


class Photos(ArraySource):
    """With one that cannot be read."""

    broken: int | None = None
    loaded = 0

    def load(self, i: int) -> Image.Image:
        from vitrail.data import UnreadableImage

        type(self).loaded += 1
        if i == self.broken:
            raise UnreadableImage("it is damaged", self.key(i))
        return super().load(i)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    pixels = np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3)).astype(np.uint8)
    source = Photos(pixels, np.zeros(8, np.int64), ("a",), "train")
    source.targets = texts_of()
    Photos.loaded = 0
    return source


def locked(source, **changes) -> Pair:
    from vitrail.data.views.augment import AugmentConfig

    task = task_of("lit", source.targets, augment=AugmentConfig.off(), **changes)
    preprocess = Preprocess(size=(16, 16), patch=(8, 8))
    task.keep(lambda device: EvalLoader(source, preprocess, batch_size=3))
    return task


def test_a_locked_tower_looks_at_each_image_once(photos):
    task = locked(photos, pair=PairConfig())
    learner = Learner(task, config_of(), torch.device("cpu"))
    assert learner.prepare() == {} and Photos.loaded == 8
    batch = batch_of(photos.targets)
    expected = torch.cat(
        [task.model.backbone(b.images) for b in EvalLoader(photos, Preprocess(size=(16, 16)))]
    )
    found = task.vectors(batch)
    close(found.images, torch.nn.functional.normalize(expected, dim=1).detach())
    learner.enter(0.0)
    learner.gradients([batch])
    learning = {name.split(".")[1] for name in gradients(task)}
    assert learning == {"text", "scale"} and not task.model.backbone.training
    loaded = Photos.loaded
    again = locked(photos, pair=PairConfig())
    again.prepare(torch.device("cpu"))  # from the cache
    assert Photos.loaded == loaded
    assert torch.equal(again.vectors(batch).images, found.images)
    assert copy.deepcopy(task)._kept is task._kept


def test_an_image_that_cannot_be_read_is_left_out_of_a_locked_run(photos):
    photos.broken = 2
    task = locked(photos, pair=PairConfig())
    (why,) = task.prepare(torch.device("cpu")).values()
    assert why.endswith("it is damaged")
    batch = batch_of(photos.targets)
    assert task.weight(batch) == 7 and len(task.vectors(batch).images) == 7
    assert task.loss(batch).total.isfinite()


def test_words_are_a_part_of_the_model():
    task = task_of()
    state = task.model.state_dict()
    assert state["words.content"].dtype == torch.uint8
    other = TASKS["clip"].model(config_of(), texts_of())
    with pytest.raises(DataError, match="tokenizer cannot be read"):
        _ = other.words.tokenizer
    copied = copy.deepcopy(other)  # as what computes in bfloat16 is, before a run is restored
    other.load_state_dict(state)
    assert copied.words.tokenizer(["a cat"]).ids.any()
    assert (other.words.tokenizer(["a cat"]).ids == task.model.words.tokenizer(["a cat"]).ids).all()
    text = task.model.text.config
    assert text.out == 8 and task.model.width == 8 and TEXT.out == 256


def test_what_is_measured_and_said():
    targets = texts_of(classes=True)
    task = task_of(targets=targets).eval()
    batch = batch_of(targets)
    with torch.no_grad():
        rows = task.measure(batch)
        assert {name: x.shape for name, x in rows.items()} == {
            "vectors": (8, 8), "texts": (8, 2), "classes": (8, 2),
        }  # fmt: skip
        close(rows["vectors"].norm(dim=1), torch.ones(8))
        metrics = task.judge(rows)
    assert metrics.images == 8 and metrics.texts == 5 and metrics.headline in metrics.summary
    lines = task.summary(metrics, "images")
    assert [line.split()[0] for line in lines] == ["texts", "images", "baseline", "zero-shot"]
    header, *table = task.table(rows)
    assert header == ("text", "nearest", "likeness", "rank", "label", "predicted")
    vectors, own, texts = task.found(rows)
    assert sorted(texts) == sorted(WORDS)
    for i, (text, nearest, likeness, rank, label, predicted) in enumerate(table):
        alike = vectors @ rows["vectors"][i]
        mine = own[i][own[i] >= 0]
        assert text in targets.of(i) and nearest == texts[alike.argmax()]
        assert float(likeness) == pytest.approx(alike.max().item(), abs=1e-5)
        assert int(rank) == 1 + sum(a > alike[mine].max() for a in alike.tolist())
        assert label == ("road_vehicle" if i % 4 == 2 else "animal")
        assert predicted in task.targets.names
    hits = sum(row[3] == "1" for row in table) / 8
    assert metrics.values()["image_to_text_r1"] == pytest.approx(hits)
    right = sum(row[4] == row[5] for row in table) / 8
    assert metrics.values()["zero_shot"] == pytest.approx(right)
    assert spoken("road_vehicle") == "road vehicle"
    stated = TASKS["clip"].stated(task.state())
    assert stated.names == ("animal", "road_vehicle") and len(stated) == 0
    with torch.no_grad():
        answers = task.answer(batch, [Seen(np.eye(3), (16, 16), (16, 16))] * 8)
    assert len(answers) == 8 and task.reading.kind == "features"


def test_ensembles_of_prompts():
    task = task_of().eval()
    alone = task.named(["cat", "dog"], ("{}",))
    close(alone, task.embedded(["cat", "dog"]))
    two = task.named(["cat"], ("{}", "a photo of a {}."))
    each = task.embedded(["cat", "a photo of a cat."])
    close(two[0], torch.nn.functional.normalize(each.mean(dim=0), dim=0))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_classes_that_are_told_in_words(kind):
    task = task_of(kind).eval()
    batch = batch_of(texts_of())
    told = ZeroShot(task, ("a cat", "a red  car"))
    assert told.reading.names == ("a cat", "a red car")
    answers = told.answer(batch, [Seen(np.eye(3), (16, 16), (16, 16))] * 8)
    with torch.no_grad():
        logits = (
            task.model.scale.exp()
            * task.model(batch.images)
            @ task.named(["a cat", "a red car"], ("{}",)).T
        )
    logits = logits + (task.model.bias if kind == "siglip" else 0)
    expected = logits.sigmoid() if kind == "siglip" else logits.softmax(dim=1)
    for answer, row in zip(answers, expected.tolist(), strict=True):
        assert answer.probabilities["a cat"] == pytest.approx(row[0], rel=1e-4)
        assert answer.probability == pytest.approx(max(row), rel=1e-4)


@pytest.mark.parametrize(
    ("labels", "templates", "words"),
    [
        (("one",), ("{}",), "two or more"),
        (("one", " "), ("{}",), "none is empty"),
        (("one", "one "), ("{}",), "there twice"),
        (("one", "two"), ("a photo",), "needs {} once"),
        (("one", "two"), (), "one template at least"),
    ],
)
def test_labels_that_cannot_be(labels, templates, words):
    with pytest.raises(UsageError, match=words):
        ZeroShot(task_of(), labels, templates)


def test_captions_of_any_kind_are_read():
    """Of 10,000 words, of no known token, of half a letter: a vector each, and a number."""
    odd = ("word " * 10_000, "\u4e00\u3042\U0001f600", "\ud800", "?" * 500, "a")
    task = task_of(targets=Texts.written([(each,) for each in odd])).eval()
    vectors = task.embedded(odd)
    assert vectors.shape == (5, 8) and vectors.isfinite().all()
    assert task.loss(batch_of(Texts.written([(each,) for each in odd]), 5)).total.isfinite()


@pytest.mark.parametrize(
    ("task", "changes", "words"),
    [
        ("clip", {"data": DataConfig(path="x", batch_size=1)}, "has one"),
        ("clip", {"text": None}, "needs a text tower"),
        ("clip", {"pair": PairConfig(loss="sigmoid")}, "learns by softmax"),
        ("siglip", {"pair": PairConfig()}, "learns by sigmoid"),
        ("lit", {}, "locks the image tower"),
        ("clip", {"method": "probe"}, "cannot follow"),
    ],
)
def test_what_a_run_cannot_be(task, changes, words):
    with pytest.raises(UsageError, match=words):
        config_of(task, **changes)


def test_a_step_can_be_had_on_paper():
    with torch.device("meta"):
        task = task_of_meta()
        blank = {
            k: torch.from_numpy(x).expand(4, *x.shape).to("meta")
            for k, x in texts_of().blank((16, 16)).items()
        }
        batch = Batch((Canvas(torch.empty(4, 3, 16, 16), None),), blank, np.arange(4))
        task.loss(batch).total.backward()
    assert task.model.text.tokens.weight.grad.is_meta


def task_of_meta() -> Pair:
    config = config_of()
    return TASKS["clip"].learn(TASKS["clip"].model(config, texts_of()), config, texts_of(), None)


def test_two_towers_need_one_width():
    with pytest.raises(AssertionError):
        TwoTowers(build(TINY), TASKS["clip"].model(config_of(), texts_of()).text, 16)


def _learn(rank: int, folder: Path, counts: tuple[int, int], how: str, micro: int | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/met", rank=rank, world_size=2)
    targets = texts_of()
    task, config = task_of(how, targets), config_of(how, micro_batch=micro)
    engine = Engine(task, config, torch.device("cpu"), World(rank, 2, rank))
    task.train()
    engine.enter()
    start = counts[0] * rank
    rows = np.arange(start, start + counts[rank])
    found = engine.gradients([batch_of(targets).rows(rows)], float(sum(counts)), share=4)
    torch.save({"loss": found.total, "grads": gradients(task)}, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's thread may still let go of a tensor, for which it needs the interpreter


@pytest.mark.parametrize("how", ["clip", "siglip"])
@pytest.mark.parametrize(("counts", "micro"), [((4, 4), None), ((4, 3), 2), ((4, 1), 2)])
def test_two_processes_step_as_one(how, counts, micro, tmp_path: Path) -> None:
    """With all negatives, in parts or whole, and where one has fewer images than the other."""
    start = torch.multiprocessing.start_processes
    start(_learn, (tmp_path, counts, how, micro), nprocs=2, start_method="fork")
    targets = texts_of()
    task = task_of(how, targets)
    loss = task.loss(batch_of(targets).rows(np.arange(sum(counts)))).total
    loss.backward()
    whole = gradients(task)
    size = largest(whole.values())
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert found["grads"].keys() == whole.keys()
        for name, grad in found["grads"].items():
            close(grad, whole[name], 1e-5, size=size, msg=name)
