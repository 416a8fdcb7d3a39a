"""`vitrail evaluate RUN` and `vitrail predict RUN IMAGE...`: a finished run at work."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from vitrail.cli.parse import NO_COLUMNS, DataColumns, parse
from vitrail.data import IMAGE_EXTENSIONS, UnreadableImage
from vitrail.data.greys import look_at_depths
from vitrail.deploy import Predictor
from vitrail.errors import DataError, UsageError
from vitrail.evaluation import evaluate as measure
from vitrail.metrics import MEASURES
from vitrail.report import write_report
from vitrail.runs import Run


@dataclass(frozen=True)
class EvaluateArgs:
    """What `vitrail evaluate` takes."""

    run: Annotated[Path, tyro.conf.Positional]
    """The folder that vitrail train wrote."""
    data: str | None = None
    """Other images with the same classes. Default: the run's own held-out images."""
    columns: DataColumns = NO_COLUMNS
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


@dataclass(frozen=True)
class PredictArgs:
    """What `vitrail predict` takes."""

    run: Annotated[Path, tyro.conf.Positional]
    """The folder that vitrail train wrote."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files, or folders of them."""
    top: int = 3
    """How many classes to show for each image."""
    checkpoint: str | None = None
    tta: str = "none"
    """Average several looks at each image: flip, scales or flip+scales."""
    tokens: str | None = None
    """Work with fewer tokens: tome:r=13 merges so many in each block of any ViT."""


_MUCH = 0.01
"""The share of values outside of a run's range of greys of which a user is told."""


def evaluate(args: Sequence[str]) -> dict[str, Any]:
    """Measure a run and print what came out; its own held-out images renew its report."""
    given = parse(EvaluateArgs, args, "evaluate", "Measure a run on held-out or other images.")
    started = time.perf_counter()
    run = Run(given.run)
    evaluation = measure(
        run,
        data=given.data,
        columns=given.columns.columns(),
        split=given.split,
        checkpoint=given.checkpoint,
        device=given.device,
        tta=given.tta,
        tokens=given.tokens,
    )
    written = run.path / f"metrics{evaluation.suffix}.json"
    if evaluation.held_out:
        written = write_report(run, evaluation)
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
        **numbers(evaluation.metrics.to_dict()),
        "seconds": round(time.perf_counter() - started, 1),
    }


def numbers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What `--json` says of metrics.json's content: the numbers alone, and with their intervals."""
    estimates = {name: metrics[name] for name in MEASURES if name in metrics}
    return {
        "metrics": {name: each and each["value"] for name, each in estimates.items()},
        "estimates": estimates,
        "over_all_classes": metrics["over_all_classes"],
    }


def predict(args: Sequence[str]) -> dict[str, Any]:
    """Label images. A damaged one is listed, the others are labelled all the same."""
    given = parse(PredictArgs, args, "predict", "Label images with a run.")
    if given.top < 1:
        raise UsageError(f"--top must be at least 1, not {given.top}")
    files = [file for path in given.images for file in _files(path)]
    predictor = Predictor(given.run, given.checkpoint, given.tta, given.tokens)
    rows: list[dict[str, Any]] = []
    failed = 0
    for file in files:
        try:
            found = predictor(file)
        except UnreadableImage as error:
            failed += 1
            print(f"{file}  {error}")
            rows.append({"image": str(file), "error": str(error)})
            continue
        top = dict(list(found.probabilities.items())[: given.top])
        print(f"{file}  " + "  ".join(f"{label} {p:.1%}" for label, p in top.items()))
        rows.append({"image": str(file), "label": found.label, "probabilities": top})
    return {"predictions": rows, "exit_code": 3 if failed else 0}


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_EXTENSIONS)
        if not found:
            raise DataError(f"no image in {path}")
        return found
    if not path.exists():
        raise DataError(f"no such image: {path}")
    return [path]
