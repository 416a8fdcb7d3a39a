"""`vitrail bench`: models side by side, trained and measured, or measured alone."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from vitrail import job
from vitrail.bench.compare import Comparison, Row, Settings, Train, compare
from vitrail.bench.hog import HOG, check_installed
from vitrail.bench.macs import macs
from vitrail.bench.measure import (
    BATCH,
    Labeller,
    Place,
    Precision,
    Speed,
    engine_labeller,
    labeller,
    model_labeller,
    speeds,
)
from vitrail.bench.memory import peak_memory
from vitrail.bench.patches import BASE, Verdict, measure_patches, verdicts
from vitrail.cli.dataset import AS_FOUND, OfData
from vitrail.cli.parse import parse
from vitrail.cli.screen import TrainingScreen, say
from vitrail.cli.table import Column, print_table, print_text
from vitrail.cli.words import Word, run_word
from vitrail.data import open_data
from vitrail.data.split import task_of
from vitrail.deploy.bundle import Bundle, is_bundle
from vitrail.errors import UsageError, VitrailError, unknown_name
from vitrail.models import MODELS, ModelConfig, ViTConfig, model_config, parameters_of
from vitrail.recipes import RECIPES, facts
from vitrail.report import words
from vitrail.report.comparison import write_comparison
from vitrail.runs import OptimConfig, Run, TrainConfig
from vitrail.runs.device import pick_device
from vitrail.runs.load import load
from vitrail.runs.machine import native_precision

_MODELS = "vit_s16,mixer_s16,r26_s32,twins_svt_s,dynamicvit_s16,mobilevit_s,resnet50"
_EVALUATIONS = 4
"""Of each training: enough for a curve, for it is wall time that no model learns in."""

_ABOUT = """Train every model for the same minutes on the same images, and compare what came out.

DATA is what `vitrail train` takes. Each model's run is a folder inside --out, as `vitrail train`
makes it. A comparison that was stopped goes on when the same command is given with its --out, and
a longer list of --models adds to it."""


@dataclass(frozen=True)
class CompareArgs:
    """What `vitrail bench compare` takes."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """The images."""
    how: OfData = AS_FOUND
    models: str = _MODELS
    """Names that `vitrail models` lists, with commas between them; and hog, the traditional
    baseline."""
    minutes: float = 3.0
    """Of training, for each model."""
    size: int | None = None
    """Side of the square images in pixels. Default: the recipe's, or the next that all models
    take; else each model's own."""
    weights: str = "none"
    """Only none: all models start at random, so that only they differ."""
    out: Path | None = None
    """The comparison's folder. Default: runs/compare-N."""
    precision: Precision | None = None
    """Default: bfloat16 where the machine has it."""
    threads: int | None = None
    """CPU threads of one operation. Default: torch's choice."""
    device: str = "auto"
    seed: int = 0


@dataclass(frozen=True)
class SpeedArgs:
    """What `vitrail bench speed` takes."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODELS")]
    """Names that `vitrail models` lists, with commas between them; folders that vitrail train or
    vitrail export wrote."""
    batch: int = BATCH
    """How many images at once, for images a second; latency is that of one alone."""
    size: int | None = None
    """Side of the square images in pixels. Default: each model's own."""
    precision: Precision | None = None
    """Default: bfloat16 where the machine has it."""
    threads: int | None = None
    """CPU threads of one operation. Default: torch's choice."""
    device: str = "auto"
    seconds: float = 3.0
    """How long each model is measured, about."""


@dataclass(frozen=True)
class PatchesArgs:
    """What `vitrail bench patches` takes."""

    precision: Precision | None = None
    """Default: bfloat16 where the machine has it."""
    threads: int | None = None
    """CPU threads of one operation. Default: torch's choice."""
    device: str = "auto"
    seconds: float = 5.0
    """How long each size of each model is measured, about."""


def bench(args: Sequence[str]) -> dict[str, Any]:
    """Compare, measure, or look at the price of patches."""
    words = {
        "compare": Word(
            _compare, "compare DATA", "train models for the same minutes, compare them"
        ),
        "speed": Word(
            _speed, "speed MODELS", "size, cost, speed and memory of models, runs and bundles"
        ),
        "patches": Word(_patches, "patches", "what patch and image size cost, beside a claim"),
    }
    return run_word("bench", words, args)


