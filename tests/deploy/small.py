"""Small models of every task, and how far a runtime is from them."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from models.families import VIT
from vitrail.data.targets import Boxes, Classes, Coding, MaskArrays, Masks
from vitrail.data.views.preprocess import Preprocess
from vitrail.deploy.engines import Engine
from vitrail.deploy.export.graph import Graph
from vitrail.heads.detector import build_detector
from vitrail.heads.segmenter import build_segmenter
from vitrail.models import ModelConfig, build
from vitrail.tasks import Classify, ClassifyConfig, Detect, DetectConfig, Segment, SegmentConfig

NAMES = ("a", "b", "c")
SIZE = (32, 48)
BARE = replace(VIT, classes=0)
LETTERBOX = Preprocess(size=SIZE, resize="letterbox")
SQUASH = Preprocess(size=SIZE, resize="squash")

Randomised = Callable[[torch.nn.Module], torch.nn.Module]


def preprocess_of(size: tuple[int, int], channels: int) -> Preprocess:
    return Preprocess(size=size, mean=(0.4,) * channels, std=(0.3,) * channels)


def classifier(config: ModelConfig, randomised: Randomised) -> Classify:
    targets = Classes(tuple(map(str, range(config.classes))), np.zeros(0, np.int64))
    return Classify(randomised(build(config)), ClassifyConfig(), targets).eval()


def segmenter(config: SegmentConfig, preprocess: Preprocess, randomised: Randomised) -> Segment:
    model = randomised(build_segmenter(build(BARE), config, 3))
    targets = Masks(NAMES, MaskArrays((), ""), Coding({}))
    return Segment(model, config, targets, preprocess).eval()


def detector(
    preprocess: Preprocess, randomised: Randomised, backbone: ModelConfig = BARE, **how: object
) -> Detect:
    config = DetectConfig(width=32, **how)  # type: ignore[arg-type]
    model = randomised(build_detector(build(backbone), config, 3))
    return Detect(model, config, Boxes.listed(NAMES, (), lambda i: (1, 1)), preprocess).eval()


def apart(graph: Graph, engine: Engine, preprocess: Preprocess) -> float:
    """How far what an engine says of 1, 2 and 7 views is from what the graph says, by the size of
    that: the furthest of its arrays. But for boxes: which of two that score the same comes first is
    chance.
    """
    furthest = 0.0
    for count in (1, 2, 7):
        shape = count, preprocess.channels, *preprocess.size
        views = np.random.default_rng(count).integers(0, 256, shape, np.uint8)
        with torch.no_grad():
            wanted = graph(torch.from_numpy(views))
        said = engine.run([*views])
        assert list(said) == list(wanted)
        for name in said.keys() - {"boxes", "labels"}:
            expected = wanted[name].numpy()
            assert said[name].shape == expected.shape
            far = np.abs(said[name] - expected).max() / np.abs(expected).max()
            furthest = max(furthest, float(far))
    return furthest
