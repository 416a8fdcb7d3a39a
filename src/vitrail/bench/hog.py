"""The traditional baseline: histograms of oriented gradients and a linear classifier.

Features are those of Dalal and Triggs (CVPR 2005, 10.1109/CVPR.2005.177): 9 unsigned orientations,
at each pixel the channel of the strongest gradient, blocks of 2 x 2 cells, L2-Hys. The classifier
is multinomial logistic regression, whose probabilities are judged as any model's; its strength is
chosen by cross-validation on the training images. On the emoji it beats the linear SVM of that
paper, 69.8% to 68.4%, both at their best, and takes half the time.

It sees what the models see: the same split, decoded, scaled and cropped alike. It is no network, so
its folder is no run:

hog.json          what it is made of, and how long it took
hog.npz           weights `[c d]`, bias `[c]`
split.csv, skipped.csv, predictions.csv, metrics.json    as a run has them (metrics.json is last)
"""

import csv
import io
import json
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, UInt8

from vitrail.bench.measure import BATCH, Labeller
from vitrail.data import Source, UnreadableImage, write_split
from vitrail.data.targets import classes_of
from vitrail.data.views.preprocess import Preprocess
from vitrail.disk import write_text
from vitrail.errors import DataError, UsageError, setting
from vitrail.metrics import classification
from vitrail.runs import TrainConfig
from vitrail.runs.data import open_data_of, with_greys

HOG = "hog"
"""Its name among the models."""
_CELLS = 12
"""Cells along the shorter side: 8 pixels, the paper's, at 96 pixels."""
_LEAST_CELL = 4
_STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Of the fit against the penalty on the weights: scikit-learn's C."""
_FOLDS = 3
_STEPS = 1000
"""Of L-BFGS, at most."""


class Part(NamedTuple):
    """The images of one part that could be read."""

    features: Float32[np.ndarray, "n d"]
    indices: list[int]
    skipped: dict[str, str]


def check_installed() -> None:
    """Raises `UsageError` when the extra is not installed."""
    try:
        import skimage  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"{HOG} needs scikit-learn and scikit-image: pip install 'vitrail[baselines]', "
            f"or leave {HOG} out of {setting('models')}"
        ) from error


