"""Small pictures that a tiny model tells apart in a few steps."""

import numpy as np

from vitrail.data.sources.source import ArraySource

CLASSES = ("dark", "light", "striped")


def pictures(n: int, seed: int) -> ArraySource:
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    images = rng.integers(0, 60, (n, 16, 16), dtype=np.uint8)
    images[labels == 1] += 150
    images[labels == 2, ::2] += 150
    return ArraySource(images, labels, CLASSES, "train")
