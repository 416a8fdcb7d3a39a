"""Mixer's and gMLP's files: recognised, understood, there and back; and brought to another grid."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from close import close
from models.families import GMLP, MIXER
from models.theirs import timm_mixer
from vitrail.errors import DataError
from vitrail.models import GmlpConfig, MixerConfig, build
from vitrail.models.mixer import ROWS
from vitrail.nn import resample_table
from vitrail.weights.files import read_weights
from vitrail.weights.fit import fit
from vitrail.weights.layouts import Found, understand, write_as
from vitrail.weights.load import open_weights, pretrained, save_weights
from vitrail.weights.mixer import resize_tokens
from vitrail.weights.write import write_npz

State = dict[str, Tensor]
Config = MixerConfig | GmlpConfig
GOOGLE = replace(MIXER, activation="gelu_tanh")


def google(config: MixerConfig) -> State:
    """A file of the published names and shapes (systems.md, 3.3)."""
    (rows, columns), (p, q), d = config.grid, config.patch, config.width

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape) * shape[0] ** -0.5

    def dense(name: str, n_in: int, n_out: int) -> State:
        return {f"{name}/kernel": normal(n_in, n_out), f"{name}/bias": normal(n_out)}

    def norm(name: str) -> State:
        return {f"{name}/scale": 1 + normal(d), f"{name}/bias": normal(d)}

    n, t, m = rows * columns, config.tokens_mlp, config.mlp
    file = {"stem/kernel": normal(p, q, config.channels, d) * 0.1, "stem/bias": normal(d)}
    for i in range(config.depth):
        block = f"MixerBlock_{i}"
        file |= norm(f"{block}/LayerNorm_0") | norm(f"{block}/LayerNorm_1")
        file |= dense(f"{block}/token_mixing/Dense_0", n, t)
        file |= dense(f"{block}/token_mixing/Dense_1", t, n)
        file |= dense(f"{block}/channel_mixing/Dense_0", d, m)
        file |= dense(f"{block}/channel_mixing/Dense_1", m, d)
    return file | norm("pre_head_layer_norm") | dense("head", d, config.classes)


def older(file: State, second_norm: int = 1) -> State:
    """The same file as it was before linen."""
    renamed = {}
    for key, tensor in file.items():
        key = key.replace("pre_head_layer_norm", "Mixer/encoder_norm").replace(
            "stem/", "embedding/"
        )
        key = key.replace("MixerBlock_", "Mixer/encoderblock_")
        key = key.replace("LayerNorm_1", f"LayerNorm_{second_norm}")
        for n in (1, 2):
            for leaf in ("kernel", "bias"):
                key = key.replace(f"mixing/Dense_{n - 1}/{leaf}", f"mixing_phase_0/{leaf}{n}")
        phase = "_phase_0/" in key
        renamed[key] = tensor[None] if phase and "token" in key else tensor
    return renamed


def opened(state: State, **told: object) -> Found:
    return understand(state, {"image_size": (32, 48), **told}, "a file")


def loaded(config: Config, state: State) -> nn.Module:
    model = build(config).eval()
    model.load_state_dict(state)
    return model


def same(one: State, other: State) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert torch.equal(other[key], tensor), key


# --- in timm ---


@pytest.mark.parametrize("config", [MIXER, GMLP], ids=["mixer", "gmlp"])
def test_our_weights_in_timm(config, randomised):
    ours, theirs = randomised(build(config)), timm_mixer(config)
    theirs.load_state_dict(write_as("timm", ours.state_dict(), config))
    x = torch.randn(2, 3, 32, 48)
    with torch.inference_mode():
        close(theirs.eval()(x), ours(x))


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_found_by_its_shapes(name):
    with torch.device("meta"):
        state = build(ROWS[name]).state_dict()
    found = understand(write_as("timm", state, ROWS[name]), {}, "a file")
    assert found.config == ROWS[name]


# --- Google's ---

AGES: dict[str, Callable[[State], State]] = {
    "google-mixer": dict,
    "google-mixer-older": older,
}
every_age = pytest.mark.parametrize("age", AGES)


@every_age
@pytest.mark.parametrize("prefix", ["", "opt/target/", "params/"])
def test_a_file_of_googles(age, prefix, tmp_path):
    file = google(GOOGLE)
    path = tmp_path / "Mixer.npz"
    beside = {"opt/state/step": torch.tensor([7.0])} if prefix == "opt/target/" else {}
    aged = {prefix + key: tensor for key, tensor in AGES[age](file).items()} | beside
    write_npz(path, aged)
    found = opened(read_weights(path).tensors)
    assert (found.layout.name, found.config) == (age, GOOGLE)
    assert found.left_out == tuple(beside)
    same(write_as("google", found.state, found.config), file)
    if age == "google-mixer":
        back = write_as("google", found.state, found.config, found.keys)
        same({**back, **beside}, aged)  # as it came, with its prefix


def test_the_ages_are_one_function():
    """tests/models/test_mixer.py holds it against Google's equations."""
    file = google(GOOGLE)
    state = opened(file).state
    same(opened(older(file)).state, state)
    same(opened(older(file, second_norm=2)).state, state)
    x = torch.randn(2, 3, 32, 48)
    assert loaded(GOOGLE, state)(x).std() > 0.1


