"""`vitrail predict RUN_OR_BUNDLE IMAGE...`: a trained or exported model at work."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from vitrail.cli.parse import parse
from vitrail.cli.table import width
from vitrail.data import UnreadableImage
from vitrail.data.sources.source import LeftOut
from vitrail.data.sources.walk import walk
from vitrail.deploy import Predictor
from vitrail.deploy.answers import Masked, Place, refuse_there, told
from vitrail.deploy.boxes import NUMBERED, RESULTS, USUAL_SCORE, Boxed, write_results
from vitrail.errors import DataError, UsageError
from vitrail.report.words import tail
from vitrail.tasks.answers import AS_THEY_ARE, Detections, Prediction, Segmentation


@dataclass(frozen=True)
class PredictArgs:
    """What `vitrail predict` takes."""

    run: Annotated[Path, tyro.conf.Positional]
    """The folder that vitrail train wrote, or vitrail export."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files, or folders of them."""
    top: int = 3
    """How many classes to show for each image."""
    score: float | None = None
    """Of boxes: the least score of those that are given. Default: what gave the best F1 on the
    run's held-out images."""
    out: Path | None = None
    """Of masks: a folder for NAME.png, the mask, and NAME-overlay.jpg, what it looks like. Of
    boxes: for NAME-overlay.jpg, and detections.json, all of them as COCO's result file. Nothing
    that is there is replaced."""
    follow_links: Annotated[bool, tyro.conf.arg(name="data.follow-links")] = False
    """Follow symbolic links to folders elsewhere."""
    checkpoint: str | None = None
    tta: str = "none"
    """Average several looks at each image: flip, scales or flip+scales."""
    labels: tuple[str, ...] = ()
    """Of a run that learned from images and texts: classes in words, "a cat" "a dog"; or a file of
    them, one a line."""
    templates: tuple[str, ...] = AS_THEY_ARE
    """Sentences around labels, of which the mean is taken: "a photo of {}" "a drawing of {}"."""
    tokens: str | None = None
    """Work with fewer tokens: tome:r=13 merges so many in each block of any ViT."""


_ABOUT_PREDICT = """Ask a run about images: what they show, or of a run with masks how much of them
each class has, of one with boxes where things are, or of one without labels their features."""
_LEAST_NAME = 24
"""Characters of a file's name that a line has room for."""
_OF_FEATURES = (
    "features are of length 1: the product of two images' is how alike they are; --json has them"
)


def predict(args: Sequence[str]) -> dict[str, Any]:
    """Label images. A damaged one is listed, the others are labelled all the same."""
    given = parse(PredictArgs, args, "predict", _ABOUT_PREDICT)
    if not given.images:
        raise UsageError(f"which images? vitrail predict {given.run} IMAGE, or a folder of them")
    if given.top < 1:
        raise UsageError(f"--top must be at least 1, not {given.top}")
    named, left_out = _files(given.images, given.follow_links)
    predictor = Predictor(
        given.run, given.checkpoint, given.tta, given.tokens,
        labels=_labels(given), templates=given.templates,
    )  # fmt: skip
    shown = _shown(predictor, given)
    places = {} if given.out is None else _places(predictor, named, given.out)
    rows: list[dict[str, Any]] = []
    boxes: dict[str, Detections] = {}
    failed = 0
    for file, _ in named:
        try:
            found = predictor(file)
        except UnreadableImage as error:
            failed += 1
            print(error)
            rows.append({"image": str(file), "error": str(error)})
            continue
        if isinstance(found, Detections):
            found = boxes[str(file)] = found.above(shown.least if shown else 0.0)
        _print_answer(found, file, given.top)
        rows.append({"image": str(file), **told(found, given.top)})
        if file in places:
            rows[-1] |= places[file].write(found, file, predictor.preprocess.grey_range)
    if given.out is not None and shown:
        print(f"boxes: {write_results(boxes, given.out)}, and drawn beside it")
    elif given.out is not None:
        print(f"masks and what they look like: {given.out}")
    if shown:
        print(f"boxes of a score of at least {shown.least:.2f}: {shown.why}")
    embeds = predictor.kind == "features"
    if embeds:
        print(_OF_FEATURES)
    for one in left_out:
        print(one.sentence())
    return {
        "classes": [] if embeds else list(predictor.names),
        "predictions": rows,
        "score": shown and shown.least,
        "left_out": [asdict(one) for one in left_out],
        "exit_code": 3 if failed else 0,
    }


