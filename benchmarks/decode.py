"""One core from JPEG files to training batches: images a second, against decoding alone.

    python benchmarks/decode.py --json

The files are real photographs, of scikit-image and scikit-learn, scaled to 500 pixels on the longer
side: at quality 90 (55 kB), and at 97 (100 kB, about what ImageNet's files have). A third set, 4000
pixels wide, shows what reducing while decoding is worth. Everything runs in one thread, through the
loader, without a cache; the parts take turns, round by round, and the median of the rounds
counts: of processor time, which a busy machine spoils less.

The table is complete: each way to make batches stands against each way to decode alone. "views"
are decoded, cropped, scaled and augmented, as bytes; "batches" have in addition become normalised
floats, which is memory's work.
"""

import argparse
import json
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import numpy as np
import PIL
import skimage.data
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from vitrail.data import read_image
from vitrail.data.batches.loader import Reading, TrainLoader
from vitrail.data.batches.making import Wanted
from vitrail.data.pixels import decode
from vitrail.data.pixels.decode import read_pixels
from vitrail.data.targets import Nothing
from vitrail.data.views.augment import AugmentConfig
from vitrail.data.views.preprocess import Preprocess
from vitrail.runs.machine import keep_freed_memory

SIZE = (224, 224)
BATCH = 64
SETS = ((500, 90, 6), (500, 97, 6), (4000, 90, 1))
"""Longer side, quality, and how often each photograph is there."""
AUGMENTS = {
    "crop, flip": AugmentConfig(),
    "crop, flip, randaugment": AugmentConfig(policy="randaugment"),
}


def photographs() -> list[Image.Image]:
    """Of people, animals, things, streets, space and tissue."""
    names = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry")
    arrays = [getattr(skimage.data, name)() for name in (*names, "retina", "rocket")]
    stereo = skimage.data.stereo_motorcycle()
    return [
        Image.fromarray(array) for array in (*arrays, *stereo[:2], *load_sample_images().images)
    ]


class Photographs:
    """JPEG files of so many pixels on the longer side."""

    def __init__(self, folder: Path, side: int, quality: int, copies: int) -> None:
        self.files = []
        for number, image in enumerate(photographs()):
            scale = side / max(image.size)
            size = round(image.width * scale), round(image.height * scale)
            file = folder / f"{side}-{quality}-{number}.jpg"
            image.resize(size, Image.Resampling.LANCZOS).save(file, quality=quality)
            self.files.append(file)
        self.files *= copies
        self.targets = Nothing(len(self.files))

    def __len__(self) -> int:
        return len(self.files)

    def key(self, i: int) -> str:
        return f"{i} {self.files[i].name}"

    def load(self, i: int) -> Image.Image:
        return read_image(self.files[i])

    def stamp(self, i: int) -> str:
        return ""

    def encoded(self, i: int) -> Path:
        return self.files[i]


Part = Callable[[], int]
"""Does its work once, and says for how many images."""


def alone(source: Photographs, read: Callable[[Path], object]) -> Part:
    def part() -> int:
        for file in source.files:
            read(file)
        return len(source)

    return part


def loader_of(source: Photographs, augment: AugmentConfig, how: Any, batch: int) -> TrainLoader:
    return TrainLoader(
        source, Preprocess(size=SIZE), augment, batch_size=batch, seed=0, workers=1,
        reading=Reading(decoders="threads", cache="none", decode=how),
    )  # fmt: skip


def batches(source: Photographs, augment: AugmentConfig, how: Any, batch: int) -> Part:
    loader, epochs = loader_of(source, augment, how, batch), count()

    def part() -> int:
        return sum(len(batch.indices) for batch in loader.epoch(next(epochs)))

    return part


def views(source: Photographs, augment: AugmentConfig, how: Any, batch: int) -> Part:
    """What `batches` does before its last step, in the same thread."""
    loader, epochs = loader_of(source, augment, how, batch), count()
    shelf, maker = loader._shelf, loader._maker

    def part() -> int:
        epoch = next(epochs)
        for start in range(0, len(source), batch):
            indices = np.arange(start, min(start + batch, len(source)))
            pictures = (shelf.picture(source, i, lambda: False) for i in indices.tolist())
            wanted = Wanted(source, indices, indices, epoch)
            made = maker._some(wanted, np.arange(len(indices)), pictures, print)
            shown = [image.views[0] for image in made if image is not None]
            maker._augmented(maker.augments[0], shown, indices, epoch)
        return len(source)

    return part


