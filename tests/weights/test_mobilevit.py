"""MobileViT's layouts: recognised, understood, there and back, and the order of the channels."""

import json
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from torch import Tensor, nn

from vitrail.errors import DataError
from vitrail.models import MobileViTConfig, build, model_config
from vitrail.weights import open_weights, pretrained
from vitrail.weights.files import write_safetensors
from vitrail.weights.layouts import recognise, understand
from vitrail.weights.load import convert
from vitrail.weights.mobilevit import HUGGINGFACE_MOBILEVIT, LAYOUTS, TIMM_MOBILEVIT
from vitrail.weights.table import WEIGHTS

State = dict[str, Tensor]
CLASSES = 7
XXS = model_config("mobilevit_xxs", classes=CLASSES)
close = partial(torch.testing.assert_close, atol=1e-5, rtol=0)


def transformers_config(config: MobileViTConfig) -> hf.MobileViTConfig:
    return hf.MobileViTConfig(
        num_channels=config.channels,
        hidden_sizes=list(config.token_widths),
        neck_hidden_sizes=[config.stem_width, *config.widths, config.last_width],
        expand_ratio=float(config.expansion),
        num_labels=config.classes,
    )


@dataclass(frozen=True)
class Source:
    """Theirs, how it is run, and what ours makes of it."""

    build: Any
    layout: str
    config: MobileViTConfig
    run: Any = lambda model, x: model(x)


SOURCES = {
    "timm": Source(
        partial(timm.create_model, "mobilevit_xxs", num_classes=CLASSES), "timm-mobilevit", XXS
    ),
    "timm, one channel, no head": Source(
        partial(timm.create_model, "mobilevit_xs", num_classes=0, in_chans=1),
        "timm-mobilevit",
        model_config("mobilevit_xs", classes=0, channels=1),
    ),
    "transformers": Source(
        lambda: hf.MobileViTForImageClassification(transformers_config(XXS)),
        "huggingface-mobilevit",
        XXS,
        lambda model, x: model(x.flip(1)).logits,
    ),
    "transformers, bare": Source(
        lambda: hf.MobileViTModel(transformers_config(replace(XXS, classes=0))),
        "huggingface-mobilevit-bare",
        replace(XXS, classes=0),
        lambda model, x: model(x.flip(1)).pooler_output,
    ),
    "transformers, bare, one channel": Source(
        lambda: hf.MobileViTModel(transformers_config(replace(XXS, channels=1))),
        "huggingface-mobilevit-bare",
        replace(XXS, classes=0, channels=1),
        lambda model, x: model(x).pooler_output,
    ),
}
every_source = pytest.mark.parametrize("name", SOURCES)


