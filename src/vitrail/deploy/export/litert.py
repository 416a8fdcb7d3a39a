"""A graph as a model of LiteRT's (TensorFlow Lite), for phones.

Of one view: its converter takes no batch of any length.
"""

from pathlib import Path

import torch

from vitrail.data.views.preprocess import Preprocess
from vitrail.deploy.export.converting import converting
from vitrail.deploy.export.graph import VIEWS, Graph, example
from vitrail.deploy.export.int8 import KindName
from vitrail.deploy.export.traced import traced

_RECIPES = {"dynamic": "dynamic_wi8_afp32", "weights": "weight_only_wi8_afp32"}
"""Of ai-edge-quantizer: both with a scale for each row of the weights."""


def save(graph: Graph, preprocess: Preprocess, file: Path, int8: KindName | None) -> None:
    """Write the graph, from `views`, of one, to its outputs by their names.

    Raises `UsageError` where LiteRT's converter is not installed or does not take the graph, and
    `OSError`.
    """
    view = example(preprocess, batch=1)
    with converting("LiteRT", "mobile"), torch.no_grad():
        import litert_torch

        made = litert_torch.convert(
            traced(graph, view), sample_kwargs={VIEWS: view}
        ).model_content()
        if int8 is not None:
            made = _in_int8(made, int8)
    file.write_bytes(made)


def _in_int8(model: bytes, kind: KindName) -> bytes:
    from ai_edge_quantizer import quantizer, recipe

    how = getattr(recipe, _RECIPES[kind])()
    return bytes(quantizer.Quantizer(model, how).quantize().quantized_model)
