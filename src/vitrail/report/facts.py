"""What made the run: model, data, training, machine, in rows of a name and a value."""

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from vitrail.data.pixels.greys import range_text
from vitrail.data.views.augment import AugmentConfig
from vitrail.evaluation import Evaluation
from vitrail.models import ViTConfig, count_parameters
from vitrail.report.words import duration
from vitrail.runs import Run, TrainConfig, TuneConfig
from vitrail.tasks import TASKS
from vitrail.tasks.tta import LOOKS

_ALIKE = asdict(TuneConfig())

Facts = dict[str, list[tuple[str, str]]]
"""Group -> rows."""
_BY = "\N{MULTIPLICATION SIGN}"
_STEMS = {
    "patch": "linear projection",
    "overlap": "one convolution, overlapping",
    "patchify": "4 x 4 patches, then halved (ConvNeXt)",
    "conv": "convolutions",
    "resnet": "a ResNet",
}
_SHOWN = {"whole": "all of an image at once", "slide": "window by window"}
_READ_OUT = {
    "class": "class token",
    "mean": "mean of the tokens",
    "class_mean": "class token and mean of the tokens",
    "map": "attention pooling",
    "first": "first patch",
}


def facts(evaluation: Evaluation, events: Sequence[dict[str, Any]]) -> Facts:
    """All of them; `events` are the lines of metrics.jsonl."""
    return {
        "Model": list(_model(evaluation)),
        "Data": list(_data(evaluation)),
        "Training": list(_training(evaluation.loaded.config, events)),
        "Machine": list(_machine(evaluation.loaded.run.environment())),
    }


def unreadable(evaluation: Evaluation) -> dict[str, str]:
    """Key and reason of the images that this evaluation could not read, or of the run's own data
    training.
    """
    file = evaluation.loaded.run.path / "skipped.csv"
    if not evaluation.own or not file.is_file():
        return evaluation.skipped
    with file.open(encoding="utf-8", newline="") as stream:
        return {row["key"]: row["reason"] for row in csv.DictReader(stream)} | evaluation.skipped


def _model(evaluation: Evaluation) -> Iterator[tuple[str, str]]:
    model = evaluation.loaded.model
    config = model.config
    (height, width), (gh, gw) = config.image_size, config.grid
    yield "name", evaluation.loaded.config.row or config.family
    yield "parameters", f"{count_parameters(model):,}"
    yield "shape", config.shape
    yield "image", f"{height} {_BY} {width} pixels, {config.channels} channels"
    if isinstance(config, ViTConfig):
        ph, pw = config.patch
        yield "patches", f"{ph} {_BY} {pw} pixels, {gh} {_BY} {gw} of them"
        yield "stem", _STEMS[config.stem]
        yield "position", config.position
        if evaluation.loaded.config.task not in ("segment", "detect"):
            yield "read out by", _READ_OUT[config.pool]
    else:
        (down, right) = config.stride
        yield "last map", f"{gh} {_BY} {gw}, one cell for {down} {_BY} {right} pixels"
    if evaluation.loaded.config.text is not None:
        name, text = evaluation.loaded.config.text_row, model.text.config
        yield "text tower", f"{name or text.family}: {text.shape}"
        yield "compared", f"vectors of {model.width} numbers"
    if evaluation.loaded.config.task == "segment":
        yield "head", evaluation.loaded.config.segment.head
    if evaluation.loaded.config.task == "detect":
        yield "head", evaluation.loaded.config.detect.head


def _data(evaluation: Evaluation) -> Iterator[tuple[str, str]]:
    yield "trained on", evaluation.loaded.config.data.path
    if evaluation.data != evaluation.loaded.config.data.path:
        yield "measured on", evaluation.data
    for part, images in _parts(evaluation.loaded.run).items():
        yield {"train": "training", "val": "validation"}.get(part, part), f"{images:,} images"
    yield "measured part", f"{evaluation.part}, {evaluation.metrics.images:,} images"
    if evaluation.loaded.names:
        yield "classes", f"{len(evaluation.loaded.names)}"
    preprocess = evaluation.loaded.preprocess
    yield "fitted by", f"{preprocess.resize}, {preprocess.interpolation}"
    if preprocess.grey_range is not None:
        yield "deep greys", f"{range_text(preprocess.grey_range)} shown as black to white"
    if evaluation.loaded.config.task == "segment":
        yield "shown", _SHOWN[evaluation.loaded.config.segment.mode]
    if evaluation.loaded.config.task == "detect":
        yield "boxes", f"at most {evaluation.metrics.max_detections:,} an image"
    if evaluation.tokens is not None:
        yield "fewer tokens by", evaluation.tokens
    if evaluation.tta != "none":
        yield "averaged over", f"{len(LOOKS[evaluation.tta])} looks at each image: {evaluation.tta}"


