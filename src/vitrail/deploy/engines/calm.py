"""OpenVINO and NNCF, imported so that they keep to themselves.

`import openvino` reports to Google Analytics, from a process of its own, and writes a number of the
user's into ~/intel; NNCF tells more. Both do without where `openvino_telemetry` cannot be imported.
So nothing here imports them in any other way.
"""

import sys
from importlib import import_module
from types import ModuleType

from vitrail.errors import UsageError


def openvino() -> ModuleType:
    """The module `openvino`. Raises `UsageError` where it is not installed."""
    return _quiet("openvino")


def nncf() -> ModuleType:
    """The module `nncf`, OpenVINO's quantiser. Raises `UsageError` where it is not installed."""
    return _quiet("nncf")


def _quiet(name: str) -> ModuleType:
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # "is not there"
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise UsageError(f"{name} is not installed: pip install 'vitrail[openvino]'") from error
