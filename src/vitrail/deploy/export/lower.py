"""A float graph in the precision that was ordered: in int8, with as much in float as the budget
asks for.

Training images calibrate, and others of them decide what stays in float; the held-out ones judge
the result, once (vitrail.deploy.export.proof).
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from vitrail.data import Source, Subset
from vitrail.data.views.preprocess import Preprocess
from vitrail.deploy.engines import Engine
from vitrail.deploy.export.budget import Attempt, Variant, search
from vitrail.deploy.export.int8 import KINDS, KindName, Quantiser, draw, fast_by
from vitrail.deploy.export.proof import scores_of
from vitrail.deploy.exported import levels, measure, task_of
from vitrail.runs.load import LoadedRun

_CHOOSE, _FEW, _TIMED = 1000, 32, 16
"""Images that decide at most; those whose outputs are compared; and a batch that is timed."""


class Lowered(NamedTuple):
    """A file in its precision."""

    file: Path
    coupled: bool = False
    made: Mapping[str, Any] = MappingProxyType({})
    """How, for the bundle."""


def in_int8(
    own: LoadedRun,
    loaded: LoadedRun,
    train: Source,
    float_file: Path,
    runtime: str,
    kind: KindName,
    budget: float,
    work: Path,
    tell: Callable[[str], None],
) -> Lowered:
    """The graph of `float_file`, from `views`, quantised for a runtime; passing files in `work`.

    It is `loaded`'s; what is lost is to `own`, the same run with all its tokens.

    Raises `DataError` without training images to calibrate with, or where nothing in int8 is within
    the budget.
    """
    if not fast_by():
        tell("this CPU has no instructions for int8: it works, but may be slower than float32")
    strata = train.targets.strata()
    drawn = draw(None if strata is None else np.asarray(strata), len(train), _CHOOSE)
    views = [_view(train.load(int(i)), loaded.preprocess) for i in drawn.calibrate]
    tool = _quantiser(runtime, float_file, views, work)
    deciding = Subset(train, drawn.choose)
    tell(f"int8: {len(views)} training images calibrate, {len(deciding)} others decide")
    few = [_view(deciding.load(i), loaded.preprocess) for i in range(min(_FEW, len(deciding)))]
    before = measure(own.task, deciding, own.preprocess, own.config)
    plain = _engine(runtime, float_file)
    said = np.concatenate([_outputs(plain, few[i : i + 8]) for i in range(0, len(few), 8)])
    numbers = count()

    def quantise(floats: Collection[str]) -> Path:
        return tool.write(work / f"trial-{next(numbers)}{_ENDINGS[runtime]}", kind, floats)

    def attempt(file: Path) -> Attempt:
        engine = _engine(runtime, file)
        task = task_of(engine, loaded.task.reading, loaded.config, loaded.task.targets)
        after = measure(task, deciding, levels(loaded.preprocess), loaded.config)
        size = sum(part.stat().st_size for part in file.parent.glob(f"{file.stem}.*"))
        return Attempt(file, scores_of(loaded.task, before, after), _seconds(engine, few), size)

    def far(file: Path) -> float:
        engine = _engine(runtime, file)
        found = np.concatenate([_outputs(engine, few[i : i + 8]) for i in range(0, len(few), 8)])
        return float(np.linalg.norm(found - said) / np.linalg.norm(said))

    variant = Variant(
        name=f"int8 {kind}", layers=tool.layers, quantise=quantise, measure=attempt, far=far
    )
    best = search([variant], scores_of(loaded.task, before, before), budget, tell)
    made = {"int8": kind, "in_float": list(best.floats), "calibration": len(views), "rest": REST}
    return Lowered(best.attempt.file, runtime in KINDS[kind].shared_by, made)


REST = "bfloat16"
"""In what OpenVINO computes what is not int8, where the CPU has it: that is how it was proved."""
_ENDINGS = {"onnx": ".onnx", "openvino": ".xml"}


def _quantiser(
    runtime: str, file: Path, views: Sequence[UInt8[np.ndarray, "c h w"]], work: Path
) -> Quantiser:
    if runtime == "onnx":
        from vitrail.deploy.export.int8_onnx import OnnxInt8

        return OnnxInt8(file, views, work)
    from vitrail.deploy.export.int8_openvino import OpenVinoInt8

    return OpenVinoInt8(file, views)


def _engine(runtime: str, file: Path) -> Engine:
    if runtime == "onnx":
        from vitrail.deploy.engines import onnxruntime

        return onnxruntime.load_file(file, "views")
    from vitrail.deploy.engines import openvino

    return openvino.load_file(file, "views", REST)


def _view(image: Any, preprocess: Preprocess) -> UInt8[np.ndarray, "c h w"]:
    """What a graph is shown of an image; of views as large as their images the middle."""
    view, (height, width) = preprocess.view(image), preprocess.size
    top, left = (max(0, (n - m) // 2) for n, m in zip(view.shape[1:], preprocess.size, strict=True))
    return np.ascontiguousarray(view[:, top : top + height, left : left + width])


def _outputs(
    engine: Engine, views: Sequence[UInt8[np.ndarray, "c h w"]]
) -> Float[np.ndarray, "b _n"]:
    """Of each view all that is said but labels, in a row."""
    found = engine.run(views)
    rows = [each.reshape(len(views), -1) for each in found.values() if each.dtype.kind == "f"]
    return np.concatenate(rows, axis=1)


def _seconds(engine: Engine, views: Sequence[UInt8[np.ndarray, "c h w"]]) -> float:
    """For an image of a batch, the median."""
    some, times = views[:_TIMED], []
    for _ in range(7):
        started = time.perf_counter()
        engine.run(some)
        times.append(time.perf_counter() - started)
    return float(np.median(times)) / len(some)
