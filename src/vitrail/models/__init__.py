"""Every model by name: one table of frozen configs, and the one function that builds from it."""

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import nn

from vitrail.errors import UsageError, unknown_name
from vitrail.models.bit import ROWS as BIT_ROWS
from vitrail.models.bit import BiT as BiT
from vitrail.models.bit import BiTConfig as BiTConfig
from vitrail.models.dynamicvit import ROWS as DYNAMICVIT_ROWS
from vitrail.models.dynamicvit import DynamicViT as DynamicViT
from vitrail.models.dynamicvit import DynamicViTConfig as DynamicViTConfig
from vitrail.models.mixer import ROWS as MIXER_ROWS
from vitrail.models.mixer import Gmlp as Gmlp
from vitrail.models.mixer import GmlpConfig as GmlpConfig
from vitrail.models.mixer import Mixer as Mixer
from vitrail.models.mixer import MixerConfig as MixerConfig
from vitrail.models.mobilevit import ROWS as MOBILEVIT_ROWS
from vitrail.models.mobilevit import MobileViT as MobileViT
from vitrail.models.mobilevit import MobileViTConfig as MobileViTConfig
from vitrail.models.resnet import ROWS as RESNET_ROWS
from vitrail.models.resnet import ResNet as ResNet
from vitrail.models.resnet import ResNetConfig as ResNetConfig
from vitrail.models.tokens import tokens_from as tokens_from
from vitrail.models.tokens import with_tokens as with_tokens
from vitrail.models.twins import ROWS as TWINS_ROWS
from vitrail.models.twins import Twins as Twins
from vitrail.models.twins import TwinsConfig as TwinsConfig
from vitrail.models.vit import ROWS as VIT_ROWS
from vitrail.models.vit import ViT as ViT
from vitrail.models.vit import ViTConfig as ViTConfig

ModelConfig: TypeAlias = (
    ViTConfig
    | DynamicViTConfig
    | MixerConfig
    | GmlpConfig
    | TwinsConfig
    | MobileViTConfig
    | BiTConfig
    | ResNetConfig
)
"""The union of the families' configs; `family` tells them apart in a file."""
Model: TypeAlias = ViT | DynamicViT | Mixer | Gmlp | Twins | MobileViT | BiT | ResNet
"""The union of the families' modules."""

MODELS: Mapping[str, ModelConfig] = {
    **VIT_ROWS,
    **DYNAMICVIT_ROWS,
    **MIXER_ROWS,
    **TWINS_ROWS,
    **MOBILEVIT_ROWS,
    **BIT_ROWS,
    **RESNET_ROWS,
}
FAMILIES: Mapping[type[ModelConfig], type[Model]] = {
    ViTConfig: ViT,
    DynamicViTConfig: DynamicViT,
    MixerConfig: Mixer,
    GmlpConfig: Gmlp,
    TwinsConfig: Twins,
    MobileViTConfig: MobileViT,
    BiTConfig: BiT,
    ResNetConfig: ResNet,
}


def model_config(name: str, **changes: Any) -> ModelConfig:
    """The row `name` of `MODELS` with fields changed; `UsageError` for a name it does not know.

    >>> model_config("vit_b16", classes=10).width
    768
    """
    if name not in MODELS:
        raise unknown_name("model", name, MODELS)
    row = MODELS[name]
    known = {field.name for field in fields(row)} - {"family"}
    if "num_classes" in changes:  # the name that timm and Hugging Face users will type
        if "classes" in changes:
            raise UsageError("classes and num_classes are the same field: give one of them")
        changes["classes"] = changes.pop("num_classes")
    for field in changes:
        if field not in known:
            raise unknown_name(f"field of {type(row).__name__}", field, known)
    return replace(row, **changes)


def build(model: str | ModelConfig, **changes: Any) -> Model:
    """A freshly initialised model, by name or from a config.

    >>> build("vit_ti16", num_classes=10, image_size=(64, 96)).config.grid
    (4, 6)
    """
    config = model_config(model, **changes) if isinstance(model, str) else model
    if changes and not isinstance(model, str):
        raise UsageError("changes go with a name; change a config with dataclasses.replace")
    return FAMILIES[type(config)](config)  # type: ignore[arg-type]  # its own config


def count_parameters(model: nn.Module) -> int:
    """How many numbers the model learns."""
    return sum(parameter.numel() for parameter in model.parameters())


@cache
def parameters_of(config: ModelConfig) -> int:
    """How many a model of this config learns; built on the meta device, without memory for it.

    >>> parameters_of(model_config("vit_b16"))
    86567656
    """
    with torch.device("meta"):
        whole = isinstance(config, DynamicViTConfig) or (
            isinstance(config, ViTConfig) and bool(config.global_blocks)
        )
        if whole or not isinstance(config, _ALIKE):
            return count_parameters(build(config))
        # What a second block adds each of the others does: three times as fast for all rows.
        one, two = (count_parameters(build(replace(config, depth=depth))) for depth in (1, 2))
        return one + (config.depth - 1) * (two - one)


_ALIKE = (ViTConfig, MixerConfig, GmlpConfig)
"""Families whose blocks are all of one shape."""