def _parts(run: Run) -> Counter[str]:
    if not run.split_file.is_file():
        return Counter()
    with run.split_file.open(encoding="utf-8", newline="") as stream:
        return Counter(row["split"] for row in csv.DictReader(stream))


def _training(config: TrainConfig, events: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    if config.method == "probe":
        yield from _probe(config, events)
        return
    steps = [event for event in events if "loss" in event]
    batch = config.data.batch_size * config.accumulate
    if steps:
        last = steps[-1]
        seen = last["step"] * batch
        yield "length", f"{duration(last['seconds'])}, {last['step']:,} steps of {batch} images"
        yield "images seen", f"{seen:,}, in epoch {last['epoch'] + 1}"
    tune, optim = config.tune, config.optim
    if tune != TuneConfig():
        asked = {name: value for name, value in asdict(tune).items() if value != _ALIKE[name]}
        yield "fine-tuning", ", ".join(f"{name} {_plain(value)}" for name, value in asked.items())
    if config.distill.teacher is not None and TASKS[config.task].teacher == "answers":
        yield "teacher", f"{config.distill.teacher}, {config.distill.kind} labels"
    yield "optimiser", f"{optim.name}, learning rate {optim.lr:g}, {optim.schedule}"
    end = "" if optim.final_weight_decay is None else f" to {optim.final_weight_decay:g}"
    yield "weight decay", f"{optim.weight_decay:g}{end}"
    views = [_augmentation(view) for view in config.views()]
    if len(views) == 1:
        yield "augmentation", views[0]
    else:
        yield from ((f"view {i}", view) for i, view in enumerate(views, 1))
    yield from TASKS[config.task].facts(config)
    if config.classify.label_smoothing:
        yield "label smoothing", f"{config.classify.label_smoothing:g}"
    if config.ema:
        yield "weights", f"running average, decay {config.ema:g}"
    yield "precision", config.precision
    yield "seed", str(config.seed)


def _probe(config: TrainConfig, events: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    trials = [event for event in events if "inner_loss" in event]
    yield "method", "linear probe: the head alone, solved on features computed once"
    yield "length", duration(max((event["seconds"] for event in events), default=0.0))
    if trials:
        best = min(trials, key=lambda trial: float(trial["inner_loss"]))
        yield "strength", f"{best['inner_strength']:.2g}, of {len(trials)}, by cross-validation"
    yield "augmentation", "mirror images" if config.augment.hflip else "none"
    if config.classify.label_smoothing:
        yield "label smoothing", f"{config.classify.label_smoothing:g}"
    yield "precision", config.precision
    yield "seed", str(config.seed)


def _plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _augmentation(config: AugmentConfig) -> str:
    scales = " to ".join(f"{scale:g}" for scale in config.scale or ())
    parts = {
        f" {_BY} ".join(map(str, config.size or ())) + " pixels": config.size,
        f"crops of {config.crop_scale[0]:.0%} and more of the area": config.crops,
        f"scaled by {scales}": scales,
        f"shifts up to {config.shift} pixels": config.shift,
        "mirror images": config.hflip,
        "upside down": config.vflip,
        config.policy: config.policy != "none",
        f"colour jitter {config.jitter:g}": config.jitter,
        f"without colours {config.grey:.0%}": config.grey,
        f"blur {config.blur:.0%}": config.blur,
        f"solarised {config.solarize:.0%}": config.solarize,
        f"erasing {config.erase:g}": config.erase,
        f"mixup {config.mixup:g}": config.mixup,
        f"cutmix {config.cutmix:g}": config.cutmix,
    }
    return ", ".join(name for name, used in parts.items() if used) or "none"


def _machine(environment: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "started", str(environment.get("started", "")).replace("T", " ")[:16]
    if environment.get("gpu"):
        yield "GPU", str(environment["gpu"])
    yield "processor", str(environment.get("processor", ""))
    yield "cores", f"{environment.get('cores')}, {environment.get('threads')} threads"
    yield "system", str(environment.get("system", ""))
    versions = {"Python": environment.get("python", ""), **environment.get("versions", {})}
    yield "software", ", ".join(f"{name} {version}" for name, version in versions.items())
