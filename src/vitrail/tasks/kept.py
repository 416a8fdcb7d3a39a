"""What a frozen model says of images, computed once for each view of one."""

from collections.abc import Callable

import torch
from torch import Tensor

from vitrail.data.batches.batch import Batch


class KeptMaps:
    """What a backbone or a teacher that does not learn says of views that come again, in memory.

    Each image is computed alone, so that what is kept does not depend on which others were in its
    batch: a run that goes on finds the same numbers.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    def __len__(self) -> int:
        """How many views are known."""
        return len(self._kept)

    def of(self, say: Callable[[Batch], tuple[Tensor, ...]], batch: Batch) -> tuple[Tensor, ...]:
        """What is said of a batch, a row an image in each tensor, on the batch's device."""
        if not len(batch.indices):  # a blank one, where a process has none to compute
            return say(batch)
        rows = []
        for i, index in enumerate(batch.indices.tolist()):
            key = (batch.epoch, index)
            if key not in self._kept:
                with torch.no_grad():
                    found = say(batch.rows(slice(i, i + 1)))
                self._kept[key] = tuple(each[0].cpu() for each in found)
            rows.append(self._kept[key])
        return tuple(torch.stack(maps).to(batch.images.device) for maps in zip(*rows, strict=True))
