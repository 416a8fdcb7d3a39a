"""Phones: what ExecuTorch and LiteRT make of the models, whatever the family, the head and the
number of images; and a run that is exported, asked and measured there.

What needs the extra `mobile` is skipped where that is not installed.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vitrail as toolkit
from command import last_json, vitrail
from deploy.small import (
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
from models.families import DYNAMICVIT, KINDS, VIT
from vitrail.data.views.preprocess import Preprocess
from vitrail.deploy.bundle import Bundle
from vitrail.deploy.engines import Engine, Setting, engine_of
from vitrail.deploy.export.graph import Graph
from vitrail.deploy.export.int8 import KINDS as KINDS_OF_INT8
from vitrail.errors import DataError, UsageError, VitrailError
from vitrail.models import ModelConfig
from vitrail.models.tokens import with_tokens
from vitrail.tasks import (
    SegmentConfig,
    Task,
)
from vitrail.tasks.answers import Reading

REFUSED = {
    ("executorch", "dynamicvit"): "is not taken by ExecuTorch",  # no kernel for aten::sort
    ("litert", "dynamicvit"): "same element type",  # its topk gives int32 for int64
    ("litert", "deeplab"): "Output shape must be broadcastable",
}
"""What does not go there with the versions of today, and the words that say so."""

slow = pytest.mark.slow
ONE = Setting(threads=1)


@pytest.fixture(params=["executorch", "litert"])
def phone(request: pytest.FixtureRequest) -> str:
    """A runtime that is installed."""
    pytest.importorskip({"executorch": "executorch", "litert": "ai_edge_litert"}[request.param])
    return request.param


def exported(graph: Graph, preprocess: Preprocess, file: Path, phone: str, **how: Any) -> Engine:
    how = {"int8": None, **how}
    import_module(f"vitrail.deploy.export.{phone}").save(graph, preprocess, file, **how)
    return import_module(f"vitrail.deploy.engines.{phone}").load_file(file, ONE)


def noise(preprocess: Preprocess, views: int) -> np.ndarray:
    shape = views, preprocess.channels, *preprocess.size
    return np.random.default_rng(views).integers(0, 256, shape, np.uint8)


def refused(phone: str, what: str) -> AbstractContextManager[Any]:
    """Where it is not, nothing."""
    words = REFUSED.get((phone, what))
    return nullcontext() if words is None else pytest.raises(VitrailError, match=words)


def far(task: Task, preprocess: Preprocess, file: Path, phone: str) -> float:
    """As `apart` has it."""
    graph = Graph(task, preprocess)
    return apart(graph, exported(graph, preprocess, file, phone), preprocess)


@pytest.mark.parametrize(
    "name", [name if name == "vit" else pytest.param(name, marks=slow) for name in KINDS]
)
def test_every_family(name: str, phone: str, tmp_path: Path, randomised: Randomised) -> None:
    config = KINDS[name].config
    preprocess = preprocess_of(KINDS[name].size, config.channels)
    with refused(phone, name):
        assert far(classifier(config, randomised), preprocess, tmp_path / "model", phone) < 1e-4


@slow
@pytest.mark.parametrize("tokens", ["tome:r=3", "dynamicvit:keep=0.5", "distilled"])
def test_fewer_tokens_and_more(
    tokens: str, phone: str, tmp_path: Path, randomised: Randomised
) -> None:
    config: ModelConfig = replace(VIT, distilled=True)
    if ":" in tokens:
        config = with_tokens(DYNAMICVIT if tokens.startswith("dynamic") else VIT, tokens)
    task = classifier(config, randomised)
    with refused(phone, tokens.partition(":")[0]):
        assert far(task, Preprocess(size=SIZE), tmp_path / "model", phone) < 1e-4


@slow
@pytest.mark.parametrize("head", ["linear", "deeplab", "queries"])
def test_masks(head: str, phone: str, tmp_path: Path, randomised: Randomised) -> None:
    config = SegmentConfig(head=head)  # type: ignore[arg-type]
    task = segmenter(config, SQUASH, randomised)
    with refused(phone, head):
        assert far(task, SQUASH, tmp_path / "model", phone) < 1e-4


@slow
@pytest.mark.parametrize("head", ["dense", "queries"])
def test_boxes(head: str, phone: str, tmp_path: Path, randomised: Randomised) -> None:
    task = detector(LETTERBOX, randomised, head=head)
    assert far(task, LETTERBOX, tmp_path / "model", phone) < 1e-4


@pytest.mark.parametrize("int8", ["dynamic", "weights"])
def test_int8_is_near_and_smaller_and_looks_at_no_neighbour(
    int8: str, phone: str, tmp_path: Path, randomised: Randomised
) -> None:
    if phone not in KINDS_OF_INT8[int8].runtimes:  # type: ignore[index]
        pytest.skip(f"{phone} has no int8 of {int8}")
    wide = replace(VIT, width=128, mlp=256)
    graph = Graph(classifier(wide, randomised), SQUASH)
    asked = exported(graph, SQUASH, tmp_path / "int8", phone, int8=int8)
    views = [*noise(SQUASH, 7)]
    with torch.no_grad():
        wanted = graph(torch.from_numpy(np.stack(views)))["logits"].numpy()
    said = asked.run(views)["logits"]
    assert 1e-4 < np.linalg.norm(said - wanted) / np.linalg.norm(wanted) < 0.05
    assert np.array_equal(asked.run(views[3:4])["logits"], said[3:4])
    in_float = sum(weights.numel() * 4 for weights in graph.parameters())
    assert (tmp_path / "int8").stat().st_size < 0.5 * in_float


def test_threads_may_share_one(phone: str, tmp_path: Path, randomised: Randomised) -> None:
    graph = Graph(classifier(replace(VIT, depth=1), randomised), SQUASH)
    asked = exported(graph, SQUASH, tmp_path / "model", phone)
    views = [*noise(SQUASH, 8)]
    wanted = asked.run(views)["logits"]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            rows = pool.map(lambda view: asked.run([view])["logits"][0], views)
            assert np.array_equal(np.stack([*rows]), wanted)


@pytest.mark.parametrize("content", [b"", b"no model", bytes(4096)], ids=["empty", "text", "zeros"])
def test_what_is_no_model_is_refused(content: bytes, phone: str, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(content)
    engine = import_module(f"vitrail.deploy.engines.{phone}")
    with pytest.raises(DataError, match="is not taken by"):
        engine.load_file(tmp_path / "model")


@pytest.mark.parametrize(
    ("phone", "runtime", "converter"),
    [
        (
            "executorch",
            "executorch.extension.pybindings.portable_lib",
            "executorch.backends.xnnpack.partition.xnnpack_partitioner",
        ),
        ("litert", "ai_edge_litert.interpreter", "litert_torch"),
    ],
)
def test_what_to_install_is_told(
    phone: str,
    runtime: str,
    converter: str,
    tmp_path: Path,
    randomised: Randomised,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, runtime, None)
    monkeypatch.setitem(sys.modules, converter, None)
    graph = Graph(classifier(replace(VIT, depth=1), randomised), SQUASH)
    with pytest.raises(UsageError, match=r"pip install 'vitrail\[mobile\]'"):
        exported(graph, SQUASH, tmp_path / "model", phone)
    bundle = Bundle(
        folder=tmp_path,
        name="run",
        runtime=phone,
        precision="float32",
        file="model",
        takes="views",
        preprocess=SQUASH,
        reading=Reading(kind="classify", names=NAMES),
    )
    with pytest.raises(DataError, match=r"pip install 'vitrail\[mobile\]'"):
        engine_of(bundle)


def test_a_run_there_and_back(
    run: Path, photos: Path, phone: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    code, said, told = vitrail(capfd, "export", run, "--to", phone, "--out", out, "--json")
    assert code == 0, told
    assert last_json(said)["agreement"] == 1
    assert "resizing stays outside" in told
    about = Bundle.open(out)
    assert about.takes == "views" and about.made["batch"] == 1 and not about.coupled
    assert "## On a phone" in (out / "CARD.md").read_text()

    files = sorted(photos.glob("*/*.png"))[::5]
    asked, own = toolkit.Predictor(out), toolkit.Predictor(run)
    for found, wanted in zip(asked.many(files), own.many(files), strict=True):
        assert found.label == wanted.label
        assert found.probability == pytest.approx(wanted.probability, rel=1e-4)

    code, said, told = vitrail(capfd, "predict", out, files[0], "--json")
    assert code == 0, told
    assert last_json(said)["predictions"][0]["label"] == own(files[0]).label
    code, said, told = vitrail(capfd, "evaluate", out, "--data", photos, "--json")
    assert code == 0, told
    assert last_json(said)["images"] == 40


def test_int8_has_to_be_asked_for_by_its_kind(
    run: Path, phone: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    order = ["export", run, "--to", phone, "--precision", "int8", "--out", tmp_path / "bundle"]
    code, _, told = vitrail(capfd, *order)
    assert code == 2 and "choose dynamic" in told
    code, _, told = vitrail(capfd, *order, "--int8", "dynamic", "--budget", "20")
    assert code == 0, told
    about = Bundle.open(tmp_path / "bundle")
    assert about.precision == "int8" and about.made["int8"] == "dynamic" and not about.coupled
