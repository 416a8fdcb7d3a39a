"""A trained run, or an exported model, as a function from images to answers."""

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import UInt8

from vitrail.data.pixels.decode import AnyPicture, read_image
from vitrail.data.views.preprocess import Preprocess
from vitrail.data.views.seen import Seen
from vitrail.deploy.bundle import Bundle, is_bundle
from vitrail.deploy.engines import USUAL, engine_of
from vitrail.deploy.tuning import tuned
from vitrail.errors import UsageError, setting
from vitrail.tasks.answers import Reading


class Shown(NamedTuple):
    """What a model is shown of one image."""

    pixels: UInt8[np.ndarray, "c h w"]
    seen: Seen
    """How they lie in the image."""


class Asked(Protocol):
    """A model that answers: a run's, or a bundle's."""

    preprocess: Preprocess
    reading: Reading
    coupled: bool
    card: dict[str, Any]
    threshold: float | None
    """Of boxes: the score that gave the best F1 on the held-out images."""

    def answers(self, shown: Sequence[Shown]) -> list[Any]:
        """What is known of each image, all looked at together."""
        ...


class Bundled:
    """A bundle's model, in its runtime."""

    def __init__(self, folder: Path | str, many: bool = False) -> None:
        bundle = Bundle.open(folder)
        self._engine = engine_of(bundle, tuned(bundle).many if many else USUAL)
        self.preprocess, self.reading = bundle.preprocess, bundle.reading
        self.coupled, self.card = bundle.coupled, bundle.card
        self.threshold = bundle.threshold

    def answers(self, shown: Sequence[Shown]) -> list[Any]:
        views, seen = [one.pixels for one in shown], [one.seen for one in shown]
        return self.reading.answers(self._engine.run, views, seen)


class Predictor:
    """Images in, answers out, with the preprocessing that the model was measured with.

    `Predictor("runs/x")("cat.jpg").label`

    An answer is what the task gives:

    - classify: a `Prediction`: `label`, `probability`, and `probabilities` by class
    - segment: a `Segmentation`: `mask`, the class of each pixel at the image's own size (upright),
      as an index into `names`; and `shares`, how much of the image each class has
    - detect: `Detections`: `boxes`, (left, top, right, bottom) in the image's own pixels (upright),
      with their `labels`, indices into `names`, and `scores`, the best first
    - without labels (mocov3, dino, ...), and clip, siglip and lit: an `Embedding`: `features`, a
      vector of length 1; the product of two is how alike the images are. With `labels`, of the
      last three: a `Prediction`

    A picture is a path, a file's bytes, a file opened with 'rb', an image of Pillow's in any mode,
    or an array of pixels, rows first (uint8, RGB where it has colours): `read_image` says it all.
    The same picture gives the same answer, whichever of them it is: transparency lies on white,
    EXIF's orientation is applied, and deep greys are scaled as they were for training.

    Threads may share one. A bundle needs its runtime, and no torch.
    """

    def __init__(
        self,
        place: Path | str,
        checkpoint: str | None = None,
        tta: str = "none",
        tokens: str | None = None,
        *,
        many: bool = False,
        labels: Sequence[str] = (),
        templates: Sequence[str] = ("{}",),
    ) -> None:
        """`place`: the folder of a run, or of a bundle that `vitrail export` wrote. `many`: that a
        bundle will be asked about many images at once, so that it is worth some seconds to measure
        how this machine does that best (vitrail.deploy.tuning). Of a run:

        `checkpoint`: last or best; the default is the one that the run's report judges.
        `tta`: what several looks at an image are averaged, a name in `vitrail.tasks.tta.LOOKS`.
        `tokens`: with how many fewer of them, `tome:r=13` for instance.
        `labels`: of a run that learned from images and texts, classes in words, which it then tells
        apart; `templates` are sentences around them, `{}`.

        Raises `DataError` for what is neither, or is damaged; `UsageError` where a bundle is asked
        for what was settled when it was made.
        """
        self._model: Asked
        if is_bundle(place):
            told: dict[str, Any] = {"checkpoint": checkpoint, "labels": labels or None}
            told["tta"] = None if tta == "none" else tta
            for name, value in (told | {"tokens": tokens}).items():
                if value is not None:
                    raise UsageError(
                        f"{setting(name, value)} is for runs, and {place} was exported: it is as "
                        f"it was made"
                    )
            self._model = Bundled(place, many)
        else:
            from vitrail.deploy.running import Running  # with torch, which a bundle does without

            self._model = Running(place, checkpoint, tta, tokens, labels, templates)
        self.preprocess = self._model.preprocess

    @property
    def kind(self) -> str:
        """Of the answers: classify, segment, detect or features."""
        return self._model.reading.kind

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes, in the model's order; of features those they were measured by."""
        return self._model.reading.names

    @property
    def coupled(self) -> bool:
        """Whether what is said of an image depends on those that are asked about with it."""
        return self._model.coupled

    @property
    def card(self) -> dict[str, Any]:
        """What the model is, in plain values: task, classes, engine, precision, metrics."""
        return self._model.card

    @property
    def threshold(self) -> float | None:
        """Of boxes: the score that gave the best F1 on the held-out images, where any did."""
        return self._model.threshold

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
        while some := [self.show(picture) for picture in islice(waiting, batch_size)]:
            answers += self.answers(some)
        return answers

    def show(self, picture: AnyPicture) -> Shown:
        """What the model is shown of an image. Raises as a call does."""
        image = read_image(picture)
        seen = self.preprocess.seen(image.height, image.width)
        return Shown(self.preprocess.view(image), seen)

    def answers(self, shown: Sequence[Shown]) -> list[Any]:
        """Of images that are shown at once."""
        return self._model.answers(shown)
