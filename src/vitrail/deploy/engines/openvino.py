"""OpenVINO, on the CPU."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from vitrail.deploy.bundle import Bundle
from vitrail.deploy.engines.calm import core, openvino
from vitrail.deploy.engines.engine import USUAL, Setting, stacked
from vitrail.deploy.engines.splice import without_front
from vitrail.errors import DataError
from vitrail.tasks.answers import Outputs


class OpenVinoEngine:
    """A compiled model; each thread that asks has requests of its own."""

    def __init__(self, compiled: Any, streams: int) -> None:
        self._compiled = compiled
        self._streams = streams
        self._names = [output.get_any_name() for output in compiled.outputs]
        self._own = threading.local()

    def run(self, views: Sequence[UInt8[np.ndarray, "c _h _w"]]) -> Outputs:
        if not hasattr(self._own, "requests"):
            self._own.requests = [
                self._compiled.create_infer_request() for _ in range(self._streams)
            ]
        parts = np.array_split(stacked(views), min(self._streams, len(views)))
        requests = self._own.requests[: len(parts)]
        for request, part in zip(requests, parts, strict=True):
            request.start_async([part], share_inputs=True)
        for request in requests:
            request.wait()
        return {
            name: np.concatenate([each.get_output_tensor(i).data for each in requests])
            for i, name in enumerate(self._names)
        }


def load(bundle: Bundle, setting: Setting = USUAL) -> OpenVinoEngine:
    """The bundle's model. Raises as `load_file` does."""
    wanted = bundle.precision == "bfloat16"
    precision = "bfloat16" if wanted else str(bundle.made.get("rest", "float32"))
    return load_file(bundle.model, bundle.takes, precision, setting, wanted=wanted)


def load_file(
    file: Path, takes: str, precision: str, setting: Setting = USUAL, *, wanted: bool = False
) -> OpenVinoEngine:
    """A model that takes `image` or `views`, compiled. What is not int8 computes in `precision`:
    float32, or bfloat16 where this CPU has it.

    Raises `DataError` for a file that the runtime refuses, and where bfloat16 is `wanted` and the
    CPU has none.
    """
    ov = openvino()
    # Asked for bfloat16 where the CPU has none it is emulated, 36 times as slow, without a word.
    able = "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if wanted and not able:
        raise DataError(
            f"{file} is in bfloat16, which this CPU has not: export the run in float32 or int8"
        )
    options: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bfloat16" and able else "f32",
        # Two processes would be pinned to the same cores, and the others idle.
        "ENABLE_CPU_PINNING": False,
        "NUM_STREAMS": setting.streams,
    }
    if setting.threads is not None:
        options["INFERENCE_NUM_THREADS"] = setting.threads
    try:
        model = core().read_model(str(file))
        if takes == "image":
            model = without_front(model)
        return OpenVinoEngine(core().compile_model(model, "CPU", options), setting.streams)
    except RuntimeError as error:
        raise DataError(
            f"{file} is not taken by OpenVINO {ov.__version__}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
