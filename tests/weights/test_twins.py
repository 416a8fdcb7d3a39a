"""Twins' layout: recognised, understood, there and back."""

from functools import partial
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from vitrail.errors import DataError
from vitrail.models import build, model_config
from vitrail.weights import open_weights, pretrained
from vitrail.weights.files import write_safetensors
from vitrail.weights.layouts import recognise, understand
from vitrail.weights.load import convert
from vitrail.weights.table import WEIGHTS
from vitrail.weights.twins import TWINS

State = dict[str, Tensor]
CLASSES = 7
close = partial(torch.testing.assert_close, atol=1e-5, rtol=0)
SOURCES: dict[str, tuple[str, str, dict[str, Any]]] = {  # theirs, ours, changes to ours
    "svt": ("twins_svt_small", "twins_svt_s", {"classes": CLASSES}),
    "pcpvt": ("twins_pcpvt_small", "twins_pcpvt_s", {"classes": CLASSES}),
    "one channel, no head": ("twins_svt_small", "twins_svt_s", {"classes": 0, "channels": 1}),
}


def theirs_of(name: str, **changes: Any) -> torch.nn.Module:
    return timm.create_model(
        name, num_classes=changes["classes"], in_chans=changes.get("channels", 3)
    )


@pytest.mark.parametrize("source", SOURCES)
def test_a_file_is_understood_and_comes_back_bit_by_bit(source, randomised):
    name, row, changes = SOURCES[source]
    state = randomised(theirs_of(name, **changes)).state_dict()
    before = {key: tensor.clone() for key, tensor in state.items()}
    found = understand(dict(sorted(state.items())), {}, "a file")  # as safetensors has them
    assert found.layout is TWINS
    assert found.config == model_config(row, **changes)
    assert found.left_out == ()
    back = found.layout.write(found.state, found.config)
    assert back.keys() == before.keys()
    for key, tensor in before.items():
        assert torch.equal(back[key], tensor), key
        assert torch.equal(state[key], tensor), f"{key} was changed in place"


@pytest.mark.parametrize("name", [name for name in WEIGHTS if name.startswith("twins_")])
def test_every_published_row_is_told_from_the_others(name):
    row = WEIGHTS[name]
    timm_name = row.place.repo.removeprefix("timm/").removesuffix(".in1k")
    with torch.device("meta"):
        state = timm.create_model(timm_name).state_dict()
    assert TWINS.infer(state, {}, "a file") == row.config
    layout, _ = recognise(state, "a file")
    assert layout.name == row.layout
    theirs = timm.models.get_pretrained_cfg(f"{timm_name}.in1k")
    told = (row.preprocess.crop, row.preprocess.interpolation, row.preprocess.size)
    assert told == (theirs.crop_pct, theirs.interpolation, theirs.input_size[1:])
    assert (row.preprocess.mean, row.preprocess.std) == (theirs.mean, theirs.std)


def test_from_a_file_to_logits_and_back_to_a_file(randomised, tmp_path):
    theirs = randomised(theirs_of("twins_pcpvt_small", classes=CLASSES))
    file = tmp_path / "theirs.safetensors"
    write_safetensors(file, theirs.state_dict(), {})
    x = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        expected = theirs(x)
        scale = expected.std().clamp(min=1)
        ours = pretrained(file)
        close(ours(x) / scale, expected / scale)
        again = pretrained(convert(open_weights(file), "timm", tmp_path / "back.safetensors"))
        assert torch.equal(again(x), ours(x))
    fewer = pretrained(file, classes=3, channels=1, image_size=(50, 75))
    assert fewer(torch.randn(1, 1, 50, 75)).shape == (1, 3)
    with pytest.raises(DataError, match="google has no counterpart of the family 'twins'"):
        convert(open_weights(file), "google", tmp_path / "ours.npz")


def small() -> State:
    """Of the shapes alone."""
    config = model_config("twins_svt_s", classes=CLASSES)
    with torch.device("meta"):
        return TWINS.write(build(config).state_dict(), config)


@pytest.mark.parametrize("prefix", ["module.", "backbone."])
def test_a_prefix_is_left_off(prefix):
    state = {f"{prefix}{key}": tensor for key, tensor in small().items()}
    assert understand(state, {}, "a file").config == model_config("twins_svt_s", classes=CLASSES)


def test_a_key_too_many_or_too_few_is_named():
    state = small()
    del state["blocks.0.1.attn.sr.bias"]
    with pytest.raises(DataError, match=r"missing 'blocks\.0\.1\.attn\.sr\.bias'"):
        understand(state, {}, "a file")
    with pytest.raises(DataError, match=r"of twins_svt_s: unexpected 'odd\.weight'"):
        understand(small() | {"odd.weight": torch.zeros(1)}, {}, "a file")


@pytest.mark.parametrize("shape", [(4,), (0, 3), (1, 1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("key", ["patch_embeds.0.proj.weight", "pos_block.1.proj.0.weight"])
def test_a_tensor_of_any_other_shape_is_one_clear_error(key, shape):
    with pytest.raises(DataError):
        understand(small() | {key: torch.zeros(shape)}, {}, "a file")