def test_our_weights_come_back_from_google_bit_by_bit(randomised):
    state = randomised(build(GOOGLE)).state_dict()
    before = {key: tensor.clone() for key, tensor in state.items()}
    written = write_as("google", state, GOOGLE)
    assert {k: t.shape for k, t in written.items()} == {
        k: t.shape for k, t in google(GOOGLE).items()
    }
    same(opened(written).state, before)
    same(dict(state), before)


def test_what_googles_code_computes_otherwise_is_not_written_for_it(randomised):
    state = build(MIXER).state_dict()
    with pytest.raises(DataError, match=r"no counterpart of activation='gelu': .* 'gelu_tanh'"):
        write_as("google", state, MIXER)
    with pytest.raises(DataError, match="no counterpart of norm_eps=1e-05"):
        write_as("google", state, replace(GOOGLE, norm_eps=1e-5))
    with pytest.raises(DataError, match="google has no counterpart of the family 'gmlp'"):
        write_as("google", build(GMLP).state_dict(), GMLP)
    other = replace(GMLP, gate_eps=1e-6)
    with pytest.raises(DataError, match="timm's gMLP has no counterpart of gate_eps=1e-06"):
        write_as("timm", build(other).state_dict(), other)


# --- what is refused ---


def test_what_is_told_wins():
    file = write_as("timm", build(MIXER).state_dict(), MIXER)
    assert opened(file, activation="gelu_tanh").config == GOOGLE
    found = understand(file, {"image_size": (48, 32)}, "a file")
    assert found.config.grid == (6, 4)


@pytest.mark.parametrize("config", [MIXER, GMLP], ids=["mixer", "gmlp"])
def test_an_oblong_grid_has_to_be_told(config):
    file = write_as("timm", build(config).state_dict(), config)
    with pytest.raises(DataError, match="no square: say the image size"):
        understand(file, {}, "a file")
    with pytest.raises(DataError, match=r"a file has the layout of timm's .* another shape"):
        understand(file, {"image_size": (32, 32)}, "a file")
    square = replace(config, image_size=(32, 32))
    file = write_as("timm", build(square).state_dict(), square)
    assert understand(file, {}, "a file").config == square


@every_age
def test_a_damaged_file_is_refused_by_name(age):
    file = AGES[age](google(GOOGLE))
    last = next(key for key in reversed(file) if "2" in key and "ock" in key)
    with pytest.raises(DataError, match="missing"):
        opened({key: tensor for key, tensor in file.items() if key != last})
    with pytest.raises(DataError, match="unexpected 'more'"):
        opened(file | {"more": torch.zeros(1)})
    stem = next(key for key in file if key.startswith(("stem", "embedding")))
    with pytest.raises(DataError, match="a file has the layout of"):
        opened(file | {stem: torch.zeros(3)})


# --- another grid ---


def drawn(seeds: Tensor, size: tuple[int, int]) -> Tensor:
    """The same smooth images at any size."""
    return F.interpolate(seeds, size=size, mode="bicubic")


