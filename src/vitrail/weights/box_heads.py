"""Weights of what lies beside a backbone, of a detector: a pyramid and a dense head, or queries."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter
from torch import Size, Tensor

from vitrail.heads.detector import DetectHeadConfig, Detector, build_detector
from vitrail.models import ModelConfig, build
from vitrail.weights.heads import checked, classes_named
from vitrail.weights.names import some

_CONFIG = TypeAdapter(DetectHeadConfig)


class BoxHeadWeights(NamedTuple):
    """A detector's own part, whatever backbone it is on."""

    config: DetectHeadConfig
    state: dict[str, Tensor]
    """Its part of the detector's state dict: see `Detector.beside`."""
    names: tuple[str, ...]
    """Of the classes; none where nothing says them."""

    @property
    def classes(self) -> int:
        """How many it knows."""
        return len(self.state[_bias(self.config)])

    @property
    def line(self) -> str:
        """What it is, in words."""
        shape = f"boxes of each cell of {self.config.levels} maps"
        if self.config.head == "queries":
            query = self.config.query
            shape = f"{query.queries} queries for boxes in {query.layers} layers"
        return f"{shape}; {classes_named(self.classes, self.names)}"


def box_head_of(model: Detector, names: tuple[str, ...]) -> BoxHeadWeights:
    """What a detector of ours has on its backbone."""
    shape = {each.name: getattr(model.head_config, each.name) for each in fields(DetectHeadConfig)}
    return BoxHeadWeights(DetectHeadConfig(**shape), model.beside(), names)


def load_box_head(model: Detector, head: BoxHeadWeights, names: Sequence[str]) -> list[str]:
    """Give a detector the head of another, and say what became of it.

    Each class is said apart from the others: where the old one knows all of `names`, and perhaps
    more, its rows are kept, and else what says the classes is new. A head of another structure
    stays new as a whole.
    """
    if model.head_config.head != head.config.head:
        return [
            f"head: a new one, {model.head_config.head}: that of the weights is {head.config.head}"
        ]
    own = model.beside()
    shapes = {key: t.shape for key, t in head.state.items() if not _of_classes(key)}
    if shapes != {key: t.shape for key, t in own.items() if not _of_classes(key)}:
        return [f"head: a new one: that of the weights is of another shape ({head.line})"]
    state = {key: head.state[key] for key in shapes}
    lacks = [name for name in names if name not in head.names]
    if lacks or not head.names:
        model.load_state_dict(state, strict=False)
        why = f"the old one does not know {some(lacks)}" if head.names else "nothing names its own"
        return [f"head: kept, but what says the classes is new: {why}"]
    rows = [head.names.index(name) for name in names]
    state |= {key: t[rows] for key, t in head.state.items() if _of_classes(key)}
    model.load_state_dict(state, strict=False)
    return [f"head: kept, with {len(rows)} of its {head.classes} classes"]


def from_header(
    header: Mapping[str, Any], tensors: Mapping[str, Tensor], config: ModelConfig
) -> BoxHeadWeights:
    """The inverse of `to_header`, of the `tensors` under their own names.

    Raises `DataError` for tensors that are missing, or no head's on a backbone of `config`.
    """
    read = _CONFIG.validate_python(header["config"])
    head = BoxHeadWeights(read, dict(tensors), tuple(map(str, header["classes"])))
    return checked(head, _bias(read), lambda classes: head_shapes(config, read, classes))


def head_shapes(config: ModelConfig, head: DetectHeadConfig, classes: int) -> dict[str, Size]:
    """Every key of a head's state and its shape, on a backbone of `config`."""
    with torch.device("meta"):
        detector = build_detector(build(replace(config, classes=0)), head, classes)
    return {key: tensor.shape for key, tensor in detector.beside().items()}


def _bias(config: DetectHeadConfig) -> str:
    """A tensor that has a number for each class."""
    return "head.classifier.bias" if config.head == "queries" else "head.classes.bias"


def _of_classes(key: str) -> bool:
    """Whether a tensor's rows are the classes: of queries, those of each group's first stage too,
    which may be the same.
    """
    return key.startswith("head.classes.") or ".classifier." in key
