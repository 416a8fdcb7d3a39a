"""From a file to a model: whoever wrote the file, at any geometry, and back out again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from close import close
from vitrail.data.views.canvas import input_of
from vitrail.data.views.preprocess import Preprocess
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


@pytest.mark.parametrize("to", [to for to in TARGETS if to not in ("eomt", "mae")])
def test_every_target_comes_back_bit_by_bit(to, model, file, tmp_path):
    """But for those that have more than a backbone: EoMT's a head, MAE's a decoder."""
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
    same, other, turned = build(CONFIG), build(CONFIG), build(CONFIG)
    kept = load_into(same, opened, tuple("abcde"))
    assert kept.new == () and kept.notes == ("head: kept, its 5 classes are those of the data",)
    new = load_into(other, opened, tuple("abcdf"))
    assert new.new == ("head.weight", "head.bias")
    assert new.notes[0].endswith("does not know 'f'; it knows besides 'e'")
    assert not other.head.weight.any() and same.head.weight.all()
    assert "in the order of the data's" in load_into(turned, opened, tuple("bacde")).notes[0]
    assert torch.equal(turned.head.weight, model.head.weight[[1, 0, 2, 3, 4]])
    assert torch.equal(turned.head.bias, model.head.bias[[1, 0, 2, 3, 4]])


def test_as_many_classes_without_names_are_no_reason_to_keep_a_head(file):
    opened = open_weights(file, HEADS)
    config = started(opened, tuple("abcde"), classes=5)
    other = build(config)
    fitted = load_into(other, opened, tuple("abcde"))
    assert fitted.notes == (
        "head: a new one for 5 classes; nothing names the classes of the old one",
    )
    assert not other.head.weight.any()
    with pytest.warns(UserWarning, match="head for 5 classes is a new one.*leave num_classes out"):
        assert not pretrained(file, heads=3, num_classes=5).head.weight.any()
    assert pretrained(file, heads=3).head.weight.all()


@pytest.mark.parametrize("hub", ["transformers", "timm"])
def test_a_config_json_beside_the_file_names_its_classes(hub, file):
    named = {
        "transformers": {"id2label": {str(i): name for i, name in enumerate("abcde")}},
        "timm": {"label_names": list("abcde")},
    }
    beside = file.with_name("config.json")
    beside.write_text(json.dumps(named[hub]))
    assert open_weights(file, HEADS).classes == tuple("abcde")
    beside.write_text(json.dumps({"id2label": {str(i): f"LABEL_{i}" for i in range(5)}}))
    assert open_weights(file, HEADS).classes == (), "a number is no name"


@pytest.mark.parametrize(
    "changes", [{"heads": 6}, {"activation": "gelu_tanh"}, {"norm_eps": 1e-3}], ids=str
)
def test_what_pretrained_is_told_arrives(changes, file):
    model = pretrained(file, **{"heads": 3} | changes)
    assert all(getattr(model.config, name) == value for name, value in changes.items())


@pytest.mark.parametrize("asked", [(16, 40), (32, 80)], ids=str)
def test_an_oblong_table_is_settled_by_the_size_that_is_asked_for(asked, randomised, tmp_path):
    config = replace(CONFIG, image_size=(16, 40))  # 2x5
    model, path = randomised(ViT(config)), tmp_path / "oblong.safetensors"
    save_file(to_timm(model.state_dict(), config), path)
    with pytest.raises(DataError, match=r"no square grid: .*image_size=\(16, 40\) if that was 2x5"):
        pretrained(path, heads=3)
    assert open_weights(path, HEADS | {"image_size": (16, 40)}).config == config
    other = pretrained(path, heads=3, image_size=asked)
    assert other.config.image_size == asked
    x = torch.randn(2, 3, *asked)
    with torch.inference_mode():
        close(other(x), model(x))


def test_a_square_table_is_not_taken_for_the_oblong_one_that_is_asked_for(randomised, tmp_path):
    model, path = randomised(ViT(CONFIG)), tmp_path / "square.safetensors"  # 4x4
    save_file(to_timm(model.state_dict(), CONFIG), path)
    opened = open_weights(path, HEADS, wanted={"image_size": (16, 64)})
    assert opened.config == CONFIG
    assert any("4x4, though 2x8 are as many" in words for words in opened.assumed)
    told = open_weights(path, HEADS | {"image_size": (16, 64)})
    assert told.config.grid == (2, 8)
    hows = [{one.field: one.how for one in x.unseen}["image_size"] for x in (opened, told)]
    assert hows == ["the square that its 16 positions make", "as told"]


def test_what_is_told_against_the_tensors_is_refused(file):
    with pytest.raises(UsageError, match=r"depth=3 is not what its tensors show, .* depth=2"):
        open_weights(file, HEADS | {"depth": 3})
    with pytest.raises(UsageError, match=r"image_size=\(16, 16\) is not what its tensors show"):
        open_weights(file, HEADS | {"image_size": (16, 16)})
    with pytest.raises(UsageError, match="unknown field of ViTConfig 'headz'"):
        open_weights(file, HEADS | {"headz": 3})


def test_a_grey_model_of_a_colour_one_says_of_a_grey_image_what_that_did(model, tmp_path):
    path = tmp_path / "ours.safetensors"
    shown = Preprocess(size=(32, 32), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    save_weights(path, CONFIG, model.state_dict(), shown)
    grey = Image.effect_noise((32, 32), 80)
    other = pretrained(path, channels=1)
    with torch.inference_mode():
        expected = model(input_of(shown, grey)[None])
        found = other(input_of(shown.grey, grey)[None])
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    opened = open_weights(path)
    notes = load_into(build(started(opened, channels=1)), opened).notes
    assert "normalised by mean 0.449 and deviation 0.226, the means of the 3" in notes[0]


def test_heads_that_nothing_says_are_asked_for(file):
    with pytest.raises(DataError, match=r"the number of heads cannot be known.*heads=1, or"):
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
