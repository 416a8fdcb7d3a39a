"""Models trained for the same minutes on the same images, then judged and measured side by side.

A comparison is a folder:

compare.json, compare.csv, compare.html    what came out
NAME/                                      one model's run, as `vitrail train` makes it

How a model is trained is not this file's business: `compare` is handed the configs and a function
that makes a run of one, or goes on with the run that is there. So a comparison that was stopped
goes on when it is called again, and models can be added to one that is finished. One model that
fails is a row that says why. Speeds are measured when all are trained, in turns.
"""

import csv
import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vitrail.bench.hog import HOG, hog_labeller, train_hog
from vitrail.bench.macs import macs
from vitrail.bench.measure import (
    BATCH,
    Labeller,
    Place,
    Precision,
    Speed,
    model_labeller,
    speeds,
)
from vitrail.bench.memory import peak_memory
from vitrail.data.sources.layout import USUAL
from vitrail.disk import write_text
from vitrail.errors import DataError, UsageError, VitrailError, setting
from vitrail.metrics import Estimate, paired, share
from vitrail.models import ModelConfig, parameters_of
from vitrail.runs import Run, TrainConfig
from vitrail.runs.device import pick_device
from vitrail.runs.folder import environment

Train = Callable[[str, TrainConfig, Path], None]
"""Make the run of this name and config in this folder, or go on with the run that is there."""

_RESULT = "compare.json"
_INTERRUPTED = 128
"""Exit codes from here on are signals."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all models of a comparison share; another one is another comparison."""

    data: str
    minutes: float
    """Of training, each."""
    size: tuple[int, int] | None
    """(height, width) in pixels; None: each model's own."""
    recipe: str
    precision: Precision
    threads: int
    device: str
    seed: int
    image_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None
    parts: str = USUAL.parts
    follow_links: bool = USUAL.follow_links
    """As in `FolderRules`."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model of a comparison. None is what could not be had, or means nothing for it."""

    name: str
    error: str | None = None
    """Why there is nothing more."""
    size: tuple[int, int] | None = None
    accuracy: Estimate | None = None
    """Top-1, or mean average precision where images have several labels."""
    behind: Estimate | None = None
    """The best model's accuracy less this one's, image by image; None for the best itself, and
    where images have several labels."""
    parameters: int | None = None
    macs: int | None = None
    """Multiply-accumulates for one image, counted."""
    speed: Speed | None = None
    memory: int | None = None
    """Bytes that labelling a batch takes at most: see vitrail.bench.memory."""
    training_seconds: float | None = None
    epochs: float | None = None


