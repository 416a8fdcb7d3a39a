"""Fewer tokens, as a user writes it: `tome:r=13`, `tome-decreasing:r=13`, `dynamicvit:keep=0.5`,
`none`.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

from vitrail.errors import UsageError, unknown_name


class Method(NamedTuple):
    """A way to have fewer tokens, and what it has to be told."""

    parameter: str
    field: str
    """Of the model's config, which the parameter sets."""
    kind: type[int] | type[float]
    lowest: float
    highest: float
    example: str
    models: str
    """That have the field."""
    beside: Mapping[str, Any] = {}
    """Other fields that it sets."""


_CONSTANT = {"merge_schedule": "constant"}

METHODS: Mapping[str, Method] = {
    "tome": Method("r", "merge", int, 0, float("inf"), "tome:r=13", "ViTs", _CONSTANT),
    "tome-decreasing": Method(
        *("r", "merge", int, 0, float("inf"), "tome-decreasing:r=13", "ViTs"),
        {"merge_schedule": "decreasing"},
    ),
    "dynamicvit": Method("keep", "keep", float, 1e-9, 1, "dynamicvit:keep=0.7", "DynamicViTs"),
}


def tokens_from(text: str) -> dict[str, Any]:
    """The changes to a model's config that `text` asks for.

    Raises `UsageError` for what is no method, no parameter of it, or out of range; whether a model
    has so many tokens, its config says.

    >>> tokens_from("tome:r=13")
    {'merge': 13, 'merge_schedule': 'constant'}
    """
    if text == "none":
        return {"merge": 0, **_CONSTANT}
    name, _, rest = text.partition(":")
    if name not in METHODS:
        raise unknown_name("method to have fewer tokens", name, [*METHODS, "none"])
    method = METHODS[name]
    parameter, _, value = rest.partition("=")
    if parameter != method.parameter:
        raise UsageError(f"tokens '{text}': write it as {method.example}")
    try:
        number = method.kind(value)
    except ValueError:
        number = method.kind(-1)
    if not method.lowest <= number <= method.highest:
        wanted = "a whole number from 0" if method.kind is int else "a number in (0, 1]"
        raise UsageError(f"tokens '{text}': {parameter} is {wanted}, as in {method.example}")
    return {method.field: number, **method.beside}


def with_tokens(config: Any, text: str) -> Any:
    """The config of any family as `text` changes it.

    Raises `UsageError` as `tokens_from` does, and for a model that cannot do so.
    """
    changes = tokens_from(text)
    lacking = changes.keys() - {item.name for item in fields(config)}
    if lacking and text != "none":
        method = METHODS[text.partition(":")[0]]
        raise UsageError(
            f"tokens '{text}' is for {method.models}, and this model is of the family "
            f"'{getattr(config, 'family', '?')}': leave it out"
        )
    return config if lacking else replace(config, **changes)
