"""int8 for OpenVINO, by NNCF."""

import io
import logging
from collections.abc import Collection, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from jaxtyping import UInt8

from vitrail.deploy.engines.calm import core, nncf, openvino
from vitrail.deploy.export.int8 import KindName, Layer, check, layers, products

_OWN = "/WithoutBiases"
"""What OpenVINO adds to the name of a node that it cuts in two, the product and its bias."""


_SMOOTH = 0.5
"""How much of the activations' outliers goes into the weights: SmoothQuant's alpha (arXiv
2211.10438). The logits of a ViT-S are 0.053 from float by it, and 0.069 by NNCF's own 0.95."""


class OpenVinoInt8:
    """A float ONNX file as OpenVINO reads it."""

    layers: tuple[Layer, ...]

    def __init__(self, file: Path, views: Sequence[UInt8[np.ndarray, "c h w"]]) -> None:
        """`views`: to calibrate with, as the model's input takes them."""
        graph = onnx.load(file)
        self._views = views
        self._products = products(graph)
        # Without this a ViT's residual sums are quantised too, and it says one class of everything.
        # Convolutional networks need them to be.
        self._transformer = any(node.op_type == "LayerNormalization" for node in graph.graph.node)
        self._model = core().read_model(file)
        self.layers = layers(graph)

    def write(self, out: Path, kind: KindName, floats: Collection[str] = ()) -> Path:
        """As `Quantiser` says: `out`, an .xml, and its .bin."""
        check("openvino", kind, len(self._views))
        quantise = {"static": self._static, "weights": self._weights}[kind]
        nncf().set_log_level(logging.ERROR)
        with redirect_stdout(io.StringIO()):  # its progress
            model = quantise(self._ignored(floats)) if len(floats) < len(self.layers) else None
        # By default the float part would be stored in halves.
        openvino().save_model(model or self._model, out, compress_to_fp16=False)
        return out

    def _ignored(self, floats: Collection[str]) -> Any:
        known = {op.get_friendly_name() for op in self._model.get_ops()}
        names = [name if name in known else name + _OWN for name in (*floats, *self._products)]
        return nncf().IgnoredScope(names=names)

    def _static(self, ignored: Any) -> Any:
        tool = nncf()
        return tool.quantize(
            self._model,
            tool.Dataset([view[None] for view in self._views]),
            subset_size=len(self._views),
            model_type=tool.ModelType.TRANSFORMER if self._transformer else None,
            ignored_scope=ignored,
            advanced_parameters=tool.AdvancedQuantizationParameters(
                smooth_quant_alphas=tool.AdvancedSmoothQuantParameters(matmul=_SMOOTH)
            ),
        )

    def _weights(self, ignored: Any) -> Any:
        tool = nncf()
        mode = tool.CompressWeightsMode.INT8_SYM
        return tool.compress_weights(self._model.clone(), mode=mode, ignored_scope=ignored)