def cell_of(size: tuple[int, int]) -> int:
    """The side of a cell in pixels. Raises `UsageError` for images without room for a block.

    >>> cell_of((96, 96)), cell_of((28, 28)), cell_of((224, 320))
    (8, 4, 18)
    """
    if min(size) < 2 * _LEAST_CELL:
        raise UsageError(f"{HOG} needs images of at least {2 * _LEAST_CELL} pixels a side")
    return max(_LEAST_CELL, min(size) // _CELLS)


def hog_features(view: UInt8[np.ndarray, "c h w"], cell: int) -> Float32[np.ndarray, " d"]:
    """The features of one image: 36 for each block, of which there is one at each inner corner."""
    from skimage.feature import hog

    return hog(
        view.transpose(1, 2, 0),
        orientations=9,
        pixels_per_cell=(cell, cell),
        cells_per_block=(2, 2),
        block_norm="L2-Hys",
        channel_axis=-1,
    ).astype(np.float32)


def train_hog(
    config: TrainConfig, folder: Path, notify: Callable[[str], None] = lambda sentence: None
) -> None:
    """Fit it on the training images of `config`'s data, judge it on the held-out ones.

    Of `config` only data, model size, threads and seed matter. Raises `UsageError` for images with
    several labels and where the extra is missing, `DataError` as training does.
    """
    check_installed()
    splits = open_data_of(config)
    if splits.stream is not None:
        raise UsageError(f"{HOG} looks at all images at once, but {config.data.path} is a stream")
    said = classes_of(splits.train.targets, HOG)
    if said.several:
        raise UsageError(f"{HOG} gives one label an image, but these images may have several")
    preprocess = with_greys(config, splits, notify).preprocess()
    if not preprocess.one_size:
        raise UsageError(f"{HOG} needs images of one size: {setting('data.resize')} crop or squash")
    held_out = splits.val if splits.test is None else splits.test
    cell = cell_of(preprocess.size)
    folder.mkdir(parents=True, exist_ok=True)
    write_split(splits, folder / "split.csv")
    started = time.perf_counter()
    train = _features(splits.parts["train"], preprocess, cell, config)
    notify(f"{HOG}  {train.features.shape[1]:,} features of {len(train.indices):,} images")
    targets = said.values[train.indices]
    strength, weights, bias = _fit(train.features, targets, len(said.names), config)
    seconds = time.perf_counter() - started
    test = _features(held_out, preprocess, cell, config)
    with (folder / "hog.npz").open("wb") as file:
        np.savez(file, weights=weights, bias=bias)
    about = {
        "preprocess": preprocess.to_dict(),
        "cell": cell,
        "strength": strength,
        "parameters": weights.size + bias.size,
        "seconds": round(seconds, 2),
        "classes": said.names,
    }
    write_text(folder / "hog.json", json.dumps(about, indent=1))
    if skipped := train.skipped | test.skipped:
        write_text(folder / "skipped.csv", _csv([("key", "reason"), *sorted(skipped.items())]))
    _judge(folder, held_out, test, _probabilities(test.features, weights, bias), config.data.path)


def hog_labeller(folder: Path) -> Labeller:
    """What `train_hog` left in `folder`, at work on random pixels, an image at a time, on one core.

    How fast it is does not depend on what the pixels show.
    """
    about = json.loads((folder / "hog.json").read_text())
    with np.load(folder / "hog.npz") as stored:
        weights, bias = stored["weights"], stored["bias"]
    preprocess = Preprocess.from_dict(about["preprocess"])
    shape = (BATCH, preprocess.channels, *preprocess.size)
    views = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    def label(batch: int) -> None:
        features = np.stack([hog_features(view, about["cell"]) for view in views[:batch]])
        _probabilities(features, weights, bias)

    return label


def _features(source: Source, preprocess: Preprocess, cell: int, config: TrainConfig) -> Part:
    def look(i: int) -> Float32[np.ndarray, " d"] | str:
        try:
            return hog_features(preprocess.view(source.load(i)), cell)
        except UnreadableImage as error:
            return str(error)

    with ThreadPoolExecutor(config.data.workers) as pool:
        looks = list(pool.map(look, range(len(source))))
    skipped = {source.key(i): why for i, why in enumerate(looks) if isinstance(why, str)}
    if len(skipped) > config.data.max_unreadable * len(source):
        key, why = next(iter(skipped.items()))
        raise DataError(f"{len(skipped)} of {len(source)} images cannot be read: {key}: {why}")
    seen = [i for i, row in enumerate(looks) if not isinstance(row, str)]
    return Part(np.stack([looks[i] for i in seen]), seen, skipped)


def _fit(
    features: Float32[np.ndarray, "n d"], targets: np.ndarray, classes: int, config: TrainConfig
) -> tuple[float, Float32[np.ndarray, "c d"], Float32[np.ndarray, " c"]]:
    """The best strength, and the weights and bias that it gives."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from threadpoolctl import threadpool_limits

    folds = min(_FOLDS, int(np.unique(targets, return_counts=True)[1].min()))
    with warnings.catch_warnings(), threadpool_limits(config.threads):
        # A fit that is cut short is judged by cross-validation like any other.
        warnings.simplefilter("ignore", ConvergenceWarning)
        if folds < 2:
            strength = 1.0
            model = LogisticRegression(C=strength, max_iter=_STEPS).fit(features, targets)
        else:
            search = GridSearchCV(
                LogisticRegression(max_iter=_STEPS),
                {"C": _STRENGTHS},
                scoring="accuracy",
                cv=StratifiedKFold(folds, shuffle=True, random_state=config.seed),
            ).fit(features, targets)
            strength, model = float(search.best_params_["C"]), search.best_estimator_
    weights = np.zeros((classes, features.shape[1]), np.float32)
    bias = np.full(classes, -np.inf, np.float32)  # a class without a readable image
    if len(model.classes_) == 2:  # scikit-learn has one row for the second against the first
        first, second = model.classes_
        weights[second], bias[first], bias[second] = model.coef_[0], 0, model.intercept_[0]
    else:
        weights[model.classes_], bias[model.classes_] = model.coef_, model.intercept_
    return strength, weights, bias


def _probabilities(
    features: Float32[np.ndarray, "n d"],
    weights: Float32[np.ndarray, "c d"],
    bias: Float32[np.ndarray, " c"],
) -> Float32[np.ndarray, "n c"]:
    logits = features @ weights.T + bias
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _judge(
    folder: Path, source: Source, part: Part, p: Float32[np.ndarray, "n c"], data: str
) -> None:
    """predictions.csv and metrics.json, as an evaluation writes them."""
    said = classes_of(source.targets, HOG)
    names, targets = said.names, said.values[part.indices]
    metrics = classification(torch.from_numpy(p), torch.from_numpy(targets))
    rows: list[Sequence[object]] = [
        ("key", "label", "predicted", "probability", *(f"p:{name}" for name in names))
    ]
    for i, target, row in zip(part.indices, targets, p, strict=True):
        best = int(row.argmax())
        label, predicted = names[target], names[best]
        rows.append(
            (source.key(i), label, predicted, f"{row[best]:.6f}", *(f"{q:.6f}" for q in row))
        )
    write_text(folder / "predictions.csv", _csv(rows))
    content = {"data": data, "unreadable": part.skipped, "classes": names}
    write_text(folder / "metrics.json", json.dumps(content | metrics.to_dict(), indent=1))


def _csv(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
