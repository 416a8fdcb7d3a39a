"""Batches and targets as tests want them: written down, not read from files."""

import numpy as np

from vitrail.data.batches.batch import Batch
from vitrail.data.targets import Classes
from vitrail.data.views.canvas import Canvas


def named(*names: str, several: bool = False) -> Classes:
    """Classes of no image."""
    return Classes.numbered(names, (), several=several)


def labelled(images, targets, indices=None, extent=None) -> Batch:
    """A batch of one view, with rows of classes."""
    places = np.arange(len(images)) if indices is None else indices
    return Batch((Canvas(images, extent),), {"classes": targets}, places)


def counted(names, counts, several: bool = False) -> Classes:
    """Classes of so many images each."""
    labels = np.repeat(np.arange(len(names)), counts)
    rows = ([label] for label in labels) if several else labels
    return Classes.numbered(tuple(names), rows, several=several)
