"""Layouts of the families besides ViT: recognised, understood, there and back, and refused."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from torch import Tensor, nn

from close import close
from models.families import GMLP, MIXER
from models.theirs import images, lively, timm_mixer, transformers_mobilevit
from vitrail.errors import DataError
from vitrail.models import ModelConfig, build, model_config
from vitrail.weights.layouts import FAMILY_LAYOUTS, recognise, understand
from vitrail.weights.places import Hub
from vitrail.weights.table import WEIGHTS
from weights.sources import in_turns, one_of_each

State = dict[str, Tensor]
CLASSES = 7


@dataclass(frozen=True)
class Source:
    """Theirs, what ours makes of it, and how theirs is run."""

    build: Callable[[], nn.Module]
    layout: str
    config: ModelConfig
    run: Callable[[nn.Module, Tensor], Tensor] = lambda model, x: model(x)
    told: Mapping[str, Any] = field(default_factory=dict)
    size: tuple[int, int] = (48, 64)
    """Of images of which theirs makes the same: timm's windows want whole ones."""


def of_timm(name: str, layout: str, row: str, size: Any = Source.size, **changes: Any) -> Source:
    config = model_config(row, **changes)
    make = partial(timm.create_model, name, num_classes=config.classes, in_chans=config.channels)
    return Source(make, layout, config, size=size)


def of_mixer(config: Any) -> Source:
    """Its grid is oblong, which no shape shows."""
    size = config.image_size
    told = {"image_size": size}
    return Source(
        partial(timm_mixer, config), f"timm-{config.family}", config, told=told, size=size
    )


def hf_bit(kind: type[nn.Module], **changes: Any) -> nn.Module:
    return kind(hf.BitConfig(num_labels=CLASSES, **changes))


BIT = model_config("bit_r50x1", classes=CLASSES, eps="timm")
XXS = model_config("mobilevit_xxs", classes=CLASSES)
GREY = {"classes": 0, "channels": 1}
SOURCES = {
    "resnet": of_timm("resnet18", "resnet", "resnet18", classes=CLASSES),
    "resnet, grey": of_timm("resnet50", "resnet", "resnet50", **GREY),
    "bit": of_timm("resnetv2_50x1_bit", "timm-bit", "bit_r50x1", classes=CLASSES, eps="timm"),
    "bit, transformers": Source(
        partial(hf_bit, hf.BitForImageClassification),
        "huggingface-bit",
        BIT,
        lambda model, x: model(x).logits,
    ),
    "bit, transformers, bare, grey": Source(
        partial(hf_bit, hf.BitModel, num_channels=1),
        "huggingface-bit-bare",
        replace(BIT, **GREY),
        lambda model, x: model(x).pooler_output.flatten(1),
    ),
    "mobilevit": of_timm("mobilevit_xxs", "timm-mobilevit", "mobilevit_xxs", classes=CLASSES),
    "mobilevit, grey": of_timm("mobilevit_xs", "timm-mobilevit", "mobilevit_xs", **GREY),
    "mobilevit, transformers": Source(
        lambda: hf.MobileViTForImageClassification(transformers_mobilevit(XXS)),
        "huggingface-mobilevit",
        XXS,
        lambda model, x: model(x.flip(1)).logits,
    ),
    "mobilevit, transformers, bare": Source(
        lambda: hf.MobileViTModel(transformers_mobilevit(XXS)),
        "huggingface-mobilevit-bare",
        replace(XXS, classes=0),
        lambda model, x: model(x.flip(1)).pooler_output,
    ),
    "mobilevit, transformers, bare, grey": Source(
        lambda: hf.MobileViTModel(transformers_mobilevit(replace(XXS, channels=1))),
        "huggingface-mobilevit-bare",
        replace(XXS, **GREY),
        lambda model, x: model(x).pooler_output,
    ),
    "twins svt": of_timm("twins_svt_small", "twins", "twins_svt_s", (224, 224), classes=CLASSES),
    "twins pcpvt": of_timm(
        "twins_pcpvt_small", "twins", "twins_pcpvt_s", (64, 96), classes=CLASSES
    ),
    "twins, grey": of_timm("twins_svt_small", "twins", "twins_svt_s", (224, 224), **GREY),
    "mixer": of_mixer(MIXER),
    "mixer, grey": of_mixer(replace(MIXER, **GREY)),
    "gmlp": of_mixer(GMLP),
    "gmlp, grey": of_mixer(replace(GMLP, **GREY)),
}
every_source = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)


def test_every_layout_has_a_source():
    """Google's have theirs in test_resnet.py and test_mixer.py, the authors' of DynamicViT in
    tests/models/test_dynamicvit.py.
    """
    others = {"google-bit", "google-mixer", "google-mixer-older", "dynamicvit"}
    assert {source.layout for source in SOURCES.values()} | others == set(FAMILY_LAYOUTS)


