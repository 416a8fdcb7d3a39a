"""An image tower and a text tower whose vectors are compared: CLIP's, SigLIP's, LiT's model.

    image -> tower -> pooled -> projection, if there is one -> length 1
    text -> tokenizer -> tower, with its own projection     -> length 1
    logit = exp(scale) * image . text + bias

The tokenizer is a part of the model: without the very one that its text tower was trained with, the
weights mean nothing. So its files lie among the weights, as bytes in a buffer.

Letters: b images or texts, t tokens, p what the image tower gives, d what is compared.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int64
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor, nn

from vitrail.errors import DataError
from vitrail.text.opening import tokenizer_of
from vitrail.text.tokenizer import Tokenizer
from vitrail.text.tower import Tower

_STATE = "tokenizer.json"


class Vectors(NamedTuple):
    """What a loss is of."""

    images: Float[Tensor, "b d"]
    texts: Float[Tensor, "b d"]
    scale: Float[Tensor, " 1"]
    """What likenesses are multiplied with."""
    bias: Float[Tensor, " 1"]
    """What is added to them: 0 of a model without."""


class Words(nn.Module):
    """A tokenizer as a part of a model's state. Copies of a model share it."""

    content: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("content", torch.zeros(0, dtype=torch.uint8))
        self._read: Tokenizer | None = None

    def __deepcopy__(self, memo: object) -> "Words":
        return self

    def keep(self, tokenizer: Tokenizer) -> None:
        """Take this one from now on."""
        files = {
            name: np.frombuffer(content, np.uint8) for name, content in tokenizer.files.items()
        }
        said = np.frombuffer(json.dumps(tokenizer.state()).encode(), np.uint8)
        whole = bytearray(save({_STATE: said, **files}))
        self.content = torch.frombuffer(whole, dtype=torch.uint8).clone().to(self.content.device)
        self._read = tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises `DataError` where there is none, or it is damaged."""
        if self._read is None:
            try:
                files = load(self.content.cpu().numpy().tobytes())
                state = json.loads(files.pop(_STATE).tobytes())
            except (SafetensorError, KeyError, ValueError) as error:
                raise DataError(f"the model's tokenizer cannot be read: {error}") from error
            self._read = tokenizer_of(state, {name: x.tobytes() for name, x in files.items()})
        return self._read

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Of any length, whatever the one before was."""
        if (found := state_dict.get(f"{prefix}content")) is not None:
            self.content = self.content.new_empty(found.shape)
            self._read = None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class TwoTowers(nn.Module):
    """Both towers, and what their vectors are compared by. `config` is the image tower's."""

    backbone: Any
    text: Any

    def __init__(
        self,
        backbone: Any,
        text: Tower,
        pooled: int,
        *,
        projected: bool = False,
        scale: float = 1 / 0.07,
        bias: float | None = None,
    ) -> None:
        """`backbone`: a model without a head, which gives vectors of `pooled` numbers for images;
        `projected`: they are projected to as many as the text tower gives, or else are as many.
        """
        super().__init__()
        assert projected or pooled == text.width
        self.config = backbone.config
        self.pooled = pooled
        self.backbone = backbone
        self.text = text
        self.projection = nn.Linear(pooled, text.width, bias=False) if projected else None
        if self.projection is not None and not self.projection.weight.is_meta:
            nn.init.normal_(self.projection.weight, std=pooled**-0.5)
        self.scale = nn.Parameter(torch.full((1,), math.log(scale)))
        self.bias = None if bias is None else nn.Parameter(torch.full((1,), bias))
        self.words = Words()

    @property
    def width(self) -> int:
        """Of what is compared."""
        return self.text.width

    def forward(
        self, x: Float[Tensor, "b c h w"], extent: Int[Tensor, "b 2"] | None = None
    ) -> Float[Tensor, "b d"]:
        """The vectors of images, of length 1."""
        return self._compared(self.backbone(x, extent))

    def texts(
        self, tokens: Int64[Tensor, "b t"], mask: Bool[Tensor, "b t"]
    ) -> Float[Tensor, "b d"]:
        """The vectors of texts, of length 1."""
        return F.normalize(self.text(tokens, mask).float(), dim=1)

    def both(
        self,
        x: Float[Tensor, "b c h w"] | Float[Tensor, "b p"],
        extent: Int[Tensor, "b 2"] | None,
        tokens: Int64[Tensor, "b t"],
        mask: Bool[Tensor, "b t"],
    ) -> Vectors:
        """Of images and as many texts; instead of images, what the image tower has given."""
        images = self._compared(x) if x.ndim == 2 else self.forward(x, extent)
        bias = torch.zeros_like(self.scale) if self.bias is None else self.bias
        return Vectors(images, self.texts(tokens, mask), self.scale.float().exp(), bias.float())

    def block_names(self) -> list[str]:
        """The names of the blocks of both, the image tower's first."""
        return [
            *(f"backbone.{name}" for name in self.backbone.block_names()),
            *(f"text.{name}" for name in self.text.block_names()),
        ]

    def _compared(self, pooled: Float[Tensor, "b p"]) -> Float[Tensor, "b d"]:
        if self.projection is not None:
            pooled = self.projection(pooled)
        return F.normalize(pooled.float(), dim=1)
