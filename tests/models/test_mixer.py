"""MLP-Mixer and gMLP: published counts, timm's outputs, and Google's by its equations."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import timm
import torch
from torch import nn

from vitrail.errors import UsageError
from vitrail.models.mixer import ROWS, Gmlp, GmlpConfig, Mixer, MixerConfig
from vitrail.weights import mixer as weights

COUNTS = {
    "mixer_s32": 19_104_624,
    "mixer_s16": 18_528_264,
    "mixer_b32": 60_293_428,  # google-research/vision_transformer, models_test.py
    "mixer_b16": 59_880_472,
    "mixer_l32": 206_939_264,
    "mixer_l16": 208_196_168,
    "mixer_h14": 432_350_952,  # the formula alone
    "gmlp_ti16": 5_867_328,  # timm's, as all below
    "gmlp_s16": 19_422_656,
    "gmlp_b16": 73_075_392,
}
SIZE = {"image_size": (32, 48), "patch": (8, 8), "classes": 5}
TINY_MIXER = MixerConfig(depth=3, width=32, mlp=48, tokens_mlp=20, **SIZE)
TINY_GMLP = GmlpConfig(depth=3, width=32, mlp=48, **SIZE)
TINY = {"mixer": TINY_MIXER, "gmlp": TINY_GMLP}
every_family = pytest.mark.parametrize("family", TINY)
close = partial(torch.testing.assert_close, atol=1e-5, rtol=0)


def of(config: MixerConfig | GmlpConfig) -> Mixer | Gmlp:
    return Mixer(config) if isinstance(config, MixerConfig) else Gmlp(config)


@pytest.mark.parametrize("name", ROWS)
def test_as_many_parameters_as_published(name):
    assert list(ROWS) == list(COUNTS)
    with torch.device("meta"):
        assert sum(p.numel() for p in of(ROWS[name]).parameters()) == COUNTS[name]


@pytest.mark.parametrize("name", [name for name in ROWS if name != "mixer_h14"])
def test_timm_has_the_same_shape(name):
    """The published integers show width, depth and MLPs, not which row has which."""
    with torch.device("meta"):
        theirs = timm.create_model(f"{name}_224").state_dict()
        ours = of(ROWS[name]).state_dict()
    assert sorted(tuple(t.shape) for t in ours.values()) == sorted(
        tuple(t.shape) for t in theirs.values()
    )


# --- the same outputs ---


def theirs_of(config: MixerConfig | GmlpConfig, **changes: object) -> nn.Module:
    """timm's model of the shape of `config`."""
    kind: dict[str, object]
    if isinstance(config, MixerConfig):
        ratios = (config.tokens_mlp / config.width, config.mlp / config.width)
        kind = {"mlp_ratio": ratios}
    else:
        kind = {
            "mlp_ratio": config.mlp / config.width,
            "block_layer": timm.models.mlp_mixer.SpatialGatingBlock,
            "mlp_layer": timm.layers.GatedMlp,
        }
    return timm.models.MlpMixer(
        num_classes=config.classes,
        img_size=config.image_size,
        in_chans=config.channels,
        patch_size=config.patch[0],
        num_blocks=config.depth,
        embed_dim=config.width,
        **kind,
        **changes,
    )


