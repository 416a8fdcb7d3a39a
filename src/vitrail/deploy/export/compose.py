"""Models that take images, out of those that take views: resizing put in front.

    image, uint8 [b h w c] -> views, uint8 [b c H W] -> what the model says of them

An image that is a view already is only transposed: the products of `Resize`, with matrices of ones
and zeros, would cost a small int8 model a seventh of its speed. A runtime computes of an `If` only
the branch that it takes.

What is inside is put in front of a finished model, a quantised one too: what quantises a model
would quantise the matrices of the resizing as well.
"""

import warnings
from collections.abc import Sequence
from itertools import count
from typing import Any

import onnx
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from vitrail.data.views.preprocess import Preprocess
from vitrail.deploy.engines.calm import core
from vitrail.deploy.engines.splice import IMAGE, joined
from vitrail.deploy.export.graph import VIEWS
from vitrail.deploy.export.onnx import OPSET, graphs, without_origins
from vitrail.deploy.export.resize import Resize
from vitrail.errors import UsageError

_PREFIX = "resize/"
"""Of all names in the resizing graph but these two: so none is the model's as well."""


def onnx_with_resizing(model: ModelProto, preprocess: Preprocess) -> ModelProto:
    """The model, whose one input is `views`, with `image` in its place. Outputs keep their names,
    and the model that was given is not changed.

    Raises `UsageError` where its views are not those of `preprocess`, or differ in size.
    """
    views = model.graph.input[0]
    _check([side.dim_value for side in views.type.tensor_type.shape.dim], preprocess)
    front = resizing(preprocess, _opset(model))
    whole = ModelProto()
    whole.CopyFrom(model)
    del whole.graph.node[:], whole.graph.input[:]
    whole.graph.input.extend(front.graph.input)
    whole.graph.node.extend([*front.graph.node, *model.graph.node])
    whole.graph.initializer.extend(front.graph.initializer)
    whole.graph.value_info.append(views)
    onnx.checker.check_model(whole)
    return without_origins(whole)


def openvino_with_resizing(model: Any, preprocess: Preprocess) -> Any:
    """The same of an `ov.Model`. Raises as that does.

    Where a CPU computes in bfloat16, which OpenVINO does unasked, views are up to 3 levels from
    what they are in float32 (INFERENCE_PRECISION_HINT).
    """
    shape = model.get_parameters()[0].get_partial_shape()
    _check([0 if side.is_dynamic else side.get_length() for side in shape], preprocess)
    front = core().read_model(resizing(preprocess).SerializeToString())
    return joined(front, model)


def _check(views: Sequence[int], preprocess: Preprocess) -> None:
    made = [preprocess.channels, *preprocess.size]
    if list(views[1:]) != made:
        raise UsageError(
            f"the model takes views of {list(views[1:])}, and its preprocessing makes {made}: "
            f"(channels, height, width) must be the same"
        )


def resizing(preprocess: Preprocess, opset: int = OPSET) -> ModelProto:
    """The graph `image` -> `views` of this preprocessing. Raises as `Resize` does."""
    height, width = preprocess.size
    example = torch.zeros(2, height + 1, width + 2, preprocess.channels, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's, of torch's own code
        program = torch.onnx.export(
            Resize(preprocess).eval(),
            (example,),
            input_names=[IMAGE],
            output_names=[VIEWS],
            dynamic_shapes=({0: "batch", 1: "height", 2: "width"},),
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    if preprocess.keeps(height, width):
        _keep(model.graph, preprocess)
    _set_apart(model.graph)
    onnx.checker.check_model(model)
    return without_origins(model)


def _keep(graph: GraphProto, preprocess: Preprocess) -> None:
    """Let the graph only transpose an image that has the views' size.

    The branches give float32: where they give uint8, OpenVINO 2026.4.1 hands the model wrong pixels
    the first time that an image is kept, without a word.
    """
    for node in graph.node:
        node.output[:] = ["made" if name == VIEWS else name for name in node.output]
    shape = [0, preprocess.channels, *preprocess.size]  # 0: as many images as there are
    numbers = {"size": preprocess.size, "shape": shape}
    graph.initializer.extend(
        helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
        for name, values in numbers.items()
    )
    as_it_is = [
        _node("Transpose", [IMAGE], "turned", perm=[0, 3, 1, 2]),
        _node("Reshape", ["turned", "shape"], "shaped"),  # to static sizes, known here only
        _node("Cast", ["shaped"], "kept", to=TensorProto.FLOAT),
    ]
    resized = [*graph.node, _node("Cast", ["made"], "levels", to=TensorProto.FLOAT)]
    branches = {
        "then_branch": _branch(as_it_is, preprocess),
        "else_branch": _branch(resized, preprocess),
    }
    del graph.node[:], graph.value_info[:]
    graph.node.extend(
        [
            _node("Shape", [IMAGE], "sides", start=1, end=3),
            _node("Equal", ["sides", "size"], "equal"),
            _node("Cast", ["equal"], "ones", to=TensorProto.INT64),
            _node("ReduceMin", ["ones"], "all", keepdims=0),
            _node("Cast", ["all"], "keep", to=TensorProto.BOOL),
            _node("If", ["keep"], "either", **branches),
            _node("Cast", ["either"], VIEWS, to=TensorProto.UINT8),
        ]
    )


def _node(operation: str, inputs: Sequence[str], output: str, **attributes: Any) -> NodeProto:
    return helper.make_node(operation, inputs, [output], **attributes)


def _branch(nodes: Sequence[NodeProto], preprocess: Preprocess) -> GraphProto:
    """A branch of an `If`, which gives what the last node does. It has no inputs, and sees all that
    is around it.
    """
    name = nodes[-1].output[0]
    shape: list[str | int] = ["batch", preprocess.channels, *preprocess.size]
    value = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    return helper.make_graph(nodes, f"branch_{name}", [], [value])


def _set_apart(graph: GraphProto) -> None:
    """Put the prefix before all names but `image` and `views`, those in branches too:
    `onnx.compose.add_prefix` loses what these take from around them.
    """

    def name(old: str) -> str:
        return old if old in ("", IMAGE, VIEWS) else f"{_PREFIX}{old}"

    number = count()
    for part in graphs(graph):
        part.name = name(part.name)
        for node in part.node:
            node.name = f"{_PREFIX}{node.op_type}_{next(number)}"  # torch's branches share names
            node.input[:] = map(name, node.input)
            node.output[:] = map(name, node.output)
        for value in (*part.input, *part.output, *part.value_info, *part.initializer):
            value.name = name(value.name)
    last = next(node for node in graph.node if VIEWS in node.output)
    last.name = VIEWS  # by which OpenVINO calls it too


def _opset(model: ModelProto) -> int:
    """Of ONNX's own operators."""
    return next(used.version for used in model.opset_import if used.domain in ("", "ai.onnx"))