class Judged(NamedTuple):
    """What the models were judged on."""

    metric: str
    """top1 or map."""
    part: str
    images: int
    trained_on: int
    classes: int
    most_common: float
    """The share of images that always saying the most common class gets right."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What came out; `rows` best first, those that failed last."""

    settings: Settings
    rows: tuple[Row, ...]
    judged: Judged | None
    """None if every model failed."""
    environment: Mapping[str, Any] = field(repr=False)

    @property
    def finished(self) -> list[Row]:
        """The rows with numbers."""
        return [row for row in self.rows if row.error is None]

    @property
    def level(self) -> list[Row]:
        """The rows that the images cannot tell from the best: the interval of what they are behind
        reaches zero.
        """
        return [row for row in self.finished if row.behind and row.behind.low <= 0]

    @property
    def frontier(self) -> set[str]:
        """Names of the models that no other beats in accuracy without being slower."""
        found, best = set(), -1.0
        for row in sorted(self.finished, key=_fastest_first):
            if row.accuracy is not None and row.accuracy.value > best:
                best = row.accuracy.value
                found.add(row.name)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as compare.json holds them."""
        rows = [_plain(row) for row in self.rows]
        judged = None if self.judged is None else self.judged._asdict()
        return {
            "settings": asdict(self.settings),
            "judged": judged,
            "models": rows,
            "batch": BATCH,
            "environment": dict(self.environment),
        }


def open_folder(out: Path, settings: Settings) -> None:
    """Make the comparison's folder, or see that the one that is there is of the same settings.

    Raises `UsageError` for a folder with anything else in it, or with other settings.
    """
    file = out / _RESULT
    if file.is_file():
        try:
            before = json.loads(file.read_text(encoding="utf-8"))["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{file} is damaged: choose another folder with {setting('out')}"
            ) from error
        now = json.loads(json.dumps(asdict(settings)))
        before = asdict(USUAL) | before  # what folders of before do not say
        changed = [
            f"{name} {before.get(name)}, not {now[name]}"
            for name in now
            if before.get(name) != now[name]
        ]
        if changed:
            raise UsageError(
                f"{out} is another comparison, of {', '.join(changed)}: give it the same settings "
                f"to go on with it, or choose another folder with {setting('out')}"
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"{out} is not empty and no comparison: choose another folder with {setting('out')}"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make the folder {out}: {error.strerror}") from error
    write_text(out / _RESULT, json.dumps({"settings": asdict(settings)}, indent=1))


def compare(
    settings: Settings,
    configs: Mapping[str, TrainConfig | UsageError],
    out: Path,
    train: Train,
    *,
    seconds: float = 3.0,
    notify: Callable[[str], None] = lambda sentence: None,
) -> Comparison:
    """Train what is not trained yet, judge and measure all, write compare.json and compare.csv.

    `configs`: name to config, of which the model `hog` is `vitrail.bench.hog`; or to the reason why
    the model cannot take part. `seconds` is how long each model's speed is measured at each batch
    size. Raises as `open_folder` does, and whatever `train` raises on an interruption.
    """
    open_folder(out, settings)
    rows: dict[str, Row] = {}
    for number, (name, config) in enumerate(configs.items(), start=1):
        folder = out / name
        notify(f"{name}, {number} of {len(configs)}{', is trained' if _done(folder) else ''}")
        try:
            if isinstance(config, UsageError):
                raise config
            if not _done(folder):
                _learn(name, config, folder, train, notify)
            rows[name] = _result(name, config, folder)
        except (VitrailError, torch.OutOfMemoryError, MemoryError) as error:
            if getattr(error, "exit_code", 0) >= _INTERRUPTED:
                raise
            reason = str(error).splitlines()[0] if str(error) else "too little memory"
            notify(f"{name} failed: {reason}")
            rows[name] = Row(name=name, error=reason)
    done = sorted((row for row in rows.values() if row.error is None), key=_best_first)
    _check_same_split([out / row.name for row in done])
    done = [replace(row, behind=_behind(out / done[0].name, out / row.name)) for row in done]
    notify(f"measuring speed and memory of {len(done)} models, in turns")
    rows |= {row.name: row for row in _measured(done, out, settings, seconds)}
    comparison = Comparison(
        settings=settings,
        rows=tuple(sorted(rows.values(), key=_best_first)),
        judged=_judged(out / done[0].name) if done else None,
        environment=environment(),
    )
    write_text(out / _RESULT, json.dumps(comparison.to_dict(), indent=1))
    write_text(out / "compare.csv", _table(comparison))
    return comparison


def _done(folder: Path) -> bool:
    """Whether its training is over: the last file that is written is there."""
    return (folder / ("metrics.json" if folder.name == HOG else "report.html")).is_file()


def _learn(
    name: str, config: TrainConfig, folder: Path, train: Train, notify: Callable[[str], None]
) -> None:
    if name == HOG:
        train_hog(config, folder, notify)
        return
    if folder.is_dir() and not ((folder / "config.yaml").is_file() and Run(folder).checkpoints()):
        shutil.rmtree(folder)  # stopped before there was anything to go on with
    train(name, config, folder)


def _result(name: str, config: TrainConfig, folder: Path) -> Row:
    """What a finished training says of itself."""
    metrics = _read(folder / "metrics.json")
    if metrics["multi_label"]:
        accuracy = metrics["map"] and Estimate(**metrics["map"])
    else:  # worked out anew: a run of before has an interval that may be none
        accuracy = share(metrics["top1"]["value"], metrics["images"])
    row = Row(name=name, size=config.model.image_size, accuracy=accuracy)
    if name == HOG:
        about = _read(folder / "hog.json")
        return replace(row, parameters=about["parameters"], training_seconds=about["seconds"])
    run = Run(folder)
    own = run.config()
    steps = [event for event in run.metrics() if "loss" in event]
    batches = _images(folder, "train") // min(own.data.batch_size, _images(folder, "train"))
    return replace(
        row,
        size=own.model.image_size,
        parameters=parameters_of(own.model),
        macs=macs(own.model),
        training_seconds=steps[-1]["seconds"],
        epochs=steps[-1]["step"] * own.accumulate / batches,
    )


def _judged(folder: Path) -> Judged:
    metrics = _read(folder / "metrics.json")
    support = [each["support"] for each in metrics["per_class"]]
    part = metrics.get("part") or ("test" if _images(folder, "test") else "val")
    return Judged(
        metric="map" if metrics["multi_label"] else "top1",
        part=part,
        images=metrics["images"],
        trained_on=_images(folder, "train"),
        classes=len(support),
        most_common=max(support) / metrics["images"],
    )


def _behind(best: Path, other: Path) -> Estimate | None:
    """How much better `best` is, image by image: what is hard for both does not count, so the
    interval is narrower than those of the two accuracies.
    """
    if best == other or (_read(best / "metrics.json"))["multi_label"]:
        return None
    ours, theirs = _right(best), _right(other)
    shared = [key for key in ours if key in theirs]
    return paired(
        sum(ours[key] > theirs[key] for key in shared),
        sum(ours[key] < theirs[key] for key in shared),
        len(shared),
    )


def _right(folder: Path) -> dict[str, int]:
    """Which images were labelled rightly, by key."""
    with (folder / "predictions.csv").open(encoding="utf-8", newline="") as stream:
        return {row["key"]: int(row["label"] == row["predicted"]) for row in csv.DictReader(stream)}


def _images(folder: Path, part: str) -> int:
    """How many images of the split belong to a part."""
    with (folder / "split.csv").open(encoding="utf-8", newline="") as stream:
        return sum(row["split"] == part for row in csv.DictReader(stream))


def _check_same_split(folders: Sequence[Path]) -> None:
    """Raises `DataError` where images were added or removed since the first model was trained."""
    splits = {folder: (folder / "split.csv").read_bytes() for folder in folders}
    for folder, split in splits.items():
        if split != splits[folders[0]]:
            raise DataError(
                f"the images changed between the training of {folders[0].name} and of "
                f"{folder.name}: compare again in another folder, with {setting('out')}"
            )


def _measured(rows: Sequence[Row], out: Path, settings: Settings, seconds: float) -> list[Row]:
    device = str(pick_device(settings.device))
    place = Place(device, settings.precision, settings.threads)
    subjects: dict[str, ModelConfig | Path] = {
        row.name: out / HOG if row.name == HOG else Run(out / row.name).config().model
        for row in rows
    }
    found = speeds(
        {name: _labeller(each, device) for name, each in subjects.items()}, place, seconds
    )
    memory = peak_memory(subjects, place)
    return [replace(row, speed=found[row.name], memory=memory[row.name]) for row in rows]


def _labeller(subject: ModelConfig | Path, device: str) -> Labeller:
    if isinstance(subject, Path):
        return hog_labeller(subject)
    return model_labeller(subject, device)


def _best_first(row: Row) -> tuple[bool, float]:
    return row.error is not None, -row.accuracy.value if row.accuracy else 0.0


def _fastest_first(row: Row) -> tuple[float, float]:
    speed = row.speed.images_per_second if row.speed else 0.0
    return -speed, -row.accuracy.value if row.accuracy else 0.0


def _plain(row: Row) -> dict[str, Any]:
    plain = asdict(row)
    for name in ("accuracy", "behind", "speed"):
        value = getattr(row, name)
        plain[name] = None if value is None else value._asdict()
    return plain


def _table(comparison: Comparison) -> str:
    """compare.csv: one flat line a model."""
    rows = []
    for row in comparison.rows:
        height, width = row.size or ("", "")
        accuracy = row.accuracy or ("", "", "")
        rows.append(
            {
                "model": row.name,
                **dict(zip(("accuracy", "accuracy_low", "accuracy_high"), accuracy, strict=True)),
                "parameters": row.parameters,
                "macs": row.macs,
                "images_per_second": row.speed and row.speed.images_per_second,
                "latency_seconds": row.speed and row.speed.latency,
                "latency_p95_seconds": row.speed and row.speed.latency_p95,
                "peak_memory_bytes": row.memory,
                "training_seconds": row.training_seconds,
                "epochs": row.epochs,
                "height": height,
                "width": width,
                "error": row.error,
            }
        )
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is missing or damaged: {error}") from error