@every_source
def test_outputs_are_those_of_their_own_code_and_a_file_comes_back_bit_by_bit(source, randomised):
    theirs = randomised(source.build())
    if source.config.family == "mobilevit":
        theirs = lively(theirs)
    state = dict(sorted(theirs.state_dict().items()))  # as safetensors has them
    before = {key: tensor.clone() for key, tensor in state.items()}
    found = understand(state, source.told, "a file")
    assert (found.layout.name, found.config) == (source.layout, source.config)
    assert found.left_out == ()
    with torch.device("meta"):
        ours = build(found.config).eval()
    ours.load_state_dict(found.state, assign=True)
    x = images(2, source.config.channels, source.size)
    with torch.inference_mode():
        close(ours(x), source.run(theirs, x))

    _, prefix = recognise(state, "a file")
    back = found.layout.write(found.state, found.config)
    assert {prefix + key for key in back} == state.keys()
    for key, tensor in before.items():
        assert torch.equal(back[key.removeprefix(prefix)], tensor), key
        assert torch.equal(state[key], tensor), f"{key} was changed in place"


ROWS = {
    name: row
    for name, row in WEIGHTS.items()
    if row.layout in FAMILY_LAYOUTS and isinstance(row.place, Hub)
}


@pytest.mark.parametrize("name", ROWS)
def test_a_published_row_is_told_from_the_others(name):
    row = ROWS[name]
    with torch.device("meta"):
        if row.place.repo.startswith("timm/"):
            state = timm.create_model(row.place.repo.removeprefix("timm/")).state_dict()
        else:
            config = transformers_mobilevit(row.config)
            state = hf.MobileViTForImageClassification(config).state_dict()
    found = understand(state, {}, "a file")
    assert (found.layout.name, found.config) == (row.layout, row.config)


@pytest.mark.parametrize(
    "name", [name for name, row in ROWS.items() if row.place.repo.startswith("timm/")]
)
def test_images_are_prepared_as_timm_does(name):
    theirs = timm.models.get_pretrained_cfg(ROWS[name].place.repo.removeprefix("timm/"))
    ours = ROWS[name].preprocess
    assert (ours.mean, ours.std) == (theirs.mean, theirs.std)
    told = (ours.crop, ours.interpolation, ours.size)
    assert told == (theirs.crop_pct, theirs.interpolation, theirs.input_size[1:])


# --- what is not quite as expected ---

# The layout's; a key of it, and those whose shapes tell of the model.
FILES = {
    "resnet18": (
        "resnet",
        "layer3.0.bn1.bias",
        ("conv1.weight", "layer2.0.conv1.weight", "fc.bias"),
    ),
    "bit_r50x1": ("timm-bit", "stages.2.blocks.0.norm1.bias", ("stem.conv.weight",)),
    "mobilevit_xxs": (
        "timm-mobilevit",
        "stages.2.1.conv_proj.bn.bias",
        ("stem.conv.weight", "stages.0.0.conv2_kxk.conv.weight"),
    ),
    "twins_svt_s": (
        "twins",
        "blocks.0.1.attn.sr.bias",
        ("patch_embeds.0.proj.weight", "pos_block.1.proj.0.weight"),
    ),
    "mixer_s32": ("timm-mixer", "blocks.7.norm2.bias", ("stem.proj.weight",)),
    "gmlp_ti16": ("timm-gmlp", "blocks.29.norm.bias", ("stem.proj.weight",)),
}
every_file = pytest.mark.parametrize("row", FILES)


def file_of(row: str) -> State:
    """Of the shapes alone."""
    config = model_config(row, classes=CLASSES)
    with torch.device("meta"):
        return FAMILY_LAYOUTS[FILES[row][0]].write(build(config).state_dict(), config)


@every_file
def test_any_prefix_is_left_off(row):
    file = file_of(row)
    slash = "/" in FILES[row][1]
    for prefix in ("params/", "opt/target/") if slash else ("", "module.", "model.net._orig_mod."):
        found = understand({prefix + k: t for k, t in file.items()}, {}, "a file")
        assert (found.layout.name, found.config.classes) == (FILES[row][0], CLASSES), prefix


@every_file
def test_a_key_too_many_or_too_few_is_named(row):
    state = file_of(row)
    with pytest.raises(DataError, match=f"of {row}: unexpected 'odd.weight'"):
        understand(state | {"odd.weight": torch.zeros(1)}, {}, "a file")
    del state[FILES[row][1]]
    with pytest.raises(DataError, match=f"missing '{FILES[row][1]}'"):
        understand(state, {}, "a file")


@in_turns((4,), (0, 3), (1, 1, 1, 1, 1))
@every_file
def test_a_tensor_of_any_other_shape_is_one_clear_error(row, shapes):
    file = file_of(row)
    for key, shape in zip(one_of_each(FILES[row][2]), cycle(shapes), strict=False):
        with pytest.raises(DataError):
            understand(file | {key: torch.zeros(shape)}, {}, "a file")
