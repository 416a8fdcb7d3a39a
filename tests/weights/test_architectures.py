"""Whose architecture is ours: every name of timm's ViTs, open_clip's towers, transformers' images.

A name is either read, and then gives the outputs of its own code, or refused by that name.
"""

import json
import re
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
)

from close import close
from vitrail.cli import main
from vitrail.errors import DataError
from vitrail.models import ViT
from vitrail.weights import open_weights
from vitrail.weights.architectures import check_architecture, told_by_timm
from vitrail.weights.beside import told_by_config
from vitrail.weights.layouts import understand

MODULES = (
    *("vision_transformer", "eva", "deit", "vision_transformer_hybrid", "beit", "cait", "xcit"),
    *("vision_transformer_relpos", "vision_transformer_sam", "naflexvit"),
)
NAMES = [name for module in MODULES for name in timm.list_models(module=module)]


def refused(config: dict[str, Any]) -> str:
    """The message, or nothing."""
    try:
        check_architecture(config, "a file")
    except DataError as error:
        return str(error)
    return ""


READ = [name for name in NAMES if not refused({"architecture": name})]
LOOK_ALIKE = {
    "vit_base_patch16_rpn_224": "residual post-norm",
    "vit_small_patch16_rope_mixed_224": "rotary positions whose periods are learned",
    "vit_small_patch16_rope_mixed_ape_224": "rotary positions whose periods are learned",
    "resnetblur18": "a blur before its strides",
    "resnetaa50": "a blur before its strides",
    "vit_relpos_small_patch16_224": "positions relative to each other",
    "vit_base_patch16_xp_224": "attention and MLP side by side",
    "vit_small_patch16_18x2_224": "two attentions side by side",
    "vit_dwee_patch16_reg1_gap_256": "differential attention",
    "vit_intern300m_patch14_448": "no norm after the last block",
    "eva02_enormous_patch14_clip_224": "norms behind attention and MLP",
    "vit_pwee_patch16_reg1_gap_256": "attention and MLP side by side",
    "naflexvit_base_patch16_par_gap": "positions that keep their proportions",
    "naflexvit_base_patch16_parfac_gap": "positions of rows and of columns",
    "naflexvit_base_patch16_radio_v3": "positions cropped from a table",
    "vit_base_patch16_sapiens2": "rotary positions and grouped queries",
    "aimv2_large_patch14_224": "RMS norms and a gated MLP",
    "hiera_tiny_224": "stages of attention in windows",
    "sam2_hiera_tiny": "stages of attention in windows",
    "samvit_base_patch16": "positions relative to each other",
    "swin_tiny_patch4_window7_224": "attention in windows",
    "beit_base_patch16_224": "positions relative to each other",
    "beit3_base_patch16_224": "norms within attention and MLP",
    "cait_xxs24_224": "attention that mixes its heads",
    "test_vit3": "its name is not known here",
    "vit_of_the_year_after": "its name is not known here",
}
SHALLOW: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("resnetblur18", "resnetaa50", "hiera_tiny_224", "sam2_hiera_tiny")},
    "swin_tiny_patch4_window7_224": {},
    "vit_base_patch16_sapiens2": {"depth": 2, "num_kv_heads": 6},
}


def tiny(name: str, width: int, side: int, **changes: Any) -> nn.Module:
    sizes = {"embed_dim": width, "depth": 2, "img_size": side, "num_classes": 5}
    return timm.create_model(name, **sizes, **changes)


def beside(name: str, model: nn.Module, width: int, side: int) -> dict[str, Any]:
    """The config.json that timm writes beside it."""
    return {
        "architecture": name,
        "global_pool": model.global_pool,
        "model_args": {"embed_dim": width, "depth": 2, "img_size": side},
        "pretrained_cfg": {"input_size": [3, side, side]},
    }


def kind(name: str) -> str:
    """What is left of a name without its sizes, whose models are built alike."""
    sizes = r"_(tiny|wee|little|x?small|medium|betwixt|base|large|so\d+m2?|huge|giant|gigantic)\b"
    return re.sub(r"(_patch\d+|_\d+$)", "", re.sub(sizes.replace(r"\b", "(?=_|$)"), "", name))


