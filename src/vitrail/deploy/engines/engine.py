"""What every runtime is to the rest: views in, arrays out."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import UInt8

from vitrail.deploy.bundle import Bundle
from vitrail.errors import DataError, UsageError, unknown_name
from vitrail.tasks.answers import Outputs


class Engine(Protocol):
    """An exported model that is ready. Threads may share one."""

    def run(self, views: Sequence[UInt8[np.ndarray, "c _h _w"]]) -> Outputs:
        """What the model says of views that `Preprocess.view` gave, each array `[b ...]`."""
        ...


class Setting(NamedTuple):
    """How a runtime uses a machine; None: as it chooses."""

    threads: int | None = None
    """Of all calls together."""
    streams: int = 1
    """Parts of a batch that are computed side by side, each by its share of the threads."""


USUAL = Setting()


class Runtime(NamedTuple):
    """Where an engine's code is, and what it needs."""

    module: str
    """Its file: `load(bundle, setting)` makes an engine."""
    packages: tuple[str, ...]
    """That it imports."""
    extra: str
    """Of vitrail, that installs them."""
    streams: bool = False
    """Whether it can compute parts of a batch side by side."""


ENGINES: Mapping[str, Runtime] = {
    "onnx": Runtime("vitrail.deploy.engines.onnxruntime", ("onnxruntime",), "onnx"),
    "openvino": Runtime("vitrail.deploy.engines.openvino", ("openvino",), "openvino", streams=True),
    "torch": Runtime("vitrail.deploy.engines.torch", ("torch",), "onnx"),
    "executorch": Runtime("vitrail.deploy.engines.executorch", ("executorch", "torch"), "mobile"),
    "litert": Runtime("vitrail.deploy.engines.litert", ("ai_edge_litert",), "mobile"),
}
"""Name, as in `vitrail export --to NAME`, to runtime."""


def runtime(name: str) -> Runtime:
    """The row `name`. Raises `UsageError` for a name that is not there."""
    if name not in ENGINES:
        raise unknown_name("runtime", name, ENGINES)
    return ENGINES[name]


def check_installed(name: str) -> None:
    """Raise `UsageError`, with what to install, where a runtime's packages are not."""
    row = runtime(name)
    for package in row.packages:
        if find_spec(package) is None:
            raise UsageError(
                f"{name} needs the package {package}, which is not installed: "
                f"python -m pip install 'vitrail[{row.extra}]'"
            )


def runtime_of(bundle: Bundle) -> Runtime:
    """The bundle's. Raises `DataError` for one that there is not, here."""
    try:
        return runtime(bundle.runtime)
    except UsageError as error:
        raise DataError(f"{bundle.folder}: {error}") from error


def engine_of(bundle: Bundle, setting: Setting = USUAL) -> Engine:
    """The bundle's model in its runtime.

    Raises `DataError` where the runtime is not installed or does not take the model.
    """
    row = runtime_of(bundle)
    try:
        module: Any = import_module(row.module)
        return module.load(bundle, setting)
    except ImportError as error:
        raise DataError(
            f"{bundle.folder} is for {bundle.runtime}, which cannot be imported ({error}): "
            f"python -m pip install 'vitrail[{row.extra}]'"
        ) from error


def stacked(views: Sequence[UInt8[np.ndarray, "c _h _w"]]) -> UInt8[np.ndarray, "b c h w"]:
    """Views of one size as one array."""
    return views[0][None] if len(views) == 1 else np.stack(views)
