"""Where a run is, and who is told of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

Listener = Callable[[dict[str, Any]], None]
"""Told of each event that is logged, for a progress bar."""


class Progress(NamedTuple):
    """Where a run is. Everything that a resumed run needs besides tensors."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    """Batches of this epoch that are done."""
    seconds: float = 0.0
    """Time spent in training steps, over all sittings; and on the head before the first of them."""
    head_seconds: float = 0.0
    """Time spent on the head before the first step."""
    evaluations: int = 0
    best: float = -1.0
    since_best: int = 0
