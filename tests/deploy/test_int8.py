"""int8 by the runtimes' own quantisers, of a tiny ViT that merges tokens; and the search for what
stays in float, of models that are made up.
"""

import functools
import logging
import sys

import jaxtyping
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from vitrail.deploy.engines import calm
from vitrail.deploy.export import int8
from vitrail.deploy.export.int8 import KINDS, Layer, draw, fast_by, layers, products
from vitrail.deploy.export.int8_onnx import OnnxInt8
from vitrail.deploy.export.int8_openvino import OpenVinoInt8
from vitrail.errors import DataError, UsageError
from vitrail.models import ViT, ViTConfig

TINY = ViTConfig(
    depth=2, width=64, heads=2, mlp=256, patch=(8, 8), image_size=(32, 32), classes=5, merge=2
)
RUNTIMES = ("onnx", "openvino")
CASES = [
    (runtime, kind) for kind in KINDS for runtime in KINDS[kind].runtimes if runtime in RUNTIMES
]


class Scaled(torch.nn.Module):
    """A model as exports have it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, views):
        return self.model(views.float() / 127.5 - 1)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = ViT(TINY).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim > 1:
                tensor.normal_(std=tensor[0].numel() ** -0.5)
            elif name.endswith("weight"):  # of a norm
                tensor.uniform_(0.5, 1.5)
            else:  # small: tokens that are alike but for rounding are merged by chance
                tensor.normal_(std=0.05)
    return Scaled(model)


@pytest.fixture(scope="module")
def views():
    return list(np.random.default_rng(0).integers(0, 256, (9, 3, 32, 32), dtype=np.uint8))


@pytest.fixture(scope="module")
def exported(model, views, tmp_path_factory):
    file = tmp_path_factory.mktemp("exported") / "model.onnx"
    with pytest.MonkeyPatch.context() as patch, pytest.warns():
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        program = torch.onnx.export(
            model,
            (torch.from_numpy(np.stack(views[:2])),),
            dynamo=True,
            dynamic_shapes=({0: "batch"},),
            input_names=["views"],
            output_names=["logits"],
            opset_version=20,
            verbose=False,
        )
    program.save(file)
    return file


@pytest.fixture(scope="module")
def quantisers(exported, views, tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    return {
        "onnx": OnnxInt8(exported, views, work),
        "openvino": OpenVinoInt8(exported, views),
    }


def asked(file, views):
    """What a file says of a batch, in float where it is in float."""
    pixels = np.stack(views)
    if file.suffix == ".onnx":
        session = onnxruntime.InferenceSession(file.read_bytes())
        return session.run(["logits"], {"views": pixels})[0]
    precise = {"INFERENCE_PRECISION_HINT": "f32"}
    return calm.core().compile_model(file, "CPU", precise)(pixels)["logits"]


def far(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def weight(file):
    return sum(part.stat().st_size for part in file.parent.glob(f"{file.stem}.*"))


@pytest.fixture(scope="module")
def written(quantisers, tmp_path_factory):
    @functools.cache
    def write(runtime, kind, floats=()):
        file = tmp_path_factory.mktemp(kind) / {"onnx": "q.onnx", "openvino": "q.xml"}[runtime]
        return quantisers[runtime].write(file, kind, floats)

    return write


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_tokens_are_merged_in_a_graph_as_torch_merges_them(runtime, model, exported, views):
    expected = model(torch.from_numpy(np.stack(views))).detach().numpy()
    file = exported
    if runtime == "openvino":
        file = exported.with_suffix(".xml")
        calm.openvino().save_model(calm.core().read_model(exported), file, False)
    assert far(asked(file, views), expected) < 1e-5


def test_layers_are_called_by_their_modules(exported):
    found = layers(onnx.load(exported))
    blocks = [f"encoder.blocks.{i}.{part}" for i in (0, 1) for part in ("attn.qkv", "mlp.fc1")]
    assert {"stem.proj", "head", *blocks} <= {layer.name for layer in found}
    assert len(found) == 2 + 2 * 4
    assert [layer.block for layer in found].count("encoder.blocks.1") == 4


@pytest.mark.parametrize("runtime, kind", CASES)
def test_every_kind_is_small_and_near_what_it_was(runtime, kind, written, exported, views, capfd):
    root = logging.getLogger()
    before = root.level, list(root.handlers)
    file = written(runtime, kind)
    assert (root.level, list(root.handlers)) == before, "what is logged is the user's to say"
    assert capfd.readouterr() == ("", "")
    assert weight(file) < 0.6 * exported.stat().st_size
    assert 1e-3 < far(asked(file, views), asked(exported, views)) < 0.15


@pytest.mark.parametrize("runtime, kind", CASES)
def test_kinds_say_whether_neighbours_change_an_answer(runtime, kind, written, views):
    file = written(runtime, kind)
    alone, together = asked(file, views[:1]), asked(file, [views[0], views[1] // 8, views[2]])[:1]
    assert (far(together, alone) > 1e-3) == (runtime in KINDS[kind].shared_by)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_layers_that_stay_in_float_bring_it_nearer(runtime, quantisers, written, exported, views):
    expected = asked(exported, views)
    nodes = [layer.node for layer in quantisers[runtime].layers]
    steps = [(), tuple(nodes[:-4]), tuple(nodes)]
    found = [far(asked(written(runtime, "static", floats), views), expected) for floats in steps]
    assert found[0] > found[1] > found[2]
    assert found[2] < 1e-5


def test_products_of_activations_stay_in_float(exported, written):
    names = products(onnx.load(exported))
    assert len(names) == 2 * 4, "of attention, of likeness, of merging"
    graph = onnx.load(written("onnx", "static")).graph
    made_by = {tensor: node.op_type for node in graph.node for tensor in node.output}
    ours = [node for node in graph.node if node.name in names]
    assert len(ours) == len(names)
    assert not {made_by.get(tensor) for node in ours for tensor in node.input} & {
        "DequantizeLinear"
    }
    read = calm.core().read_model(written("openvino", "static"))
    ours = [op for op in read.get_ops() if op.get_friendly_name() in names]
    assert len(ours) == len(names)
    sources = {value.get_node().get_type_name() for op in ours for value in op.input_values()}
    assert "FakeQuantize" not in sources


def test_without_the_instructions_sums_have_room(
    quantisers, views, exported, written, monkeypatch, tmp_path
):
    def largest(file):
        return max(
            np.abs(onnx.numpy_helper.to_array(tensor).astype(int)).max()
            for tensor in onnx.load(file).graph.initializer
            if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1
        )

    assert largest(written("onnx", "static")) > 64 or not fast_by()
    monkeypatch.setattr(int8, "processor", lambda: {"flags": "fpu sse avx2"})
    assert fast_by() == ()
    file = quantisers["onnx"].write(tmp_path / "narrow.onnx", "static")
    assert largest(file) <= 64
    assert far(asked(file, views), asked(exported, views)) < 0.2
    monkeypatch.setattr(int8, "processor", lambda: {"flags": "avx2 avx512_vnni amx_int8"})
    assert fast_by() == ("AMX", "AVX-512 VNNI")


def test_openvino_does_not_report():
    calm.openvino(), calm.nncf()
    assert sys.modules["openvino_telemetry"] is None


@pytest.mark.parametrize(
    "kind, images, says", [("static", 0, "needs images"), ("dinamic", 9, "did you mean 'dynamic'")]
)
def test_what_cannot_be_quantised_is_refused(kind, images, says, exported, views, tmp_path):
    with pytest.raises(UsageError, match=says):
        OpenVinoInt8(exported, views[:images]).write(tmp_path / "x.xml", kind)
    assert not list(tmp_path.iterdir())


def test_a_kind_that_a_runtime_lacks_is_refused(quantisers, tmp_path):
    with pytest.raises(UsageError, match="choose static or weights"):
        quantisers["openvino"].write(tmp_path / "x.xml", "dynamic")


def test_images_calibrate_or_decide():
    strata = np.array([0] * 700 + [1] * 200 + [2] * 20)
    drawn = draw(strata, 920, 500)
    assert np.bincount(strata[drawn.calibrate]).tolist() == [22, 22, 20]
    assert len(drawn.choose) == 500
    assert len(np.unique(np.concatenate(drawn))) == 564
    assert np.array_equal(draw(strata, 920, 500).choose, drawn.choose)
    few = draw(None, 7, 500)
    assert (len(few.calibrate), len(few.choose)) == (2, 5)


@pytest.mark.parametrize(
    "strata, images, says",
    [(None, 0, "there are none"), (np.zeros(9, int), 9, "all 9 images .* one class")],
)
def test_images_that_cannot_calibrate_are_refused(strata, images, says):
    with pytest.raises(DataError, match=says):
        draw(strata, images, 500)


def test_a_layer_without_a_name_is_its_node():
    assert Layer("node_7", "node_7").block == "node_7"
