"""What a person sees while something runs: a progress bar on a terminal, plain lines elsewhere.

All of it goes to stderr; stdout is for results.
"""

import os
import sys
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class _Bar:
    """A progress bar that is there while the `with` block runs."""

    _progress: Progress

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()


class TrainingScreen(_Bar):
    """Listens to a training run: a bar with an estimate of what is left, and a line a measure."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, quiet=_silent())
        self._live = self._console.is_terminal
        self._progress = Progress(
            TextColumn("[bold]training"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[now]}", style="dim"),
            console=self._console,
            transient=True,
            disable=not self._live,
        )
        self._task = self._progress.add_task("train", total=1.0, now="")
        self._loss: float | None = None

    def notify(self, sentence: str) -> None:
        """Print a sentence above the bar."""
        self._console.print(sentence, markup=False, soft_wrap=True)

    def listen(self, event: dict[str, Any]) -> None:
        """Show an event of the training loop."""
        if score := next((name for name in event if name.startswith("val_")), None):
            loss = "" if self._loss is None else f"   loss {self._loss:.3f}"
            self.notify(
                f"{clock(event['seconds'])}  epoch {event['epoch'] + 1}  step {event['step']}"
                f"{loss}   held-out {score[4:]} {event[score]:.1%}"
            )
            return
        # A noisy loss is easier to read as a running mean over about twenty steps.
        now = f"{event['images_per_second']:.0f} images/s"
        if "loss" in event:
            loss = event["loss"]
            self._loss = loss if self._loss is None else self._loss + (loss - self._loss) / 20
            now = f"loss {self._loss:.3f}  {now}"
        self._progress.update(self._task, completed=event["done"], now=now)


class CountingScreen(_Bar):
    """A bar that counts to a known number."""

    def __init__(self, what: str, total: int) -> None:
        self._progress = Progress(
            TextColumn(f"[bold]{what}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._progress.add_task(what, total=total)

    def done(self, count: int) -> None:
        """So many are done."""
        self._progress.update(self._task, completed=count)


def say(sentence: str) -> None:
    """Print a sentence where there is no bar."""
    if not _silent():
        print(sentence, file=sys.stderr, flush=True)


def _silent() -> bool:
    """Whether this is not the first of several processes, which is the one that talks."""
    return os.environ.get("RANK", "0") != "0"


def clock(seconds: float) -> str:
    """Minutes and seconds.

    >>> clock(125.3)
    '2:05'
    """
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
