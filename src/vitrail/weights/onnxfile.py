"""The weights in an ONNX graph, under the names that the exported model gave its parameters.

torch's exporter folds what it can: the weight of a Linear on tokens becomes the transposed second
input of a MatMul, under a name like onnx::MatMul_123, and a position table that is resampled in
the graph is cut in two. Both are found again by what the graph does with them.
"""

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vitrail.errors import DataError
from vitrail.weights.content import Content, from_numpy

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto

_KEEPS_CONTENT = ("Reshape", "Transpose", "Cast", "Resize")
_EXTERNAL = 1  # TensorProto.EXTERNAL


def read_onnx(path: Path) -> Content:
    """The weights in the ONNX file at `path`.

    Raises `DataError` for damage, for weights kept in another file, and where the package onnx is
    not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise DataError(
            f"reading {path} needs the package onnx: python -m pip install 'vitrail[onnx]'"
        ) from error
    try:
        graph = onnx.load_model(path, load_external_data=False).graph
    except Exception as error:  # whatever protobuf throws at damage, the file is at fault
        raise DataError(f"{path} is damaged, or no ONNX file: {error}") from error
    nodes = [each for node in graph.node for each in (node.name, *node.input, *node.output)]
    if not all(isinstance(name, str) for name in (*nodes, *(t.name for t in graph.initializer))):
        raise DataError(f"{path} is damaged: it has names that are no text")
    tensors = _initializers(path, graph)
    notes = [*_name_linears(graph, tensors), *_join_positions(graph, tensors)]
    used = {name for node in graph.node for name in node.input}
    if anonymous := [name for name in tensors if name in used and _folded(name)]:
        listed = ", ".join(f"{name} {list(tensors[name].shape)}" for name in anonymous)
        notes.append(f"kept under the graph's own names: {listed}")
    return Content(tensors, {}, tuple(notes))


def _folded(name: str) -> bool:
    """Whether the exporter made this name up: `onnx::MatMul_12`, `/norm/Constant_output_0`."""
    return "::" in name or name.startswith(("/", "val_")) or name.isdigit()


def _initializers(path: Path, graph: "GraphProto") -> dict[str, Tensor]:
    """Every stored tensor by its name in the graph, but for the small change of shapes and axes."""
    from onnx import numpy_helper

    stored: list[tuple[str, TensorProto]] = [(tensor.name, tensor) for tensor in graph.initializer]
    for node in graph.node:
        if node.op_type == "Constant" and node.output:
            stored += [(node.output[0], each.t) for each in node.attribute if len(each.t.dims) > 1]
    tensors: dict[str, Tensor] = {}
    for name, proto in stored:
        if proto.data_location == _EXTERNAL:
            raise DataError(
                f"{path} keeps {name!r} in another file. Make it one file: "
                f"import onnx; onnx.save(onnx.load('FILE'), 'whole.onnx')"
            )
        try:
            array = numpy_helper.to_array(proto)
        except Exception as error:  # a shape that its bytes do not fill, an unknown type
            raise DataError(f"{name!r} in {path} is damaged: {error}") from error
        if name in tensors:
            raise DataError(f"{path} holds {name!r} twice: it is damaged or hostile")
        tensor = from_numpy(array.copy(), f"{path}: {name!r}")
        if tensor.is_floating_point() or not _folded(name):
            tensors[name] = tensor
    return tensors


def _name_linears(graph: "GraphProto", tensors: dict[str, Tensor]) -> list[str]:
    """Give the folded weight of each Linear its own name and orientation, [out, in]."""
    users: dict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            users[name].append(node)
    for node in graph.node:
        if node.op_type not in ("MatMul", "Gemm") or len(node.input) < 2 or not node.output:
            continue
        folded = node.input[1]
        if folded not in tensors or not _folded(folded) or tensors[folded].ndim != 2:
            continue
        module = _linear(node, users)
        name = f"{module}.weight"
        if module and name not in tensors:
            is_transposed = any(a.name == "transB" and a.i for a in node.attribute)
            matrix = tensors.pop(folded)
            tensors[name] = matrix if is_transposed else matrix.T.contiguous()
    stored = {tensor.name for tensor in graph.initializer}
    unused = sorted(name for name in stored if name in tensors and name not in users)
    return [f"used by no node of the graph: {', '.join(unused)}"] if unused else []


def _linear(node: "NodeProto", users: dict[str, list["NodeProto"]]) -> str:
    """The Linear that this product belongs to: its bias says which; without one, its scope does."""
    added = [name for user in users[node.output[0]] if user.op_type == "Add" for name in user.input]
    for name in (*node.input[2:], *added):
        if name.endswith(".bias"):
            return name.removesuffix(".bias")
    return _scope(node)


def _scope(node: "NodeProto") -> str:
    """The module that a node was traced in: /encoder/layer.0/query/MatMul is encoder.layer.0.query.

    A name that carries no scope, as the newer exporter gives, is left as it is.
    """
    return ".".join(node.name.split("/")[1:-1]) if "/" in node.name else node.name


def _join_positions(graph: "GraphProto", tensors: dict[str, Tensor]) -> list[str]:
    """Put the position table together again where the graph resamples the part of the patches."""
    makers = {name: node for node in graph.node for name in node.output}
    notes = []
    for node in graph.node:
        if node.op_type != "Concat" or len(node.input) != 2:
            continue
        prefix, patches = node.input
        # Nothing keeps a hostile graph from being a circle: no path is longer than all its nodes.
        for _ in makers:
            maker = makers.get(patches)
            if maker is None or maker.op_type not in _KEEPS_CONTENT or not maker.input:
                break
            patches = maker.input[0]
        is_cut = prefix != patches and _folded(prefix) and _folded(patches)
        if not (is_cut and _are_tables(tensors.get(prefix), tensors.get(patches))):
            continue
        scope = f"{_scope(node)}." if _scope(node) else ""
        is_hf = any(name.startswith(f"{scope}patch_embeddings.") for name in tensors)
        name = f"{scope}position_embeddings" if is_hf else f"{scope}pos_embed"
        tensors[name] = torch.cat([tensors.pop(prefix), tensors.pop(patches)], dim=1)
        notes.append(f"'{name}' was put together from '{prefix}' and '{patches}'")
    return notes


def _are_tables(one: Tensor | None, two: Tensor | None) -> bool:
    """Whether these may be positions `[1 n d]` of one table."""
    return (
        one is not None
        and two is not None
        and one.ndim == two.ndim == 3
        and len(one) == len(two) == 1
        and (one.shape[2], one.dtype) == (two.shape[2], two.dtype)
    )