def _labels(given: PredictArgs) -> tuple[str, ...]:
    """As they are given, or the lines of the one file that is."""
    if given.templates != AS_THEY_ARE and not given.labels:
        raise UsageError("--templates are for --labels: give some")
    if len(given.labels) != 1 or not Path(given.labels[0]).expanduser().is_file():
        return given.labels
    file = Path(given.labels[0]).expanduser()
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the labels in {file}: it must be text in UTF-8") from error
    return tuple(line.strip() for line in lines if line.strip())


def _print_answer(found: Any, file: Path, top: int) -> None:
    """A line for the terminal."""
    if isinstance(found, Prediction):
        _print_line(file, [f"{label} {p:.1%}" for label, p in found.probabilities.items()], top)
    elif isinstance(found, Segmentation):
        _print_line(file, [f"{name} {s:.1%}" for name, s in found.shares.items()], top, rest=True)
    elif isinstance(found, Detections):
        counts = Counter(found.names[label] for label in found.labels.tolist())
        said = [f"{name} {n}" for name, n in counts.most_common()] or ["nothing"]
        _print_line(file, said, top, rest=True)
    else:
        _print_line(file, [f"{len(found.features)} features"], top)


class _Shown(NamedTuple):
    """From what score on boxes are shown, and why."""

    least: float
    why: str


class _Named(NamedTuple):
    """An image that was asked for."""

    file: Path
    name: Path
    """Its own, or its path in the folder that was named."""


def _print_line(file: Path, parts: Sequence[str], top: int, *, rest: bool = False) -> None:
    """An image and the `top` things that are said of it, or as many as the terminal has room for;
    of a long name the end. `rest`: and how many more there are.
    """
    name, room = str(file), width()
    for most in range(min(top, len(parts)), 0, -1):
        said = "".join(f"  {part}" for part in parts[:most])
        if rest and len(parts) > most:
            said += f"  {len(parts) - most} more"
        if min(len(name), _LEAST_NAME) + len(said) <= room:
            break
    print(tail(name, max(room - len(said), _LEAST_NAME)) + said)


def _shown(predictor: Predictor, given: PredictArgs) -> _Shown | None:
    """From what score on boxes are given; None of a model that gives no boxes."""
    if predictor.kind != "detect":
        if given.score is not None:
            raise UsageError("--score is for boxes, and this run gives none: leave it out")
        return None
    if given.score is not None:
        if not 0 <= given.score <= 1:
            raise UsageError(f"--score must be 0 to 1, not {given.score}")
        return _Shown(given.score, "as asked")
    if predictor.threshold is None:
        return _Shown(USUAL_SCORE, "the usual one, for no measurement of the run says a better")
    return _Shown(predictor.threshold, "of the best F1 on the held-out images")


def _places(predictor: Predictor, named: Sequence[_Named], out: Path) -> dict[Path, Place]:
    """Where the answer about each file goes: in `out`, by its name, or its path in the folder that
    was named, without the ending; where two would be one, with it.

    Raises `UsageError` for a run that gives no files, and for what would replace anything.
    """
    if predictor.kind not in ("segment", "detect"):
        raise UsageError("--out is for masks and boxes, and this run gives neither: leave it out")
    of_file = dict(named)
    short = {file: name.with_suffix("") for file, name in of_file.items()}
    often = Counter(short.values())
    names = {file: of_file[file] if often[name] > 1 else name for file, name in short.items()}
    double = next((name for name, n in Counter(names.values()).items() if n > 1), None)
    if double is not None:
        raise UsageError(f"two images are called {double}: give them to --out in two calls")
    kind = Masked if predictor.kind == "segment" else Boxed
    places: dict[Path, Place] = {file: kind.of(out, str(name)) for file, name in names.items()}
    results = [out / RESULTS, out / NUMBERED] if kind is Boxed else []
    refuse_there(*results, *(path for place in places.values() for path in place.files))
    return places


def _files(places: Sequence[Path], follow_links: bool) -> tuple[list[_Named], list[LeftOut]]:
    """The images that are named, or lie in the folders that are; and what else these hold."""
    files: list[_Named] = []
    left_out: list[LeftOut] = []
    for place in places:
        if not place.is_dir():
            if not place.exists():
                raise DataError(f"no such image: {place}")
            files.append(_Named(place, Path(place.name)))
            continue
        tree = walk(str(place), follow_links=follow_links)
        found = tree.images()
        if not found:
            told = "".join(f"; {one.sentence()}" for one in tree.left_out)
            raise DataError(f"no image in {place}{told}")
        files += [_Named(place / path, Path(path)) for path in found]
        left_out += tree.left_out
    return files, left_out
