"""A graph as ONNX: one file, opset stated, its batch of any length."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import GraphProto, ModelProto, numpy_helper

from vitrail.data.views.preprocess import Preprocess
from vitrail.deploy.export.graph import BATCH, VIEWS, Graph, example

OPSET = 20
"""LayerNormalization and Gelu are one node each, and it is what TensorRT's parser takes; from 23 on
attention is one node too, which ONNX Runtime alone gains from (2 to 13%)."""


def to_onnx(graph: Graph, preprocess: Preprocess) -> ModelProto:
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
    return without_origins(with_padding_kept(program.model_proto))


def with_padding_kept(model: ModelProto) -> ModelProto:
    """The model itself, with zeros before a MaxPool that stay zeros.

    ONNX Runtime 1.31 makes a Pad with zeros the MaxPool's own padding, which is minus infinity:
    logits of a BiT are then off by 2e-3. A padding that is nearly zero it leaves alone.
    """
    pooled = {node.input[0] for node in model.graph.node if node.op_type == "MaxPool"}
    for node in model.graph.node:
        if node.op_type == "Pad" and node.output[0] in pooled and len(node.input) == 2:
            name = f"{node.output[0]}_nearly_zero"
            nearly = numpy_helper.from_array(np.array(1e-30, np.float32), name)
            model.graph.initializer.append(nearly)
            node.input.append(name)
    return model


def without_origins(model: ModelProto) -> ModelProto:
    """The model itself, without what the exporter says of where it was made: paths of the author's
    machine, in every node.
    """
    model.ClearField("doc_string")
    del model.metadata_props[:]
    for graph in graphs(model.graph):
        values = [*graph.input, *graph.output, *graph.value_info, *graph.initializer]
        for part in (graph, *graph.node, *values):
            part.ClearField("doc_string")
            del part.metadata_props[:]
        for node in graph.node:
            for attribute in node.attribute:
                attribute.ClearField("doc_string")
    return model


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph, and those of its branches."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs(attribute.g)


def read(file: Path) -> ModelProto:
    """The inverse of `save`."""
    return onnx.load(file)


def save(model: ModelProto, file: Path) -> None:
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
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # its own graphs
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
