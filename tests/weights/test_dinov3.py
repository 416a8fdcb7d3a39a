"""DINOv3: counts in each layout's own terms, the masked bias, the periods, and who pools what."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from close import close
from vitrail import pretrained
from vitrail.errors import DataError, UsageError
from vitrail.models import MODELS, ViT, ViTConfig, build
from vitrail.weights import dinov3, fetch, open_weights
from vitrail.weights.beside import told_by_config
from vitrail.weights.fit import fit
from vitrail.weights.layouts import recognise, understand, write_as
from vitrail.weights.names import State
from vitrail.weights.table import WEIGHTS
from weights.sources import SOURCES, D

# The makers' model with its mask token and the keys' bias, which a mask makes zero; Hugging Face's
# without that bias; timm's without the token, and without biases of q, k and v.
COUNTS = {
    "dinov3_s16": (21_601_152, 21_596_544, 21_586_944),
    "dinov3_s16plus": (28_697_472, 28_692_864, 28_683_264),
    "dinov3_b16": (85_669_632, 85_660_416, 85_641_216),
    "dinov3_l16": (303_154_176, 303_129_600, 303_079_424),
    "dinov3_h16plus": (840_633_600, 840_592_640, 840_509_440),
    "dinov3_7b16": (6_716_043_264, 6_716_035_072, 6_716_030_976),
}
BUFFERS = ("periods", "bias_mask")
OWN = "DINOv3"


def parameters(state: State) -> int:
    return sum(tensor.numel() for key, tensor in state.items() if not key.endswith(BUFFERS))


def on_meta(config: ViTConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return build(config).state_dict()


@pytest.mark.parametrize("name", COUNTS)
def test_counts_in_each_layouts_own_terms(name):
    config = MODELS[name]
    own, hugging_face, timms = COUNTS[name]
    second_norm = 2 * config.width if name == "dinov3_7b16" else 0  # of small crops, in training
    assert parameters(dinov3.DINOV3.write(on_meta(config), config)) + second_norm == own
    assert parameters(write_as("huggingface", on_meta(config), config)) == hugging_face
    bare = replace(config, qkv_bias=False)
    assert parameters(write_as("timm", on_meta(bare), bare)) == timms


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("dinov3_s16plus", "vit_small_plus_patch16_dinov3_qkvb"),
        ("dinov3_7b16", "vit_7b_patch16_dinov3"),
    ],
)
def test_what_is_written_is_what_timm_loads(name, theirs):
    config = replace(MODELS[name], depth=1)
    with torch.device("meta"):
        model = timm.create_model(theirs, depth=1)
    assert {k: t.shape for k, t in write_as("timm", on_meta(config), config).items()} == {
        k: t.shape for k, t in model.state_dict().items()
    }


def test_counts_of_eupe_and_lingbot():
    """EUPE's smallest in its makers' terms; LingBot's giant in timm's."""
    config = MODELS["dinov3_ti16"]
    assert parameters(dinov3.DINOV3.write(on_meta(config), config)) == 5_492_160
    giant = WEIGHTS["lingbot_g16_512"].config  # timm's vit_giant_patch16_lingbot
    assert parameters(write_as("timm", on_meta(giant), giant)) == 1_134_473_216


@pytest.fixture
def own(randomised, tmp_path: Path) -> dict[str, Tensor]:
    """A file of the makers' own layout."""
    return SOURCES[OWN].tensors(randomised(SOURCES[OWN].build()), tmp_path)


def test_the_keys_have_no_bias_whatever_the_file_holds(own):
    """The makers' code multiplies it by its mask."""
    before = understand(own, {}, "a file").state
    for key in own:
        if key.endswith("qkv.bias"):
            own[key][D : 2 * D] = 7
    after = understand(own, {}, "a file").state
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("value", [float("nan"), 1.0])
def test_a_mask_that_masks_nothing_is_refused(own, value):
    own["blocks.1.attn.qkv.bias_mask"].fill_(value)
    with pytest.raises(DataError, match=r"'blocks\.1\.attn\.qkv\.bias_mask' does not .* never in"):
        understand(own, {}, "a file")


def test_periods_show_the_heads_and_are_checked(own):
    assert understand(own, {}, "a file").config.heads == SOURCES[OWN].expected.heads
    own["rope_embed.periods"] = own["rope_embed.periods"] * 1.1
    with pytest.raises(DataError, match=r"'rope_embed\.periods' are not those of DINOv3"):
        understand(own, {}, "a file")
    own["rope_embed.periods"] = torch.ones(5)
    with pytest.raises(DataError, match=r"'rope_embed\.periods' of \(5,\) is none of width 24"):
        understand(own, {}, "a file")


