"""What no tensor shows is told in one way: in Python, to train, to show and to convert."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from close import close
from vitrail.cli import main
from vitrail.cli import train as verb
from vitrail.cli.told import Told
from vitrail.models import ViT, ViTConfig
from vitrail.weights import convert, open_weights, pretrained, to_timm
from vitrail.weights.google import to_google
from vitrail.weights.layouts import LAYOUTS
from vitrail.weights.table import WEIGHTS
from vitrail.weights.unseen import UNSEEN
from vitrail.weights.write import write_npz

SIZE = (16, 40)  # 2 x 5 patches: no square
PLAIN = ViTConfig(depth=2, width=24, heads=3, mlp=40, patch=(8, 8), image_size=SIZE, classes=5)


def google(config: ViTConfig, folder: Path, model: ViT) -> Path:
    arrays = to_google(model.state_dict(), config)
    if config.position != "learned":
        arrays = {key: x for key, x in arrays.items() if "pos_embedding" not in key}
    write_npz(folder / "weights.npz", arrays)
    return folder / "weights.npz"


def named(layout: str, config: ViTConfig, folder: Path, model: ViT) -> Path:
    tensors = LAYOUTS[layout].write(model.state_dict(), config)
    save_file({key: t.contiguous() for key, t in tensors.items()}, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def timm(config: ViTConfig, folder: Path, model: ViT) -> Path:
    save_file(to_timm(model.state_dict(), config), folder / "weights.safetensors")
    return folder / "weights.safetensors"


def open_clip(config: ViTConfig, folder: Path, model: ViT) -> Path:
    return named("open_clip", config, folder, model)


CLIP = {"pre_norm": True, "stem_bias": False, "head_bias": False}
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    # who wrote the file, what its tensors show, what is told
    "timm": (
        timm,
        {},
        {"heads": 3, "image_size": SIZE, "activation": "gelu_tanh", "norm_eps": 1e-5},
    ),
    "big_vision, fixed positions": (
        google,
        {"class_token": False},
        {"position": "sincos_bigvision", "image_size": SIZE, "pool": "mean"},
    ),
    "big_vision, the first patch": (
        google,
        {"class_token": False, "prefix_position": False},
        {"pool": "first", "image_size": SIZE},
    ),
    "FlexiViT": (google, {}, {"resample": "flexivit", "image_size": SIZE}),
    "RoPE-ViT with a table": (
        timm,
        {"layer_scale": 1e-5, "resample": "bicubic"},
        {"heads": 3, "position": "learned_rope", "rope": "axial", "image_size": SIZE},
    ),
    "CLIP": (
        open_clip,
        CLIP,
        {"heads": 3, "image_size": SIZE, "activation": "gelu_quick", "norm_eps": 1e-5},
    ),
}


@pytest.fixture(params=CASES)
def case(request, randomised, tmp_path) -> tuple[Path, ViT, dict[str, Any]]:
    """A file, the model that is in it, and what has to be told of it."""
    write, shown, told = CASES[request.param]
    usual = {"activation": "gelu_tanh", "resample": "bilinear_aligned"} if write is google else {}
    model = randomised(ViT(replace(PLAIN, **{**usual, **shown, **told})))
    return write(model.config, tmp_path, model), model, told


def flags(told: dict[str, Any], prefix: str = "--model.") -> list[str]:
    words: list[str] = []
    for name, value in told.items():
        values = value if isinstance(value, tuple) else (value,)
        words += [f"{prefix}{name.replace('_', '-')}", *map(str, values)]
    return words


def test_the_flags_are_those_of_the_one_list():
    assert {item.name for item in fields(Told)} == set(UNSEEN)
    assert set(UNSEEN) <= {item.name for item in fields(ViTConfig)}


def test_in_python(case):
    file, model, told = case
    found = pretrained(file, **told)
    assert found.config == model.config
    x = torch.randn(3, 3, *SIZE)
    with torch.inference_mode():
        close(found(x), model(x))
    assert open_weights(file, told).config == model.config


def test_to_show_and_to_convert(case, tmp_path, capsys):
    file, model, told = case
    assert main(["weights", "show", str(file), *flags(told), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {name: shown["config"][name] for name in told} == json.loads(json.dumps(told))
    lines = {one["field"]: one for one in shown["unseen"]}
    assert {name for name, one in lines.items() if one["how"] == "as told"} == set(told)
    out = tmp_path / "out.safetensors"
    asked = ["weights", "convert", str(file), str(out), "--to", "vitrail"]
    assert main([*asked, *flags(told, "--")]) == 0  # the short flags as well
    printed = capsys.readouterr().out
    for name in lines:  # a line each, assumed or known
        assert sum(line.split()[1] == name for line in printed.splitlines()) == 1, name
    again = open_weights(out)
    assert again.config == model.config
    assert {one.how for one in again.unseen} == {"by its header"}
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state[key], tensor), key


def test_to_train(case, tmp_path):
    """The first field by a config file, the others by flags."""
    file, _, told = case
    config = tmp_path / "config.yaml"
    (name, value), *others = told.items()
    config.write_text(json.dumps({"model": {name: value}}))  # which is YAML too
    said = ["--config", str(config), *flags(dict(others))]
    asked = ["samples:emoji", "--weights", str(file), "--recipe", "probe", *said]
    found = verb.read(asked).args.settings.model
    assert {name: getattr(found, name) for name in told} == told


def test_a_row_tells_it_all(randomised, tmp_path, monkeypatch):
    """Of big_vision's ViT-S/16: fixed positions, mean pooling, pre-logits."""
    row = WEIGHTS["vit_s16_in1k_90ep"]
    tiny = {"depth": 2, "width": 24, "heads": 3, "mlp": 40, "classes": 5, "representation": 24}
    small = replace(row, changes={**row.changes, **tiny})
    monkeypatch.setitem(WEIGHTS, "vit_s16_in1k_90ep", small)
    model = randomised(ViT(small.config))
    file = google(small.config, tmp_path, model)
    monkeypatch.setattr("vitrail.weights.load.fetch", lambda source, notify: file)
    opened = open_weights("vit_s16_in1k_90ep")
    assert opened.config == small.config and opened.assumed == ()
    assert {one.how for one in opened.unseen} == {"by vit_s16_in1k_90ep's row in WEIGHTS"}
    x = torch.randn(2, 3, 32, 48)
    with torch.inference_mode():
        close(pretrained("vit_s16_in1k_90ep")(x), model(x))
    out = convert(opened, "google", tmp_path / "again.npz")
    assert open_weights(out, {"position": "sincos_bigvision"}).keys == opened.keys


def test_pooling_that_is_asked_for_is_no_reason_to_read_a_file_as_what_it_cannot_be(
    randomised, tmp_path
):
    """It settles what is open: not which tensors there are."""
    config = replace(PLAIN, class_token=False, prefix_position=False, pool="mean")
    file = timm(config, tmp_path, randomised(ViT(config)))
    told = {"heads": 3, "image_size": SIZE}
    for pool in ("class", "class_mean", "map"):
        assert open_weights(file, told, wanted={"pool": pool}).config.pool == "mean"
    assert open_weights(file, told, wanted={"pool": "first"}).config.pool == "first"
