"""Models that take images: what two runtimes make of them, against torch and against Pillow."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

from deploy.pictures import EXTREME, VIEW, as_image, in_torch, noise, off
from vitrail.data.views.preprocess import Preprocess
from vitrail.deploy.engines.calm import core, nncf, openvino
from vitrail.deploy.engines.splice import VIEWS, without_front
from vitrail.deploy.export import compose
from vitrail.deploy.export.compose import onnx_with_resizing, openvino_with_resizing, resizing
from vitrail.errors import DataError, UsageError

Run = Callable[[np.ndarray], np.ndarray]

CUT = Preprocess(size=VIEW, crop=0.875)
BOXED = Preprocess(
    size=VIEW,
    resize="letterbox",
    interpolation="lanczos",
    tile=40,
    background=7,
    mean=(0.5,),
    std=(0.5,),
)
"""Of grey images, and a view is shown as it is."""
KINDS = {"cut": CUT, "boxed": BOXED}
SIZES = [*EXTREME, (70, 90), (90, 70), (31, 200), (16, 24), (39, 20)]
HINTS = {
    "INFERENCE_PRECISION_HINT": "f32",
    "INFERENCE_NUM_THREADS": 1,
    "ENABLE_CPU_PINNING": False,
}


def in_onnxruntime(model: ModelProto) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return lambda given: session.run(None, {session.get_inputs()[0].name: given})[0]


def in_openvino(model: Any) -> Run:
    compiled = core().compile_model(model, "CPU", HINTS)
    return lambda given: compiled(given)[0]


def read(model: ModelProto) -> Any:
    return core().read_model(model.SerializeToString())


RUNTIMES = {"onnxruntime": in_onnxruntime, "openvino": lambda model: in_openvino(read(model))}


@pytest.fixture(scope="module")
def graphs() -> dict[str, ModelProto]:
    """Made once: torch takes seconds for each."""
    return {kind: resizing(preprocess) for kind, preprocess in KINDS.items()}


@pytest.fixture
def made(graphs: dict[str, ModelProto], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is exported again."""
    known = {preprocess: graphs[kind] for kind, preprocess in KINDS.items()}
    monkeypatch.setattr(compose, "resizing", lambda preprocess, opset=20: known[preprocess])


