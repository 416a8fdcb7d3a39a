"""What a task learns from and is measured on."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num
from torch import Tensor

from vitrail.data.views.canvas import Canvas


class Batch(NamedTuple):
    """Views of `b` images, and what is said of them."""

    views: tuple[Canvas, ...]
    """Normalised, on the device; each a way to look at the same images, in the same order."""
    targets: Mapping[str, Num[Tensor, "b ..."]]
    """By name: what `Targets.target` gives, on the device."""
    indices: Int[np.ndarray, " b"]
    """Which images of the source these are; of a stream, their numbers in it."""
    epoch: int = 0
    """For what a task draws itself: it is keyed by (seed, epoch, index)."""

    @property
    def images(self) -> Float[Tensor, "b c h w"]:
        """Those of the first view, which is the only one but where a task asks for more."""
        return self.views[0].images

    @property
    def extent(self) -> Int[Tensor, "b 2"] | None:
        """Of the first view: how many (rows, columns) of patches show each image, at the top left
        of its canvas; None: all of them, for the images are of one size.
        """
        return self.views[0].extent

    def rows(self, chosen: slice | Int[np.ndarray, " m"]) -> "Batch":
        """Some of the images, in any order."""
        return Batch(
            tuple(
                Canvas(images[chosen], None if extent is None else extent[chosen])
                for images, extent in self.views
            ),
            {name: values[chosen] for name, values in self.targets.items()},
            self.indices[chosen],
            self.epoch,
        )