def lively(model: nn.Module) -> nn.Module:
    """A random model in whose outputs an image tells: with its batch norms' own statistics."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    first = next(p for p in model.parameters() if p.ndim == 4)
    with torch.no_grad():
        model.train()(torch.rand(8, first.shape[1], 64, 64).round())
    return model.eval()


@every_source
def test_outputs_are_those_of_their_own_code(name, randomised):
    source = SOURCES[name]
    theirs = lively(randomised(source.build()))
    # As safetensors has them: sorted.
    found = understand(dict(sorted(theirs.state_dict().items())), {}, "a file")
    assert (found.layout.name, found.config) == (source.layout, source.config)
    assert found.left_out == ()
    ours = build(found.config).eval()
    ours.load_state_dict(found.state)
    x = torch.rand(2, source.config.channels, 48, 64)
    with torch.inference_mode():
        expected = source.run(theirs, x)
        scale = expected.std().clamp(min=1)
        close(ours(x) / scale, expected / scale)


@every_source
def test_a_file_comes_back_bit_by_bit(name, randomised):
    source = SOURCES[name]
    state = randomised(source.build()).state_dict()
    before = {key: tensor.clone() for key, tensor in state.items()}
    found = understand(state, {}, "a file")
    _, prefix = recognise(state, "a file")
    back = found.layout.write(found.state, found.config)
    assert {prefix + key for key in back} == state.keys()
    for key, tensor in before.items():
        assert torch.equal(back[key.removeprefix(prefix)], tensor), key
        assert torch.equal(state[key], tensor), f"{key} was changed in place"


def test_every_layout_has_a_source():
    assert {source.layout for source in SOURCES.values()} == {layout.name for layout in LAYOUTS}


def test_the_channels_of_transformers_files_are_turned_and_turned_back(randomised):
    state = randomised(SOURCES["transformers"].build()).state_dict()
    stem = "mobilevit.conv_stem.convolution.weight"
    found = understand(state, {}, "a file")
    assert torch.equal(found.state["stem.conv.weight"], state[stem].flip(1))
    as_timm = TIMM_MOBILEVIT.write(found.state, found.config)
    assert torch.equal(as_timm["stem.conv.weight"], state[stem].flip(1))
    assert not torch.equal(state[stem], state[stem].flip(1))


@pytest.mark.parametrize("name", [name for name in WEIGHTS if "mobilevit" in name])
def test_every_published_row_is_told_from_the_others(name):
    row = WEIGHTS[name]
    with torch.device("meta"):
        if row.layout == "timm-mobilevit":
            state = timm.create_model(row.model).state_dict()
        else:
            config = transformers_config(row.config)
            state = hf.MobileViTForImageClassification(config).state_dict()
    layout, _ = recognise(state, "a file")
    assert layout.name == row.layout
    assert understand(state, {}, "a file").config == row.config
    assert (row.preprocess.mean, row.preprocess.std) == ((0.0,) * 3, (1.0,) * 3)
    if row.layout == "timm-mobilevit":
        theirs = timm.models.get_pretrained_cfg(row.place.repo.removeprefix("timm/"))
        assert theirs is not None and (theirs.mean, theirs.std) == ((0, 0, 0), (1, 1, 1))
        told = (row.preprocess.crop, row.preprocess.interpolation, row.preprocess.size)
        assert told == (theirs.crop_pct, theirs.interpolation, theirs.input_size[1:])


def test_from_timms_file_to_logits_and_to_transformers(randomised, tmp_path):
    theirs = lively(randomised(SOURCES["timm"].build()))
    file = tmp_path / "theirs.safetensors"
    write_safetensors(file, theirs.state_dict(), {})
    other = hf.MobileViTForImageClassification(transformers_config(XXS)).eval()
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
    model = hf.MobileViTForImageClassification(transformers_config(XXS))
    model.save_pretrained(tmp_path)
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


def xxs() -> State:
    with torch.device("meta"):
        return TIMM_MOBILEVIT.write(build(XXS).state_dict(), XXS)


def test_a_key_too_many_or_too_few_is_named():
    state = xxs()
    del state["stages.2.1.conv_proj.bn.bias"]
    with pytest.raises(DataError, match=r"missing 'stages\.2\.1\.conv_proj\.bn\.bias'"):
        understand(state, {}, "a file")
    with pytest.raises(DataError, match=r"of mobilevit_xxs: unexpected 'odd\.weight'"):
        understand(xxs() | {"odd.weight": torch.zeros(1)}, {}, "a file")


def test_the_second_version_is_refused():
    with torch.device("meta"):
        state = timm.create_model("mobilevitv2_050").state_dict()
    with pytest.raises(DataError, match="layout of no model that vitrail knows"):
        understand(state, {}, "a file")


def test_a_segmentation_model_is_refused():
    config = transformers_config(XXS)
    with torch.device("meta"):
        state = hf.MobileViTForSemanticSegmentation(config).state_dict()
    with pytest.raises(DataError, match="Hugging Face MobileViT, and fits none of"):
        understand(state, {}, "a file")


@pytest.mark.parametrize("shape", [(4,), (0, 3), (1, 1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("key", ["stem.conv.weight", "stages.0.0.conv2_kxk.conv.weight"])
def test_a_tensor_of_any_other_shape_is_one_clear_error(key, shape):
    with pytest.raises(DataError):
        understand(xxs() | {key: torch.zeros(shape)}, {}, "a file")
