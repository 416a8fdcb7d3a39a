"""Classes that are told in words: a model of images and texts as a classifier that never learned.

A class is the vector of its words (`Pair.named`), and an image's likeness to each of them, scaled
as in training, becomes probabilities: by softmax, or of a model that learned by sigmoids, where
each pair was judged by itself, one by one.
"""

from collections.abc import Sequence

import torch

from vitrail.data.batches.batch import Batch
from vitrail.data.names import text_line
from vitrail.data.views.seen import Seen
from vitrail.errors import UsageError, setting
from vitrail.tasks.answers import AS_THEY_ARE, Prediction, Reading, read_classes
from vitrail.tasks.pair import Pair, check_templates
from vitrail.tasks.task import Task


class ZeroShot:
    """What `Predictor` asks of a run that is told its classes."""

    def __init__(
        self, task: Task, labels: Sequence[str], templates: Sequence[str] = AS_THEY_ARE
    ) -> None:
        """`templates` are sentences around a label, `{}`, of whose vectors the mean is taken.

        Raises `UsageError` for a task that knows no texts, and for labels that cannot be.
        """
        if not isinstance(task, Pair):
            raise UsageError(
                f"{setting('labels', *labels)} are for a run that has learned from images and "
                f"texts ({setting('task')} clip, siglip or lit): leave them out"
            )
        names = tuple(map(text_line, labels))
        if len(names) < 2 or not all(names):
            raise UsageError(
                f"{setting('labels')} are two or more, of which none is empty, not {list(labels)}"
            )
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise UsageError(f"{setting('labels')}: '{twice[0]}' is there twice")
        check_templates(templates)
        self._task = task
        self._vectors = task.named(names, templates)
        self.reading = Reading(kind="classify", names=names, several=task.model.bias is not None)

    @torch.no_grad()
    def answer(self, batch: Batch, seen: Sequence[Seen]) -> list[Prediction]:
        """Of each image every label, the likeliest first."""
        model = self._task.model
        images = model(*batch.views[0])
        logits = model.scale.exp() * images @ self._vectors.to(images.device).T
        said = logits.softmax(dim=1) if model.bias is None else (logits + model.bias).sigmoid()
        return [read_classes(row, self.reading.names) for row in said.cpu().numpy()]
