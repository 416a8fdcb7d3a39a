"""From images that arrive one by one to calls of the engine with several.

By default nobody waits for company: whenever the engine is free it gets all that is waiting, up to
a number. On a CPU a batch is hardly faster than its images one after another, so waiting would
only delay the answer; where it is faster, a busy engine fills its batches by itself.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

from vitrail.deploy.predict import Shown

_END_SECONDS = 1.0


class Batchable(Protocol):
    """What makes answers."""

    @property
    def most(self) -> int | None:
        """Images in one call; None: any number. 1 where an answer depends on its neighbours."""
        ...

    def answers(self, shown: Sequence[Shown]) -> list[Any]:
        """One call of the engine."""
        ...


class Expired(Exception):
    """An answer that nobody wanted any more when its turn came."""


class Waiting(NamedTuple):
    """An image on its way into the engine."""

    model: Batchable
    shown: Shown
    due: float
    """Until when an answer is wanted, by `time.monotonic`."""
    came: float
    answer: Future[Any]

    def goes_with(self, other: "Waiting") -> bool:
        """Whether one call can have both: of one model, and of one size, so that neither is
        brought to the other's.
        """
        return self.model is other.model and self.shown.pixels.shape == other.shown.pixels.shape


class Call(NamedTuple):
    """A call of the engine that is over, for those who count."""

    images: int
    seconds: float
    waited: tuple[float, ...]
    """Seconds from each image's arrival to the call."""


class Batcher:
    """The one thread that calls engines.

    `most`: images in a call. `delay`: seconds that the first of a batch waits for it to be full.
    `called` and `expired` hear of each call, and of each image that was too late for one.
    """

    def __init__(
        self,
        most: int,
        delay: float = 0.0,
        called: Callable[[Call], None] = lambda call: None,
        expired: Callable[[], None] = lambda: None,
    ) -> None:
        self.most, self.delay = most, delay
        self._called, self._expired = called, expired
        self._queue: deque[Waiting] = deque()
        self._change = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="vitrail-engine", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, model: Batchable, shown: Shown, due: float) -> Future[Any]:
        """What will hold the answer; or `Expired`, or what the engine raised. Cancel it, and no
        work is done for it any more.
        """
        answer: Future[Any] = Future()
        with self._change:
            self._queue.append(Waiting(model, shown, due, time.monotonic(), answer))
            self._change.notify()
        return answer

    def close(self) -> None:
        """End, after those that wait; but do not wait long for that."""
        with self._change:
            self._closed = True
            self._change.notify()
        self._thread.join(_END_SECONDS)

    def _run(self) -> None:
        while batch := self._take():
            self._answer(batch)

    def _take(self) -> list[Waiting]:
        """The next images; none at the end."""
        with self._change:
            while True:
                self._change.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return []
                first = self._queue[0]
                most = min(self.most, first.model.most or self.most)
                until = first.came + self.delay
                while len(self._queue) < most and not self._closed:
                    if (left := until - time.monotonic()) <= 0:
                        break
                    self._change.wait(left)
                if batch := self._taken(first, most):
                    return batch

    def _taken(self, first: Waiting, most: int) -> list[Waiting]:
        """Up to `most` that can share a call with the first, in their order; the others stay."""
        batch: list[Waiting] = []
        others: deque[Waiting] = deque()
        for one in self._queue:
            if len(batch) == most or not one.goes_with(first):
                others.append(one)
                continue
            wanted = one.answer.set_running_or_notify_cancel()
            if wanted and one.due > time.monotonic():
                batch.append(one)
                continue
            self._expired()
            if wanted:
                one.answer.set_exception(Expired())
        self._queue = others
        return batch

    def _answer(self, batch: list[Waiting]) -> None:
        started = time.monotonic()
        try:
            answers = batch[0].model.answers([one.shown for one in batch])
            if len(answers) != len(batch):
                raise RuntimeError(f"{len(answers)} answers about {len(batch)} images")
        except Exception as error:
            if len(batch) == 1:
                batch[0].answer.set_exception(error)
                return
            for one in batch:  # so that only the one at fault fails
                self._answer([one])
            return
        waited = tuple(started - one.came for one in batch)
        self._called(Call(len(batch), time.monotonic() - started, waited))
        for one, answer in zip(batch, answers, strict=True):
            one.answer.set_result(answer)
