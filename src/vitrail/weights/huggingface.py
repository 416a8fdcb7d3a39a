"""Hugging Face's checkpoint layouts: ViT, DeiT with teacher, DINOv2 with and without registers.

These are the names in the files (`model.safetensors`), the same since transformers 4. In memory
transformers 5 calls some modules otherwise, and translates whenever it reads or writes.

A config with `classes=0` stands for the bare model (`ViTModel` and `DeiTModel` without their
pooling layer, `Dinov2Model`); `layer_scale` tells DINOv2 from ViT. Not in the weights, and
different: transformers' ViT and DeiT default to a LayerNorm epsilon of 1e-12, ours to 1e-6.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from vitrail.errors import DataError
from vitrail.models import ViTConfig
from vitrail.weights.timm import Names, gather, scatter

_LAYER = "encoder.layer.{i}"

_COMMON: Names = {
    "prefix.class": "embeddings.cls_token",
    "position.table": "embeddings.position_embeddings",
    "stem.proj": "embeddings.patch_embeddings.projection",
    "encoder.blocks.{i}.attn.qkv": (
        f"{_LAYER}.attention.attention.query",
        f"{_LAYER}.attention.attention.key",
        f"{_LAYER}.attention.attention.value",
    ),
    "encoder.blocks.{i}.attn.proj": f"{_LAYER}.attention.output.dense",
    "encoder.norm": "layernorm",
}
VIT: Names = {
    **_COMMON,
    "encoder.blocks.{i}.norm1": f"{_LAYER}.layernorm_before",
    "encoder.blocks.{i}.norm2": f"{_LAYER}.layernorm_after",
    "encoder.blocks.{i}.mlp.fc1": f"{_LAYER}.intermediate.dense",
    "encoder.blocks.{i}.mlp.fc2": f"{_LAYER}.output.dense",
}
DEIT: Names = {**VIT, "prefix.distilled": "embeddings.distillation_token"}
DINOV2: Names = {
    **_COMMON,
    "prefix.registers": "embeddings.register_tokens",
    "encoder.blocks.{i}.norm1": f"{_LAYER}.norm1",
    "encoder.blocks.{i}.norm2": f"{_LAYER}.norm2",
    "encoder.blocks.{i}.mlp.fc1": f"{_LAYER}.mlp.fc1",
    "encoder.blocks.{i}.mlp.fc2": f"{_LAYER}.mlp.fc2",
    "encoder.blocks.{i}.scale1.gamma": f"{_LAYER}.layer_scale1.lambda1",
    "encoder.blocks.{i}.scale2.gamma": f"{_LAYER}.layer_scale2.lambda1",
}
DINOV2_SWIGLU: Names = {
    **DINOV2,
    "encoder.blocks.{i}.mlp.fc1": f"{_LAYER}.mlp.weights_in",
    "encoder.blocks.{i}.mlp.fc2": f"{_LAYER}.mlp.weights_out",
}
MASK = "embeddings.mask_token"
"""In every DINOv2 file, for its pre-training only: dropped on the way in, zeros on the way out."""


def from_huggingface(state: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """The tensors of a Hugging Face file under our names, for `ViT(config).load_state_dict`.

    Raises `DataError` with the name of a key that is missing, unexpected or of another shape.
    """
    side, names = _names(config)
    if config.layer_scale is not None:
        state = {key: tensor for key, tensor in state.items() if key != MASK}
    return gather(state, config, names, side)


def to_huggingface(state: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """The inverse of `from_huggingface`: our state dict under the names of their files."""
    side, names = _names(config)
    theirs = scatter(state, config, names, side)
    if config.layer_scale is not None:
        theirs[MASK] = torch.zeros_like(theirs["embeddings.cls_token"][0])
    return theirs


def _names(config: ViTConfig) -> tuple[str, Names]:
    """What the architecture of `config` is called there, and its table of names."""
    if not (config.class_token and config.prefix_position and config.position == "learned"):
        raise DataError(
            "Hugging Face's ViTs have a class token and a learned position for it: no counterpart "
            "of class_token=False, prefix_position=False or another kind of position"
        )
    if config.layer_scale is not None:
        swiglu = config.activation == "swiglu"
        return "Hugging Face DINOv2", DINOV2_SWIGLU if swiglu else DINOV2
    if config.distilled:
        heads = {"head": "cls_classifier", "head_distilled": "distillation_classifier"}
        return "Hugging Face DeiT", _under("deit", DEIT, heads) if config.classes else DEIT
    heads = {"head": "classifier"}
    return "Hugging Face ViT", _under("vit", VIT, heads) if config.classes else VIT


def _under(model: str, names: Names, heads: Names) -> Names:
    """The names of a backbone that is the part `model` of a classifier, and of its heads."""
    below = {
        ours: f"{model}.{name}" if isinstance(name, str) else tuple(f"{model}.{x}" for x in name)
        for ours, name in names.items()
    }
    return {**below, **heads}