OBLONG = {"image_size": (48, 80)}
EPS = {"norm_layer": partial(nn.LayerNorm, eps=0.1)}
CASES = {  # and what timm's has besides
    "mixer_s32": (replace(ROWS["mixer_s32"], depth=2), {}),
    "mixer_b16, oblong": (replace(ROWS["mixer_b16"], depth=1, **OBLONG), {}),
    "mixer, grey, tanh, another epsilon": (
        replace(TINY_MIXER, channels=1, activation="gelu_tanh", norm_eps=0.1, classes=7),
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
    theirs = randomised(theirs_of(config, **changes))
    ours = of(config).eval()
    layout, state = LAYOUT[config.family], theirs.state_dict()
    names = {key: layout.theirs(key) for key in ours.state_dict()}
    assert sorted(names.values()) == sorted(state)
    ours.load_state_dict({key: state[name] for key, name in names.items()})
    x = torch.randn(3, config.channels, *config.image_size)
    with torch.inference_mode():
        expected = theirs(x)
        assert expected.std() > 0.2, "outputs of order 1"
        close(ours(x), expected)
        close(ours(x[:1]), theirs(x[:1]))
        close(ours(x.mT.contiguous().mT), expected)


def test_the_mixer_computes_what_googles_code_does(randomised):
    """Its equations in numpy, from the arrays of its file."""
    config = replace(TINY_MIXER, activation="gelu_tanh")
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
        exact = Mixer(TINY_MIXER).eval()
        exact.load_state_dict(ours.state_dict())
        assert (exact(x) - ours(x)).abs().max() > 1e-5, "which GELU shows"


def test_a_new_gmlps_gates_are_one_whatever_the_tokens():
    """Section 2.1: near the start of training each block is a plain MLP of each token."""
    model = Gmlp(TINY_GMLP).eval()
    x = torch.randn(1, 3, 32, 48)
    other = torch.randn(1, 3, 32, 48)
    other[..., :8, :8] = x[..., :8, :8]
    first = model.features(x).patches[0, 0] - model.features(other).patches[0, 0]
    assert first.abs().max() < 1e-3
    mixer = Mixer(TINY_MIXER).eval()
    first = mixer.features(x).patches[0, 0] - mixer.features(other).patches[0, 0]
    assert first.abs().max() > 0.1


# --- the contract of a family ---


@every_family
def test_features(family, randomised):
    model = randomised(of(TINY[family]))
    x = torch.randn(3, 3, 32, 48)
    features = model.features(x)
    assert features.grid == (4, 6)
    assert features.strides == ((8, 8),)
    assert [m.shape for m in features.maps] == [(3, 32, 4, 6)]
    assert features.prefix.shape == (3, 0, 32)
    assert torch.equal(features.patches[1, 7], features.maps[0][1, :, 1, 1]), "row by row"
    normal = (features.patches - model.norm.bias) / model.norm.weight
    close(normal.mean(-1), torch.zeros(3, 24), atol=1e-5)
    close(normal.std(-1, correction=0), torch.ones(3, 24), atol=1e-4)
    close(features.pooled, features.patches.mean(1))
    assert model.logits(features).shape == (3, 1, 5)
    assert torch.equal(model(x), model.logits(features)[:, 0])
    bare = of(replace(model.config, classes=0)).eval()
    assert bare.head is None
    bare.load_state_dict({k: t for k, t in model.state_dict().items() if "head" not in k})
    assert torch.equal(bare(x), features.pooled)


@every_family
def test_grid_stride_and_shape(family):
    config = TINY[family]
    assert (config.grid, config.stride) == ((4, 6), (8, 8))
    assert config.shape == "3 blocks, width 32, 4x6 tokens"
    assert of(config).block_names() == ["blocks.0", "blocks.1", "blocks.2"]
    assert {name for name, _ in of(config).named_modules()} >= set(of(config).block_names())


@every_family
def test_another_grid_is_refused_with_what_would_work(family):
    """Also one of as many tokens: 24 of 6x4 are other places than 24 of 4x6."""
    model = of(TINY[family])
    for size in [(48, 32), (32, 40), (64, 96)]:
        h, w = size
        message = (
            rf"this {family} has a weight for each place of 4x6 patches, so it takes images of "
            rf"32x48 pixels \(height x width\), not {h}x{w}: scale them, or build it with "
            rf"image_size=\({h}, {w}\)"
        )
        with pytest.raises(UsageError, match=message):
            model(torch.zeros(1, 3, *size))
        with pytest.raises(UsageError, match=message):
            model.config.check_size(size)
        assert of(replace(model.config, image_size=size))(torch.zeros(1, 3, *size)).shape == (1, 5)
    model.config.check_size((32, 48))


@every_family
def test_what_it_does_not_take_is_refused(family):
    model = of(TINY[family])
    with pytest.raises(UsageError, match="have 1 channels, the model takes 3: build it with chan"):
        model(torch.zeros(1, 1, 32, 48))
    with pytest.raises(UsageError, match=f"are for ViTs: {family} takes resize crop or squash"):
        model(torch.zeros(1, 3, 32, 48), torch.tensor([[1, 1]]))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"family": "vit"}, "of the family"),
        ({"depth": 0}, "depth must be at least 1, not 0"),
        ({"mlp": 0}, "mlp must be at least 1"),
        ({"channels": 0}, "channels must be at least 1"),
        ({"classes": -1}, "classes cannot be negative"),
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\)"),
        ({"norm_eps": 0.0}, "norm_eps must be in"),
        ({"image_size": (32,)}, "image_size is a pair"),
        ({"patch": (0, 8)}, "patch is a pair"),
        ({"image_size": (36, 30)}, "36x30 .* cannot be cut into patches of 8x8: use 32x24"),
        ({"activation": "gelu_tan"}, "did you mean 'gelu_tanh'"),
        ({"activation": "swiglu"}, "unknown activation"),
    ],
    ids=str,
)
@every_family
def test_a_config_that_makes_no_sense_is_refused(family, changes, message):
    with pytest.raises(UsageError, match=message):
        replace(TINY[family], **changes)


