"""How many images a server takes in at once, so that whoever is taken in is answered soon.

A queue helps nobody whose answer comes too late. At a rate of R answers a second an image that
finds K others inside waits K / R (Little's law); alone it would take U. So K is what makes the wait
PATIENCE times U, and everyone else is told at once to come again, and when. U and R are measured
all the time, for they depend on the images that come and on what else the machine does.

    U = seconds to decode an image + seconds of the engine for one image
    R = the slower of all decoders together and of the engine, at the batches that it gets

Requests come in bursts where nobody is overloaded, too: at 70% load two images inside would turn
every sixth away. So BURST times K are let in, until somebody has to be turned away; from then on K,
until less than every fifth of those who ask is turned away, or nobody asks for a while. Where twice
as many come as can be answered, neither happens.
"""

import time
from collections.abc import Callable
from math import ceil

PATIENCE = 2.2
"""Below three, which is what is promised: the waits of single images scatter around their mean."""
BURST = 6
_LEAST = 2
"""One image that is decoded while the engine has another."""
_WEIGHT = 0.1
"""Of a new measurement in the average."""
_CALM, _CALM_WEIGHT, _CALM_SECONDS = 0.2, 0.02, 2.0
"""The share turned away below which there is no overload; the weight of each who asks in it; and
how long nobody asks.
"""


class Admission:
    """Counts the images that are inside.

    >>> admission = Admission(decoders=1, decode=0.01, engine=0.04)
    >>> admission.room, admission.enter(2), admission.enter(1), admission.retry_after
    (12, True, True, 1)
    """

    def __init__(
        self,
        *,
        decoders: int,
        decode: float,
        engine: float,
        room: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`decode`, `engine`: seconds for one image, as a first guess. `room`: a fixed number."""
        self._decoders = decoders
        self._fixed = room
        self.decode_seconds = decode
        self.alone_seconds = self.engine_seconds = engine
        """Of the engine, for an image that is alone in its batch, and in the batches that come."""
        self.inside = 0
        self._clock = clock
        self._asked = clock()
        self._turned_away = 0.0
        """The share of late; from _CALM on there is no burst."""

    @property
    def rate(self) -> float:
        """Images that can be answered in a second."""
        return min(self._decoders / self.decode_seconds, 1 / self.engine_seconds)

    @property
    def room(self) -> int:
        """How many images may be inside."""
        if self._fixed is not None:
            return self._fixed
        return self.lasting_room * (BURST if self._turned_away < _CALM else 1)

    @property
    def lasting_room(self) -> int:
        """How many may be inside all the time."""
        return max(_LEAST, int(PATIENCE * self.rate * (self.decode_seconds + self.alone_seconds)))

    @property
    def retry_after(self) -> int:
        """Whole seconds, as the header has them, after which those inside will be answered."""
        return max(1, ceil(self.inside / self.rate))

    def crowded(self, images: int = 1) -> bool:
        """Whether there is no room for so many. Nobody else inside, there is for any number."""
        return self.inside > 0 and self.inside + images > self.room

    def enter(self, images: int) -> bool:
        """Let so many in, if there is room."""
        now, crowded = self._clock(), self.crowded(images)
        if now - self._asked > _CALM_SECONDS:
            self._turned_away = 0.0
        self._asked = now
        if crowded and self._turned_away < _CALM:
            self._turned_away = 1.0
        self._turned_away += _CALM_WEIGHT * (crowded - self._turned_away)
        if not crowded:
            self.inside += images
        return not crowded

    def leave(self, images: int) -> None:
        """They are answered, or gone."""
        self.inside -= images

    def decoded(self, seconds: float) -> None:
        """An image took so long to decode."""
        self.decode_seconds += _WEIGHT * (max(seconds, 1e-5) - self.decode_seconds)

    def computed(self, images: int, seconds: float) -> None:
        """A batch of so many images took the engine so long."""
        each = max(seconds, 1e-5) / images
        self.engine_seconds += _WEIGHT * (each - self.engine_seconds)
        if images == 1:
            self.alone_seconds += _WEIGHT * (each - self.alone_seconds)