def _compare(args: Sequence[str]) -> dict[str, Any]:
    given = parse(CompareArgs, args, "bench compare", _ABOUT)
    names = _names(given.models, [*MODELS, HOG])
    _check(given)
    if HOG in names:
        check_installed()
    base = _base(given)
    size = _size(names, base, given.size)
    configs = {name: _config(name, base, size) for name in names}
    reasons = [config for config in configs.values() if isinstance(config, UsageError)]
    if len(reasons) == len(names):
        raise reasons[0]
    settings = Settings(
        data=base.data.path,
        minutes=given.minutes,
        size=size,
        recipe="scratch",
        precision=base.precision,
        threads=base.threads or 1,
        device=str(pick_device(given.device)),
        seed=given.seed,
        **asdict(given.how),
    )
    out = given.out or _free_folder()
    length = words.duration(60 * given.minutes)
    say(f"{len(names)} models, {length} of training each, into {out}")
    again = ["vitrail", "bench", "compare", *args]
    again += [] if given.out else ["--out", str(out)]
    try:
        comparison = compare(settings, configs, out, _learner(), notify=say)
    except (VitrailError, KeyboardInterrupt) as stop:
        code = 130 if isinstance(stop, KeyboardInterrupt) else stop.exit_code
        if code < 128:
            raise
        stopped = VitrailError(f"stopped, all saved; go on with: {shlex.join(again)}")
        stopped.exit_code = code
        raise stopped from stop
    report = write_comparison(out, comparison, shlex.join(again))
    _print_comparison(comparison)
    print(f"report    {report}")
    exit_code = 0 if comparison.finished else 3
    return (
        comparison.to_dict()
        | {"comparison": str(out), "report": str(report)}
        | ({"exit_code": exit_code} if exit_code else {})
    )


def _check(given: CompareArgs) -> None:
    if not 0 < given.minutes < math.inf:
        raise UsageError(f"--minutes must be above 0, not {given.minutes:g}")
    if given.weights != "none":
        raise UsageError(
            "--weights can only be none: published weights have seen different images, which would "
            "be compared too. Start one model from weights with: vitrail train DATA --weights NAME"
        )
    if given.size is not None and given.size < 1:
        raise UsageError(f"--size must be at least 1, not {given.size}")
    _check_threads(given.threads)


