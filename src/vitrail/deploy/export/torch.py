"""A graph as a program of torch.export's: torch runs it without the code that it was made from."""

import warnings
from pathlib import Path

import torch

from vitrail.data.views.preprocess import Preprocess
from vitrail.deploy.export.graph import BATCH, Graph, example


def save(graph: Graph, preprocess: Preprocess, file: Path) -> None:
    """Write the graph, from `views`, of a batch of any length, to its outputs. Raises `OSError`."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch's own making
        batch = torch.export.Dim(BATCH, min=1, max=2**16)
        program = torch.export.export(
            graph.eval(), (example(preprocess),), dynamic_shapes=({0: batch},), strict=False
        )
        torch.export.save(program, str(file))