def model_of(preprocess: Preprocess) -> ModelProto:
    """A small one from views to numbers of order 1, made where paths are."""
    channels, (height, width) = preprocess.channels, preprocess.size
    weights = np.random.default_rng(0).normal(0, 0.1, (5, channels, 8, 8)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", [VIEWS], ["x"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Div", ["x", "white"], ["y"], "div"),
        helper.make_node("Conv", ["y", "w"], ["patches"], "conv", strides=[8, 8]),
        helper.make_node("Relu", ["patches"], ["kept"], "relu"),
        helper.make_node("GlobalAveragePool", ["kept"], ["logits"], "pool"),
    ]
    nodes[0].doc_string = "/home/author/model.py"
    nodes[0].metadata_props.add(key="stack_trace", value="/home/author/model.py")
    constants = [
        numpy_helper.from_array(np.float32(255), "white"),
        numpy_helper.from_array(weights, "w"),
    ]
    views = helper.make_tensor_value_info(
        VIEWS, TensorProto.UINT8, ["batch", channels, height, width]
    )
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 5, 1, 1])
    graph = helper.make_graph(nodes, "model", [views], [logits], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def nodes_of(graph: GraphProto) -> list[onnx.NodeProto]:
    """Those of branches too."""
    branches = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    return [*graph.node, *(node for branch in branches for node in nodes_of(branch))]


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_runtime_makes_the_views_that_torch_makes(
    graphs: dict[str, ModelProto], kind: str, runtime: str
) -> None:
    preprocess, views = KINDS[kind], RUNTIMES[runtime](graphs[kind])
    for size in SIZES:
        images = noise(*size, preprocess.channels, images=1 + size[0] % 3)
        made = views(images)
        levels = np.abs(made.astype(np.int64) - in_torch(preprocess, images))
        assert levels.max() <= 1, size
        assert (levels > 0).mean() < 0.01, size
        assert off(preprocess, images, made).max() <= 2, size


@pytest.mark.parametrize("runtime", ["onnx", "xml"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_says_of_images_what_it_says_of_their_views(
    made: None, tmp_path: Path, kind: str, runtime: str
) -> None:
    preprocess, model = KINDS[kind], model_of(KINDS[kind])
    if runtime == "onnx":
        alone, whole = in_onnxruntime(model), in_onnxruntime(onnx_with_resizing(model, preprocess))
    else:
        file = tmp_path / "model.xml"
        openvino().save_model(openvino_with_resizing(read(model), preprocess), file)
        alone, whole = in_openvino(read(model)), in_openvino(core().read_model(file))
    # A view comes first: OpenVINO's first answer is not like the others where an `If` gives uint8.
    for size in [VIEW, (90, 70), VIEW, (33, 48), (1, 1), VIEW]:
        images = noise(*size, preprocess.channels, images=3)
        views = np.stack([preprocess.view(as_image(image)) for image in images])
        np.testing.assert_allclose(whole(images), alone(views), rtol=0.002, atol=0.002)


def test_openvinos_model_is_cut_where_it_was_joined(made: None, tmp_path: Path) -> None:
    model, file = read(model_of(BOXED)), tmp_path / "model.xml"
    openvino().save_model(openvino_with_resizing(model, BOXED), file, compress_to_fp16=False)
    cut = without_front(core().read_model(file))
    assert cut.input(0).names == {VIEWS} and cut.output(0).names == {"logits"}
    views = noise(*VIEW, 1, images=3).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(in_openvino(cut)(views), in_openvino(model)(views))
    assert model.input(0).names == {VIEWS}  # and nothing was done to the model that was given
    with pytest.raises(DataError, match=f"nothing called '{VIEWS}' in it"):
        without_front(
            read(
                onnx.parser.parse_model(
                    '<ir_version: 10, opset_import: ["" : 20]> g '
                    "(float[n] a) => (float[n] b) { b = Relu(a) }"
                )
            )
        )


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_is_one_sound_graph(made: None, kind: str) -> None:
    model = model_of(KINDS[kind])
    before = model.SerializeToString()
    whole = onnx_with_resizing(model, KINDS[kind])
    assert model.SerializeToString() == before
    onnx.checker.check_model(whole, full_check=True)
    nodes = nodes_of(whole.graph)
    assert len({node.name for node in nodes}) == len(nodes)
    assert [node.op_type for node in whole.graph.node].count("If") == 1
    assert [value.name for value in whole.graph.output] == ["logits"]
    inferred = onnx.shape_inference.infer_shapes(whole, strict_mode=True, data_prop=True).graph
    views = next(value for value in inferred.value_info if value.name == VIEWS)
    assert [d.dim_value for d in views.type.tensor_type.shape.dim[1:]] == [
        KINDS[kind].channels,
        *VIEW,
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_does_not_say_where_it_was_made(made: None, kind: str) -> None:
    whole = onnx_with_resizing(model_of(KINDS[kind]), KINDS[kind]).SerializeToString()
    here = str(Path(compose.__file__).parent.parent).encode()
    for told in (b"/home/author", here, b"stack_trace", b".py"):
        assert told not in whole


def test_what_does_not_fit_is_refused() -> None:
    other = Preprocess(size=(48, 48))
    for joined, model in (
        (onnx_with_resizing, model_of(CUT)),
        (openvino_with_resizing, read(model_of(CUT))),
    ):
        with pytest.raises(UsageError, match=r"views of \[3, 32, 48\], .* makes \[3, 48, 48\]"):
            joined(model, other)


@pytest.mark.slow
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("resize", ["crop", "squash", "letterbox"])
def test_every_rule_and_interpolation(resize: Any, interpolation: Any) -> None:
    preprocess = Preprocess(size=VIEW, resize=resize, interpolation=interpolation)
    graph = resizing(preprocess)
    for runtime in RUNTIMES.values():
        views = runtime(graph)
        # The last one's numbers are not exact as float32, as which OpenVINO divides.
        for size in [*SIZES, (3, 400_001)]:
            images = noise(*size)
            levels = np.abs(views(images).astype(np.int64) - in_torch(preprocess, images))
            assert levels.max() <= 1, size


@pytest.mark.slow
def test_a_quantised_model_is_joined_and_cut(made: None, tmp_path: Path) -> None:
    views = [noise(*VIEW, 1).transpose(0, 3, 1, 2) for _ in range(8)]
    model = nncf().quantize(read(model_of(BOXED)), nncf().Dataset(views), subset_size=8)
    kinds = [op.get_type_name() for op in model.get_ops()]
    assert "FakeQuantize" in kinds
    whole = openvino_with_resizing(model, BOXED)
    answer = in_openvino(model)(views[0])
    np.testing.assert_array_equal(in_openvino(without_front(whole))(views[0]), answer)
    np.testing.assert_array_equal(in_openvino(whole)(views[0].transpose(0, 2, 3, 1)), answer)