def smooth(config: Config, randomised: Callable[[nn.Module], nn.Module]) -> State:
    """Weights whose maps on the grid are smooth, as training makes them."""
    coarse = replace(config, image_size=(16, 24))
    return resize_tokens(randomised(build(coarse)).state_dict(), coarse, config)


SIZES = [(96, 96), (80, 120), (48, 72), (64, 160)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("config", [MIXER, GMLP], ids=["mixer", "gmlp"])
def test_smooth_images_are_seen_as_before_on_another_grid(config, size, randomised):
    config = replace(config, image_size=(64, 96))
    state = smooth(config, randomised)
    seeds = torch.randn(16, 3, 2, 3)
    wanted = replace(config, image_size=size)
    resized = resize_tokens(state, config, wanted)
    with torch.inference_mode():
        before = loaded(config, state)(drawn(seeds, (64, 96)))
        after = loaded(wanted, resized)(drawn(seeds, size))
        spread = (before - before.mean(0)).norm()
        assert (after - before).norm() < 0.1 * spread
        # Maps that are read keep their sums; with those of a position table they would not.
        factor = (size[0] * size[1]) / (64 * 96)
        reads = ("mlp_tokens.fc1.weight", "gate.proj.weight")
        naive = {k: t * factor if k.endswith(reads) else t for k, t in resized.items()}
        assert (loaded(wanted, naive)(drawn(seeds, size)) - before).norm() > 0.2 * spread


@pytest.mark.parametrize("new", [(8, 12), (6, 6), (5, 9)], ids=str)
def test_mixing_commutes_with_making_the_grid_finer(new, randomised):
    """Exactly, whatever the weights and the tokens."""
    size = (new[0] * 8, new[1] * 8)

    def finer(tokens: Tensor) -> Tensor:
        return torch.stack([resample_table(t, (4, 6), new) for t in tokens])

    tokens = torch.randn(2, 24, 32)
    wanted = replace(MIXER, image_size=size)
    model = randomised(build(MIXER))
    other = loaded(wanted, resize_tokens(model.state_dict(), MIXER, wanted))
    for one, two in zip(model.blocks, other.blocks, strict=True):
        close(two.mlp_tokens(finer(tokens).mT).mT, finer(one.mlp_tokens(tokens.mT).mT))
    wanted = replace(GMLP, image_size=size)
    model = randomised(build(GMLP))
    other = loaded(wanted, resize_tokens(model.state_dict(), GMLP, wanted))
    for one, two in zip(model.blocks, other.blocks, strict=True):
        close(two.gate.proj(finer(tokens).mT).mT, finer(one.gate.proj(tokens.mT).mT))


@pytest.mark.parametrize("config", [MIXER, GMLP], ids=["mixer", "gmlp"])
def test_the_same_grid_and_all_other_weights_stay_bit_by_bit(config, randomised):
    state = dict(randomised(build(config)).state_dict())
    same(resize_tokens(state, config, replace(config, classes=3)), state)
    wanted = replace(config, image_size=(64, 64))
    resized = resize_tokens(state, config, wanted)
    changed = {key for key in state if not torch.equal(resized[key], state[key])}
    across = ("mlp_tokens.fc1.weight", "mlp_tokens.fc2", "gate.proj")
    assert changed == {key for key in state if any(part in key for part in across)}
    half = resize_tokens({key: t.half() for key, t in state.items()}, config, wanted)
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}


@pytest.mark.parametrize("config", [GOOGLE, GMLP], ids=["mixer", "gmlp"])
def test_our_own_file_starts_a_model_for_other_images(config, randomised, tmp_path):
    state = randomised(build(config)).state_dict()
    path = tmp_path / "own.safetensors"
    save_weights(path, config, state)
    assert open_weights(path).config == config
    same(dict(pretrained(path).state_dict()), dict(state))
    model = pretrained(path, image_size=(40, 64), classes=3)
    assert model(torch.randn(2, 3, 40, 64)).shape == (2, 3)
    wanted = replace(config, image_size=(40, 64))
    fitted = fit(state, config, wanted, "own")
    same(fitted.state, resize_tokens(state, config, wanted))
    assert any("4x6 of them resampled to 5x8" in note for note in fitted.notes)
