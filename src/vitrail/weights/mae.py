"""MAE's decoder in files: Meta's, whose names are timm's, and Hugging Face's ViTMAEForPreTraining.

It lies beside the encoder, which other layouts read, and only a run that goes on with MAE wants it.
No shape shows its heads: Meta's code has 16, Hugging Face's config.json says how many. Its
positions are fixed, and written out; a decoder with others is not read. Published files call its
blocks decoder_layers; what transformers 5 saves, decoder_encoder.layer, and it reads both.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from pydantic import TypeAdapter
from torch import Size, Tensor

from vitrail.errors import DataError, UsageError
from vitrail.heads.masked import DecoderConfig, PatchDecoder
from vitrail.models import ViTConfig
from vitrail.nn import sincos_table
from vitrail.weights.huggingface import to_huggingface
from vitrail.weights.names import State
from vitrail.weights.timm import to_timm

MaeLayout: TypeAlias = Literal["huggingface", "mae"]
_HEADS = 16
_NEAR = 1e-4
"""Of a table and the one it is, which others have computed in float32."""
_POSITIONS = "decoder_pos_embed"
_SAVED_BLOCKS = "decoder_encoder.layer."
_PARTS = {
    "mask_token": "mask_token",
    "embed": "decoder_embed",
    "encoder.norm": "decoder_norm",
    "predict": "decoder_pred",
}
_HF_BLOCK = {
    "norm1": ("layernorm_before",),
    "attn.qkv": tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
    "attn.proj": ("attention.output.dense",),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("intermediate.dense",),
    "mlp.fc2": ("output.dense",),
}
_CONFIG = TypeAdapter(DecoderConfig)


class DecoderWeights(NamedTuple):
    """A decoder of MAE, whatever encoder it is for."""

    config: DecoderConfig
    state: dict[str, Tensor]
    """A `PatchDecoder`'s state dict."""
    keys: tuple[str, ...] = ()
    """What its tensors were called in the file, positions included."""

    @property
    def line(self) -> str:
        """What it is, in words."""
        shape = self.config
        return f"{shape.depth} blocks, width {shape.width}, {shape.heads} heads"

    def to_header(self) -> dict[str, Any]:
        """What a file of ours says of it."""
        return {"config": asdict(self.config)}


def from_header(header: Mapping[str, Any], tensors: State, encoder: ViTConfig) -> DecoderWeights:
    """The inverse of `to_header`, of the `tensors` under their own names.

    Raises `DataError` for tensors that are no such decoder's.
    """
    config = _CONFIG.validate_python(header["config"])
    if {key: tensor.shape for key, tensor in tensors.items()} != _shapes(config, encoder):
        raise DataError("the decoder does not fit its config: the file is not whole")
    return DecoderWeights(config, dict(tensors), ())


def decoder_of(state: State, encoder: ViTConfig, said: Mapping[str, Any]) -> DecoderWeights | None:
    """The decoder beside an `encoder` in a file of Meta's or Hugging Face's; None: there is none,
    or it is not whole, or of another kind. `said`: the config.json beside the file.
    """
    mark = f"{_PARTS['embed']}.weight"
    key = next((key for key in state if key.endswith(mark)), None)
    if key is None or state[key].ndim != 2:
        return None
    prefix, width = key.removesuffix(mark), len(state[key])
    layout: MaeLayout = "huggingface" if prefix.endswith("decoder.") else "mae"
    called = {key.replace(_SAVED_BLOCKS, "decoder_layers."): key for key in state}
    blocks = re.compile(rf"{re.escape(prefix)}decoder_(?:blocks|layers)\.(\d+)\.")
    depth = len({found[1] for name in called if (found := blocks.match(name))})
    try:
        heads = int(said.get("decoder_num_attention_heads", _HEADS))
        config = DecoderConfig(depth=depth, width=width, heads=heads)
    except (UsageError, ValueError, TypeError):
        return None
    ours, keys = {}, []
    for name, shape in _shapes(config, encoder).items():
        theirs = [called.get(prefix + each, "") for each in _theirs(name, layout)]
        if "" in theirs:
            return None
        parts = [
            state[each].reshape(-1) if name == "mask_token" else state[each] for each in theirs
        ]
        if any(part.ndim != len(shape) or part.shape[1:] != shape[1:] for part in parts):
            return None
        ours[name] = torch.cat(parts)
        if ours[name].shape != shape:
            return None
        keys += theirs
    if not _fixed(state.get(prefix + _POSITIONS), encoder.grid, width):
        return None
    return DecoderWeights(config, ours, (*keys, prefix + _POSITIONS))


def write_mae(
    state: State, encoder: ViTConfig, decoder: DecoderWeights, layout: MaeLayout
) -> dict[str, Tensor]:
    """What pre-training goes on from: `ViTMAEForPreTraining`'s file, or that of Meta's code.

    Raises `DataError` for an encoder that they have not.
    """
    # What pools its features is not in the weights, and their code never pools in pre-training.
    encoder = replace(encoder, pool="class" if encoder.class_token else encoder.pool)
    if layout == "huggingface":
        body = {f"vit.{key}": x for key, x in to_huggingface(state, encoder).items()}
    else:
        body = to_timm(state, encoder)
    prefix = "decoder." if layout == "huggingface" else ""
    beside: dict[str, Tensor] = {}
    for name, tensor in decoder.state.items():
        theirs = _theirs(name, layout)
        parts = (
            tensor.view(1, 1, -1).chunk(1) if name == "mask_token" else tensor.chunk(len(theirs))
        )
        beside |= {prefix + each: part for each, part in zip(theirs, parts, strict=True)}
    rows = sincos_table(encoder.grid, decoder.config.width, "sincos_mae")
    beside[prefix + _POSITIONS] = torch.cat([torch.zeros_like(rows[:1]), rows])[None]
    return body | beside


def _shapes(config: DecoderConfig, encoder: ViTConfig) -> dict[str, Size]:
    out = math.prod(encoder.patch) * encoder.channels
    with torch.device("meta"):
        decoder = PatchDecoder(config, encoder.width, encoder.grid, out)
    return {key: tensor.shape for key, tensor in decoder.state_dict().items()}


def _theirs(key: str, layout: MaeLayout) -> tuple[str, ...]:
    """Their name of our tensor, or their names, one below the other."""
    if key in _PARTS:
        return (_PARTS[key],)
    module, leaf = key.rsplit(".", 1)
    if module in _PARTS:
        return (f"{_PARTS[module]}.{leaf}",)
    number, part = module.removeprefix("encoder.blocks.").split(".", 1)
    if layout == "mae":
        return (f"decoder_blocks.{number}.{part}.{leaf}",)
    return tuple(f"decoder_layers.{number}.{each}.{leaf}" for each in _HF_BLOCK[part])


def _fixed(table: Tensor | None, grid: tuple[int, int], width: int) -> bool:
    """Whether positions are the ones that a decoder of ours has."""
    rows = sincos_table(grid, width, "sincos_mae")
    if table is None or table.shape != (1, len(rows) + 1, width):
        return False
    return bool(
        (table[0].float() - torch.cat([torch.zeros_like(rows[:1]), rows])).abs().max() < _NEAR
    )
