"""Training images that change their size while a run goes on, batch by batch.

- progressive resizing: a run begins with small images, which cost less, and ends with whole ones.
  What a model learns first is coarse and can be learned from few pixels (progressive learning in
  EfficientNetV2, arXiv 2104.00298, there with harder augmentation for larger images)
- multi-scale: each step has images of another size, so that objects are met at several (YOLOv2,
  arXiv 1612.08242; detectors scale whole batches on the device, as it is done here)

Boxes are scaled with their images. Masks are not, and are refused.
"""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.data import keyed
from vitrail.data.batches.batch import Batch
from vitrail.data.targets.targets import PADDING
from vitrail.data.views.canvas import Canvas

_GROWN = 0.7
"""The share of a run after which images are whole."""

Size = tuple[int, int]


def size_at(sizes: tuple[Size, ...], done: float) -> Size:
    """The size when `done` (0 to 1) of the run is done: all small ones as long, then the whole."""
    return sizes[min(int(done / _GROWN * (len(sizes) - 1)), len(sizes) - 1)]


def drawn_size(sizes: tuple[Size, ...], seed: int, epoch: int, batch: int) -> Size:
    """The size of the step that begins with batch `batch` of an epoch, in every process."""
    draw = float(keyed.uniform(seed, epoch, np.array([batch]), "size", 1)[0, 0])
    return sizes[int(draw * len(sizes))]


def resized(batches: Iterable[Batch], size: Size) -> Iterator[Batch]:
    """The batches with images scaled to `size`, and blurred as they shrink; boxes go with them."""
    for batch in batches:
        if batch.images.shape[-2:] == size or not len(batch.images):
            yield batch
            continue
        targets = _scaled(batch.targets, (batch.images.shape[2], batch.images.shape[3]), size)
        views = (F.interpolate(v.images, size, mode="bicubic", antialias=True) for v in batch.views)
        shown = tuple(Canvas(images, None) for images in views)
        yield batch._replace(views=shown, targets=targets)


def _scaled(targets: Mapping[str, Tensor], old: Size, new: Size) -> Mapping[str, Tensor]:
    """What lies in images of (height, width) pixels, after these were scaled."""
    assert "mask" not in targets, "masks have the size of their views"
    if "boxes" not in targets:
        return targets
    boxes = targets["boxes"]
    factors = boxes.new_tensor([new[1] / old[1], new[0] / old[0]]).repeat(2)
    padding = (targets["labels"] == PADDING)[..., None]
    return {**targets, "boxes": torch.where(padding, boxes, boxes * factors)}
