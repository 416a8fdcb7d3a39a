"""Graphs say what the models say, whatever the family, the head, the number of images and the
runtime; and what is read from them are the tasks' own answers.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import ModelProto
from PIL import Image

from close import close
from deploy.small import (
    BARE,
    LETTERBOX,
    NAMES,
    SIZE,
    SQUASH,
    Randomised,
    apart,
    classifier,
    detector,
    preprocess_of,
    segmenter,
)
from models.families import KINDS, VIT
from vitrail.data.batches.batch import Batch
from vitrail.data.targets import Classes
from vitrail.data.views.canvas import canvas_of
from vitrail.data.views.preprocess import Preprocess
from vitrail.deploy.engines.calm import core
from vitrail.deploy.engines.onnxruntime import OnnxEngine
from vitrail.deploy.export import tensorrt
from vitrail.deploy.export.graph import Graph
from vitrail.deploy.export.onnx import to_onnx
from vitrail.models import build
from vitrail.models.tokens import with_tokens
from vitrail.tasks import (
    Detections,
    Embed,
    Segmentation,
    SegmentConfig,
    Task,
)

TILES = Preprocess(size=SIZE, resize="tiles", patch=(8, 8))
SHORT = Preprocess(size=SIZE, resize="short", patch=(8, 8))

slow = pytest.mark.slow


def engine(model: ModelProto) -> OnnxEngine:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return OnnxEngine(session, "views")


class Made(NamedTuple):
    """What became of a task."""

    engine: OnnxEngine
    apart: float
    """As of `deploy.small.apart`."""


def exported(task: Task, preprocess: Preprocess) -> Made:
    graph = Graph(task, preprocess)
    model = to_onnx(graph, preprocess)
    assert tensorrt.complaints(model) == []
    made = engine(model)
    return Made(made, apart(graph, made, preprocess))


def same_answers(task: Task, preprocess: Preprocess, asked: OnnxEngine) -> None:
    """To images that are oblong, small and of the size itself."""
    rng = np.random.default_rng(0)
    for height, width in ((50, 70), (33, 20), SIZE):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        view, seen = preprocess.view(image), preprocess.seen(height, width)
        with torch.inference_mode():
            batch = Batch((canvas_of(preprocess, [view]),), {}, np.arange(1))
            (wanted,) = task.answer(batch, [seen])
        (found,) = task.reading.answers(asked.run, [view], [seen])
        if isinstance(wanted, Segmentation):
            assert found.mask.shape == (height, width)
            assert (found.mask == wanted.mask).mean() > 0.999
        elif isinstance(wanted, Detections):
            close(np.sort(found.scores), np.sort(wanted.scores), 1e-4)
            best = slice(int((wanted.scores > wanted.scores.max() - 1e-3).sum()))
            nearest = (
                np.abs(found.boxes[:, None] - wanted.boxes[None, best]).max(axis=2).min(axis=0)
            )
            assert nearest.max() < 1e-2
        else:
            close(found.features, wanted.features)


@pytest.mark.parametrize(
    "name", [name if name in ("vit", "bit") else pytest.param(name, marks=slow) for name in KINDS]
)
def test_every_family(name: str, randomised: Randomised) -> None:
    config = KINDS[name].config
    preprocess = preprocess_of(KINDS[name].size, config.channels)
    assert exported(classifier(config, randomised), preprocess).apart < 1e-5


@slow
@pytest.mark.parametrize("tokens", ["tome:r=3", "hierarchical", "adaptive"])
def test_fewer_tokens_and_two_sizes_of_patches(tokens: str, randomised: Randomised) -> None:
    config = (
        with_tokens(VIT, tokens) if ":" in tokens else replace(VIT, scales=tokens)  # type: ignore[arg-type]
    )
    assert exported(classifier(config, randomised), Preprocess(size=SIZE)).apart < 1e-5


@pytest.mark.parametrize(
    ("config", "preprocess"),
    [
        pytest.param(SegmentConfig(head="linear"), SQUASH, marks=slow),
        pytest.param(SegmentConfig(head="deeplab"), SQUASH, marks=slow),
        pytest.param(SegmentConfig(head="queries"), SQUASH, marks=slow),
        (SegmentConfig(head="linear", mode="slide"), SHORT),
    ],
    ids=["linear", "deeplab", "queries", "slide"],
)
def test_masks(config: SegmentConfig, preprocess: Preprocess, randomised: Randomised) -> None:
    task = segmenter(config, preprocess, randomised)
    made = exported(task, preprocess)
    assert made.apart < 1e-5
    same_answers(task, preprocess, made.engine)


@pytest.mark.parametrize(
    ("preprocess", "how"),
    [
        pytest.param(LETTERBOX, {}, marks=slow),
        (TILES, {}),
        pytest.param(LETTERBOX, {"head": "queries"}, marks=slow),
        pytest.param(
            LETTERBOX,
            {"backbone": replace(BARE, window=(2, 2), global_blocks=(2,))},
            marks=slow,
        ),
    ],
    ids=["dense", "tiles", "queries", "windows"],
)
def test_boxes(preprocess: Preprocess, how: dict[str, object], randomised: Randomised) -> None:
    task = detector(preprocess, randomised, **how)  # type: ignore[arg-type]
    made = exported(task, preprocess)
    assert made.apart < 1e-5
    same_answers(task, preprocess, made.engine)


@slow
def test_features(randomised: Randomised) -> None:
    task = Embed(randomised(build(BARE)), Classes(NAMES, np.zeros(0, np.int64))).eval()
    preprocess = Preprocess(size=SIZE)
    made = exported(task, preprocess)
    assert made.apart < 1e-5
    same_answers(task, preprocess, made.engine)


@slow
@pytest.mark.parametrize("name", KINDS)
def test_every_family_in_openvino(name: str, randomised: Randomised) -> None:
    config = KINDS[name].config
    preprocess = preprocess_of(KINDS[name].size, config.channels)
    graph = Graph(classifier(config, randomised), preprocess)
    model = core().read_model(to_onnx(graph, preprocess).SerializeToString())
    compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for batch in (1, 2, 7):
        shape = batch, config.channels, *preprocess.size
        views = np.random.default_rng(batch).integers(0, 256, shape, np.uint8)
        with torch.no_grad():
            wanted = graph(torch.from_numpy(views))["logits"]
        close(compiled([views])["logits"], wanted, 1e-5)


def test_a_graph_tells_nothing_of_where_it_was_made(randomised: Randomised) -> None:
    small = replace(VIT, depth=1)
    model = to_onnx(Graph(classifier(small, randomised), SQUASH), SQUASH)
    text = model.SerializeToString()
    assert b"site-packages" not in text and b"vitrail" not in text and b".py" not in text
    assert not model.metadata_props and not any(node.metadata_props for node in model.graph.node)