def test_what_one_family_alone_has_is_checked():
    with pytest.raises(UsageError, match="tokens_mlp must be at least 1, not 0"):
        replace(TINY_MIXER, tokens_mlp=0)
    with pytest.raises(UsageError, match="it must be even, not 49"):
        replace(TINY_GMLP, mlp=49)
    with pytest.raises(UsageError, match="gate_eps must be in"):
        replace(TINY_GMLP, gate_eps=0.0)


@pytest.mark.parametrize(
    "family, change",
    [
        ("mixer", {"activation": "gelu_tanh"}),
        ("gmlp", {"activation": "gelu_tanh"}),
        ("mixer", {"norm_eps": 0.1}),
        ("gmlp", {"norm_eps": 0.1}),
        ("gmlp", {"gate_eps": 0.1}),
    ],
)
def test_what_no_shape_shows_has_an_effect(family, change, randomised):
    model = randomised(of(TINY[family]))
    other = of(replace(TINY[family], **change)).eval()
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 32, 48)
    assert (other(x) - model(x)).abs().max() > 1e-5


@every_family
def test_it_trains_on_one_image_in_bfloat16(family):
    model = of(TINY[family]).train()
    nn.init.normal_(model.head.weight)  # zeros would let no gradient through
    x = torch.randn(1, 48, 32, 3).permute(0, 3, 2, 1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = nn.functional.cross_entropy(model(x).float(), torch.tensor([1]))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@every_family
def test_stochastic_depth_acts_in_training_alone(family, randomised):
    model = randomised(of(replace(TINY[family], drop_path=0.9)))
    x = torch.randn(8, 3, 32, 48)
    plain = of(TINY[family])
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(x), plain.eval()(x))
    assert not torch.equal(model.train()(x), plain.train()(x))
    rates = [model.get_submodule(f"{name}.drop_path").rate for name in model.block_names()]
    assert rates == [0.0, 0.45, 0.9]


@every_family
def test_a_new_model_says_nothing_and_can_learn(family):
    model = of(TINY[family]).train()
    x = torch.randn(4, 3, 32, 48)
    assert model(x).abs().max() == 0, "a head of zeros"
    step = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(x), torch.arange(4))
        step.zero_grad()
        loss.backward()
        step.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(later < losses[0] for _, later in pairwise(losses))


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
    gate = Gmlp(TINY_GMLP).blocks[0].gate.proj
    assert 0 < gate.weight.abs().max() < 1e-5
    assert torch.equal(gate.bias, torch.ones(24))
