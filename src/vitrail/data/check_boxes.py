"""What is wrong with the boxes of a data set, found before hours are spent on it.

What cannot be used was found when the data was opened (`vitrail.data.sources.box_frames`), and is
told here with its share; the rest is what a look at all boxes shows.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vitrail.data.check_masks import Finding
from vitrail.data.names import printable
from vitrail.data.pixels.decode import UnreadableImage
from vitrail.data.sources.box_frames import MISFITS
from vitrail.data.sources.boxed import BoxedSource
from vitrail.data.sources.source import PartedSource
from vitrail.data.targets.boxes import Boxes

_TRAIN = 0
_MANY_CUT = 0.01
"""The share of boxes cut at their image's edge that is more than sloppy drawing."""
_USUAL_ANSWERS = 100
"""Answers an image that COCO's measure looks at, unless it is told otherwise."""
_SMALL, _LARGE = 32.0, 96.0
"""Sides of a square, in pixels, by which COCO tells small, medium and large objects."""


class BoxClass(NamedTuple):
    """How often one class is there."""

    name: str
    objects: int
    """Without ignored ones."""
    share: float
    images: int
    """That show it."""


@dataclass(frozen=True)
class BoxReport:
    """What `check_boxes` found: faults, and what the boxes are."""

    findings: tuple[Finding, ...]
    classes: tuple[BoxClass, ...]
    """By index."""
    objects: int
    ignored: int
    """Objects and regions that do not count."""
    negatives: int
    """Images without an object."""
    most: int
    """Objects of one image."""
    median: float
    """The square root of an object's area, in pixels."""
    sizes: dict[str, int]
    """How many objects are small, medium and large, by COCO's measure."""
    unusable: int
    """Images that are left out because no box can be told of them."""


def check_boxes(source: PartedSource) -> BoxReport:
    """Look at every box of `source`, whose targets are `Boxes`."""
    boxes = source.targets
    assert isinstance(boxes, Boxes)
    found = _Found(source, boxes)
    for i in range(len(boxes)):
        found.look(i)
    return found.report()


class _Found:
    def __init__(self, source: PartedSource, boxes: Boxes) -> None:
        self._source = source
        self._boxes = boxes
        self._objects = np.zeros((2, len(boxes.names)), np.int64)
        """Of each class: to train with, and elsewhere."""
        self._images = np.zeros(len(boxes.names), np.int64)
        self._ignored = 0
        self._sides: list[np.ndarray] = []
        self._two_names: list[str] = []
        self._crowded: list[str] = []

    def look(self, i: int) -> None:
        said = self._boxes.of(i)
        counts = np.bincount(said.labels[~said.ignored], minlength=len(self._boxes.names))
        self._objects[int(self._source.part[i] != _TRAIN)] += counts
        self._images += counts > 0
        self._ignored += int(said.ignored.sum())
        corners = said.corners[~said.ignored]
        if len(np.unique(corners, axis=0)) < len(corners):
            self._two_names.append(self._source.key(i))
        if len(corners) > _USUAL_ANSWERS:
            self._crowded.append(self._source.key(i))
        try:
            height, width = self._boxes.size(i)
        except UnreadableImage:  # as `check` says
            return
        area = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1]) * height * width
        self._sides.append(np.sqrt(area))

    def report(self) -> BoxReport:
        objects, sides = self._objects.sum(axis=0), np.concatenate([np.zeros(0), *self._sides])
        total = int(objects.sum())
        small, large = int((sides < _SMALL).sum()), int((sides >= _LARGE).sum())
        return BoxReport(
            findings=(*self._left_out(), *self._looked_at(), *self._of_classes()),
            classes=tuple(
                BoxClass(name, count, count / max(1, total), images)
                for name, count, images in zip(
                    self._boxes.names, objects.tolist(), self._images.tolist(), strict=True
                )
            ),
            objects=total,
            ignored=self._ignored,
            negatives=self._boxes.empty(),
            most=self._boxes.most,
            median=float(np.median(sides)) if len(sides) else 0.0,
            sizes={"small": small, "medium": len(sides) - small - large, "large": large},
            unusable=sum(one.count for one in self._source.left_out if one.kind == MISFITS),
        )

    def _left_out(self) -> list[Finding]:
        """What the data's opening found, with its share of all boxes that are told."""
        if not isinstance(self._source, BoxedSource):
            return []
        told = max(1, self._source.told)
        found = [
            Finding(
                one.kind,
                one.count,
                f"{one.count / told:.2%} of all boxes; left out: {one.reason}",
                one.examples,
            )
            for one in self._source.left_out
            if one.kind.startswith("boxes ")
        ]
        if cut := self._source.cut:
            share = cut / told
            many = "; so many are no slips: are they of these images, and of this size?"
            found.append(
                Finding(
                    "boxes beyond their image",
                    cut,
                    f"{share:.2%} of all boxes; cut at its edge{many if share > _MANY_CUT else ''}",
                )
            )
        return found

    def _looked_at(self) -> list[Finding]:
        sentences = (
            (
                "images with equal boxes of two classes",
                self._two_names,
                "a model is taught both: of which class is the object?",
            ),
            (
                f"images with more than {_USUAL_ANSWERS} objects",
                self._crowded,
                f"COCO's measure looks at {_USUAL_ANSWERS} answers an image unless it is told "
                "otherwise, and would call the others missed",
            ),
        )
        return [
            Finding(name, len(keys), sentence, tuple(keys))
            for name, keys, sentence in sentences
            if keys
        ]

    def _of_classes(self) -> list[Finding]:
        train, other = self._objects
        found = []
        for name, which, sentence in (
            (
                "classes only in held-out images",
                (train == 0) & (other > 0),
                "no object to train with: they cannot be learned, and count 0",
            ),
            (
                "classes without an object",
                (train == 0) & (other == 0),
                "no image has one that counts: are names and numbers the right ones?",
            ),
        ):
            called = tuple(printable(self._boxes.names[k]) for k in np.flatnonzero(which))
            if called:
                found.append(Finding(name, len(called), sentence, called))
        return found
