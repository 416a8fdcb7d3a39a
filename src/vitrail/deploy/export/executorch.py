"""A graph as a program of ExecuTorch's, for phones: XNNPACK computes what it can of it.

Of one view: memory is planned for the longest batch that a program takes, whatever it is asked, and
activations in int8 have one range for all of a batch.
"""

from pathlib import Path
from typing import Any

import torch

from vitrail.data.views.preprocess import Preprocess
from vitrail.deploy.engines.executorch import OUTPUTS
from vitrail.deploy.export.converting import converting
from vitrail.deploy.export.graph import VIEWS, Graph, example
from vitrail.deploy.export.int8 import KindName
from vitrail.deploy.export.traced import traced


def save(graph: Graph, preprocess: Preprocess, file: Path, int8: KindName | None) -> None:
    """Write the graph, from `views`, of one, to its outputs, whose names the program tells.

    Raises `UsageError` where ExecuTorch is not installed or does not take the graph, and `OSError`.
    """
    view = example(preprocess, batch=1)
    with converting("ExecuTorch", "mobile"), torch.no_grad():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
            XnnpackDynamicallyQuantizedPartitioner,
            XnnpackPartitioner,
        )
        from executorch.exir import to_edge_transform_and_lower

        module = traced(graph, view)
        if int8 is not None:
            module = _in_int8(module, view)
        lowered = to_edge_transform_and_lower(
            torch.export.export(module, (), {VIEWS: view}, strict=False),
            # Those of int8 one by one, and first: among others, XNNPACK finds wrong shapes.
            partitioner=[
                XnnpackDynamicallyQuantizedPartitioner(per_op_mode=True),
                XnnpackPartitioner(),
            ],
            constant_methods={OUTPUTS: " ".join(graph(view))},
        )
        made = lowered.to_executorch().buffer
    file.write_bytes(made)


def _in_int8(module: Any, view: torch.Tensor) -> Any:
    """Linear layers with weights in int8, a scale for each row of them, and activations in int8, of
    the range of the tensor at hand: convolutions have no such product. With ranges fixed by
    calibration logits of a ViT-S are ten times as far from float (0.40 of their size for 0.03).
    """
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    how = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    prepared = prepare_pt2e(module, XNNPACKQuantizer().set_global(how))
    prepared(**{VIEWS: view})
    return convert_pt2e(prepared)
