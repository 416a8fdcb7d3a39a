"""A trained run as a function from images to labels."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from vitrail.data.pixels.decode import AnyPicture, read_image
from vitrail.runs.load import load
from vitrail.tasks.tta import looks, probabilities


class Prediction(NamedTuple):
    """What a model says of one image."""

    label: str
    """The likeliest class."""
    probability: float
    probabilities: dict[str, float]
    """Every class, likeliest first. With several labels an image they do not add up to 1."""


class Predictor:
    """Images in, labels out, with the preprocessing that the model was measured with.

    `Predictor("runs/x")("cat.jpg").label`

    A picture is a path, a file's bytes, a file opened with 'rb', an image of Pillow's in any mode,
    or an array of pixels, rows first (uint8, RGB where it has colours): `read_image` says it all.
    The same picture gives the same answer, whichever of them it is: transparency lies on white,
    EXIF's orientation is applied, and deep greys are scaled as they were for training.
    """

    def __init__(
        self,
        run: Path | str,
        checkpoint: str | None = None,
        tta: str = "none",
        tokens: str | None = None,
    ) -> None:
        """`checkpoint`: last or best; the default is the one that the run's report judges.

        `tta`: what several looks at an image are averaged, a name in `vitrail.tasks.tta.LOOKS`.
        `tokens`: with how many fewer of them, `tome:r=13` for instance.
        """
        looks(tta)  # so that a wrong name is told at once
        loaded = load(run, checkpoint, tokens)
        self.model = loaded.model
        self.classes: Sequence[str] = loaded.classes
        self.preprocess = loaded.preprocess
        self.multi_label = loaded.multi_label
        self.tta = tta

    def __call__(self, picture: AnyPicture) -> Prediction:
        """Predict one image. Raises `UnreadableImage` (a `DataError`) for a damaged file, and
        `UsageError`, with what to give, for what is no picture.
        """
        return self.many([picture])[0]

    def many(self, pictures: Iterable[AnyPicture], batch_size: int = 32) -> list[Prediction]:
        """Predict images in batches, in their order. Raises as a call does."""
        predictions: list[Prediction] = []
        batch: list[torch.Tensor] = []
        for picture in pictures:
            batch.append(torch.from_numpy(self.preprocess.view(read_image(picture))))
            if len(batch) == batch_size:
                predictions += self._predict(batch)
                batch = []
        return predictions + (self._predict(batch) if batch else [])

    @torch.inference_mode()
    def _predict(self, batch: list[torch.Tensor]) -> list[Prediction]:
        images, extent = self.preprocess.collate(batch)
        images = self.preprocess.normalise(images)
        rows = probabilities(self.model, images, extent, multi_label=self.multi_label, tta=self.tta)
        found = []
        for row in rows.tolist():
            ranked = dict(sorted(zip(self.classes, row, strict=True), key=lambda pair: -pair[1]))
            label = next(iter(ranked))
            found.append(Prediction(label, ranked[label], ranked))
        return found
