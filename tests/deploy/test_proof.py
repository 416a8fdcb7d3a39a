"""When an exported model is what the run is: answers that are the same, what was lost, and what is
made of it; and the setting that a machine was found to like.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vitrail.deploy import tuning
from vitrail.deploy.bundle import SUMS, Bundle
from vitrail.deploy.engines import Setting
from vitrail.deploy.export.alike import same_answer
from vitrail.deploy.export.make import ExportConfig, hold_answers, hold_budget
from vitrail.deploy.export.proof import Proof
from vitrail.errors import DataError
from vitrail.metrics import Estimate, paired
from vitrail.tasks import Detections, Embedding, Prediction, Segmentation

NAMES = ("a", "b")


def said(label: str, a: float, b: float) -> Prediction:
    return Prediction(label, max(a, b), {"a": a, "b": b})


def found(*rows: tuple[list[float], int, float]) -> Detections:
    boxes, labels, scores = zip(*rows, strict=True) if rows else ([], [], [])
    return Detections(
        np.array(boxes, float).reshape(-1, 4), np.array(labels, int), np.array(scores, float), NAMES
    )


def test_the_same_answer() -> None:
    assert same_answer(said("a", 0.6, 0.4), said("a", 0.9, 0.1))
    assert not same_answer(said("a", 0.51, 0.49), said("b", 0.49, 0.51))
    both, one = said("a", 0.9, 0.6), said("a", 0.9, 0.4)
    assert same_answer(both, one) and not same_answer(both, one, several=True)
    mask = np.zeros((40, 50), np.int16)
    other = mask.copy()
    other[0, :2] = 1  # a thousandth
    assert same_answer(Segmentation(mask, NAMES), Segmentation(other, NAMES))
    other[0, 2] = 1
    assert not same_answer(Segmentation(mask, NAMES), Segmentation(other, NAMES))
    near = np.array([1.0, 0.01], np.float32)
    assert same_answer(Embedding(np.array([1.0, 0], np.float32)), Embedding(near))
    assert not same_answer(Embedding(near), Embedding(-near))


def test_boxes_are_the_same_where_each_has_its_twin() -> None:
    one = found(([0, 0, 100, 100], 0, 0.9), ([0, 0, 9, 9], 1, 0.05))
    assert same_answer(one, found(([1, 0, 100, 101], 0, 0.8)))  # the second is too weak to count
    assert not same_answer(one, found(([1, 0, 100, 101], 1, 0.8)))
    assert not same_answer(one, found(([20, 0, 100, 100], 0, 0.9)))
    assert not same_answer(one, found()) and not same_answer(found(), one)
    assert same_answer(found(), found())


def proof(lost: Estimate, same: int, images: int) -> Proof:
    alike = np.arange(images) < same
    return Proof(images, None, None, alike, tuple(map(str, range(images))), lost)


@pytest.mark.parametrize(
    ("lost", "budget", "outcome"),
    [
        (paired(0, 0, 10_000), 0.5, "holds"),
        (paired(20, 40, 10_000), 0.5, "holds"),
        (paired(10, 60, 10_000), 0.5, "refused"),  # 0.5 lost, and up to 0.67
        (paired(1, 1, 364), 0.5, "few"),
        (paired(1, 4, 364), 0.5, "refused"),
        (paired(1, 4, 364), 2.5, "holds"),
    ],
)
def test_a_budget(lost: Estimate, budget: float, outcome: str) -> None:
    lost = Estimate(-lost.value, -lost.high, -lost.low)  # `paired` is of what is gained
    config = ExportConfig(to="openvino", precision="int8", budget=budget)
    told: list[str] = []
    if outcome == "refused":
        with pytest.raises(DataError, match=r"points lost .* and the budget is"):
            hold_budget(proof(lost, 350, 364), config, told.append)
    else:
        hold_budget(proof(lost, 350, 364), config, told.append)
    assert bool(told) == (outcome == "few")


def test_float_has_no_budget() -> None:
    hold_answers(proof(paired(0, 0, 1000), 999, 1000))
    with pytest.raises(DataError, match=r"other answers to 2 of 1000 held-out images \(998, 999\)"):
        hold_answers(proof(paired(0, 0, 1000), 998, 1000))


def test_what_a_machine_likes_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    (tmp_path / SUMS).write_text("x")
    bundle: Any = object.__new__(Bundle)
    object.__setattr__(bundle, "folder", tmp_path)
    object.__setattr__(bundle, "runtime", "onnx")
    best = tuning.Tuned(Setting(), Setting(streams=2))
    monkeypatch.setattr(tuning, "_measured_apart", lambda _: best)
    assert tuning.tuned(bundle) == best
    (file,) = (tmp_path / "cache" / "engines").iterdir()
    monkeypatch.setattr(tuning, "_measured_apart", lambda _: pytest.fail("measured twice"))
    assert tuning.tuned(bundle) == best
    monkeypatch.setattr(tuning, "_measured_apart", lambda _: tuning.Tuned(Setting(1), Setting(1)))
    (tmp_path / SUMS).write_text("another bundle")
    assert tuning.tuned(bundle).alone == Setting(1)
    (tmp_path / SUMS).write_text("x")
    file.write_text(json.dumps({"alone": 3}))  # damaged: measured again
    object.__setattr__(bundle, "runtime", "nothing")
    with pytest.raises(DataError, match="unknown runtime 'nothing'"):
        tuning.tuned(bundle)
    object.__setattr__(bundle, "runtime", "onnx")
    assert tuning.tuned(bundle).alone == Setting(1)
