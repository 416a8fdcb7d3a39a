"""Every model by name: one table of frozen configs, and the one function that builds from it."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from torch import nn

from vitrail.errors import UsageError, unknown_name
from vitrail.models.vit import ROWS as VIT_ROWS
from vitrail.models.vit import ViT as ViT
from vitrail.models.vit import ViTConfig as ViTConfig

ModelConfig = ViTConfig
"""The union of the families' configs; `family` tells them apart in a file."""
Model = ViT
"""The union of the families' modules."""

MODELS: Mapping[str, ModelConfig] = {**VIT_ROWS}
FAMILIES: Mapping[type[ModelConfig], type[Model]] = {ViTConfig: ViT}


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
    return FAMILIES[type(config)](config)


def count_parameters(model: nn.Module) -> int:
    """How many numbers the model learns."""
    return sum(parameter.numel() for parameter in model.parameters())
