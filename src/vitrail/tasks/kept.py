"""What a frozen model says of images, computed once: maps for each view, vectors for each image.


On the disk a file's name is the SHA-256 of all that its content follows from, so nothing in the
cache is ever stale, and it may be emptied at any time.
"""

import hashlib
import json
from collections.abc import Callable, Collection
from dataclasses import asdict

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitrail.data.batches.batch import Batch
from vitrail.data.batches.loader import EvalLoader
from vitrail.data.sources.kept import keep, kept_place, read_kept
from vitrail.data.sources.source import Source
from vitrail.data.views.preprocess import Preprocess
from vitrail.errors import DataError
from vitrail.models import Model


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


class KeptVectors:
    """The pooled vectors of all images to learn from, by a model that does not learn.

    All copies of a task have the same one.
    """

    def __init__(self, loader: Callable[[torch.device], EvalLoader]) -> None:
        """`loader`: of the images as they are measured, for a model on a device."""
        self._loader = loader
        self._values = torch.empty(0, 0)
        self._rows = np.empty(0, np.int64)

    def __deepcopy__(self, memo: object) -> "KeptVectors":
        return self

    @property
    def looked(self) -> bool:
        """Whether the images have been looked at."""
        return len(self._rows) > 0

    @property
    def known(self) -> Bool[np.ndarray, " n"]:
        """Which images could be read."""
        return self._rows >= 0

    def look(
        self, model: Model, device: torch.device, notify: Callable[[str], None]
    ) -> dict[str, str]:
        """Look at every image, or read what another run has seen; key and reason of those that
        cannot be read. Raises `DataError` where none can.
        """
        loader = self._loader(device)
        key = key_of(model, loader.preprocess, loader.source, ("vectors 1", str(device.type)))
        file = kept_place("features", key)
        if known := read_kept(file):
            self._values = torch.from_numpy(known.arrays["values"])
            indices, skipped = known.arrays["indices"], dict(known.about)
        else:
            notify(f"the image tower is locked: it looks at {len(loader.source):,} images, once")
            parts, places = [], []
            was = model.training
            model.eval()
            with torch.no_grad():
                for batch in loader:
                    parts.append(model(*batch.views[0]).float().cpu())
                    places.append(batch.indices)
            model.train(was)
            if not parts:
                raise DataError(f"none of the {len(loader.source)} images can be read")
            self._values, indices = torch.cat(parts), np.concatenate(places)
            skipped = dict(loader.skipped)
            keep(file, {"values": self._values.numpy(), "indices": indices}, skipped)
        self._rows = np.full(len(loader.source), -1)
        self._rows[indices] = np.arange(len(indices))
        return skipped

    def of(self, batch: Batch) -> Float[Tensor, "b d"]:
        """Those of a batch, on the CPU; of what cannot be read, another's."""
        assert self.looked, "a locked tower looks at its images before the first step"
        return self._values[self._rows[batch.indices].clip(min=0)]


def key_of(
    model: Model,
    preprocess: Preprocess,
    source: Source,
    facts: Collection[object],
    without: Collection[str] = (),
) -> str:
    """The SHA-256 of everything that what a model says of images follows from, but for the parts
    `without`.
    """
    digest = hashlib.sha256()
    # What acts in training only, or comes after the features, makes no other features.
    shape = asdict(model.config) | {"classes": 0, "dropout": 0.0, "drop_path": 0.0}
    digest.update(json.dumps([shape, preprocess.to_dict(), *facts]).encode())
    for name, tensor in model.state_dict().items():
        if name.split(".")[0] not in without:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
    for i in range(len(source)):
        digest.update(json.dumps([source.key(i), source.stamp(i)]).encode())
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
