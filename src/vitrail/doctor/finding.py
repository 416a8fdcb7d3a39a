"""A finding: one line on one thing, and what mends it if it is a problem."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it is, in one line; and for programs the numbers in it."""

    topic: str
    level: Level
    text: str
    mend: str = ""
    """The command that mends it; a problem has one."""
    numbers: Mapping[str, Any] = field(default_factory=dict)


def on_linux() -> bool:
    """Whether /proc and cgroups say how the machine is."""
    return platform.system() == "Linux"
