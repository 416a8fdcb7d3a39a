"""Noise, as colours and as black and white only: of all pictures the worst to resize. And the views
that Pillow and torch make of it.
"""

import numpy as np
import torch
from PIL import Image

from vitrail.data.views.preprocess import Preprocess
from vitrail.deploy.export.resize import Resize

VIEW = (32, 48)
EXTREME = [(1, 1), (1, 3000), (3000, 2), (33, 48), (32, 49), VIEW, (64, 96), (900, 1200), (7, 5)]
"""(height, width)."""


def noise(height: int, width: int, channels: int = 3, images: int = 1) -> np.ndarray:
    pixels = np.random.default_rng([height, width]).integers(
        0, 256, (images, height, width, channels), dtype=np.uint8
    )
    return np.where((height + width) % 2, pixels, pixels // 128 * np.uint8(255))


def as_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def off(preprocess: Preprocess, images: np.ndarray, views: np.ndarray) -> np.ndarray:
    """Levels between these views and Pillow's."""
    wanted = np.stack([preprocess.view(as_image(image)) for image in images])
    assert views.dtype == np.uint8 and views.shape == wanted.shape
    return np.abs(views.astype(np.int64) - wanted)


def in_torch(preprocess: Preprocess, images: np.ndarray) -> np.ndarray:
    return Resize(preprocess)(torch.from_numpy(images)).numpy()
