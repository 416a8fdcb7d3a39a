"""int8: what can be made of a float model, of what images, and which of its layers.

The quantisers are the runtimes' own: ONNX Runtime's (vitrail.deploy.export.int8_onnx), and NNCF for
OpenVINO (int8_openvino). Each file is for its own runtime: ONNX Runtime's runs in OpenVINO too, but
takes half as long again as OpenVINO's own. Those for phones (vitrail.deploy.export.executorch and
.litert) have all of a model in int8 or nothing: no layer is tried in float.

A *layer* is a product with weights: MatMul, Gemm or Conv. Products of two activations, attention's
and token merging's, stay in float whatever the kind: see `Quantiser`.
"""

from collections.abc import Collection, Mapping
from itertools import chain, zip_longest
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import onnx
from jaxtyping import Int

from vitrail.errors import DataError, UsageError, unknown_name
from vitrail.proc import processor

KindName = Literal["static", "dynamic", "weights"]


class Kind(NamedTuple):
    """A way to have int8."""

    about: str
    calibrated: bool
    """Whether it needs images."""
    runtimes: tuple[str, ...]
    """Whose quantisers can do it."""
    shared_by: tuple[str, ...] = ()
    """Runtimes whose answer for an image depends on the others of its batch: no server may batch
    there."""


KINDS: Mapping[KindName, Kind] = {
    "static": Kind(
        "weights and activations; the activations' ranges are those of calibration images",
        calibrated=True,
        runtimes=("onnx", "openvino"),
    ),
    "dynamic": Kind(
        "weights and activations; the activations' ranges are those of the batch at hand",
        calibrated=False,
        runtimes=("onnx", "executorch", "litert"),
        # One range for the whole batch: another neighbour, another rounding (microsoft/onnxruntime
        # #10111). Logits of a ViT-S move by 0.3. Phones look at one image at a time.
        shared_by=("onnx",),
    ),
    "weights": Kind(
        "weights alone, which are brought back to float as they are used",
        calibrated=False,
        runtimes=("onnx", "openvino", "litert"),
    ),
}


class Layer(NamedTuple):
    """A product with weights."""

    node: str
    """The ONNX node's name."""
    name: str
    """The module that it was, as far as the file tells: `encoder.blocks.3.mlp.fc1`."""

    @property
    def block(self) -> str:
        """The module's name up to its last number.

        >>> Layer("node_MatMul_7", "encoder.blocks.3.mlp.fc1").block, Layer("node_9", "head").block
        ('encoder.blocks.3', 'head')
        """
        parts = self.name.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
        return ".".join(parts[: numbers[-1] + 1]) if numbers else self.name


_WEIGHTED = ("MatMul", "Gemm", "Conv")


def layers(model: onnx.ModelProto) -> tuple[Layer, ...]:
    """The layers of a float model, in the order of the graph.

    The exporter keeps the names of parameters, but not of those that it has transposed: then the
    bias tells, which is added next. Where nothing does, the node's own name has to.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    readers = {tensor: node for node in model.graph.node for tensor in node.input}
    found = []
    for node in model.graph.node:
        if node.op_type not in _WEIGHTED or node.input[1] not in constants:
            continue
        after = readers.get(node.output[0])
        added = list(after.input) if after is not None and after.op_type == "Add" else []
        names = [
            name.rpartition(".")[0].removeprefix("task.").removeprefix("model.")
            for name in (*node.input[1:], *added)
            if name in constants and name.endswith((".weight", ".bias"))
        ]
        found.append(Layer(node.name, names[0] if names else node.name))
    return tuple(found)


def products(model: onnx.ModelProto) -> tuple[str, ...]:
    """The nodes that multiply two activations."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return tuple(
        node.name
        for node in model.graph.node
        if node.op_type == "MatMul" and not constants & set(node.input)
    )


class Quantiser(Protocol):
    """A runtime's quantiser at work on one float file, of which it keeps what calibration finds."""

    layers: tuple[Layer, ...]

    def write(self, out: Path, kind: KindName, floats: Collection[str] = ()) -> Path:
        """Write the model in int8 to `out`, and say where it is; `floats`: nodes of the layers that
        stay in float.
        """
        ...


# ------------------------------------------------------------------------------- calibration

CALIBRATION = 64
"""Images; of a ViT-S, 300 give the same accuracy as these."""


class Drawn(NamedTuple):
    """Rows of the training images, none of them twice."""

    calibrate: Int[np.ndarray, " k"]
    """Whose activations give the ranges."""
    choose: Int[np.ndarray, " m"]
    """On which it is decided what stays in float. The held-out images only judge the result."""


def draw(
    strata: Int[np.ndarray, " n"] | None, images: int, choose: int, calibrate: int = CALIBRATION
) -> Drawn:
    """Divide the training images at random, always in the same way; to calibrate, of each class as
    many as there are, in turns. Of few images a third calibrates.

    `strata`: the class of each, None where nothing is said of them. Raises `DataError` without
    images, and where they are all of one class: its ranges would cut off the other classes' values.
    """
    if not images:
        raise DataError(
            "int8 needs training images to calibrate with, and there are none: "
            "give the run's own data, or --int8.kind weights, which needs none"
        )
    classes = np.zeros(images, np.int64) if strata is None else strata
    if strata is not None and len(np.unique(strata)) == 1:
        raise DataError(
            f"all {images} images to calibrate with are of one class, and the ranges that they "
            f"give would cut off what others need: give images of all classes"
        )
    order = np.random.default_rng(0).permutation(images)
    of_class = [order[classes[order] == each] for each in np.unique(classes)]
    turns = [i for i in chain.from_iterable(zip_longest(*of_class)) if i is not None]
    calibrate = min(calibrate, max(1, images // 3))
    chosen = np.array(turns[:calibrate])
    rest = order[~np.isin(order, chosen)]
    return Drawn(chosen, rest[:choose])


def check(runtime: str, kind: KindName, images: int) -> None:
    """Raises `UsageError` for a kind that there is not, there, or not without images."""
    if kind not in KINDS:
        raise unknown_name("kind of int8", kind, KINDS)
    if runtime not in KINDS[kind].runtimes:
        able = [name for name, each in KINDS.items() if runtime in each.runtimes]
        raise UsageError(f"int8 {kind} is nothing that {runtime} has: choose {' or '.join(able)}")
    if KINDS[kind].calibrated and not images:
        raise UsageError(f"int8 {kind} needs images to calibrate with: give some, or kind weights")


# ----------------------------------------------------------------------------------- this CPU

_FAST = {
    "amx_int8": "AMX",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX VNNI",
    "asimddp": "Arm's dot product",
}
"""Flags of processors that multiply int8 in hardware, and what they are called."""


def fast_by() -> tuple[str, ...]:
    """The instructions by which this machine's CPU is fast in int8; without any, int8 works, but
    may be slower than float.
    """
    try:
        facts = processor()
    except OSError:  # not Linux
        return ()
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    return tuple(name for flag, name in _FAST.items() if flag in flags)
