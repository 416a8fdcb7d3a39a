"""Weights of queries for boxes that lie beside a backbone: of a detector."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter
from torch import Size, Tensor

from vitrail.errors import DataError
from vitrail.heads.deformable import QueryBoxes, QueryBoxesConfig
from vitrail.models import ModelConfig, ViTConfig
from vitrail.weights.names import some

_CLASSIFIER = "classifier."
"""What says each class, of the queries and of each group's first stage: its rows are theirs."""
_MAPS = 4
"""That are read of a ViT where its taps are not said."""
_CONFIG = TypeAdapter(QueryBoxesConfig)


class BoxHeadWeights(NamedTuple):
    """A detector's projector, first stage and decoder."""

    config: QueryBoxesConfig
    state: dict[str, Tensor]
    """Its state dict."""
    names: tuple[str, ...]
    """Of the classes; none where nothing says them."""

    @property
    def classes(self) -> int:
        """How many it knows."""
        return len(self.state[f"{_CLASSIFIER}bias"])

    @property
    def line(self) -> str:
        """What it is, in words."""
        shape = f"{self.config.queries} queries for boxes in {self.config.layers} layers"
        named = some(list(self.names), 6) or "nothing names them"
        return f"{shape}; {self.classes} classes: {named}"


def load_box_head(model: QueryBoxes, head: BoxHeadWeights, names: Sequence[str]) -> list[str]:
    """Give a head the weights of another, and say what became of them.

    Each class is said apart from the others: where the old one knows all of `names`, and perhaps
    more, its rows are kept, and else what says the classes is new. A head of another structure
    stays new as a whole.
    """
    own = model.state_dict()
    shapes = {key: t.shape for key, t in head.state.items() if _CLASSIFIER not in key}
    if shapes != {key: t.shape for key, t in own.items() if _CLASSIFIER not in key}:
        return [f"head: a new one: that of the weights is of another shape ({head.line})"]
    state = {key: head.state[key] for key in shapes}
    lacks = [name for name in names if name not in head.names]
    if lacks or not head.names:
        model.load_state_dict(own | state)
        why = f"the old one does not know {some(lacks)}" if head.names else "nothing names its own"
        return [f"head: kept, but what says the classes is new: {why}"]
    rows = [head.names.index(name) for name in names]
    state |= {key: t[rows] for key, t in head.state.items() if _CLASSIFIER in key}
    model.load_state_dict(own | state)
    return [f"head: kept, with {len(rows)} of its {head.classes} classes"]


def to_header(head: BoxHeadWeights) -> dict[str, Any]:
    """What a file of ours says of it."""
    return {"config": asdict(head.config), "classes": head.names}


def from_header(
    header: Mapping[str, Any], tensors: Mapping[str, Tensor], config: ModelConfig
) -> BoxHeadWeights:
    """The inverse, of the `tensors` under their own names.

    Raises `DataError` for tensors that are missing, or no head's on a backbone of `config`.
    """
    read = _CONFIG.validate_python(header["config"])
    head = BoxHeadWeights(read, dict(tensors), tuple(map(str, header["classes"])))
    if f"{_CLASSIFIER}bias" not in tensors:
        raise DataError(f"the head has no '{_CLASSIFIER}bias': the file is not whole")
    if len(head.names) not in (0, head.classes):
        raise DataError(
            f"the head is for {head.classes} classes, and the header names {len(head.names)}"
        )
    wanted = head_shapes(config, read, head.classes)
    if wrong := sorted({*wanted.items()} ^ {(key, t.shape) for key, t in tensors.items()}):
        raise DataError(f"the head does not fit its config: {some([key for key, _ in wrong])}")
    return head


def head_shapes(config: ModelConfig, head: QueryBoxesConfig, classes: int) -> dict[str, Size]:
    """Every key of a head's state dict and its shape, on a backbone of `config`."""
    if not isinstance(config, ViTConfig):
        raise DataError(f"queries for boxes are of a ViT's maps, and this is a {config.family}")
    with torch.device("meta"):
        module = QueryBoxes((config.width,) * (len(head.taps) or _MAPS), classes, head)
    return {key: tensor.shape for key, tensor in module.state_dict().items()}
