"""Images found by words or by an image: an index of their vectors, on the disk, built once.

An index follows from the model, from how it is shown images, and from every image by key and
stamp: the SHA-256 of all that is its name in the user's cache, so that it is never stale, and
building it again is all that is lost where the cache is emptied.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from vitrail.data import Source
from vitrail.data.batches.loader import EvalLoader
from vitrail.data.names import text_line
from vitrail.data.pixels.decode import read_image
from vitrail.data.sources.kept import keep, kept_place, read_kept
from vitrail.data.views.canvas import canvas_of
from vitrail.errors import DataError, UsageError, setting
from vitrail.runs.load import LoadedRun
from vitrail.runs.world import ALONE
from vitrail.tasks import Pair

_FORMAT = "vitrail search 1"


class Hit(NamedTuple):
    """An image that was found."""

    key: str
    score: float
    """The cosine, 1 at most."""


class Index(NamedTuple):
    """The vectors of images, of length 1."""

    keys: tuple[str, ...]
    vectors: Float32[np.ndarray, "n d"]
    skipped: dict[str, str]
    """Key and reason of images that cannot be read."""
    built: bool
    """Whether that was now; else it was on the disk."""

    def nearest(self, query: Float32[np.ndarray, " d"], top: int) -> list[Hit]:
        """The `top` images that are most like a vector, the best first."""
        alike = self.vectors @ query
        order = np.argsort(-alike, kind="stable")[:top]
        return [Hit(self.keys[i], float(alike[i])) for i in order]


class Searcher:
    """A run that gives vectors, and what it finds by them."""

    def __init__(self, loaded: LoadedRun) -> None:
        """Raises `UsageError` for a run whose answers are no vectors."""
        if loaded.task.reading.kind != "features":
            raise UsageError(
                f"{loaded.run.path} has learned to {loaded.config.task}: to search takes a run "
                f"that gives vectors, of {setting('task')} clip, siglip or lit for words, or of "
                f"one without labels for images"
            )
        self.loaded = loaded
        self.device = ALONE.device(loaded.config.device)
        self.task = loaded.task.to(self.device)

    def words(self, text: str) -> Float32[np.ndarray, " d"]:
        """The vector of a text. Raises `UsageError` where the run knows none, or there is none."""
        if not isinstance(self.task, Pair):
            raise UsageError(
                f"{self.loaded.run.path} has learned from images alone, and knows no words: search "
                f"by an image file"
            )
        line = text_line(text)
        if not line:
            raise UsageError("search for what? The words are empty")
        return self.task.embedded([line])[0].float().numpy()

    @torch.inference_mode()
    def image(self, picture: Path) -> Float32[np.ndarray, " d"]:
        """The vector of an image. Raises `UnreadableImage` for what is none."""
        view = self.loaded.preprocess.view(read_image(picture))
        shown = canvas_of(self.loaded.preprocess, [view])
        extent = None if shown.extent is None else shown.extent.to(self.device)
        return self._vectors(shown.images.to(self.device), extent)[0]

    def index(self, source: Source, tell: Callable[[int], None] = lambda images: None) -> Index:
        """Of all images of a source; `tell` is told how many have been looked at. Raises
        `DataError` where none can be read.
        """
        file = kept_place("search", self._key(source))
        if known := read_kept(file):
            keys, skipped = known.about
            return Index(tuple(keys), known.arrays["vectors"], skipped, built=False)
        loader = EvalLoader(
            source,
            self.loaded.preprocess,
            batch_size=1 if self.loaded.preprocess.alone else 64,
            workers=self.loaded.config.data.workers,
            device=self.device,
            reading=self.loaded.config.data.reading(),
        )
        parts, keys = [], list[str]()
        with torch.inference_mode():
            for batch in loader:
                if len(batch.indices):
                    parts.append(self._vectors(*batch.views[0]))
                    keys += [source.key(int(i)) for i in batch.indices]
                tell(len(keys))
        if not parts:
            raise DataError(f"none of the {len(source)} images can be read")
        vectors, skipped = np.concatenate(parts), dict(loader.skipped)
        keep(file, {"vectors": vectors}, (keys, skipped))
        return Index(tuple(keys), vectors, skipped, built=True)

    def _vectors(self, images: Tensor, extent: Tensor | None) -> Float[np.ndarray, "b d"]:
        return self.task.outputs(images, extent)["features"].float().cpu().numpy()

    def _key(self, source: Source) -> str:
        facts = [_FORMAT, self.loaded.sha256, self.loaded.preprocess.to_dict()]
        digest = hashlib.sha256(json.dumps(facts).encode())
        for i in range(len(source)):
            digest.update(json.dumps([source.key(i), source.stamp(i)]).encode())
        return digest.hexdigest()
