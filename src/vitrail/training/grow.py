"""Progressive resizing: a run begins with small images, which cost less, and ends with whole ones.

What a model learns first is coarse and can be learned from few pixels (progressive learning in
EfficientNetV2, arXiv 2104.00298, there with harder augmentation for larger images).
"""

from collections.abc import Iterable, Iterator

import torch.nn.functional as F

from vitrail.data.batches.batch import Batch
from vitrail.data.views.preprocess import Canvas

_GROWN = 0.7
"""The share of a run after which images are whole."""

Size = tuple[int, int]


def size_at(sizes: tuple[Size, ...], done: float) -> Size:
    """The size when `done` (0 to 1) of the run is done: all small ones as long, then the whole."""
    return sizes[min(int(done / _GROWN * (len(sizes) - 1)), len(sizes) - 1)]


def resized(batches: Iterable[Batch], size: Size) -> Iterator[Batch]:
    """The batches with images scaled to `size`, and blurred as they shrink."""
    for batch in batches:
        if batch.images.shape[-2:] == size or not len(batch.images):
            yield batch
            continue
        views = (F.interpolate(v.images, size, mode="bicubic", antialias=True) for v in batch.views)
        yield batch._replace(views=tuple(Canvas(images, None) for images in views))
