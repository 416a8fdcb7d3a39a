"""What every test gets: shapes checked at run time, fixed seeds, and models without zeros in them.

And one thread, also in the processes that it starts: those of tiny tensors wait for each other
longer than they compute, on busy cores ten times as long. OMP_NUM_THREADS=2 takes two.

Shapes are checked by jaxtyping and beartype in `vitrail.nn`, `vitrail.models`, `vitrail.heads` and
`vitrail.text`, by the tests of these (parity shows by itself); set JAXTYPING_DISABLE=1 for tests
that compile or export (pytorch#122093).
"""

import gc
import importlib
import os
import random
import sys
import typing
from collections.abc import Callable, Iterator
from typing import TypeVar

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch

import jaxtyping
import numpy as np
import pytest
import torch
import tyro

# Before anything imports these packages.
jaxtyping.install_import_hook(
    ["vitrail.nn", "vitrail.models", "vitrail.heads", "vitrail.text"], "beartype.beartype"
)

from vitrail.doctor import compute  # noqa: E402
from vitrail.errors import spell  # noqa: E402
from vitrail.heads import DetectHeadConfig, SegmentHeadConfig  # noqa: E402
from vitrail.heads.deformable import QueryBoxesConfig  # noqa: E402
from vitrail.models import FAMILIES  # noqa: E402
from vitrail.planning import tryout  # noqa: E402
from vitrail.runs.machine import matrix_rate  # noqa: E402
from vitrail.text import TEXT_FAMILIES  # noqa: E402

for config in (*FAMILIES, *TEXT_FAMILIES, DetectHeadConfig, QueryBoxesConfig, SegmentHeadConfig):
    typing.no_type_check(config.__init__)  # a config checks itself, and says it better

try:
    import torchvision  # noqa: F401  (timm imports it)
except RuntimeError:
    # No torchvision matches a CPU-only torch, so its compiled part does not load and the two
    # operators that its Python part describes have no schema. Where it loads, a second definition
    # would abort the process.
    OPERATORS = torch.library.Library("torchvision", "DEF")
    OPERATORS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    OPERATORS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _once(
    tokenised: Callable[[type], tyro._docstrings._ClassTokenization],
) -> Callable[[type], tyro._docstrings._ClassTokenization]:
    """tyro reads the source of each config anew for each command line."""
    found: dict[type, tyro._docstrings._ClassTokenization | OSError] = {}

    def once(kind: type) -> tyro._docstrings._ClassTokenization:
        if kind not in found:
            try:
                found[kind] = tokenised(kind)
            except OSError as error:  # a class that no file holds
                found[kind] = error
        if isinstance(read := found[kind], OSError):
            raise read
        return read

    return once


tyro._docstrings._ClassTokenization.make = _once(tyro._docstrings._ClassTokenization.make)

Module = TypeVar("Module", bound=torch.nn.Module)
PAGES = ("test_readme.py", "test_compare.py")
"""Files whose tests look at reports."""


def pytest_collection_finish() -> None:
    """What is imported and collected stays: it need not be searched for garbage all the time, nor
    what a test makes after every 700 things.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 20, 20)


@pytest.fixture(autouse=True)
def shapes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = request.path.parent.name in ("models", "nn", "heads")
    if not checked or request.path.name.startswith("test_parity"):
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that are compared with theirs get their values afterwards, from `randomised`."""
    told = ("_with_their", "_timms_", "_their_own_code")
    if request.path.name.startswith("test_parity") or any(w in request.node.name for w in told):
        for layer in (torch.nn.Linear, torch.nn.Conv2d):
            monkeypatch.setattr(layer, "reset_parameters", lambda self: None)
        for draw in ("trunc_normal_", "normal_", "uniform_", "xavier_uniform_"):
            monkeypatch.setattr(torch.nn.init, draw, lambda tensor, *_, **__: tensor)
        if drawn := sys.modules.get("timm.layers.weight_init"):
            monkeypatch.setattr(drawn, "_trunc_normal_", lambda tensor, *_: tensor)


@pytest.fixture(autouse=True, scope="module")
def charts(request: pytest.FixtureRequest) -> Iterator[None]:
    """Drawing takes longer than a tiny run: charts are for the tests that look at pages."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name != "report" and request.path.name not in PAGES:
            patch.setattr("vitrail.report.charts.curves", lambda events, score: {})
            patch.setattr("vitrail.report.charts.calibration", lambda bins: "")
        yield


@pytest.fixture(autouse=True)
def speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a fast machine: what a recipe chooses is not to depend on what else this one does. Where a
    rate is told, it is measured for a moment.
    """
    facts = importlib.import_module("vitrail.recipes.facts")  # not the function of that name
    monkeypatch.setattr(facts, "matrix_rate", lambda *args, **options: 1e13)
    monkeypatch.setattr(tryout, "matrix_rate", lambda *args, **_: matrix_rate(*args, 256, 0.02))
    monkeypatch.setattr(compute, "_SECONDS", 0.02)


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def spelling() -> Iterator[None]:
    """A test that called a verb's function, and not `main`, has left its flags in messages."""
    yield
    spell()


@torch.no_grad()
def _randomised(model: Module) -> Module:
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():  # BatchNorm's count
            tensor.fill_(3)
        elif name.endswith("weight") and tensor.ndim > 1:
            tensor.normal_(std=tensor[0].numel() ** -0.5)
        elif tensor.ndim > 1 or name.endswith(("bias", "running_mean")):  # tokens, positions too
            tensor.normal_(std=0.5)
        else:  # norms, LayerScale, running variances
            tensor.uniform_(0.5, 1.5)
    return model.eval()


@pytest.fixture
def randomised() -> Callable[[Module], Module]:
    """Give a model random values everywhere, and outputs of order 1: zeros hide faults."""
    return _randomised