@pytest.mark.parametrize("name", {re.sub(r"_\d+$", "", name): name for name in READ}.values())
def test_a_name_of_timms_tells_what_no_tensor_shows(name):
    with torch.device("meta"):
        theirs = timm.create_model(name, depth=1)
    told = told_by_timm(name)
    if "heads" in told:
        assert told["heads"] == theirs.blocks[0].attn.num_heads
    else:
        assert name.startswith("test_vit")
    if "siglip" not in name and "activation" in told:  # those as they were trained
        gated = isinstance(theirs.blocks[0].mlp.act, nn.SiLU)  # which shapes show
        assert told["activation"] == "gelu"
        assert gated or isinstance(theirs.blocks[0].mlp.act, nn.GELU)


@pytest.mark.parametrize("name", {kind(name): name for name in READ}.values())
def test_a_name_of_timms_that_is_read_gives_the_outputs_of_its_own_code(name, randomised):
    """Its heads, activation and pooling follow from the name alone."""
    width = 8 * told_by_timm(name).get("heads", 2)
    side = 2 * told_by_timm(name).get("patch", (32, 32))[0]
    exact = {"act_layer": "gelu_tanh"} if "siglip" in name else {}  # as it was trained
    theirs = randomised(tiny(name, width, side, **exact))
    told = told_by_config(beside(name, theirs, width, side))
    if "clip" in name.split("_"):
        told = {"activation": "gelu"} | told
    if "heads" not in told:
        assert name.startswith("test_vit")
        told["heads"] = theirs.blocks[0].attn.num_heads
    found = understand(theirs.state_dict(), told, "a file", named=True)
    assert not any(words.startswith("heads") for words in found.assumed)
    ours = ViT(found.config).eval()
    ours.load_state_dict(found.state)
    x = torch.randn(2, 3, side, side)
    with torch.inference_mode():
        expected: Tensor = theirs(x)
        assert expected.std() > 0.05
        close(ours(x), expected)


def test_what_is_read_of_timm():
    """None is lost, and none comes to it unseen."""
    assert len(READ) > 165
    assert all("mixed" not in name and "rpn" not in name for name in READ)


@pytest.mark.parametrize("name", LOOK_ALIKE)
def test_a_name_of_timms_that_is_not_ours_is_refused_by_it(name):
    message = refused({"architecture": name, "pretrained_cfg": {}})
    assert f"timm's {name}, which the config.json beside a file names, is not a model" in message
    assert f"({LOOK_ALIKE[name]}" in message


@pytest.mark.parametrize("name", [name for name in LOOK_ALIKE if timm.is_model(name)])
def test_without_its_name_a_look_alike_is_refused_or_the_assumption_is_printed(name):
    """Where not one tensor differs, what is taken to be so is said."""
    with torch.device("meta"):
        state = timm.create_model(name, **SHALLOW.get(name, {"depth": 2})).state_dict()
    try:
        found = understand(state, {"heads": 1, "image_size": (224, 224)}, "a file")
    except DataError:
        return
    assert found.layout.takes
    assert set(found.layout.takes) <= set(found.assumed)


@pytest.mark.parametrize("name", open_clip.list_models())
def test_every_tower_of_open_clips(name):
    config = open_clip.get_model_config(name)
    message = refused({"model_cfg": config})
    vision = config["vision_cfg"]
    others = ("CLIPA", "RN", "EVA02-E", "ViTamin", "convnext", "coca_ViT", "swin", "vit_relpos")
    mobile = name.startswith("MobileCLIP") and name != "MobileCLIP2-L-14"
    assert bool(message) == (any(x in name for x in others) or mobile), message
    if message:
        said = f"timm's {vision['timm_model_name']}" if "timm_model_name" in vision else "open_clip"
        assert said in message
    elif "timm_model_name" not in vision:
        told = told_by_config({"model_cfg": config})
        assert told["heads"] == vision["width"] // vision.get("head_width", 64)
        assert told["activation"] == ("gelu_quick" if "quick_gelu" in config else "gelu")


