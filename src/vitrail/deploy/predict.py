"""A trained run as a function from images to answers."""

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vitrail.data.batches.batch import Batch
from vitrail.data.pixels.decode import AnyPicture, read_image
from vitrail.runs.load import load
from vitrail.tasks.tta import looks


class Predictor:
    """Images in, answers out, with the preprocessing that the model was measured with.

    `Predictor("runs/x")("cat.jpg").label`

    An answer is what the run's task gives:

    - classify: a `Prediction`: `label`, `probability`, and `probabilities` by class
    - segment: a `Segmentation`: `mask`, the class of each pixel at the image's own size (upright),
      as an index into `names`; and `shares`, how much of the image each class has
    - detect: `Detections`: `boxes`, (left, top, right, bottom) in the image's own pixels (upright),
      with their `labels`, indices into `names`, and `scores`, the best first
    - mocov3: an `Embedding`: `features`, a vector of length 1; the product of two is how alike the
      images are

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
        loaded = load(run, checkpoint, tokens, tta)
        self.task = loaded.task
        self.preprocess = loaded.preprocess

    @property
    def model(self) -> Any:
        """What the run has learned."""
        return self.task.model

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes, in the model's order; of mocov3 those by which it was measured."""
        return self.task.targets.names

    def __call__(self, picture: AnyPicture) -> Any:
        """Ask about one image.

        Raises `UnreadableImage` (a `DataError`) for a damaged file, and `UsageError`, with what to
        give, for what is no picture.
        """
        return self.many([picture])[0]

    def many(self, pictures: Iterable[AnyPicture], batch_size: int = 32) -> list[Any]:
        """Ask about images in batches, in their order; one by one where each is seen at its own
        size, in tiles. Raises as a call does.
        """
        if self.preprocess.alone:
            batch_size = 1
        answers: list[Any] = []
        waiting = iter(pictures)
        while some := [read_image(picture) for picture in islice(waiting, batch_size)]:
            answers += self._answer(some)
        return answers

    @torch.inference_mode()
    def _answer(self, images: Sequence[Image.Image]) -> list[Any]:
        views = [torch.from_numpy(self.preprocess.view(image)) for image in images]
        canvas = self.preprocess.collate(views)
        shown = canvas._replace(images=self.preprocess.normalise(canvas.images))
        seen = [self.preprocess.seen(image.height, image.width) for image in images]
        return self.task.answer(Batch((shown,), {}, np.arange(len(images))), seen)