def with_pillow(part: Part) -> Part:
    """As on a machine without simplejpeg."""

    def without() -> int:
        before, decode.simplejpeg = decode.simplejpeg, None
        try:
            return part()
        finally:
            decode.simplejpeg = before

    return without


def parts(source: Photographs, batch: int) -> Iterator[tuple[str, Part]]:
    yield "decoding alone: Pillow", alone(source, read_image)
    yield "decoding alone: simplejpeg", alone(source, read_pixels)
    shown = alone(source, lambda file: read_pixels(file, shown=SIZE, fast=True))
    yield "decoding alone: fast", shown
    for how in ("exact", "fast"):
        for name, augment in AUGMENTS.items():
            yield f"views, {how}: {name}", views(source, augment, how, batch)
            yield f"batches, {how}: {name}", batches(source, augment, how, batch)
    fast = batches(source, AUGMENTS["crop, flip"], "fast", batch)
    yield "batches, fast: crop, flip, without simplejpeg", with_pillow(fast)


def measured(parts: Sequence[tuple[str, Part]], rounds: int) -> dict[str, float]:
    """Images per second of processor time."""
    seconds: dict[str, list[float]] = {name: [] for name, _ in parts}
    for number in range(rounds + 1):
        for name, part in parts:
            started = process_time()
            images = part()
            if number:  # the first round warms up
                seconds[name].append((process_time() - started) / images)
    return {name: 1 / median(times) for name, times in seconds.items()}


def differences(source: Photographs) -> dict[str, dict[str, float]]:
    """In grey levels of 255: fast against exact, of the decoded image and of the training view."""
    found: dict[str, list[tuple[float, float]]] = {"decoded": [], "view": []}
    for file in dict.fromkeys(source.files):
        exact, fast = (
            Image.fromarray(read_pixels(file, shown=SIZE, fast=fast)) for fast in (False, True)
        )
        if fast.size != exact.size:  # reduced by a power of two, not by the factor itself
            fast = fast.resize(exact.size, Image.Resampling.BOX)
        off = np.abs(np.asarray(exact, np.int16) - np.asarray(fast, np.int16))
        found["decoded"].append((float(off.mean()), float(off.max())))
    loaders = [
        TrainLoader(
            source, Preprocess(size=SIZE), AugmentConfig(), batch_size=1, seed=0,
            reading=Reading(decoders="threads", decode=how),
        )
        for how in ("exact", "fast")
    ]  # fmt: skip
    for one, other in zip(*(loader.epoch(0) for loader in loaders), strict=True):
        levels = (one.images - other.images).abs() * 127.5
        found["view"].append((levels.mean().item(), levels.max().item()))
    return {
        name: {"mean": float(np.mean([m for m, _ in pairs])), "max": max(m for _, m in pairs)}
        for name, pairs in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as every run does
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for side, quality, copies in SETS:
            source = Photographs(Path(folder), side, quality, copies)
            rounds = arguments.rounds if side == 500 else max(2, arguments.rounds // 3)
            rates = measured(list(parts(source, min(BATCH, len(source)))), rounds)
            off = differences(source)
            kilobytes = sum(file.stat().st_size for file in source.files) / len(source) / 1000
            print(
                f"{side} pixels, quality {quality}, {kilobytes:.0f} kB an image; images/s, against"
            )
            references = [name for name in rates if name.startswith("decoding alone")]
            for name, rate in rates.items():
                shares = "".join(f"{rate / rates[other]:12.0%}" for other in references)
                print(f"  {name:46} {rate:8.1f} {shares}")
            for name, values in off.items():
                print(f"  fast against exact, {name}: {values['mean']:.2f} of 255 on average")
            shares_of = {
                name: {other: round(rate / rates[other], 3) for other in references}
                for name, rate in rates.items()
                if name not in references
            }
            results[f"{side}, quality {quality}"] = {
                "kilobytes": kilobytes,
                "images_per_second": rates,
                "of_decoding_alone": shares_of,
                "fast_against_exact": off,
            }
    if arguments.json:
        machine = {
            "processor": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pillow": PIL.__version__,
            "simplejpeg": getattr(decode.simplejpeg, "__version__", None),
        }
        print(json.dumps({"machine": machine, "sets": results}))


if __name__ == "__main__":
    main()
