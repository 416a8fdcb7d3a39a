"""A graph as ONNX: one file, opset stated, its batch of any length."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import torch

from vitrail.data.views.preprocess import Preprocess
from vitrail.deploy.export.graph import BATCH, VIEWS, Graph, example

OPSET = 20
"""LayerNormalization and Gelu are one node each, and it is what TensorRT's parser takes; from 23 on
attention is one node too, which ONNX Runtime alone gains from (2 to 13%)."""


def to_onnx(graph: Graph, preprocess: Preprocess) -> onnx.ModelProto:
    """The graph, from `views` to its outputs; without the paths and the code of where it was made,
    which torch writes into each node.
    """
    with calm(), torch.no_grad():
        program = torch.onnx.export(
            graph.eval(),
            (example(preprocess),),
            dynamo=True,
            dynamic_shapes=({0: BATCH},),
            input_names=[VIEWS],
            output_names=list(graph(example(preprocess))),
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    plain(model.graph)
    del model.metadata_props[:]
    return model


def plain(graph: onnx.GraphProto) -> None:
    """Clear what is only about how a graph was made, here and in the graphs within."""
    graph.doc_string = ""
    del graph.metadata_props[:]
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
        for attribute in node.attribute:
            for within in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                plain(within)


def save(model: onnx.ModelProto, file: Path) -> None:
    """Write one file. Raises `OSError`."""
    file.write_bytes(model.SerializeToString())


@contextmanager
def calm() -> Iterator[None]:
    """Without what torch's exporter says of itself, on its way."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
