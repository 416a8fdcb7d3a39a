"""The same weights give the same outputs as transformers, through the files it writes and reads."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from close import close
from vitrail.errors import DataError
from vitrail.models import ViT, ViTConfig, build, model_config
from vitrail.weights import from_huggingface, to_huggingface

# Ours and its changes, theirs, and what to read of its output.
HF_EPS = {"norm_eps": 1e-12}  # the default of transformers' ViT and DeiT
CLASSIFIER = (hf.ViTConfig, hf.ViTForImageClassification, "logits")
DINOV2 = (hf.Dinov2Config, hf.Dinov2Model, "pooler_output")
DINOV2_REG = (hf.Dinov2WithRegistersConfig, hf.Dinov2WithRegistersModel, "pooler_output")
TEACHER = (hf.DeiTConfig, hf.DeiTForImageClassificationWithTeacher, "logits")
CASES = {
    "vit_ti16, full depth": ("vit_ti16", HF_EPS, *CLASSIFIER),
    "vit_s16": ("vit_s16", {"depth": 2, "classes": 10}, *CLASSIFIER),
    "a large epsilon": ("vit_ti16", {"depth": 2, "norm_eps": 0.1}, *CLASSIFIER),
    "vit_s32": ("vit_s32", {"depth": 2, "classes": 10}, *CLASSIFIER),
    "vit_b16": ("vit_b16", {"depth": 2} | HF_EPS, *CLASSIFIER),
    "no qkv bias": ("vit_ti16", {"depth": 2, "qkv_bias": False}, *CLASSIFIER),
    "deit_s16_distilled": ("deit_s16_distilled", {"depth": 2} | HF_EPS, *TEACHER),
    "dinov2_s14": ("dinov2_s14", {"depth": 2}, *DINOV2),
    "dinov2_s14_reg": ("dinov2_s14_reg", {"depth": 2}, *DINOV2_REG),
    "dinov2_g14's gated MLP": (
        "dinov2_g14",
        {"depth": 2, "width": 96, "heads": 3, "mlp": 256},
        *DINOV2,
    ),
    "dinov2_g14_reg's gated MLP": (
        "dinov2_g14_reg",
        {"depth": 2, "width": 96, "heads": 3, "mlp": 256},
        *DINOV2_REG,
    ),
}
SIZES = [(224, 224), (384, 384), (160, 256)]
# transformers' DINOv2 resamples its table for every oblong image: two tests of their own below.
CASES_AND_SIZES = [(c, s) for c in CASES for s in SIZES if s[0] == s[1] or "dinov2" not in c]


def ours_and_theirs(case: str, size: tuple[int, int]) -> tuple[ViTConfig, hf.PreTrainedModel, str]:
    name, changes, hf_config, hf_model, output = CASES[case]
    side = model_config(name).patch[0]
    size = (size[0] // side * side, size[1] // side * side)
    config = model_config(name, image_size=size, **changes)
    common = {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "image_size": size,
        "patch_size": side,
        "qkv_bias": config.qkv_bias,
        "layer_norm_eps": config.norm_eps,
    }
    if output == "logits":
        own = {"num_labels": config.classes, "intermediate_size": config.mlp}
    else:
        own = {"use_swiglu_ffn": config.activation == "swiglu"}  # mlp_ratio is 4
    return config, hf_model(hf_config(**common, **own)), output


def saved(model: hf.PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the file that transformers writes: in memory it has other names."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("case, size", CASES_AND_SIZES, ids=str)
def test_outputs_with_their_weights(case, size, randomised, tmp_path):
    config, theirs, output = ours_and_theirs(case, size)
    ours = ViT(config).eval()
    ours.load_state_dict(from_huggingface(saved(randomised(theirs), tmp_path), config))
    x = torch.randn(2, 3, *config.image_size)
    with torch.inference_mode():
        expected = theirs(x)[output]
        assert 0.3 < expected.std() < 3, "outputs of order 1"
        close(ours(x), expected)
        close(ours(x[:1]), expected[:1])


@pytest.mark.parametrize("case", CASES)
def test_they_load_a_file_that_we_wrote(case, randomised, tmp_path):
    config, theirs, output = ours_and_theirs(case, (112, 112))
    ours = randomised(ViT(config))
    theirs.config.save_pretrained(tmp_path)
    state = {key: t.contiguous() for key, t in to_huggingface(ours.state_dict(), config).items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs, info = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    x = torch.randn(2, 3, *config.image_size)
    with torch.inference_mode():
        close(theirs.eval()(x)[output], ours(x))


@pytest.mark.parametrize("case", CASES)
def test_their_file_comes_back_bit_by_bit(case, randomised, tmp_path):
    config, theirs, _ = ours_and_theirs(case, (112, 112))
    before = saved(randomised(theirs), tmp_path)
    back = to_huggingface(from_huggingface(before, config), config)
    assert back.keys() == before.keys()
    for key, tensor in before.items():
        # The mask token belongs to DINOv2's pre-training: we do not keep it.
        assert torch.equal(back[key], tensor) or key.endswith("mask_token"), key


@pytest.mark.parametrize("registers", [0, 4])
def test_every_token_and_the_feature_map_of_a_dinov2_backbone(registers, randomised, tmp_path):
    name = "dinov2_s14_reg" if registers else "dinov2_s14"
    config, model, _ = ours_and_theirs(name, (112, 112))
    kind = hf.Dinov2WithRegistersBackbone if registers else hf.Dinov2Backbone
    backbone = randomised(kind(model.config))
    model.load_state_dict(backbone.state_dict())
    ours = ViT(config).eval()
    ours.load_state_dict(from_huggingface(saved(backbone, tmp_path), config))
    x = torch.randn(2, 3, 112, 112)
    with torch.inference_mode():
        features = ours.features(x)
        tokens = torch.cat([features.prefix, features.patches], dim=1)
        close(tokens, model.eval()(x).last_hidden_state)
        close(features.maps[0], backbone(x).feature_maps[-1])


def test_dinov2_with_registers_resamples_positions_as_they_do(randomised, tmp_path):
    config, theirs, output = ours_and_theirs("dinov2_s14_reg", (224, 224))
    ours = ViT(config).eval()
    ours.load_state_dict(from_huggingface(saved(randomised(theirs), tmp_path), config))
    x = torch.randn(2, 3, 168, 252)
    with torch.inference_mode():
        close(ours(x), theirs(x)[output])


def test_other_models_differ_by_the_resampled_table_and_nothing_else(randomised, tmp_path):
    """Theirs is bicubic with a = -0.75 and no antialiasing; ours is timm's, a = -0.5 and with."""
    config, theirs, output = ours_and_theirs("dinov2_s14", (224, 224))
    state = saved(randomised(theirs), tmp_path)
    x = torch.randn(2, 3, 168, 252)
    ours = ViT(config).eval()
    ours.load_state_dict(from_huggingface(state, config))
    with torch.inference_mode():
        expected = theirs(x)[output]
        assert (ours(x) - expected).abs().max() > 1e-3
        any_oblong = torch.empty(1, 1 + 12 * 18, 384)
        table = theirs.embeddings.interpolate_pos_encoding(any_oblong, 168, 252)
        config = model_config("dinov2_s14", depth=2, image_size=(168, 252))
        ours = ViT(config).eval()
        state["embeddings.position_embeddings"] = table
        ours.load_state_dict(from_huggingface(state, config))
        close(ours(x), expected)


