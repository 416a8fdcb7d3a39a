"""OpenVINO and NNCF, imported so that they keep to themselves.

`import openvino` reports to Google Analytics, from a process of its own, and writes a number of the
user's into ~/intel; NNCF tells more. Both do without where `openvino_telemetry` cannot be imported.
So nothing here imports them in any other way.
"""

import sys
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from vitrail.errors import UsageError


def openvino() -> ModuleType:
    """The module `openvino`. Raises `UsageError` where it is not installed."""
    return _quiet("openvino")


@cache
def core() -> Any:
    """The `openvino.Core` of this process, which is never freed; nothing here makes another.

    On CPUs with AMX a Core gives the thread that first asks it for the CPU a stack for signals, and
    takes that stack's memory back when it is freed. Freed by another thread, as a garbage collector
    may, it leaves the first with a stack that is gone: the next signal that Python handles, a
    server's SIGTERM, is a segmentation fault (OpenVINO 2026.4.1). Raises as `openvino` does.
    """
    return openvino().Core()


def nncf() -> ModuleType:
    """The module `nncf`, OpenVINO's quantiser. Raises `UsageError` where it is not installed."""
    return _quiet("nncf")


def _quiet(name: str) -> ModuleType:
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # "is not there"
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise UsageError(f"{name} is not installed: pip install 'vitrail[openvino]'") from error
