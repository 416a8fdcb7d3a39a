"""The log once more, for TensorBoard."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitrail.errors import UsageError
from vitrail.training.progress import Listener


@contextmanager
def board(folder: Path) -> Iterator[Listener]:
    """A listener that writes each event's numbers as TensorBoard events into `folder`.

    Raises `UsageError` when the extra is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            "tensorboard is not installed: pip install 'vitrail[tensorboard]'"
        ) from error
    with SummaryWriter(folder) as writer:

        def listen(event: dict[str, Any]) -> None:
            for name, value in event.items():
                if name not in ("step", "seconds", "done"):
                    writer.add_scalar(name, value, event["step"])

        yield listen