def test_what_is_done_with_the_periods_is_said(own):
    assert "periods of the rope in float32: its own code has them in bfloat16, 3 digits" in (
        understand(own, {}, "a file").assumed
    )


@pytest.mark.parametrize("layout", [dinov3.DINOV3, dinov3.TIMM], ids=lambda layout: layout.name)
def test_a_bias_of_keys_has_no_counterpart(layout, randomised):
    config = SOURCES[OWN].expected
    with pytest.raises(DataError, match=r"no bias there, and that in 'blocks.0"):
        layout.write(randomised(ViT(config)).state_dict(), config)


def test_from_layout_to_layout(own, randomised):
    """The makers' file as Hugging Face's and timm's, and back: the same function, the same bits."""
    found = understand(own, {"image_size": SOURCES[OWN].size}, "a file")
    for to, told in (("huggingface", {}), ("timm", {"pool": "class"})):
        file = write_as(to, found.state, found.config)
        again = understand(file, {"heads": 3, "image_size": found.config.image_size} | told, to)
        assert again.config == found.config
        assert all(torch.equal(again.state[key], tensor) for key, tensor in found.state.items())


def test_timm_pools_the_mean_and_its_makers_the_class_token(own):
    found = understand(own, {}, "a file")
    assert found.config.pool == "class"
    file = write_as("timm", found.state, found.config)
    assert understand(file, {"heads": 3}, "a file").config.pool == "mean"
    assert "pool mean, as in the code of timm's DINOv3" in (
        understand(file, {"heads": 3}, "a file").assumed
    )
    config = {"architecture": "vit_small_patch16_lingbot", "global_pool": "token"}
    told = told_by_config(config)
    assert told["pool"] == "class"


def test_positions_are_its_own_whatever_model_is_wanted(own):
    wanted = {"position": "learned", "image_size": (16, 24)}
    assert understand(own, {}, "a file", wanted).config.position == "rope"


def test_files_without_biases_start_a_model_with_them(randomised):
    """The distilled ones' are zeros, and timm leaves them out."""
    bare = SOURCES["timm, DINOv3"].expected
    state = randomised(ViT(bare)).state_dict()
    wanted = replace(bare, qkv_bias=True)
    fitted = fit(state, bare, wanted, "a file")
    assert "biases of q, k and v: zeros, for the weights have none" in fitted.notes
    model = ViT(wanted).eval()
    model.load_state_dict(fitted.state)
    old = ViT(bare).eval()
    old.load_state_dict(state)
    x = torch.randn(1, 3, 16, 24)
    with torch.inference_mode():
        close(model.features(x).pooled, old.features(x).pooled)


def test_heads_of_a_gated_mlp_are_not_those_of_a_plain_one_of_its_size():
    """H+ has 20 heads and ViT-H 16, with the same width, depth and MLP."""
    for name, heads in (("dinov3_h16plus", 20), ("vit_h14", 16)):
        config = replace(MODELS[name], qkv_bias=False, classes=0)
        found = understand(write_as("timm", on_meta(config), config), {}, "a file")
        assert found.config.heads == heads


def test_its_licence_is_said_before_the_fetch(monkeypatch, tmp_path):
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path))

    def unreachable(*args):
        raise DataError("no connection")

    monkeypatch.setattr("vitrail.weights.fetch._fetch_companions", unreachable)
    said: list[str] = []
    with pytest.raises(DataError, match="cannot fetch dinov3_s16"):
        fetch.fetch("dinov3_s16", said.append)
    assert "Meta's own, https://ai.meta.com" in said[0]
    assert "HF_TOKEN" in said[0]
    with pytest.warns(UserWarning, match="dinov3_s16: its licence"), pytest.raises(DataError):
        pretrained("dinov3_s16")


def test_a_file_on_disk_says_all_of_itself(own, tmp_path):
    path = tmp_path / "dinov3.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in own.items()}, path)
    opened = open_weights(path)
    assert opened.layout == "dinov3"
    assert opened.left_out == ("mask_token",)
    with pytest.raises(UsageError, match="heads=2 is not what its tensors show"):
        open_weights(path, {"heads": 2})


def test_layouts_are_told_from_each_other():
    for name in ("DINOv3", "HF DINOv3", "timm, DINOv3"):
        config = SOURCES[name].expected
        bare = replace(config, qkv_bias=False)
        file = (
            dinov3.DINOV3.write(on_meta(bare), bare)
            if name == "DINOv3"
            else write_as("timm" if name.startswith("timm") else "huggingface", on_meta(bare), bare)
        )
        assert recognise(file, "a file")[0].name == SOURCES[name].layout
