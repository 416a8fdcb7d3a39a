"""What TensorRT's parser needs of an ONNX graph, held against one. No engine is built: that takes
the GPU that it is for.

https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md, of TensorRT 10; from 11 on every
network is strongly typed, so that the graph's own types decide.
"""

from collections.abc import Iterator

from onnx import ModelProto, TensorProto

OPSETS = 9, 20
_OPERATORS = (
    "Abs Add And ArgMax ArgMin AveragePool BatchNormalization Cast Ceil Clip Concat Constant",
    "ConstantOfShape Conv ConvTranspose Cos CumSum DepthToSpace DequantizeLinear Div Einsum Elu",
    "Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND Gelu Gemm",
    "GlobalAveragePool Greater GreaterOrEqual GridSample GroupNormalization HardSigmoid",
    "HardSwish Identity If InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu",
    "Less LessOrEqual Log LogSoftmax Loop MatMul Max MaxPool Mean Min Mod Mul Neg NonZero",
    "Not OneHot Or Pad Pow PRelu QuantizeLinear Range Reciprocal ReduceL1 ReduceL2",
    "ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum",
    "ReduceSumSquare Relu Reshape Resize Round ScatterElements ScatterND Selu Shape Sigmoid",
    "Sign Sin Size Slice Softmax Softplus SpaceToDepth Split Sqrt Squeeze Sub Sum Tanh Tile",
    "TopK Transpose Trilu Unsqueeze Where Xor",
)
OPERATORS = frozenset(name for line in _OPERATORS for name in line.split())
_TYPES = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.INT64: "int64",
    TensorProto.INT32: "int32",
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "uint8",
    TensorProto.BOOL: "bool",
}


def complaints(model: ModelProto) -> list[str]:
    """Why TensorRT would not take a graph, a sentence each; none where it would."""
    return list(_complaints(model))


def _complaints(model: ModelProto) -> Iterator[str]:
    opset = next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
    if not OPSETS[0] <= opset <= OPSETS[1]:
        yield f"opset {opset} is not {OPSETS[0]} to {OPSETS[1]}"
    unknown = {
        node.op_type
        for node in model.graph.node
        if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS
    }
    if unknown:
        yield f"operators that it does not have: {', '.join(sorted(unknown))}"
    for value in model.graph.input:
        sides = value.type.tensor_type.shape.dim
        if any(not side.dim_value for side in sides[1:]):
            yield f"the input {value.name} has sizes that are not fixed, besides the batch"
    others = {each.data_type for each in model.graph.initializer} - _TYPES.keys()
    if others:
        yield f"tensors of types that it does not have: {sorted(others)}"
    zero = {each.name for each in model.graph.initializer if each.data_type == TensorProto.UINT8}
    if any(set(node.input[2:]) & zero for node in model.graph.node if "Linear" in node.op_type):
        yield "int8 with a zero point: it takes symmetric int8 alone"


def command(file: str, size: tuple[int, int], channels: int) -> str:
    """What builds an engine, on the machine with the GPU; `size` is (height, width)."""
    shape = f"x{channels}x{size[0]}x{size[1]}"
    shapes = " ".join(
        f"--{name}Shapes=views:{batch}{shape}"
        for name, batch in (("min", 1), ("opt", 16), ("max", 64))
    )
    return f"trtexec --onnx={file} {shapes} --saveEngine=model.engine"
