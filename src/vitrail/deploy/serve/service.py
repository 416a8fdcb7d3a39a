"""One model at work: from a file's bytes to an answer, as many at once as there is room for."""

import asyncio
import json
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np

from vitrail.data import UnreadableImage
from vitrail.data.views.preprocess import Preprocess
from vitrail.deploy.answers import told
from vitrail.deploy.boxes import USUAL_SCORE
from vitrail.deploy.predict import Shown
from vitrail.deploy.serve.admission import Admission
from vitrail.deploy.serve.batching import Batcher, Call, Expired
from vitrail.deploy.serve.counts import Counts
from vitrail.deploy.serve.decoding import Decoders
from vitrail.deploy.serve.limits import Limits
from vitrail.errors import DataError, VitrailError


class Model(Protocol):
    """What a `Predictor` is to a server."""

    @property
    def kind(self) -> str:
        """Of the answers: classify, segment, detect or features."""
        ...

    @property
    def coupled(self) -> bool:
        """Whether an answer depends on its neighbours in a batch."""
        ...

    @property
    def threshold(self) -> float | None:
        """Of boxes: from which score on they are given."""
        ...

    @property
    def card(self) -> dict[str, Any]:
        """What is to be known of it, as plain values."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes."""
        ...

    @property
    def preprocess(self) -> Preprocess:
        """From images to what the model takes."""
        ...

    def show(self, picture: Any) -> Shown:
        """What the model takes of an image."""
        ...

    def answers(self, shown: Sequence[Shown]) -> list[Any]:
        """One call of the engine."""
        ...


class Served(NamedTuple):
    """A model that has answered once, so that it is known to work, and how long it takes."""

    model: Model
    name: str
    """As addresses have it: letters, digits, points and dashes."""
    seconds: float
    """Of the engine, for one image."""

    @classmethod
    def tried(cls, model: Model, name: str | None = None) -> "Served":
        """Ask it about a grey image. Raises `DataError` for an answer with no numbers in it."""
        shown = model.show(np.full((96, 128, 3), 128, np.uint8))
        model.answers([shown])  # what comes first takes longer
        started = time.monotonic()
        (answer,) = model.answers([shown])
        seconds = time.monotonic() - started
        try:
            json.dumps(told(answer), allow_nan=False)
        except ValueError:
            raise DataError("the model answers a grey image with what is no number") from None
        called = name or str(model.card.get("name") or "model")
        return cls(model, re.sub(r"[^\w.-]+", "-", called, flags=re.ASCII), seconds)

    @property
    def threshold(self) -> float:
        """Of boxes: the least score that is told unasked."""
        return USUAL_SCORE if self.model.threshold is None else self.model.threshold

    @property
    def most(self) -> int | None:
        """Of `Batchable`."""
        return 1 if self.model.coupled or self.model.preprocess.alone else None

    def answers(self, shown: Sequence[Shown]) -> list[Any]:
        return self.model.answers(shown)


class Late(Exception):
    """An answer that was not there in time."""


class Failed(Exception):
    """The engine cannot answer about this image."""


class Full(Exception):
    """There is no room for more images."""


class Service:
    """Decoders, a queue and an engine.

    `open` gives the model; it is called again to reload it. `room`: how many images may be inside
    at once; None: as measured.
    """

    def __init__(
        self,
        open: Callable[[], Served],
        limits: Limits,
        *,
        decoders: int,
        batch: int = 16,
        delay: float = 0.0,
        room: int | None = None,
    ) -> None:
        """Raises what `open` raises."""
        self._open = open
        self.served = open()
        self.limits = limits
        self.counts = Counts()
        self.draining = False
        self.held = 0
        """Bytes of bodies that are here."""
        self.admission = Admission(
            decoders=decoders, decode=0.005, engine=self.served.seconds, room=room
        )
        self.decoders = Decoders(decoders, limits, self._decoded)
        self.batcher = Batcher(batch, delay, self._called, self.counts.expired.inc)
        self.unpacking = asyncio.Semaphore(2)
        """Bodies at once: each may become as large as any."""
        self.reloaded: Callable[[], None] = lambda: None
        """Called when a client has had the model reloaded: other processes do so too."""
        self._reloading = asyncio.Lock()

    async def warm(self) -> None:
        """Start the decoders."""
        preprocess = self.served.model.preprocess
        started = (self.decoders.show(_BLACK, preprocess) for _ in range(self.decoders.count))
        await asyncio.gather(*started)

    @contextmanager
    def admitted(self, images: int) -> Iterator[None]:
        """Room for so many images. Raises `Full`."""
        if not self.admission.enter(images):
            raise Full
        try:
            yield
        finally:
            self.admission.leave(images)

    async def answer(self, served: Served, image: bytes, due: float) -> Any:
        """What the model says of an image, if it can until `due`, by `time.monotonic`.

        Raises `UnreadableImage`, `Late` and `Failed`. Cancelled, it does no work any more.
        """
        started = time.monotonic()
        try:
            async with asyncio.timeout_at(due):
                shown = await self.decoders.show(image, served.model.preprocess)
                answer = await self._computed(served, shown, due)
        except (TimeoutError, Expired):
            raise Late from None
        except UnreadableImage:
            self.counts.unreadable.inc()
            raise
        self.counts.images.inc()
        self.counts.seconds.labels("all").observe(time.monotonic() - started)
        return answer

    async def _computed(self, served: Served, shown: Shown, due: float) -> Any:
        try:
            return await asyncio.wrap_future(self.batcher.put(served, shown, due))
        except Expired:
            raise
        except Exception as error:
            traceback.print_exc()
            raise Failed from error

    async def reload(self) -> None:
        """Take what lies in the model's place now; what is inside is answered by the old one.

        Raises `DataError` where it is no model that works; the old one stays.
        """
        async with self._reloading:
            try:
                served = await asyncio.to_thread(self._open)
            except Exception as error:
                self.counts.reloads.labels("refused").inc()
                why = str(error) if isinstance(error, VitrailError) else repr(error)
                print(f"vitrail: not reloaded, the old model stays: {why}", file=sys.stderr)
                raise DataError(f"not reloaded, the old model stays: {why}") from error
            self.served = served
            self.admission.alone_seconds = self.admission.engine_seconds = served.seconds
            self.counts.reloads.labels("loaded").inc()

    def card(self) -> Mapping[str, Any]:
        """What is to be known of the model, as plain values."""
        served = self.served
        return {**served.model.card, "name": served.name, "kind": served.model.kind}

    def metrics(self) -> bytes:
        """The numbers as Prometheus reads them."""
        self.counts.inside.set(self.admission.inside)
        self.counts.room.set(self.admission.room)
        return self.counts.page()

    def close(self) -> None:
        """End, whatever is inside."""
        self.batcher.close()
        self.decoders.close()

    def _decoded(self, seconds: float) -> None:
        self.admission.decoded(seconds)
        self.counts.seconds.labels("decode").observe(seconds)

    def _called(self, call: Call) -> None:
        self.admission.computed(call.images, call.seconds)
        self.counts.batches.observe(call.images)
        self.counts.engine.inc(call.seconds)
        for waited in call.waited:
            self.counts.seconds.labels("wait").observe(waited)
            self.counts.seconds.labels("engine").observe(call.seconds)


_BLACK = b"P6 1 1 255\n\0\0\0"
"""An image of one pixel, as a file of PPM."""
