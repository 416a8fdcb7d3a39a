"""Phones: what ExecuTorch and LiteRT make of the models, whatever the family, the head and the
number of images; and a run that is exported, asked and measured there.

Skipped where the extra `mobile` is not installed.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from close import close
from models.families import DYNAMICVIT, KINDS, VIT
from vitrail.data.targets import Boxes, Classes, Coding, MaskArrays, Masks
from vitrail.data.views.preprocess import Preprocess
from vitrail.deploy.engines import Engine, Setting
from vitrail.deploy.export.graph import Graph
from vitrail.heads.detector import build_detector
from vitrail.heads.segmenter import build_segmenter
from vitrail.models import ModelConfig, build
from vitrail.models.tokens import with_tokens
from vitrail.tasks import (
    Classify,
    ClassifyConfig,
    Detect,
    DetectConfig,
    Segment,
    SegmentConfig,
    Task,
)

NAMES = ("a", "b", "c")
SIZE = (32, 48)
BARE = replace(VIT, classes=0)
MASKS = Masks(NAMES, MaskArrays((), ""), Coding({}))
BOXES = Boxes.listed(NAMES, (), lambda i: (1, 1))
SQUASH = Preprocess(size=SIZE, resize="squash")
LETTERBOX = Preprocess(size=SIZE, resize="letterbox")

Randomised = Callable[[torch.nn.Module], torch.nn.Module]
slow = pytest.mark.slow
ONE = Setting(threads=1)


@pytest.fixture(params=["executorch", "litert"])
def phone(request: pytest.FixtureRequest) -> str:
    """A runtime that is installed."""
    pytest.importorskip({"executorch": "executorch", "litert": "ai_edge_litert"}[request.param])
    return request.param


def classifier(config: ModelConfig, randomised: Randomised) -> Classify:
    targets = Classes(tuple(map(str, range(config.classes))), np.zeros(0, np.int64))
    return Classify(randomised(build(config)), ClassifyConfig(), targets).eval()


def exported(graph: Graph, preprocess: Preprocess, file: Path, phone: str, **how: Any) -> Engine:
    how = {"int8": None, **how}
    import_module(f"vitrail.deploy.export.{phone}").save(graph, preprocess, file, **how)
    return import_module(f"vitrail.deploy.engines.{phone}").load_file(file, ONE)


def noise(preprocess: Preprocess, views: int) -> np.ndarray:
    shape = views, preprocess.channels, *preprocess.size
    return np.random.default_rng(views).integers(0, 256, shape, np.uint8)


def says_the_same(task: Task, preprocess: Preprocess, file: Path, phone: str) -> None:
    """Of 1, 2 and 7 views, by the same names."""
    graph = Graph(task, preprocess)
    asked = exported(graph, preprocess, file, phone)
    for count in (1, 2, 7):
        views = noise(preprocess, count)
        with torch.no_grad():
            wanted = graph(torch.from_numpy(views))
        said = asked.run([*views])
        assert set(said) == set(wanted)
        # Which of two boxes that score the same comes first is chance.
        for name in said.keys() - {"boxes", "labels"}:
            close(said[name], wanted[name], 1e-4)


@pytest.mark.parametrize(
    "name", [name if name == "vit" else pytest.param(name, marks=slow) for name in KINDS]
)
def test_every_family(name: str, phone: str, tmp_path: Path, randomised: Randomised) -> None:
    kind = KINDS[name]
    n = kind.config.channels
    preprocess = Preprocess(size=kind.size, mean=(0.4,) * n, std=(0.3,) * n)
    says_the_same(classifier(kind.config, randomised), preprocess, tmp_path / "model", phone)


@slow
@pytest.mark.parametrize("tokens", ["tome:r=3", "dynamicvit:keep=0.5", "distilled"])
def test_fewer_tokens_and_more(
    tokens: str, phone: str, tmp_path: Path, randomised: Randomised
) -> None:
    config: ModelConfig = replace(VIT, distilled=True)
    if ":" in tokens:
        config = with_tokens(DYNAMICVIT if tokens.startswith("dynamic") else VIT, tokens)
    task = classifier(config, randomised)
    says_the_same(task, Preprocess(size=SIZE), tmp_path / "model", phone)


@slow
@pytest.mark.parametrize("head", ["linear", "deeplab", "queries"])
def test_masks(head: str, phone: str, tmp_path: Path, randomised: Randomised) -> None:
    config = SegmentConfig(head=head)  # type: ignore[arg-type]
    model = randomised(build_segmenter(build(BARE), config, 3))
    task = Segment(model, config, MASKS, SQUASH).eval()
    says_the_same(task, SQUASH, tmp_path / "model", phone)


@slow
@pytest.mark.parametrize("head", ["dense", "queries"])
def test_boxes(head: str, phone: str, tmp_path: Path, randomised: Randomised) -> None:
    config = DetectConfig(width=32, head=head)  # type: ignore[arg-type]
    model = randomised(build_detector(build(BARE), config, 3))
    task = Detect(model, config, BOXES, LETTERBOX).eval()
    says_the_same(task, LETTERBOX, tmp_path / "model", phone)
