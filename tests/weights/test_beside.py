"""What config.json and preprocessor_config.json tell: files as the libraries write them."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from PIL import Image

from close import close
from vitrail.data.views.canvas import input_of
from vitrail.data.views.preprocess import Preprocess
from vitrail.errors import DataError
from vitrail.models import ViT, ViTConfig
from vitrail.weights.beside import preprocess_by, told_by_config
from vitrail.weights.files import WeightsFile, read_weights
from vitrail.weights.layouts import understand
from weights.sources import HUGGING_FACE

BASE = {"patch": (16, 16), "width": 768, "heads": 12}
"""What the name of a vit_base_patch16 of timm's tells."""
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_a_folder_of_transformers_needs_no_other_word(name, randomised, tmp_path):
    source = HUGGING_FACE[name]
    theirs = randomised(source.build())
    theirs.save_pretrained(tmp_path)
    file = read_weights(tmp_path)
    found = understand(file.tensors, told_by_config(file.config), "a folder", named=True)
    assert found.config == source.expected
    assert not found.assumed
    model = ViT(found.config).eval()
    model.load_state_dict(found.state)
    x = torch.randn(2, 3, *source.size)
    with torch.inference_mode():
        close(model(x), source.run(theirs, x))


def test_a_folder_of_timm_needs_no_other_word(randomised, tmp_path):
    sizes = {"depth": 2, "img_size": (64, 96), "num_classes": 5}
    theirs = randomised(timm.create_model("vit_tiny_patch16_224", **sizes))
    theirs.pretrained_cfg |= {"input_size": (3, 64, 96)}
    arguments = {"num_heads": 3}  # which timm writes where they are not the architecture's own
    timm.models.save_for_hf(theirs, tmp_path, model_args=arguments, safe_serialization=True)
    file = read_weights(tmp_path)
    found = understand(file.tensors, told_by_config(file.config), "a folder")
    assert preprocess_by(file, found.config) == Preprocess(size=(64, 96), crop=0.9)
    model = ViT(found.config).eval()
    model.load_state_dict(found.state)
    x = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        close(model(x), theirs(x))


@pytest.mark.parametrize(
    "config, told",
    [
        ({}, {}),
        ({"image_size": [32, 48]}, {"image_size": (32, 48)}),
        ({"image_size": "224", "num_attention_heads": None, "layer_norm_eps": "x"}, {}),
        ({"hidden_act": "gelu_pytorch_tanh"}, {"activation": "gelu_tanh"}),
        ({"hidden_act": "silu", "use_swiglu_ffn": True}, {}),
        (
            {"model_type": "dinov3_vit", "hidden_act": "silu", "use_gated_mlp": True},
            {"position": "rope", "rope": "dinov3", "pool": "class"},
        ),
        ({"model_type": "vit_msn"}, {"norm_eps": 1e-6, "pool": "class"}),
        (
            {"model_type": "tipsv2_vision_model"},
            {"resample": "bilinear_antialias", "pool": "class"},
        ),
        (
            {"architecture": "naflexvit_base_patch16_siglip"},
            {"resample": "bilinear_antialias", **BASE, "activation": "gelu_tanh"},
        ),
        (
            {"architecture": "vit_huge_plus_patch16_dinov3", "global_pool": "avg"},
            {"patch": (16, 16), "width": 1280, "heads": 20, "activation": "gelu", "pool": "mean"},
        ),
        # openai/clip-vit-large-patch14: a part's defaults are not in the file
        (
            {"model_type": "clip", "vision_config": {"model_type": "clip_vision_model"}},
            {"activation": "gelu_quick", "pool": "class"},
        ),
        (
            {"vision_config": {"hidden_act": "gelu", "num_attention_heads": 16}},
            {"activation": "gelu", "heads": 16},
        ),
        # timm/vit_base_patch16_224.augreg2_in21k_ft_in1k
        (
            {
                "architecture": "vit_base_patch16_224",
                "global_pool": "token",
                "pretrained_cfg": {"tag": "augreg2", "input_size": [3, 224, 224]},
            },
            {"image_size": (224, 224), "pool": "class", "activation": "gelu", **BASE},
        ),
        (
            {
                "architecture": "vit_base_patch16_224",
                "global_pool": "avg",
                "model_args": {"act_layer": "gelu_tanh", "num_heads": 6},
                "pretrained_cfg": {},
            },
            {**BASE, "pool": "mean", "activation": "gelu_tanh", "heads": 6},
        ),
        (
            {"architecture": "vit_base_patch16_clip_224", "pretrained_cfg": {"tag": "openai"}},
            {"activation": "gelu_quick", **BASE},
        ),
        (
            {"architecture": "vit_base_patch16_clip_quickgelu_224", "pretrained_cfg": {}},
            {"activation": "gelu_quick", **BASE},
        ),
        (
            {
                "architecture": "vit_base_patch16_clip_224",
                "pretrained_cfg": {"tag": "openai_ft_in1k"},
            },
            {"activation": "gelu", **BASE},
        ),
        (
            {"architecture": "vit_base_patch16_clip_224", "pretrained_cfg": {"tag": "dfn2b"}},
            BASE,
        ),
        # open_clip_config.json of ViT-B-32-quickgelu, of ViT-H-14, of a SigLIP
        (
            {
                "model_cfg": {
                    "quick_gelu": True,
                    "vision_cfg": {"image_size": 224, "width": 768},
                }
            },
            {"heads": 12, "width": 768, "activation": "gelu_quick", "image_size": (224, 224)}
            | {"pool": "class"},
        ),
        (
            {"model_cfg": {"vision_cfg": {"image_size": 224, "width": 1280, "head_width": 80}}},
            {"heads": 16, "width": 1280, "activation": "gelu", "image_size": (224, 224)}
            | {"pool": "class"},
        ),
        (
            {"model_cfg": {"vision_cfg": {"image_size": 256, "timm_model_name": "vit_siglip"}}},
            {"image_size": (256, 256), "activation": "gelu_tanh"},
        ),
    ],
    ids=str,
)
def test_what_a_config_tells(config, told):
    assert told_by_config(config) == told


