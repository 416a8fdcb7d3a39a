"""Weights of a head that lies beside a backbone: of a segmenter."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from pydantic import TypeAdapter
from torch import Size, Tensor

from vitrail.errors import DataError
from vitrail.heads import Segmenter, SegmentHeadConfig, build_segmenter
from vitrail.heads.queries import QueryHead
from vitrail.models import ModelConfig, build
from vitrail.weights.classes import match
from vitrail.weights.names import some

_CLASSIFIER = "classifier."
"""What a head says of each class: its rows are theirs, and of queries one more for nothing."""

_CONFIG = TypeAdapter(SegmentHeadConfig)


class HeadWeights(NamedTuple):
    """A segmenter's head, whatever backbone it is on."""

    config: SegmentHeadConfig
    state: dict[str, Tensor]
    """Its state dict."""
    names: tuple[str, ...]
    """Of the classes; none where nothing says them."""

    @property
    def classes(self) -> int:
        """How many it knows."""
        return len(self.state[f"{_CLASSIFIER}bias"]) - (self.config.head == "queries")

    @property
    def line(self) -> str:
        """What it is, in words."""
        kind = {
            "linear": f"linear, {self.config.taps} tap{'s' * (self.config.taps == 'four')}",
            "deeplab": "DeepLabV3+",
            "queries": f"{self.config.queries} queries in {self.config.joint_blocks} blocks",
        }[self.config.head]
        return f"{kind}; {classes_named(self.classes, self.names)}"


def classes_named(count: int, names: tuple[str, ...]) -> str:
    """So many classes, in words; `names` may be unknown."""
    return f"{count} classes: {some(list(names), 6) or 'nothing names them'}"


def head_of(model: Segmenter, names: tuple[str, ...]) -> HeadWeights:
    """What a segmenter of ours has on its backbone."""
    settled = asdict(model.head_config)
    fields = {name: settled[name] for name in SegmentHeadConfig.__dataclass_fields__}
    if isinstance(model.head, QueryHead):
        fields["joint_blocks"] = model.head.blocks
    return HeadWeights(SegmentHeadConfig(**fields), dict(model.head.state_dict()), names)


def load_head(model: Segmenter, head: HeadWeights, names: tuple[str, ...]) -> list[str]:
    """Give a segmenter's head the weights of another, and say what became of them.

    What says the classes is kept, its rows in the order of `names`, if it is known to be for just
    those, and else stays as new as it is; a head of another structure stays new as a whole.
    """
    own = model.head.state_dict()
    shapes = {key: t.shape for key, t in head.state.items() if not key.startswith(_CLASSIFIER)}
    if model.head_config.head != head.config.head:
        return [
            f"head: a new one, {model.head_config.head}: that of the weights is {head.config.head}"
        ]
    if shapes != {key: t.shape for key, t in own.items() if not key.startswith(_CLASSIFIER)}:
        return [f"head: a new one: that of the weights is of another shape ({head.line})"]
    found = match(head.names, names)
    state = {key: head.state[key] for key in shapes}
    if found.order is not None:
        rows = [*found.order, len(names)] if head.config.head == "queries" else [*found.order]
        state |= {
            key: tensor[rows] for key, tensor in head.state.items() if key.startswith(_CLASSIFIER)
        }
    model.head.load_state_dict(own | state)
    if found.order is None:
        return [f"head: kept, but what says the classes is new: {found.why}"]
    return [f"head: {found.why}"]


class AnyHead(Protocol):
    """What lies beside a backbone, of any task."""

    @property
    def config(self) -> Any:
        """A dataclass."""
        ...

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Its tensors, under their own names."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes, or none."""
        ...

    @property
    def classes(self) -> int:
        """How many it knows."""
        ...


Head = TypeVar("Head", bound=AnyHead)


def to_header(head: AnyHead) -> dict[str, Any]:
    """What a file of ours says of it."""
    return {"config": asdict(head.config), "classes": head.names}


def checked(head: Head, bias: str, wanted: Callable[[int], Mapping[str, Size]]) -> Head:
    """The head, of a file that is whole: it has `bias`, which has a number for each class, and all
    that is `wanted` of a head of so many classes, and nothing else. Raises `DataError`.
    """
    if bias not in head.state:
        raise DataError(f"the head has no '{bias}': the file is not whole")
    if len(head.names) not in (0, head.classes):
        raise DataError(
            f"the head is for {head.classes} classes, and the header names {len(head.names)}"
        )
    there = {(key, tensor.shape) for key, tensor in head.state.items()}
    if wrong := sorted({*wanted(head.classes).items()} ^ there):
        raise DataError(f"the head does not fit its config: {some([key for key, _ in wrong])}")
    return head


def from_header(
    header: Mapping[str, Any], tensors: Mapping[str, Tensor], config: ModelConfig
) -> HeadWeights:
    """The inverse, of the `tensors` under their own names.

    Raises `DataError` for tensors that are missing, or no head's on a backbone of `config`.
    """
    config_of_head = _CONFIG.validate_python(header["config"])
    head = HeadWeights(config_of_head, dict(tensors), tuple(map(str, header["classes"])))
    wanted = head.config
    return checked(head, f"{_CLASSIFIER}bias", lambda classes: head_shapes(config, wanted, classes))


def head_shapes(config: ModelConfig, head: SegmentHeadConfig, classes: int) -> dict[str, Size]:
    """Every key of a head's state dict and its shape, on a backbone of `config`."""
    with torch.device("meta"):
        segmenter = build_segmenter(build(replace(config, classes=0)), head, classes)
    return {key: tensor.shape for key, tensor in segmenter.head.state_dict().items()}
