"""`vitrail evaluate RUN`: a finished run, or an exported model, measured."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from vitrail import report
from vitrail.cli.dataset import ALL_AS_FOUND, OfAnyData
from vitrail.cli.parse import parse
from vitrail.data.pixels.greys import look_at_depths
from vitrail.deploy.bundle import is_bundle
from vitrail.errors import UsageError, setting
from vitrail.evaluation import Evaluation, evaluate_bundle
from vitrail.evaluation import evaluate as measure
from vitrail.metrics import MEASURES
from vitrail.metrics.retrieval import NUMBERS
from vitrail.runs import Run
from vitrail.runs.config import from_dict


@dataclass(frozen=True)
class EvaluateArgs:
    """What `vitrail evaluate` takes."""

    run: Annotated[Path, tyro.conf.Positional]
    """The folder that vitrail train wrote, or vitrail export."""
    data: str | None = None
    """Other images with the same classes; of a run that learned without labels, with any. Default:
    the run's own held-out images."""
    how: OfAnyData = ALL_AS_FOUND
    split: Literal["train", "val", "test", "all"] | None = None
    """Which part of them. Default: test if there is one, else val, else all."""
    checkpoint: str | None = None
    """last, best or step-NUMBER. Default: the one that the run keeps."""
    device: str | None = None
    """Default: the run's."""
    tta: str = "none"
    """Average several looks at each image: flip, scales or flip+scales."""
    tokens: str | None = None
    """Work with fewer tokens: tome:r=13 merges so many in each block of any ViT,
    dynamicvit:keep=0.5 changes what a DynamicViT keeps."""


_MUCH = 0.01
"""The share of values outside of a run's range of greys of which a user is told."""


def evaluate(args: Sequence[str]) -> dict[str, Any]:
    """Measure a run, print what came out and write a report; the run's own held-out images renew
    its report.html. Of an exported model nothing is written.
    """
    given = parse(EvaluateArgs, args, "evaluate", "Measure a run on held-out or other images.")
    started = time.perf_counter()
    if is_bundle(given.run):
        return _of_bundle(given, started)
    run = Run(given.run)
    evaluation = measure(
        run,
        data=given.data,
        columns=given.how.columns(),
        rules=given.how.rules(),
        masks=given.how.masks,
        split=given.split,
        checkpoint=given.checkpoint,
        device=given.device,
        tta=given.tta,
        tokens=given.tokens,
    )
    written = report.write_report(run, evaluation)
    for line in evaluation.summary():
        print(line)
    for note in evaluation.notes():
        print(f"note      {note}")
    if evaluation.skipped:
        print(f"skipped   {len(evaluation.skipped)} images that cannot be read")
    if given.data and (shown := evaluation.loaded.preprocess.grey_range):
        greys = look_at_depths(evaluation.source, given=shown).greys
        if greys and greys.clipped > _MUCH:
            print(f"greys     {greys.sentence()}")
    print(f"speed     {evaluation.images_per_second:.0f} images/s")
    print(f"written   {written}")
    return {
        "run": str(run.path),
        "checkpoint": str(evaluation.loaded.folder),
        "report": str(written),
        **numbers(evaluation),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _of_bundle(given: EvaluateArgs, started: float) -> dict[str, Any]:
    """Measure an exported model."""
    told_of = {"checkpoint": given.checkpoint, "device": given.device, "tokens": given.tokens}
    for name, value in (told_of | {"tta": None if given.tta == "none" else given.tta}).items():
        if value is not None:
            raise UsageError(
                f"{setting(name, value)} is for runs, and {given.run} was exported: it is as it "
                f"was made"
            )
    found = evaluate_bundle(
        given.run,
        data=given.data,
        columns=given.how.columns(),
        rules=given.how.rules(),
        masks=given.how.masks,
        split=given.split,
    )
    for line in found.summary():
        print(line)
    for note in found.notes():
        print(f"note      {note}")
    if found.skipped:
        print(f"skipped   {len(found.skipped)} images that cannot be read")
    print(f"speed     {found.images_per_second:.0f} images/s")
    learned = from_dict(found.bundle.learned, str(given.run))
    return {
        "bundle": str(found.bundle.folder),
        "to": found.bundle.runtime,
        "precision": found.bundle.precision,
        **told(learned.task, "none", found.metrics.to_dict()),
        "images_per_second": round(found.images_per_second, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }


def numbers(evaluation: Evaluation) -> dict[str, Any]:
    """What `--json` says of an evaluation."""
    return told(evaluation.loaded.config.task, evaluation.tta, evaluation.metrics.to_dict())


def told(task: str, tta: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What `--json` says of metrics.json's content: the numbers alone, with their intervals, and
    how they were measured.
    """
    names = (*MEASURES, *_OTHERS)
    estimates = {name: metrics[name] for name in names if name in metrics}
    return {
        "task": task,
        "metrics": {name: each and each["value"] for name, each in estimates.items()}
        | {name: metrics[name] for name in _LIMITS if name in metrics},
        "estimates": estimates,
        "over_all_classes": metrics.get("over_all_classes", {}),
        "images": metrics["images"],
        "tta": tta,
        **{name: metrics[name] for name in _HOW if name in metrics},
    }


_OTHERS = (
    *("miou", "pixel_accuracy", "mean_accuracy", "boundary_iou"),
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar", "f1"),
    *("knn", "probe", "std", "rankme", "alpha_req"),
    *NUMBERS,
)
"""The numbers of masks, of boxes, of features, and of images with texts."""
_LIMITS = ("max_detections",)
"""Numbers that others are measured under."""
_HOW = ("mode", "neighbours", "temperature", "bank", "chance", "dimensions", "texts")
"""What numbers of masks, and of features, have to be read with."""