def _check_threads(threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise UsageError(f"--threads must be at least 1, not {threads}")


def _names(listed: str, known: Sequence[str]) -> list[str]:
    """The names between the commas, each once."""
    names = list(dict.fromkeys(name.strip() for name in listed.split(",") if name.strip()))
    if not names:
        raise UsageError("name at least one model: `vitrail models` lists them")
    for name in names:
        if name not in known:
            raise unknown_name("model", name, known)
    return names


def _base(given: CompareArgs) -> TrainConfig:
    """The recipe's config for the data, at the comparison's length and on its place."""
    if (task := task_of(given.data)) != "classify":
        raise UsageError(
            f"bench compare trains classifiers, and {given.data} asks for --task {task}: "
            f"train one run a model on it, with vitrail train DATA --model NAME"
        )
    source = open_data(given.data, given.how.columns(), given.how.rules())
    # The same on every machine, by the optimiser that all families were measured with.
    found = facts(given.data, source)._replace(rate=math.inf)
    config = replace(RECIPES["scratch"].config(found), optim=OptimConfig(lr=7e-4))
    path = Path(given.data).expanduser()
    return replace(
        config,
        data=replace(
            config.data,
            path=str(path.resolve()) if path.exists() else given.data,
            **asdict(given.how),
        ),
        minutes=given.minutes,
        precision=given.precision or config.precision,
        threads=given.threads or torch.get_num_threads(),
        device=given.device,
        seed=given.seed,
        evaluations=_EVALUATIONS,
    )


def _size(names: Sequence[str], base: TrainConfig, asked: int | None) -> tuple[int, int] | None:
    """The size that all models get: the asked one, or the first that all take, from the recipe's
    to twice as much; None where there is none.
    """
    if asked is not None:
        return asked, asked
    first = max(base.model.image_size)
    for side in range(first, 2 * first + 1):
        configs = [_config(name, base, (side, side)) for name in names]
        if not any(isinstance(config, UsageError) for config in configs):
            return side, side
    return None


def _config(name: str, base: TrainConfig, size: tuple[int, int] | None) -> TrainConfig | UsageError:
    """How one model is trained; or why it cannot be."""
    changes: dict[str, Any] = {} if size is None else {"image_size": size}
    try:
        if name == HOG:  # the config only carries data and size, and cells need not be patches
            assert isinstance(base.model, ViTConfig), "the scratch recipe is about ViTs"
            return replace(base, model=replace(base.model, indivisible="pad", **changes))
        model = model_config(
            name, channels=base.model.channels, classes=base.model.classes, **changes
        )
        return replace(base, model=model, row=name)
    except UsageError as error:
        return error


def _learner() -> Train:
    """Runs made and resumed as `vitrail train` does; what is the same of each is said once."""
    said: set[str] = set()

    def learn(name: str, config: TrainConfig, folder: Path) -> None:
        with TrainingScreen() as screen:

            def notify(sentence: str) -> None:
                if sentence not in said:
                    said.add(sentence)
                    screen.notify(sentence)

            if folder.exists():
                job.resume(Run(folder), listen=screen.listen, notify=notify)
            else:
                job.train(config, folder, listen=screen.listen, notify=notify)

    return learn


def _free_folder() -> Path:
    """runs/compare-N with the first N that is free."""
    number = 1
    while (folder := Path("runs") / f"compare-{number}").exists():
        number += 1
    return folder


def _print_comparison(comparison: Comparison) -> None:
    judged = comparison.judged
    columns = (
        Column("model", justify="left"),
        Column("mAP" if judged and judged.metric == "map" else "accuracy"),
        Column("95% interval", 1, "left"),
        Column("behind the best", 2, "left"),
        *_MEASURES,
        Column("trained", 9),
        Column("epochs", 10),
    )
    if comparison.finished:
        print_table(columns, map(_result, comparison.finished))
    for row in comparison.rows:
        if row.error is not None:
            print_text(f"{row.name:<12}failed: {row.error}")
    if comparison.level:
        names = ", ".join(row.name for row in comparison.level)
        print_text(f"level     these images cannot tell {names} from {comparison.rows[0].name}")


def _result(row: Row) -> tuple[str, ...]:
    """The cells of one model of a comparison."""
    accuracy, behind = row.accuracy, row.behind
    return (
        row.name,
        words.percent(accuracy.value) if accuracy else "-",
        words.span(accuracy) if accuracy else "",
        f"{100 * behind.value:.1f} ({100 * behind.low:.1f} to {100 * behind.high:.1f})"
        if behind
        else "",
        *_measures(row.parameters, row.macs, row.speed, row.memory),
        words.duration(row.training_seconds) if row.training_seconds is not None else "",
        f"{row.epochs:.3g}" if row.epochs is not None else "",
    )


_MEASURES = (
    Column("parameters", 6),
    Column("MACs", 7),
    Column("images/s", 3),
    Column("1 image", 4),
    Column("95%", 8),
    Column("memory", 5),
)


def _measures(
    parameters: int | None, count: int | None, speed: Speed | None, memory: int | None
) -> tuple[str, ...]:
    """The cells of `_MEASURES`."""
    return (
        words.short(parameters) if parameters is not None else "",
        words.short(count) if count is not None else "",
        words.rate(speed.images_per_second) if speed else "",
        words.milliseconds(speed.latency) if speed else "",
        words.milliseconds(speed.latency_p95) if speed else "",
        words.megabytes(memory) if memory is not None else "",
    )


def _speed(args: Sequence[str]) -> dict[str, Any]:
    given = parse(SpeedArgs, args, "bench speed", _ABOUT_SPEED)
    _check_threads(given.threads)
    if given.batch < 1:
        raise UsageError(f"--batch must be at least 1, not {given.batch}")
    asked = _asked(given.models)
    place = _place(given.device, given.precision, given.threads)
    changes = {} if given.size is None else {"image_size": (given.size, given.size)}
    if changes and (folders := [name for name in asked if Path(name).is_dir()]):
        raise UsageError(f"--size is for models by name, and {folders[0]} has a size of its own")
    subjects = {name: _subject(name, changes) for name in asked}
    labellers = {name: _labeller(each, place, given.batch) for name, each in subjects.items()}
    found = speeds(labellers, place, given.seconds, given.batch)
    del labellers
    configs = {name: each for name, each in subjects.items() if not isinstance(each, Bundle | Run)}
    memories = peak_memory(configs, place)
    rows, cells = [], []
    for name, subject in subjects.items():
        if isinstance(subject, Bundle):
            config, size = None, subject.preprocess.size
        else:
            config = subject.config().model if isinstance(subject, Run) else subject
            size = config.image_size
        parameters = None if config is None else parameters_of(config)
        count = None if config is None else macs(config)
        memory, speed = memories.get(name), found[name]
        shape = "x".join(map(str, size))
        cells.append((name, shape, *_measures(parameters, count, speed, memory)))
        rows.append(
            {
                "name": name,
                "image_size": list(size),
                "parameters": parameters,
                "macs": count,
                **speed._asdict(),
                "latency_ms": 1000 * speed.latency,
                "memory": memory,
            }
        )
    print_table((Column("model", justify="left"), Column("image", 9), *_MEASURES), cells)
    print_text(f"images/s at batches of {given.batch}; {_words(place)}")
    if len(configs) < len(subjects):
        print_text("bundles compute in their own precision, and memory is of named models alone")
    return {"rows": rows, "models": rows, "batch": given.batch, **place._asdict()}


_ABOUT_SPEED = """Size, cost, speed and memory of models, which take turns: untrained ones by name,
runs, and what was exported of them."""
Subject = ModelConfig | Run | Bundle


def _asked(words: Sequence[str]) -> list[str]:
    """Folders of runs and bundles, and names between commas, each once."""
    folders = {word for word in words if Path(word).is_dir() and word not in MODELS}
    listed = [[word] if word in folders else _names(word, list(MODELS)) for word in words]
    asked = list(dict.fromkeys(name for names in listed for name in names))
    if not asked:
        raise UsageError("name at least one model: `vitrail models` lists them")
    return asked


def _subject(name: str, changes: dict[str, Any]) -> Subject:
    if name in MODELS:
        return model_config(name, **changes)
    return Bundle.open(name) if is_bundle(name) else Run(name)


def _labeller(subject: Subject, place: Place, most: int) -> Labeller:
    if isinstance(subject, Bundle):
        return engine_labeller(subject, place.threads, most)
    if isinstance(subject, Run):
        loaded = load(subject)
        shape = loaded.preprocess.channels, *loaded.preprocess.size
        return labeller(loaded.model, shape, place.device, most)
    return model_labeller(subject, place.device, most)


def _patches(args: Sequence[str]) -> dict[str, Any]:
    about = "What patch and image size cost ViTs here, beside an article's claims."
    given = parse(PatchesArgs, args, "bench patches", about)
    _check_threads(given.threads)
    place = _place(given.device, given.precision, given.threads)
    cases = measure_patches(place, seconds=given.seconds, notify=say)
    columns = (
        Column("model", justify="left"),
        Column("image/patch"),
        Column("tokens", 5),
        Column("MACs", 4),
        Column("1 image", 3),
        Column("MACs, ratio", 2),
        Column("time, ratio", 1),
        Column("article", 2),
    )
    cells = (
        (
            case.model,
            f"{case.side}/{case.patch}",
            str(case.tokens),
            words.short(case.macs),
            words.milliseconds(case.latency),
            f"{case.macs_ratio:.2f}x",
            f"{case.latency_ratio:.2f}x",
            f"{case.claim:g}x" if case.claim else "",
        )
        for case in cases
    )
    print_table(columns, cells)
    print_text(f"ratios are to {BASE[0]}/{BASE[1]} of the same model; {_words(place)}")
    found = verdicts(cases)
    for verdict in found:
        print_text(_sentence(verdict))
    return {
        "cases": [case._asdict() for case in cases],
        "verdicts": [verdict._asdict() for verdict in found],
        **place._asdict(),
    }


def _sentence(verdict: Verdict) -> str:
    counted, measured = (
        f"{low:.2f}x" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f}x to {high:.2f}x"
        for low, high in (verdict.macs, verdict.latency)
    )
    holds = {0: "no model", verdict.models: "every model"}
    said = [
        f"{holds.get(count, f'{count} of {verdict.models} models')} by {what}"
        for count, what in ((verdict.counted, "MACs"), (verdict.measured, "time"))
    ]
    return (
        f"{verdict.side}/{verdict.patch}: the article says {verdict.claim:g}x; counted {counted}, "
        f"measured {measured}. Right within a tenth for {' and '.join(said)}"
    )


def _place(name: str, precision: Precision | None, threads: int | None) -> Place:
    device = pick_device(name)
    precision = precision or native_precision(device)
    return Place(str(device), precision, threads or torch.get_num_threads())


def _words(place: Place) -> str:
    threads = f"{place.threads} thread{'s' if place.threads > 1 else ''}"
    return f"{place.precision}, {place.device}, {threads}"
