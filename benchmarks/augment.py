"""What augmentation costs: the view of one image, and the batched part, in images a second.

    python benchmarks/augment.py --threads 2 --json

Each time is the median of the repeats; on a machine that does other work, compare rows of one run.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image

from vitrail.data.augment import Augment, AugmentConfig, view
from vitrail.data.mix import mix
from vitrail.data.preprocess import Preprocess

OFF = AugmentConfig.off()
DEIT = AugmentConfig(policy="randaugment", erase=0.25)
POLICIES = {
    "flip": AugmentConfig(),
    "shift, flip": AugmentConfig(shift=4),
    "randaugment": AugmentConfig(hflip=0, policy="randaugment"),
    "randaugment, flip, erase": DEIT,
    "trivial, flip": AugmentConfig(policy="trivial"),
    "three, jitter, flip": AugmentConfig(policy="three", jitter=0.3),
}


class Row(NamedTuple):
    what: str
    images: int
    milliseconds: float

    @property
    def rate(self) -> float:
        return self.images / self.milliseconds * 1000


def picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def measure(what: str, images: int, call: Callable[[], object], repeats: int) -> Row:
    call()
    times = []
    for _ in range(repeats):
        start = perf_counter()
        call()
        times.append(perf_counter() - start)
    return Row(what, images, median(times) * 1000)


def views(repeats: int) -> list[Row]:
    rows = []
    for (h, w), size, mode in (
        ((128, 128), 112, "RGB"),
        ((375, 500), 224, "RGB"),
        ((3000, 4000), 224, "RGB"),
        ((28, 28), 28, "L"),
    ):
        image = picture(h, w, mode)
        channels = len(mode)
        preprocess = Preprocess(size=(size, size), mean=(0.5,) * channels, std=(0.5,) * channels)
        box = (w / 8, h / 8, 7 * w / 8, 7 * h / 8)
        pillow = lambda: image.resize((size, size), Image.Resampling.BICUBIC, box)  # noqa: E731, B023
        train = lambda: view(image, preprocess, AugmentConfig(), seed=0, epoch=0, index=1)  # noqa: E731, B023
        ...
    return rows