def test_clipas_tower_is_known_by_its_tensors_too():
    clip = open_clip.CLIP(
        embed_dim=5,
        vision_cfg={"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16}
        | {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
        text_cfg={"context_length": 7, "vocab_size": 9, "width": 8, "heads": 1, "layers": 1},
    )
    with pytest.raises(DataError, match=r"CLIPA's in open_clip's names: .* mean of the tokens"):
        understand(clip.state_dict(), {"heads": 2, "activation": "gelu"}, "a file")


TRANSFORMERS = {
    *MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    *MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    *("audio-spectrogram-transformer", "siglip2_vision_model", "dinov3_vit", "videomae", "yolos"),
    *("clip_vision_model", "siglip_vision_model", "vit_mae", "vision-text-dual-encoder"),
    *("idefics3_vision", "smolvlm_vision", "tipsv2_vision_model", "metaclip_2_vision_model"),
    *("idefics2_vision", "intern_vit_6b"),
    *(
        "chinese_clip_vision_model",
        "ijepa",
        "siglip2",
        "vit_msn",
        "qwen2_5_vl",
        "mlcd_vision_model",
    ),
    *("aimv2_vision_model", "radio", "sam_vision_model", "hiera", "vjepa2", "internvl_vision"),
}
OURS = {
    *("vit", "vit_mae", "deit", "dinov2", "dinov2_with_registers", "bit", "mobilevit", "clip"),
    *("clip_vision_model", "siglip", "siglip_vision_model", "vision-text-dual-encoder"),
    *("dinov3_vit", "siglip2", "siglip2_vision_model", "ijepa", "vit_msn"),
    *("tipsv2", "tipsv2_vision_model"),
    *("metaclip_2", "metaclip_2_vision_model", "chinese_clip", "chinese_clip_vision_model"),
    *("idefics2_vision", "idefics3_vision", "smolvlm_vision"),
}


@pytest.mark.parametrize("kind", sorted(TRANSFORMERS))
def test_every_image_model_of_transformers(kind):
    message = refused({"model_type": kind})
    assert bool(message) == (kind not in OURS)
    assert not message or f"transformers' {kind}, which the config.json" in message
    # Of a model of two towers, the one for images counts.
    whole = {"model_type": "llava", "vision_config": {"model_type": kind}}
    assert bool(refused(whole)) == bool(message)


# --- beside a file, as a user has it ---


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(tiny("vit_tiny_patch16_224", 24, 32, num_heads=3).state_dict(), path)
    return path


def write(file: Path, **config: Any) -> None:
    file.with_name("config.json").write_text(json.dumps(config))


def test_a_look_alike_is_refused_beside_its_file(file):
    write(file, architecture="vit_base_patch16_rpn_224", pretrained_cfg={})
    with pytest.raises(DataError, match=r"timm's vit_base_patch16_rpn_224.*residual post-norm"):
        open_weights(file, {"heads": 3})


def test_a_config_of_other_weights_is_not_obeyed(file):
    write(file, architecture="vit_small_patch16_224", pretrained_cfg={})
    with pytest.raises(DataError, match="says width 384, its tensors have 24: one of the two"):
        open_weights(file)
    write(file, model_type="vit", hidden_size=24, num_hidden_layers=7)
    with pytest.raises(DataError, match="says depth 7, its tensors have 2"):
        open_weights(file)


def test_what_is_assumed_is_in_the_answer_and_on_the_screen(file, capsys):
    assert main(["weights", "show", str(file), "--heads", "3", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert shown["architecture"] == "vit: 2 blocks, width 24, 3 heads"
    assumed = {words.split()[0] for words in shown["assumed"]}
    assert assumed == {"activation", "norm_eps", "pool", "resample", "norms", "no", "images"}
    main(["weights", "show", str(file), "--heads", "3"])
    printed = capsys.readouterr().out
    for words in shown["assumed"]:
        assert f"assumed      {words}" in printed
    flags = ["--activation", "gelu", "--norm-eps", "1e-6", "--pool", "class"]
    flags += ["--resample", "bicubic_offset"]
    main(["weights", "show", str(file), "--heads", "3", *flags, "--json"])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {words.split()[0] for words in told["assumed"]} == {"norms", "no", "images"}
    assert told["config"]["resample"] == "bicubic_offset"


def test_a_name_beside_the_file_settles_what_it_names(file, capsys):
    sizes = {"embed_dim": 24, "depth": 2}
    look = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}
    write(file, architecture="vit_tiny_patch16_224", model_args=sizes, pretrained_cfg=look)
    opened = open_weights(file)
    assert opened.config.heads == 3
    assert "timm's vit_tiny_patch16_224, by the config.json" in opened.architecture
    assert {words.split()[0] for words in opened.assumed} == {"norm_eps", "pool"}
