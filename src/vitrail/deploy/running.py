"""A run's model, in torch, as one that answers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vitrail.data.batches.batch import Batch
from vitrail.data.views.canvas import canvas_of
from vitrail.runs import Run
from vitrail.runs.load import LoadedRun, load
from vitrail.tasks.answers import AS_THEY_ARE
from vitrail.tasks.tta import looks
from vitrail.tasks.zero_shot import ZeroShot

if TYPE_CHECKING:
    from vitrail.deploy.predict import Shown


class Running:
    """What `Predictor` asks of a run."""

    coupled = False

    def __init__(
        self,
        run: Path | str,
        checkpoint: str | None,
        tta: str,
        tokens: str | None,
        labels: Sequence[str] = (),
        templates: Sequence[str] = AS_THEY_ARE,
    ) -> None:
        looks(tta)  # so that a wrong name is told at once
        self._loaded = load(run, checkpoint, tokens, tta)
        task = self._loaded.task
        self._asked = ZeroShot(task, labels, templates) if labels else task
        self.preprocess = self._loaded.preprocess
        self.reading = self._asked.reading
        self.card = card_of(self._loaded)
        self.threshold = threshold_in(measured_of(self._loaded.run))

    @torch.inference_mode()
    def answers(self, shown: Sequence["Shown"]) -> list[Any]:
        canvas = canvas_of(self.preprocess, [one.pixels for one in shown])
        batch = Batch((canvas,), {}, np.arange(len(shown)))
        return self._asked.answer(batch, [one.seen for one in shown])


def card_of(loaded: LoadedRun) -> dict[str, Any]:
    """What a user of the model wants to know of it, in plain values."""
    measured = measured_of(loaded.run)
    return {
        "name": loaded.run.path.name,
        "task": loaded.task.reading.kind,
        "classes": list(loaded.names),
        "engine": "torch",
        "precision": "float32",
        "image_size": list(loaded.preprocess.size),
        "resize": loaded.preprocess.resize,
        "metrics": estimates_in(measured),
        "images": measured.get("images"),
        "checkpoint": loaded.folder.name,
        "sha256": loaded.sha256,
    }


def measured_of(run: Run) -> dict[str, Any]:
    """What metrics.json says; nothing where the run was not measured."""
    try:
        found = json.loads((run.path / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def estimates_in(measured: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers that have an interval: each its value, low and high."""
    return {
        name: value
        for name, value in measured.items()
        if isinstance(value, dict) and value.keys() == {"value", "low", "high"}
    }


def threshold_in(measured: Mapping[str, Any]) -> float | None:
    """Of boxes, the score that gave the best F1, if anything in them was right."""
    best = measured.get("best")
    found = best.get("threshold") if isinstance(best, dict) else None
    return float(found) if isinstance(found, int | float) else None
