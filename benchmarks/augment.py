"""What augmentation costs: the view of one image, and the batched part, in images a second.

    python benchmarks/augment.py --threads 2 --json

The rate is that of the median of the repeats; beside it the best, which a machine that does other
work spoils less. The rows "Pillow's resize alone" are the limit for the views.
"""

import argparse
import json
import platform
from collections.abc import Callable, Iterator
from itertools import count
from statistics import median
from time import perf_counter
from typing import NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image

from vitrail.data.views import canvas
from vitrail.data.views.augment import Augment, AugmentConfig, view_of
from vitrail.data.views.mix import mix
from vitrail.data.views.preprocess import Preprocess

OFF = AugmentConfig.off()
CONFIGS = {
    "hflip": AugmentConfig(),
    "shift 4, hflip": AugmentConfig(shift=4),
    "randaugment": AugmentConfig(hflip=0.0, policy="randaugment"),
    "randaugment, hflip, erase": AugmentConfig(policy="randaugment", erase=0.25),
    "trivial, hflip": AugmentConfig(policy="trivial"),
    "three, jitter, hflip": AugmentConfig(policy="three", jitter=0.3),
    "mixup or cutmix": AugmentConfig(mixup=0.8, cutmix=1.0),
}


class Row(NamedTuple):
    """Times of one call for so many images."""

    what: str
    images: int
    milliseconds: float
    best: float

    @property
    def rate(self) -> float:
        return self.images / self.milliseconds * 1000


def measure(what: str, images: int, repeats: int, call: Callable[[], object]) -> Row:
    call()
    times = []
    for _ in range(repeats):
        start = perf_counter()
        call()
        times.append(perf_counter() - start)
    return Row(what, images, median(times) * 1000, min(times) * 1000)


def picture(height: int, width: int, mode: str) -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def preprocess_of(size: int, channels: int) -> Preprocess:
    return Preprocess(size=(size, size), mean=(0.5,) * channels, std=(0.5,) * channels)


def views(side: tuple[int, int], size: int, mode: str, repeats: int) -> Iterator[Row]:
    """The views of one image, and the resize that they cannot be faster than."""
    (h, w), number = side, count()
    image, preprocess = picture(h, w, mode), preprocess_of(size, len(mode))
    # The mean area and ratio of the random crops.
    cut = ((1 - 0.54**0.5) / 2, (1 + 0.54**0.5) / 2)
    box = (cut[0] * w, cut[0] * h, cut[1] * w, cut[1] * h)
    title = f"{h}x{w} {mode} to {size}"

    def resize() -> object:
        return image.resize((size, size), Image.Resampling.BICUBIC, box)

    def train() -> object:
        return view_of(image, preprocess, AugmentConfig(), seed=0, epoch=0, index=next(number))

    yield measure(f"{title}: Pillow's resize alone", 1, repeats, resize)
    yield measure(f"{title}: training view", 1, repeats, train)
    yield measure(f"{title}: evaluation view", 1, repeats, lambda: preprocess.view(image))


def batches(b: int, channels: int, size: int, repeats: int) -> Iterator[Row]:
    """Each config on a batch, and the step to float32."""
    image = torch.from_numpy(preprocess_of(size, 3).view(picture(size, size, "RGB")))
    images = image[:channels].repeat(b, 1, 1, 1)
    floats = canvas.normalise(preprocess_of(size, channels), images)
    targets = torch.eye(10)[torch.arange(b) % 10]
    indices, epoch = np.arange(b), count()
    title = f"{b} x {channels}x{size}x{size}"
    for name, config in CONFIGS.items():
        augment = Augment(config, 0, (size, size))

        def call(augment: Augment = augment, config: AugmentConfig = config) -> object:
            if config.mixes:
                return mix(floats, targets, indices, config, seed=0, epoch=next(epoch))
            return augment(images, indices, next(epoch))

        yield measure(f"{title}: {name}", b, repeats, call)
    normalise = preprocess_of(size, channels).normalise
    yield measure(f"{title}: normalise", b, repeats, lambda: normalise(images))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    n = arguments.repeats
    rows = [
        *views((128, 128), 112, "RGB", 4 * n),
        *views((375, 500), 224, "RGB", 4 * n),
        *views((3000, 4000), 224, "RGB", max(1, n // 5)),
        *views((28, 28), 28, "L", 4 * n),
        *batches(64, 3, 112, n),
        *batches(64, 3, 224, n),
        *batches(256, 1, 28, n),
    ]
    for row in rows:
        print(
            f"{row.what:48} {row.milliseconds:8.3f} ms (best {row.best:8.3f}) "
            f"{row.rate:9,.0f} images/s"
        )
    if arguments.json:
        machine = {
            "threads": arguments.threads,
            "processor": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pillow": PIL.__version__,
        }
        results = [{**row._asdict(), "rate": row.rate} for row in rows]
        print(json.dumps({"machine": machine, "rows": results}))


if __name__ == "__main__":
    main()
