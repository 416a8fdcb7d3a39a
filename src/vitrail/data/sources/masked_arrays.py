"""Images and masks in memory as one data set."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from vitrail.data.sources.source import Arrays, LeftOut
from vitrail.data.targets.coding import Coding
from vitrail.data.targets.masks import MaskArrays, Masks
from vitrail.errors import DataError


class MaskedArrays(Arrays):
    """Images, uint8 `[h w]` or `[h w 3]`, and their masks `[h w]` of class indices; anything that
    is no index of `names` does not count. `part` is each image's index in PARTS.

    Raises DataError where their numbers or sizes differ.
    """

    def __init__(
        self,
        images: Sequence[UInt8[np.ndarray, "h w *c"]],
        masks: Sequence[np.ndarray],
        names: tuple[str, ...],
        part: UInt8[np.ndarray, " n"],
        prefix: str,
        *,
        left_out: tuple[LeftOut, ...] = (),
        notes: tuple[str, ...] = (),
    ) -> None:
        if not len(images) == len(masks) == len(part):
            raise DataError(
                f"{prefix} has {len(images)} images, {len(masks)} masks and parts of {len(part)}"
            )
        for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
            if image.shape[:2] != mask.shape:
                raise DataError(
                    f"{prefix}/{i}: the image is {image.shape[1]} x {image.shape[0]} pixels, its "
                    f"mask {mask.shape[1]} x {mask.shape[0]}"
                )
        self._images = images
        self._prefix = prefix
        coding = Coding({k: k for k in range(len(names))})
        self.targets = Masks(names, MaskArrays(masks, prefix), coding)
        self.part = part
        self.left_out = left_out
        self.notes = notes
