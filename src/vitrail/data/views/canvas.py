"""Views as a model takes them: normalised, and those of several sizes on one canvas."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64, Num, UInt8
from torch import Tensor

from vitrail.data.pixels.decode import AnyPicture, read_image
from vitrail.data.views.preprocess import Preprocess


class Canvas(NamedTuple):
    """Images of one size, or of several on a canvas, each at its top left."""

    images: Num[Tensor, "b c h w"]
    extent: Int64[Tensor, "b 2"] | None
    """How many (rows, columns) of patches show each image; None: all of them."""


def collate(views: Sequence[Num[Tensor, "c _h _w"]], patch: tuple[int, int]) -> Canvas:
    """A batch of images, which must be whole patches where their sizes differ.

    >>> collate([torch.zeros(3, 16, 48), torch.zeros(3, 32, 16)], patch=(16, 16)).extent
    tensor([[1, 3],
            [2, 1]])
    """
    sizes = [(view.shape[1], view.shape[2]) for view in views]
    if len(set(sizes)) == 1:
        return Canvas(torch.stack(list(views)), None)
    (height, width), first = (max(side) for side in zip(*sizes, strict=True)), views[0]
    images = first.new_zeros(len(views), first.shape[0], height, width)
    for place, view, (h, w) in zip(images, views, sizes, strict=True):
        place[:, :h, :w] = view
    extent = [(h // patch[0], w // patch[1]) for h, w in sizes]
    return Canvas(images, torch.tensor(extent, device=images.device))


def normalise(preprocess: Preprocess, x: Num[Tensor, "b c h w"]) -> Float32[Tensor, "b c h w"]:
    """Grey levels 0 to 255, uint8 or float, as (x / 255 - mean) / std."""
    x = x.to(torch.float32, copy=True)  # and the rest in place: a batch is large
    scale = x.new_tensor([1 / (255 * std) for std in preprocess.std])
    pairs = zip(preprocess.mean, preprocess.std, strict=True)
    shift = x.new_tensor([mean / std for mean, std in pairs])
    return x.mul_(scale[:, None, None]).sub_(shift[:, None, None])


def canvas_of(preprocess: Preprocess, views: Sequence[UInt8[np.ndarray, "c _h _w"]]) -> Canvas:
    """What `Preprocess.view` gives, as a model takes it."""
    canvas = collate([torch.from_numpy(view) for view in views], preprocess.patch)
    return canvas._replace(images=normalise(preprocess, canvas.images))


def input_of(preprocess: Preprocess, picture: AnyPicture) -> Float32[Tensor, "c h w"]:
    """The model's input for one picture: whatever `vitrail.data.read_image` takes."""
    return canvas_of(preprocess, [preprocess.view(read_image(picture))]).images[0]
