"""torch.export: the graph as torch itself runs it, without the code that it was made from."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from vitrail.deploy.bundle import Bundle
from vitrail.deploy.engines.engine import USUAL, Setting, stacked
from vitrail.errors import DataError
from vitrail.tasks.answers import Outputs


class TorchEngine:
    """A graph module."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def run(self, views: Sequence[UInt8[np.ndarray, "c _h _w"]]) -> Outputs:
        # In its own precision, whatever its caller's autocast is.
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            found = self._module(torch.from_numpy(stacked(views)))
        return {name: values.numpy() for name, values in found.items()}


def load(bundle: Bundle, setting: Setting = USUAL) -> TorchEngine:
    """The bundle's program; threads are the whole process's here, and are left as they are.

    Raises `DataError` for a file that this torch does not take.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own making
            module = torch.export.load(str(bundle.model)).module()
    except Exception as error:  # whatever a damaged archive makes torch raise
        raise DataError(
            f"{bundle.model} is not taken by torch {torch.__version__}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    return TorchEngine(module)
