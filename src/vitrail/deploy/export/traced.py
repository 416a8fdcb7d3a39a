"""A graph for phones: of one view, and nothing in it that is the same for each."""

from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from vitrail.deploy.export.graph import VIEWS, Graph


def traced(graph: Graph, view: UInt8[Tensor, "1 c h w"]) -> Any:
    """The graph in torch's operations: a `GraphModule`, to be called by the name of its input.

    What weights alone decide is computed: standardised kernels, positions brought to another size,
    for which LiteRT has no operation. Raises `ImportError`.
    """
    from torchao.quantization.pt2e.constant_fold import constant_fold

    module = torch.export.export(graph.eval(), (), {VIEWS: view}, strict=False).module()
    constant_fold(module)
    return module
