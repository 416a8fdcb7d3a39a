"""From a file to a model: whoever wrote the file, at any geometry, and back out again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vitrail.data.preprocess import Preprocess
from vitrail.errors import DataError, UsageError
from vitrail.models import ViT, ViTConfig, build
from vitrail.weights import (
    TARGETS,
    convert,
    load_into,
    open_weights,
    pretrained,
    save_weights,
    started,
    to_timm,
)

CONFIG = ViTConfig(depth=2, width=24, heads=3, mlp=40, patch=(8, 8), image_size=(32, 32), classes=5)
HEADS = {"heads": 3}


@pytest.fixture
def model(randomised) -> ViT:
    return randomised(ViT(CONFIG))


@pytest.fixture
def file(model, tmp_path) -> Path:
    """As timm would have saved it: nothing says how many heads."""
    path = tmp_path / "model.safetensors"
    save_file(to_timm(model.state_dict(), CONFIG), path)
    return path


def test_a_file_of_ours_says_all_of_itself(model, tmp_path):
    path = tmp_path / "ours.safetensors"
    config = replace(CONFIG, norm_eps=1e-3, activation="gelu_quick")
    preprocess = Preprocess(size=(32, 32), mean=(0.1, 0.2, 0.3))
    save_weights(path, config, model.state_dict(), preprocess, tuple("abcde"))
    opened = open_weights(path)
    assert opened.config == config and opened.preprocess == preprocess
    assert opened.classes == tuple("abcde") and opened.notes == () == opened.left_out
    other = pretrained(path)
    assert other.config == config
    for key, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], tensor)


@pytest.mark.parametrize("to", TARGETS)
def test_every_target_comes_back_bit_by_bit(to, model, file, tmp_path):
    opened = open_weights(file, HEADS | {"activation": "gelu_tanh"} if to == "google" else HEADS)
    out = convert(opened, to, tmp_path / f"out{'.npz' if to == 'google' else '.safetensors'}")
    back = open_weights(out, {} if to in ("vitrail", "google") else HEADS)
    for key, tensor in model.state_dict().items():
        assert torch.equal(back.state[key], tensor), key
    with pytest.raises((DataError, UsageError), match="out"):
        convert(opened, to, out)  # nothing is overwritten


def test_googles_layout_is_npz_and_the_others_are_not(file, tmp_path):
    opened = open_weights(file, HEADS)
    with pytest.raises(UsageError, match=r"call it x\.npz"):
        convert(opened, "google", tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="unknown layout to convert to 'tim': did you mean 'timm'"):
        convert(opened, "tim", tmp_path / "x.safetensors")


def test_a_start_for_other_images_and_classes(model, file):
    opened = open_weights(file, HEADS)
    other = build(started(opened, classes=3, image_size=(40, 64), channels=1))
    fitted = load_into(other, opened)
    assert fitted.new == ("head.weight", "head.bias")
    assert other(torch.randn(2, 1, 40, 64)).shape == (2, 3)
    assert torch.equal(other.encoder.norm.weight, model.encoder.norm.weight)


def test_a_head_for_classes_of_other_names_is_new(model, tmp_path):
    path = tmp_path / "ours.safetensors"
    save_weights(path, CONFIG, model.state_dict(), None, tuple("abcde"))
    opened = open_weights(path)
    same, other = build(CONFIG), build(CONFIG)
    assert load_into(same, opened, tuple("abcde")).new == ()
    assert load_into(other, opened, tuple("abcdf")).new == ("head.weight", "head.bias")
    assert not other.head.weight.any() and same.head.weight.all()


def test_heads_that_nothing_says_are_asked_for(file):
    with pytest.raises(DataError, match=r"the number of heads cannot be known.*heads=N"):
        open_weights(file)
    opened = open_weights(file, HEADS)
    assert opened.config.heads == 3
    assert any("activation gelu" in words for words in opened.assumed), "what was assumed is said"


def test_a_config_json_beside_the_file_says_them(file):
    beside = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 5,
        "model_args": {"num_heads": 3, "embed_dim": 24, "depth": 2, "patch_size": 8},
        "pretrained_cfg": {
            "input_size": [3, 32, 32],
            "mean": [0.5, 0.4, 0.3],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "crop_pct": 0.9,
        },
    }
    file.with_name("config.json").write_text(json.dumps(beside))
    opened = open_weights(file, HEADS)
    assert opened.preprocess is not None and opened.preprocess.mean == (0.5, 0.4, 0.3)


def test_mocos_heads_are_not_what_a_row_of_that_shape_has(tmp_path):
    config = ViTConfig(width=384, heads=12, mlp=1536, depth=2, image_size=(32, 32), classes=0)
    state = to_timm(build(config).state_dict(), config)
    path = tmp_path / "moco.safetensors"
    save_file({f"module.base_encoder.{key}": tensor for key, tensor in state.items()}, path)
    for row in (None, "vit_s16"):
        with pytest.raises(DataError, match="MoCo v3's ViT-S has 12"):
            open_weights(path, row=row)
    assert open_weights(path, {"heads": 12}).config.heads == 12


@pytest.mark.parametrize(
    "header",
    ["{", "[]", '{"config": {"depth": "x"}}', '{"config": {"family": "nothing"}}', '{"config": 3}'],
)
def test_a_header_of_ours_that_is_damaged(header, model, tmp_path):
    path = tmp_path / "ours.safetensors"
    save_file(model.state_dict(), path, {"vitrail": header})
    with pytest.raises(DataError, match="the header is not vitrail's"):
        open_weights(path)


def test_tensors_that_are_not_those_of_the_header(model, tmp_path):
    path = tmp_path / "ours.safetensors"
    save_weights(path, replace(CONFIG, width=48), model.state_dict())
    with pytest.raises(DataError, match="does not fit the model"):
        open_weights(path)


def test_a_name_that_nobody_has():
    with pytest.raises(UsageError, match="did you mean 'dinov2_s14'"):
        open_weights("dinov2_s15")
    with pytest.raises(UsageError, match="unknown field of ViTConfig 'clases'"):
        started(_opened(), clases=3)


def _opened():
    from vitrail.weights import Opened

    return Opened("x", "", "timm", CONFIG, {}, None, (), (), ())
