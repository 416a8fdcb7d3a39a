"""OpenVINO, on the CPU."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from vitrail.deploy.bundle import Bundle
from vitrail.deploy.engines.calm import openvino
from vitrail.deploy.engines.engine import stacked
from vitrail.deploy.engines.splice import without_front
from vitrail.errors import DataError
from vitrail.tasks.answers import Outputs


class OpenVinoEngine:
    """A compiled model; each thread that asks has a request of its own."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._names = [output.get_any_name() for output in compiled.outputs]
        self._own = threading.local()

    def run(self, views: Sequence[UInt8[np.ndarray, "c _h _w"]]) -> Outputs:
        if not hasattr(self._own, "request"):
            self._own.request = self._compiled.create_infer_request()
        found = self._own.request.infer([stacked(views)], share_inputs=True)
        return {name: found[i] for i, name in enumerate(self._names)}


def load(bundle: Bundle, threads: int | None = None) -> OpenVinoEngine:
    """The bundle's model. Raises as `load_file` does."""
    return load_file(bundle.model, bundle.takes, bundle.precision, threads)


def load_file(file: Path, takes: str, precision: str, threads: int | None = None) -> OpenVinoEngine:
    """A model that takes `image` or `views`, compiled. Raises `DataError` for a file that the
    runtime refuses, and for bfloat16 where this CPU has none.
    """
    ov = openvino()
    core = ov.Core()
    hint = "f32"
    if precision == "bfloat16":
        # Asked for where the CPU has none, it is emulated, 36 times as slow, and nothing is said.
        if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise DataError(
                f"{file} is in bfloat16, which this CPU has not: export the run in float32 or int8"
            )
        hint = "bf16"
    options: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": hint,
        # Two processes would be pinned to the same cores, and the others idle.
        "ENABLE_CPU_PINNING": False,
    }
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    try:
        model = core.read_model(str(file))
        if takes == "image":
            model = without_front(model)
        return OpenVinoEngine(core.compile_model(model, "CPU", options))
    except RuntimeError as error:
        raise DataError(
            f"{file} is not taken by OpenVINO {ov.__version__}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
