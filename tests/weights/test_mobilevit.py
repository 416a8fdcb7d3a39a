"""MobileViT's files: the order of the channels, and what lies beside Apple's."""

import json
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from torch import Tensor, nn

from close import close
from models.theirs import lively, transformers_mobilevit
from vitrail.errors import DataError
from vitrail.models import model_config
from vitrail.weights import open_weights, pretrained
from vitrail.weights.layouts import understand
from vitrail.weights.load import convert
from vitrail.weights.mobilevit import HUGGINGFACE_MOBILEVIT, TIMM_MOBILEVIT
from vitrail.weights.table import WEIGHTS
from vitrail.weights.write import write_safetensors

State = dict[str, Tensor]
CLASSES = 7
XXS = model_config("mobilevit_xxs", classes=CLASSES)


def transformers() -> nn.Module:
    return hf.MobileViTForImageClassification(transformers_mobilevit(XXS))


def test_the_channels_of_transformers_files_are_turned_and_turned_back(randomised):
    state = randomised(transformers()).state_dict()
    stem = "mobilevit.conv_stem.convolution.weight"
    found = understand(state, {}, "a file")
    assert torch.equal(found.state["stem.conv.weight"], state[stem].flip(1))
    as_timm = TIMM_MOBILEVIT.write(found.state, found.config)
    assert torch.equal(as_timm["stem.conv.weight"], state[stem].flip(1))
    assert not torch.equal(state[stem], state[stem].flip(1))


def test_from_timms_file_to_logits_and_to_transformers(randomised, tmp_path):
    theirs = lively(randomised(timm.create_model("mobilevit_xxs", num_classes=CLASSES)))
    file = tmp_path / "theirs.safetensors"
    write_safetensors(file, theirs.state_dict(), {})
    other = transformers().eval()
    there = open_weights(convert(open_weights(file), "huggingface", tmp_path / "hf.safetensors"))
    other.load_state_dict(HUGGINGFACE_MOBILEVIT.write(there.state, there.config))
    x = torch.rand(2, 3, 40, 75)
    with torch.inference_mode():
        expected = theirs(x)
        close(pretrained(file)(x), expected)
        close(other(x.flip(1)).logits, expected)
    fewer = pretrained(file, classes=3, channels=1, image_size=(50, 75))
    assert fewer(torch.rand(1, 1, 50, 75)).shape == (1, 3)


# --- the files beside Apple's ---

APPLES = {  # of apple/mobilevit-small, as it lies on the hub
    "crop_size": 256,
    "do_center_crop": True,
    "do_flip_channels": True,
    "do_resize": True,
    "feature_extractor_type": "MobileViTFeatureExtractor",
    "resample": 2,
    "size": 288,
}
NEWER = {  # as transformers writes it today
    "crop_size": {"height": 256, "width": 256},
    "do_center_crop": True,
    "do_convert_rgb": None,
    "do_flip_channel_order": True,
    "do_normalize": None,
    "do_rescale": True,
    "do_resize": True,
    "image_processor_type": "MobileViTImageProcessor",
    "resample": 2,
    "size": {"shortest_edge": 288},
}


def folder(tmp_path: Any, preprocessor: dict[str, Any]) -> Any:
    transformers().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("preprocessor", [APPLES, NEWER], ids=["apple's", "newer"])
def test_the_preprocessing_is_that_of_the_table(preprocessor, tmp_path):
    opened = open_weights(folder(tmp_path, preprocessor))
    assert opened.layout == "huggingface-mobilevit"
    assert opened.config == XXS
    assert opened.preprocess == WEIGHTS["mobilevit_xxs_256"].preprocess


@pytest.mark.parametrize(
    "changes",
    [
        {"do_flip_channel_order": False},
        {"do_flip_channel_order": False, "do_flip_channels": True},
        {"do_flip_channel_order": None},
    ],
    ids=str,
)
def test_a_model_that_was_shown_red_green_blue_is_not_read_as_another(changes, tmp_path):
    file = folder(tmp_path, NEWER | changes)
    with pytest.raises(DataError, match="it shows the model red, green, blue"):
        open_weights(file)


# --- what is not quite as expected ---


def test_the_second_version_is_refused():
    with torch.device("meta"):
        state = timm.create_model("mobilevitv2_050").state_dict()
    with pytest.raises(DataError, match="layout of no model that vitrail knows"):
        understand(state, {}, "a file")


def test_a_segmentation_model_is_refused():
    config = transformers_mobilevit(XXS)
    with torch.device("meta"):
        state = hf.MobileViTForSemanticSegmentation(config).state_dict()
    with pytest.raises(DataError, match="Hugging Face MobileViT, and fits none of"):
        understand(state, {}, "a file")