@pytest.mark.parametrize("act", ["relu", ["gelu"], 1])
def test_an_activation_that_no_model_of_ours_has(act):
    with pytest.raises(DataError, match=r"asks for the activation .*: vitrail has gelu"):
        told_by_config({"hidden_act": act})


def beside(**config: Any) -> WeightsFile:
    preprocessor = config.pop("preprocessor", {})
    return WeightsFile(
        Path("folder"),
        "safetensors",
        {},
        "",
        {},
        config=config,
        preprocessor=preprocessor,
        notes=(),
    )


HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
TIMM_224 = {"input_size": [3, 224, 224], "mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.mark.parametrize(
    "preprocessor, expected",
    [
        # google/vit-base-patch16-224
        (
            {"do_normalize": True, "do_resize": True, "resample": 2, "size": 224, **HALF},
            Preprocess(size=(224, 224), resize="squash", interpolation="bilinear"),
        ),
        # facebook/deit-base-distilled-patch16-224
        (
            {"crop_size": 224, "do_center_crop": True, "resample": 3, "size": 256}
            | {f"image_{k}": list(v) for k, v in IMAGENET.items()},
            Preprocess(size=(224, 224), resize="squash", crop=0.875, **IMAGENET),
        ),
        # facebook/dinov2-base
        (
            {
                "crop_size": {"height": 224, "width": 224},
                "do_center_crop": True,
                "image_processor_type": "BitImageProcessor",
                "resample": 3,
                "size": {"shortest_edge": 256},
            }
            | {f"image_{k}": list(v) for k, v in IMAGENET.items()},
            Preprocess(size=(224, 224), crop=0.875, **IMAGENET),
        ),
        # openai/clip-vit-base-patch32
        (
            {
                "crop_size": 224,
                "do_center_crop": True,
                "feature_extractor_type": "CLIPFeatureExtractor",
                "resample": 3,
                "size": 224,
                **HALF,
            },
            Preprocess(size=(224, 224)),
        ),
        (
            {"size": {"height": 32, "width": 48}, "do_normalize": False},
            Preprocess(
                size=(32, 48),
                resize="squash",
                interpolation="bilinear",
                mean=(0.0,) * 3,
                std=(1.0,) * 3,
            ),
        ),
        # google/siglip2-base-patch16-naflex
        (
            {
                "image_processor_type": "Siglip2ImageProcessor",
                "max_num_patches": 256,
                "patch_size": 16,
                "resample": 2,
                **HALF,
            },
            Preprocess(size=(256, 256), resize="native", interpolation="bilinear", patch=(16, 16)),
        ),
        ({"max_num_patches": 200, "patch_size": 16, **HALF}, None),
        ({"size": 224, "do_resize": False, **HALF}, None),
        ({"size": {"shortest_edge": 224}, **HALF}, None),  # images keep their aspect
        ({"size": 224, "crop_size": 256, **HALF}, None),  # theirs pads
        ({"size": {"longest_edge": 224}, **HALF}, None),
        ({"size": 28, "image_mean": [0.5], "image_std": [0.5]}, None),  # of another model
    ],
    ids=str,
)
def test_preprocessing_by_transformers(preprocessor, expected):
    assert preprocess_by(beside(preprocessor=preprocessor), ViTConfig()) == expected


