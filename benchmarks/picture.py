"""The picture of segmentation in the README: held-out emoji on drawn skies, and what a run says.

    python benchmarks/picture.py RUN docs/segment.jpg

RUN is one of `vitrail train samples:scenes`. The photographs of its scenes are not ours to show, so
the skies here are noise of several sizes; the run has seen neither them nor these emoji.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from vitrail import Predictor
from vitrail.data.sources.scenes import COUNTS, VERSION, SceneSource
from vitrail.deploy.answers import coloured

SIDE = 320
COLOURS = (((250, 214, 165), (60, 90, 150)), ((214, 234, 248), (40, 116, 166)))
"""Near the ground and high up."""
SHOWN, HEIGHT, GAP = 5, 180, 6


def sky(draw: np.random.Generator) -> np.ndarray:
    """Clouds: noise of four sizes, in two colours that change with the height."""
    clouds = np.zeros((SIDE, SIDE))
    for cells in (3, 6, 12, 40):
        noise = Image.fromarray(draw.random((cells, cells)).astype(np.float32))
        clouds += np.asarray(noise.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) / cells**0.6
    clouds = (clouds - clouds.min()) / np.ptp(clouds)
    low, high = np.array(COLOURS[draw.integers(len(COLOURS))], float)
    share = 0.6 * np.linspace(1, 0, SIDE)[:, None] + 0.4 * clouds
    pixels = low + (high - low) * share[..., None] + draw.normal(0, 3, (SIDE, SIDE, 1))
    return pixels.clip(0, 255).astype(np.uint8)


def row(pictures: list[np.ndarray]) -> np.ndarray:
    """Pictures of one height, side by side."""
    scaled = []
    for each in pictures:
        width = round(each.shape[1] * HEIGHT / each.shape[0])
        picture = Image.fromarray(each).resize((width, HEIGHT), Image.Resampling.LANCZOS)
        scaled += [np.asarray(picture), np.full((HEIGHT, GAP, 3), 255, np.uint8)]
    return np.concatenate(scaled[:-1], axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    draw = np.random.default_rng(asked.seed)
    predictor = Predictor(asked.run)
    with tempfile.TemporaryDirectory() as place:
        for part in COUNTS:
            skies = np.stack([sky(draw) for _ in range(12)])
            np.save(Path(place, f"photographs-{VERSION}-{part}.npy"), skies)
        source = SceneSource(Path(place), asked.seed)
        shown = [source.scene(COUNTS["train"] + i) for i in range(SHOWN)]
    images = [scene.image for scene in shown]
    answers = predictor.many(Image.fromarray(image) for image in images)
    overlays = [
        coloured(im, answer.mask, answer.names) for im, answer in zip(images, answers, strict=True)
    ]
    right = sum(int((a.mask == s.mask).sum()) for a, s in zip(answers, shown, strict=True))
    rows = [row(images), np.full((GAP, row(images).shape[1], 3), 255, np.uint8), row(overlays)]
    Image.fromarray(np.concatenate(rows)).save(asked.out, quality=85, optimize=True)
    print(f"{asked.out}: {right / sum(s.mask.size for s in shown):.1%} of the pixels are right")


if __name__ == "__main__":
    main()
