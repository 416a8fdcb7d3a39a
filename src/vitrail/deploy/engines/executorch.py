"""ExecuTorch, on the CPU: the program that a phone runs, by the same kernels (XNNPACK)."""

import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from vitrail.deploy.bundle import Bundle
from vitrail.deploy.engines.engine import USUAL, Setting
from vitrail.errors import DataError
from vitrail.tasks.answers import Outputs

OUTPUTS = "outputs"
"""The method of a program that says what the outputs of `forward` are called, by spaces apart."""


class ExecuTorchEngine:
    """A program, of one view at a time; threads take turns, for it computes in one place."""

    def __init__(self, program: Any) -> None:
        self._program = program  # whose memory the method uses
        self._method = program.load_method("forward")
        (names,) = program.load_method(OUTPUTS).execute([])
        self._outputs = names.split()
        self._turn = threading.Lock()

    def run(self, views: Sequence[UInt8[np.ndarray, "c _h _w"]]) -> Outputs:
        pixels = [torch.from_numpy(np.ascontiguousarray(view)[None]) for view in views]
        try:
            with self._turn:
                found = [self._method.execute([each]) for each in pixels]
        except RuntimeError as error:  # a delegate looks at shapes no sooner
            raise DataError(f"ExecuTorch cannot compute this model: {error}") from error
        columns = zip(self._outputs, zip(*found, strict=True), strict=True)
        return {name: torch.cat(rows).numpy() for name, rows in columns}


def load(bundle: Bundle, setting: Setting = USUAL) -> ExecuTorchEngine:
    """The bundle's program. Raises as `load_file` does."""
    return load_file(bundle.model, setting)


def load_file(file: Path, setting: Setting = USUAL) -> ExecuTorchEngine:
    """A program that takes `views`; threads are the whole process's here.

    Raises `ImportError` where ExecuTorch is not installed, `DataError` for a file that it refuses.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own making
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
        from executorch.runtime import Runtime

    if setting.threads is not None:
        _unsafe_reset_threadpool(setting.threads)
    try:
        return ExecuTorchEngine(Runtime.get().load_program(file.read_bytes()))
    except Exception as error:  # whatever a damaged program makes it raise
        raise DataError(
            f"{file} is not taken by ExecuTorch: {' '.join(str(error).split())[:300]}"
        ) from error
