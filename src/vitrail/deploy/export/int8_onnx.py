"""int8 for ONNX Runtime, by its own quantiser."""

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from jaxtyping import UInt8
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from vitrail.deploy.export.int8 import KindName, Layer, check, fast_by, layers
from vitrail.disk import whole

_BATCH = 8
_BLOCK = 128
"""Of `weights`: so many of a column share a scale."""


class OnnxInt8:
    """A float file, and what calibration found of it, kept in `work`, a folder for passing files.

    Static: QDQ nodes before the layers alone. With all kinds of nodes the logits of a ViT-S are
    three times as far from float; with the products' results in int8 too, nearly twice as far, and
    it takes a quarter longer.
    """

    layers: tuple[Layer, ...]

    def __init__(self, file: Path, views: Sequence[UInt8[np.ndarray, "c h w"]], work: Path) -> None:
        """`views`: to calibrate with, as the model's input takes them."""
        self._views, self._ranges = views, work / "ranges.json"
        self._file = work / "prepared.onnx"
        # Shapes are the exporter's: inferring them again, symbolically, takes long and finds none.
        quant_pre_process(file, self._file, skip_symbolic_shape=True)
        model = onnx.load(self._file)
        # Shapes of transposed weights, which the dynamic quantiser turns and then finds wrong.
        model.graph.ClearField("value_info")
        onnx.save(model, self._file)
        self.layers = layers(model)

    def write(self, out: Path, kind: KindName, floats: Collection[str] = ()) -> Path:
        """As `Quantiser` says."""
        check("onnx", kind, len(self._views))
        chosen = [layer.node for layer in self.layers if layer.node not in floats]
        with whole(out) as beside, _quiet():
            if not chosen:  # which the quantisers take for "all"
                beside.write_bytes(self._file.read_bytes())
            else:
                {"static": self._static, "dynamic": self._dynamic, "weights": self._weights}[kind](
                    beside, chosen
                )
        return out

    def _static(self, out: Path, nodes: list[str]) -> None:
        quantize_static(
            self._file,
            out,
            _Reader(self._views),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Gemm", "Conv"],
            nodes_to_quantize=nodes,
            per_channel=True,
            # Without VNNI sums of two products are of 16 bits, and would be cut off there.
            reduce_range=not fast_by(),
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
            calibration_cache_path=self._ranges,
        )

    def _dynamic(self, out: Path, nodes: list[str]) -> None:
        # Convolutions stay: ONNX Runtime has no such product of signed weights on CPUs.
        quantize_dynamic(
            self._file,
            out,
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_quantize=nodes,
            per_channel=True,
            reduce_range=not fast_by(),
            weight_type=QuantType.QInt8,
        )

    def _weights(self, out: Path, nodes: list[str]) -> None:
        from onnxruntime.quantization.matmul_nbits_quantizer import (
            DefaultWeightOnlyQuantConfig,
            MatMulNBitsQuantizer,
        )

        others = [layer.node for layer in self.layers if layer.node not in nodes]
        config = DefaultWeightOnlyQuantConfig(block_size=_BLOCK, is_symmetric=True, bits=8)
        quantiser = MatMulNBitsQuantizer(
            onnx.load(self._file), nodes_to_exclude=others, algo_config=config
        )
        quantiser.process()
        onnx.save(quantiser.model.model, out)


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # untyped
    """Calibration images in batches, as the quantiser asks for them."""

    def __init__(self, views: Sequence[UInt8[np.ndarray, "c h w"]]) -> None:
        self._batches = self._cut(views)

    @staticmethod
    def _cut(views: Sequence[UInt8[np.ndarray, "c h w"]]) -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, len(views), _BATCH):
            yield {"views": np.stack(views[start : start + _BATCH])}

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


@contextmanager
def _quiet() -> Iterator[None]:
    """No word of the quantiser's, of which one module sets the root logger up as it is imported."""
    root, disabled = logging.getLogger(), logging.root.manager.disable
    handlers, level = list(root.handlers), root.level
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)