@pytest.mark.parametrize(
    "config, expected",
    [
        ({}, None),
        (
            {"pretrained_cfg": TIMM_224 | {"crop_pct": 0.9, "interpolation": "bicubic"}},
            Preprocess(size=(224, 224), crop=0.9),
        ),
        (
            {"pretrained_cfg": TIMM_224 | {"crop_pct": 1.0, "crop_mode": "squash"}},
            Preprocess(size=(224, 224), resize="squash"),
        ),
        ({"pretrained_cfg": TIMM_224 | {"crop_mode": "border"}}, None),
        (
            {"preprocess_cfg": {**IMAGENET, "resize_mode": "squash"}},
            Preprocess(size=(224, 224), resize="squash", **IMAGENET),
        ),
        (
            {"preprocess_cfg": {}},
            Preprocess(
                size=(224, 224),
                mean=(0.48145466, 0.4578275, 0.40821073),
                std=(0.26862954, 0.26130258, 0.27577711),
            ),
        ),
        ({"preprocess_cfg": {"resize_mode": "longest"}}, None),
    ],
    ids=str,
)
def test_preprocessing_by_timm_and_open_clip(config, expected):
    assert preprocess_by(beside(**config), ViTConfig()) == expected


@pytest.mark.parametrize(
    "config",
    [
        {"preprocessor": {"size": 224}},
        {"preprocessor": {"size": 224, "resample": 9, **HALF}},
        {"preprocessor": {"size": 224, "resample": [], **HALF}},
        {"preprocessor": {"size": 224, "image_mean": 0.5, "image_std": 0.5}},
        {"preprocessor": {"size": 224, "image_mean": [0.5] * 3, "image_std": [0.0] * 3}},
        {"pretrained_cfg": TIMM_224 | {"crop_pct": "all"}},
        {"pretrained_cfg": TIMM_224 | {"input_size": 224}},
        {"pretrained_cfg": TIMM_224 | {"crop_mode": ["center"]}},
        {"preprocess_cfg": {"mean": None}},
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_one_clear_error(config):
    with pytest.raises(DataError, match="the preprocessing in the JSON file beside folder"):
        preprocess_by(beside(**config), ViTConfig())


def test_every_published_side_and_crop_is_met():
    """However the quotient of two sides rounds, the scaled image has the side that they say."""
    for short in range(224, 640):
        file = beside(
            preprocessor={
                "size": {"shortest_edge": short},
                "crop_size": 224,
                "do_center_crop": True,
            }
            | HALF
        )
        found = preprocess_by(file, ViTConfig())
        assert found is not None
        assert int(224 / found.crop) == short


@pytest.mark.parametrize(
    "processor",
    [
        lambda: hf.ViTImageProcessor(size={"height": 32, "width": 48}),
        lambda: hf.CLIPImageProcessor(size={"shortest_edge": 40}, crop_size=32),
    ],
    ids=["ViT", "CLIP"],
)
def test_a_saved_processor_prepares_images_as_ours_does(processor, tmp_path):
    theirs = processor()
    theirs.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    ours = preprocess_by(beside(preprocessor=saved), ViTConfig())
    assert ours is not None
    pixels = torch.arange(80 * 60 * 3).reshape(60, 80, 3) // 57 % 256
    image = Image.fromarray(pixels.byte().numpy())
    expected = theirs(image, return_tensors="pt")["pixel_values"][0]
    assert input_of(ours, image).shape == expected.shape
    # Theirs rounds at other places: a grey level or two of 255, over a standard deviation.
    assert (input_of(ours, image) - expected).abs().max() < 2.1 / 255 / min(ours.std)
