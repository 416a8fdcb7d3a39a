"""LiteRT (TensorFlow Lite), on the CPU."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from vitrail.deploy.bundle import Bundle
from vitrail.deploy.engines.engine import USUAL, Setting
from vitrail.errors import DataError
from vitrail.tasks.answers import Outputs


class LiteRtEngine:
    """An interpreter, of one view at a time; threads take turns, for it computes in one place."""

    def __init__(self, interpreter: Any) -> None:
        self._ask = interpreter.get_signature_runner()
        self._turn = threading.Lock()

    def run(self, views: Sequence[UInt8[np.ndarray, "c _h _w"]]) -> Outputs:
        with self._turn:
            found = [self._ask(views=view[None]) for view in views]
        return {name: np.concatenate([row[name] for row in found]) for name in found[0]}


def load(bundle: Bundle, setting: Setting = USUAL) -> LiteRtEngine:
    """The bundle's model. Raises as `load_file` does."""
    return load_file(bundle.model, setting)


def load_file(file: Path, setting: Setting = USUAL) -> LiteRtEngine:
    """A model that takes `views`.

    Raises `ImportError` where LiteRT is not installed, `DataError` for a file that it refuses.
    """
    from ai_edge_litert.interpreter import Interpreter

    try:
        content = file.read_bytes()
        interpreter = Interpreter(model_content=content, num_threads=setting.threads)
        interpreter.allocate_tensors()  # which refuses what does not fit together
        return LiteRtEngine(interpreter)
    except (RuntimeError, ValueError) as error:
        raise DataError(
            f"{file} is not taken by LiteRT: {' '.join(str(error).split())[:300]}"
        ) from error
