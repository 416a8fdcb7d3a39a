"""A data set opened with whatever is said of its images, where no task says what that must be."""

import os
from pathlib import Path

from vitrail.data.sources.csvfile import Columns, list_file
from vitrail.data.sources.layout import USUAL, FolderRules
from vitrail.data.sources.mask_meaning import AS_THEY_SAY, MaskRules
from vitrail.data.sources.source import PartedSource
from vitrail.data.sources.unlabelled import open_unlabelled
from vitrail.data.split import open_data, task_of, why_bare
from vitrail.data.targets import Boxes, Classes, Masks, Texts
from vitrail.errors import DataError


def open_found(
    data: str,
    columns: Columns | None = None,
    rules: FolderRules = USUAL,
    masks: MaskRules = AS_THEY_SAY,
) -> PartedSource:
    """Open the data set at `data`, as `open_data` does: with masks, boxes or texts where it has
    some, or else with classes; a folder of images that is in no way labelled, with nothing.

    Raises as `open_data` does.
    """
    task = task_of(data, masks)
    if task == "segment":
        return open_data(data, columns, rules, masks=masks, targets=Masks)
    if task == "detect":
        return open_data(data, columns, rules, targets=Boxes)
    if task == "clip" or (columns and columns.caption):
        return open_data(data, columns, rules, targets=Texts)
    try:
        return open_data(data, columns, rules, targets=Classes)
    except DataError as no_labels:
        place = Path(os.path.expanduser(data))
        if not place.is_dir() or list_file(place) or any(columns or ()):
            raise
        try:
            source = open_unlabelled(place, rules=rules)
        except DataError:
            raise no_labels from None
        why, _, _ = why_bare(no_labels).partition(": make a folder for each class")
        said = f"nothing says what images show: {why}"
        source.notes = (*source.notes, said)
        return source
