"""`vitrail evaluate RUN` and `vitrail predict RUN IMAGE...`: a finished run at work."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from vitrail.cli.dataset import AS_FOUND, OfData
from vitrail.cli.parse import parse
from vitrail.data import UnreadableImage
from vitrail.data.pixels.greys import look_at_depths
from vitrail.data.sources.source import LeftOut
from vitrail.data.sources.walk import walk
from vitrail.deploy import Predictor
from vitrail.deploy.answers import write_answer
from vitrail.errors import DataError, UsageError
from vitrail.evaluation import evaluate as measure
from vitrail.metrics import MEASURES
from vitrail.report import write_report
from vitrail.runs import Run
from vitrail.tasks import Prediction, Segmentation


@dataclass(frozen=True)
class EvaluateArgs:
    """What `vitrail evaluate` takes."""

    run: Annotated[Path, tyro.conf.Positional]
    """The folder that vitrail train wrote."""
    data: str | None = None
    """Other images with the same classes. Default: the run's own held-out images."""
    how: OfData = AS_FOUND
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
    out: Path | None = None
    """Of masks: a folder for NAME.png, the mask, and NAME-overlay.jpg, what it looks like."""
    follow_links: Annotated[bool, tyro.conf.arg(name="data.follow-links")] = False
    """Follow symbolic links to folders elsewhere."""
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
        columns=given.how.columns(),
        rules=given.how.rules(),
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
    names = (*MEASURES, *_OTHERS)
    estimates = {name: metrics[name] for name in names if name in metrics}
    return {
        "metrics": {name: each and each["value"] for name, each in estimates.items()},
        "estimates": estimates,
        "over_all_classes": metrics.get("over_all_classes", {}),
    }


_OTHERS = (
    *("miou", "pixel_accuracy", "mean_accuracy", "boundary_iou"),
    *("knn", "probe", "std", "rankme"),
)
"""The numbers of masks, and of features."""


def predict(args: Sequence[str]) -> dict[str, Any]:
    """Label images. A damaged one is listed, the others are labelled all the same."""
    given = parse(PredictArgs, args, "predict", "Label images with a run.")
    if given.top < 1:
        raise UsageError(f"--top must be at least 1, not {given.top}")
    files, left_out = _files(given.images, given.follow_links)
    predictor = Predictor(given.run, given.checkpoint, given.tta, given.tokens)
    names = _names(files, given.out)
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
        rows.append({"image": str(file), **_told(found, file, given.top)})
        if given.out is not None:
            rows[-1] |= write_answer(found, file, given.out, names[file])
    for one in left_out:
        print(one.sentence())
    told = [asdict(one) for one in left_out]
    return {"predictions": rows, "left_out": told, "exit_code": 3 if failed else 0}


def _told(found: Any, file: Path, top: int) -> dict[str, Any]:
    """An answer in a line for the terminal, and as plain values."""
    if isinstance(found, Prediction):
        first = dict(list(found.probabilities.items())[:top])
        print(f"{file}  " + "  ".join(f"{label} {p:.1%}" for label, p in first.items()))
        return {"label": found.label, "probabilities": first}
    if isinstance(found, Segmentation):
        first = dict(list(found.shares.items())[:top])
        print(f"{file}  " + "  ".join(f"{name} {share:.1%}" for name, share in first.items()))
        return {"shares": first}
    print(f"{file}  {len(found.features)} numbers")
    return {"features": found.features.tolist()}


def _names(files: Sequence[Path], out: Path | None) -> dict[Path, str]:
    """What each file's answer is called in `out`: its stem; where two have one, with the ending."""
    if out is None:
        return {}
    stems = Counter(file.stem for file in files)
    names = {file: file.stem if stems[file.stem] == 1 else file.name for file in files}
    if len(set(names.values())) < len(names):
        double = next(name for name, n in Counter(names.values()).items() if n > 1)
        raise UsageError(f"two images are called {double}: give them to --out in two calls")
    return names


def _files(places: Sequence[Path], follow_links: bool) -> tuple[list[Path], list[LeftOut]]:
    """The images that are named, or lie in the folders that are; and what else these hold."""
    files: list[Path] = []
    left_out: list[LeftOut] = []
    for place in places:
        if not place.is_dir():
            if not place.exists():
                raise DataError(f"no such image: {place}")
            files.append(place)
            continue
        tree = walk(str(place), follow_links=follow_links)
        found = tree.images()
        if not found:
            told = "".join(f"; {one.sentence()}" for one in tree.left_out)
            raise DataError(f"no image in {place}{told}")
        files += [place / path for path in found]
        left_out += tree.left_out
    return files, left_out
