"""What a server counts, for Prometheus."""

import os

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

PLACE = "PROMETHEUS_MULTIPROC_DIR"
"""Where several processes put their counts together; prometheus-client reads it when imported."""
CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Counts:
    """One server's numbers."""

    def __init__(self) -> None:
        own = self._own = CollectorRegistry()
        self.requests = Counter(
            "vitrail_requests",
            "Requests by their status.",
            ["code"],
            registry=own,
        )
        self.images = Counter("vitrail_images", "Images that were answered.", registry=own)
        self.unreadable = Counter(
            "vitrail_unreadable_images", "Images that could not be decoded.", registry=own
        )
        self.expired = Counter(
            "vitrail_expired_images",
            "Images that nobody waited for any more, for which the engine did nothing.",
            registry=own,
        )
        self.reloads = Counter(
            "vitrail_reloads",
            "Models loaded, and kept out.",
            ["result"],
            registry=own,
        )
        self.engine = Counter(
            "vitrail_engine_seconds", "Time in which the engine was at work.", registry=own
        )
        self.batches = Histogram(
            "vitrail_batch_images", "Images in a call of the engine.", buckets=_SIZES, registry=own
        )
        self.seconds = Histogram(
            "vitrail_seconds",
            "Time an image took: decode, wait for the engine, engine (its whole batch), and all.",
            ["stage"],
            buckets=_SECONDS,
            registry=own,
        )
        self.inside = Gauge(
            "vitrail_images_inside",
            "Images that are decoded, wait or are computed now.",
            registry=own,
            multiprocess_mode="livesum",
        )
        self.room = Gauge(
            "vitrail_room_images",
            "How many may be inside; more are told to come again.",
            registry=own,
            multiprocess_mode="livesum",
        )

    def value(self, name: str, **labels: str) -> float:
        """A number of this process."""
        return self._own.get_sample_value(name, labels) or 0.0

    def page(self) -> bytes:
        """All numbers as Prometheus reads them; of several processes their sums."""
        if PLACE not in os.environ:
            return generate_latest(self._own)
        together = CollectorRegistry()
        MultiProcessCollector(together)  # type: ignore[no-untyped-call]
        return generate_latest(together)
