"""ONNX Runtime, on the CPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from jaxtyping import UInt8

from vitrail.deploy.bundle import Bundle
from vitrail.deploy.engines.engine import USUAL, Setting, stacked
from vitrail.errors import DataError
from vitrail.tasks.answers import Outputs


class OnnxEngine:
    """A session."""

    def __init__(self, session: Any, takes: str) -> None:
        self._session = session
        self._takes = takes
        self._outputs = [each.name for each in session.get_outputs()]

    def run(self, views: Sequence[UInt8[np.ndarray, "c _h _w"]]) -> Outputs:
        pixels = stacked(views)
        if self._takes == "image":  # of the model's own size, which is then taken as it is
            pixels = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
        found = self._session.run(self._outputs, {self._takes: pixels})
        return dict(zip(self._outputs, found, strict=True))


def load(bundle: Bundle, setting: Setting = USUAL) -> OnnxEngine:
    """The bundle's model. Raises as `load_file` does."""
    return load_file(bundle.model, bundle.takes, setting)


def load_file(file: Path, takes: str, setting: Setting = USUAL) -> OnnxEngine:
    """A session of a graph that takes `image` or `views`. Raises `DataError` for a file that the
    runtime refuses.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors, which are raised besides
    if setting.threads is not None:
        options.intra_op_num_threads = setting.threads
    # A waiting thread that spins takes the cores from whatever else the machine has to do, decoding
    # above all: half of the CPU time for nothing.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        # From bytes: a file that asks for others, anywhere on the disk, is refused.
        session = onnxruntime.InferenceSession(
            file.read_bytes(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # it has a class of its own for each code, and no common one
        raise DataError(
            f"{file} is not taken by ONNX Runtime {onnxruntime.__version__}: "
            f"{' '.join(str(error).split())}"
        ) from error
    return OnnxEngine(session, takes)
