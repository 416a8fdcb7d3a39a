"""MLP-Mixer and gMLP: timm's outputs, and Google's by its equations."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import timm
import torch
from torch import nn

from close import close
from models.families import GMLP, MIXER
from models.theirs import timm_mixer
from vitrail.models import build
from vitrail.models.mixer import ROWS, Gmlp, Mixer, MixerConfig
from vitrail.weights import mixer as weights


@pytest.mark.parametrize("name", [name for name in ROWS if name != "mixer_h14"])
def test_timm_has_the_same_shape(name):
    """The published integers show width, depth and MLPs, not which row has which."""
    with torch.device("meta"):
        theirs = timm.create_model(f"{name}_224").state_dict()
        ours = build(ROWS[name]).state_dict()
    assert sorted(tuple(t.shape) for t in ours.values()) == sorted(
        tuple(t.shape) for t in theirs.values()
    )


# --- the same outputs ---


OBLONG = {"image_size": (48, 80)}
EPS = {"norm_layer": partial(nn.LayerNorm, eps=0.1)}
CASES = {  # and what timm's has besides
    "mixer_s32": (replace(ROWS["mixer_s32"], depth=2), {}),
    "mixer_b16, oblong": (replace(ROWS["mixer_b16"], depth=1, **OBLONG), {}),
    "mixer, grey, tanh, another epsilon": (
        replace(MIXER, channels=1, activation="gelu_tanh", norm_eps=0.1, classes=7),
        EPS | {"act_layer": partial(nn.GELU, "tanh")},
    ),
    "gmlp_ti16": (replace(ROWS["gmlp_ti16"], depth=3), {}),
    "gmlp_s16, oblong": (replace(ROWS["gmlp_s16"], depth=2, classes=11, **OBLONG), {}),
    "gmlp_b16, another epsilon": (
        replace(ROWS["gmlp_b16"], depth=1, image_size=(64, 64), norm_eps=0.1),
        EPS,
    ),
}
LAYOUT = {"mixer": weights.TIMM_MIXER, "gmlp": weights.TIMM_GMLP}


@pytest.mark.parametrize("case", CASES)
def test_logits_with_timms_weights(case, randomised):
    config, changes = CASES[case]
    theirs = randomised(timm_mixer(config, **changes))
    ours = build(config).eval()
    ours.load_state_dict(LAYOUT[config.family].read(theirs.state_dict(), config))
    x = torch.randn(3, config.channels, *config.image_size)
    with torch.inference_mode():
        expected = theirs(x)
        assert expected.std() > 0.2, "outputs of order 1"
        close(ours(x), expected)
        close(ours(x[:1]), theirs(x[:1]))
        close(ours(x.mT.contiguous().mT), expected)


def test_the_mixer_computes_what_googles_code_does(randomised):
    """Its equations in numpy, from the arrays of its file."""
    config = replace(MIXER, activation="gelu_tanh")
    ours = randomised(Mixer(config))
    file = weights.GOOGLE_MIXER.write(ours.state_dict(), config)
    arrays = {key: tensor.double().numpy() for key, tensor in file.items()}
    x = torch.randn(3, 3, 32, 48)

    def dense(x: np.ndarray, name: str) -> np.ndarray:
        return x @ arrays[f"{name}/kernel"] + arrays[f"{name}/bias"]

    def mlp(x: np.ndarray, name: str) -> np.ndarray:
        y = dense(x, f"{name}/Dense_0")
        y = y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        return dense(y, f"{name}/Dense_1")

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return normal * arrays[f"{name}/scale"] + arrays[f"{name}/bias"]

    # Patches as flax's convolution has them: rows, columns, channels.
    y = x.double().numpy().reshape(3, 3, 4, 8, 6, 8).transpose(0, 2, 4, 3, 5, 1).reshape(3, 24, -1)
    y = y @ arrays["stem/kernel"].reshape(-1, 32) + arrays["stem/bias"]
    for i in range(3):
        block = f"MixerBlock_{i}"
        across = norm(y, f"{block}/LayerNorm_0").swapaxes(1, 2)
        y = y + mlp(across, f"{block}/token_mixing").swapaxes(1, 2)
        y = y + mlp(norm(y, f"{block}/LayerNorm_1"), f"{block}/channel_mixing")
    y = norm(y, "pre_head_layer_norm")
    with torch.inference_mode():
        close(ours.features(x).patches, torch.from_numpy(y).float())
        close(ours(x), torch.from_numpy(dense(y.mean(1), "head")).float())
        exact = Mixer(MIXER).eval()
        exact.load_state_dict(ours.state_dict())
        assert (exact(x) - ours(x)).abs().max() > 1e-5, "which GELU shows"


def test_a_new_gmlps_gates_are_one_whatever_the_tokens():
    """Section 2.1: near the start of training each block is a plain MLP of each token."""
    model = Gmlp(GMLP).eval()
    x = torch.randn(1, 3, 32, 48)
    other = torch.randn(1, 3, 32, 48)
    other[..., :8, :8] = x[..., :8, :8]
    first = model.features(x).patches[0, 0] - model.features(other).patches[0, 0]
    assert first.abs().max() < 1e-3
    mixer = Mixer(MIXER).eval()
    first = mixer.features(x).patches[0, 0] - mixer.features(other).patches[0, 0]
    assert first.abs().max() > 0.1


@pytest.mark.parametrize("config", [MIXER, GMLP], ids=["mixer", "gmlp"])
def test_tokens_are_normed(config, randomised):
    model = randomised(build(config))
    patches = model.features(torch.randn(3, 3, 32, 48)).patches
    normal = (patches - model.norm.bias) / model.norm.weight
    close(normal.mean(-1), torch.zeros(3, 24), size=1)
    close(normal.std(-1, correction=0), torch.ones(3, 24), 1e-4)


@pytest.mark.parametrize("config", [MIXER, GMLP], ids=["mixer", "gmlp"])
@pytest.mark.parametrize("size", [(48, 32), (32, 40), (64, 96)], ids=str)
def test_another_grid_is_another_model(config, size):
    """As the refusal of such images says."""
    assert build(replace(config, image_size=size))(torch.zeros(1, 3, *size)).shape == (1, 5)


def test_first_weights_are_as_in_the_makers_code():
    mixer = Mixer(MixerConfig(depth=1, image_size=(64, 64)))
    block = mixer.blocks[0]
    for layer, fan_in in [
        (block.mlp_tokens.fc1, 16),
        (block.mlp_channels.fc2, 3072),
        (mixer.stem.proj, 768),
    ]:
        assert layer.weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.05)
        assert layer.weight.abs().max() < 2.3 * fan_in**-0.5, "cut at two sigma"
        assert layer.bias.abs().max() == 0
    gate = Gmlp(GMLP).blocks[0].gate.proj
    assert 0 < gate.weight.abs().max() < 1e-5
    assert torch.equal(gate.bias, torch.ones(24))
