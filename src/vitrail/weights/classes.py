"""The classes of a head: what they are called, and whether they are those of somebody's images."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vitrail.weights.names import some


class Match(NamedTuple):
    """How the classes of a head answer to others. A number alone never does: timm counts folders
    0, 1, 2, 10 where we count 0, 1, 10, 2.
    """

    order: tuple[int, ...] | None
    """The row of the head for each of the others; None: it is no head for them."""
    why: str
    """In words, as a sentence about the head goes on."""


def match(there: Sequence[str], here: Sequence[str]) -> Match:
    """The rows that a head for the classes `there` has for `here`.

    >>> match(["dark", "light"], ["light", "dark"]).order
    (1, 0)
    """
    if not there:
        return Match(None, "nothing names the classes of the old one")
    lacks = [name for name in here if name not in there]
    extra = [name for name in there if name not in here]
    if lacks or extra:
        differ = [
            f"{words} {some(names)}"
            for words, names in (("does not know", lacks), ("knows besides", extra))
            if names
        ]
        return Match(None, f"the old one is for other classes: it {'; it '.join(differ)}")
    if len(set(there)) < len(there):
        return Match(None, "two classes of the old one have the same name")
    order = tuple(there.index(name) for name in here)
    if order == tuple(range(len(order))):
        return Match(order, f"kept, its {len(order)} classes are those of the data")
    return Match(order, f"kept, its {len(order)} classes put in the order of the data's")


def named_by_config(config: Mapping[str, Any], number: int) -> tuple[str, ...]:
    """The names of `number` classes that a config.json beside weights gives, Hugging Face's or
    timm's; none where it has others, or mere numbers.
    """
    told = config.get("id2label")
    names: object = config.get("label_names")
    if isinstance(told, dict):
        names = [told.get(str(i)) for i in range(number)] if len(told) == number else None
    if not isinstance(names, list) or len(names) != number:
        return ()
    found = tuple(name for name in names if isinstance(name, str))
    if len(found) < number or found == tuple(f"LABEL_{i}" for i in range(number)):
        return ()
    return found