def hf_state(name: str, **changes: object) -> tuple[dict[str, torch.Tensor], ViTConfig]:
    side = 2 * model_config(name).patch[0]
    config = model_config(name, depth=1, image_size=(side, side), **changes)
    return to_huggingface(build(config).state_dict(), config), config


@pytest.mark.parametrize(
    "name, key",
    [
        ("vit_ti16", "vit.encoder.layer.0.attention.attention.key.bias"),
        ("deit_ti16_distilled", "distillation_classifier.weight"),
        ("dinov2_s14_reg", "embeddings.register_tokens"),
    ],
)
def test_a_key_too_many_or_too_few_is_named(name, key):
    state, config = hf_state(name)
    with pytest.raises(DataError, match=r"unexpected 'pooler\.dense\.weight'"):
        from_huggingface(state | {"pooler.dense.weight": torch.zeros(1)}, config)
    del state[key]
    with pytest.raises(DataError, match=f"missing '{key}'"):
        from_huggingface(state, config)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("dinov2_s14", {"classes": 10}, "DINOv2 has no counterpart of 'head.weight'"),
        ("vit_ti16", {"registers": 4}, "ViT has no counterpart of 'prefix.registers'"),
        ("vit_ti16", {"qk_norm": True}, "no counterpart of 'encoder.blocks.0.attn.q_norm.weight'"),
        ("deit3_s16", {}, "DINOv2 has no counterpart of prefix_position=False"),
        ("vit_ti16", {"position": "rope"}, "ViT has no counterpart of position='rope'"),
    ],
)
def test_what_they_have_no_name_for_is_named(name, changes, message):
    with pytest.raises(DataError, match=message):
        hf_state(name, **changes)
