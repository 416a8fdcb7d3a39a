"""Whole data sets kept as arrays: MedMNIST's .npz files, and MNIST's folders of IDX files.

Both carry the split of their makers. Headers are checked before memory is taken, and nothing in
them can run code.
"""

import gzip
import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from vitrail.data.sources.source import PARTS, ArraySource, Joined, PartedSource
from vitrail.data.targets import Classes
from vitrail.errors import DataError

_MAX_IDX_BYTES = 4 << 30
_IDX_UINT8 = b"\x00\x00\x08"

_Arrays = Mapping[str, tuple[np.ndarray, np.ndarray]]


def open_npz(file: Path) -> PartedSource:
    """The data set in a .npz file of MedMNIST's layout.

    Its arrays are {train,val,test}_images, uint8 `[n h w]` or `[n h w 3]`, and {...}_labels, whole
    numbers `[n]` or `[n 1]`, or zeros and ones `[n c]` where an image may have several labels.
    Only the two for train must be there. Raises DataError for a file that is another thing.
    """
    if not zipfile.is_zipfile(file):
        raise DataError(f"{file} is not a .npz file, or it is cut short")
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            names = archive.files
            arrays = {
                part: (archive[f"{part}_images"], archive[f"{part}_labels"])
                for part in PARTS
                if f"{part}_images" in names and f"{part}_labels" in names
            }
    except Exception as error:  # whatever zip and numpy throw at damage, the file is at fault
        raise DataError(f"cannot read {file} as plain arrays: {error}") from error
    if "train" not in arrays:
        raise DataError(
            f"{file} has no train_images and train_labels: its arrays are {', '.join(names)}"
        )
    return _parted(file, arrays, None)


def has_idx(folder: Path) -> bool:
    """Whether MNIST's training images lie in `folder` as an IDX file."""
    return _idx_file(folder, "train", "images", 3) is not None


def open_idx(folder: Path, classes: tuple[str, ...] | None = None) -> PartedSource:
    """The data set in a folder of MNIST's layout, with the parts train and, if there, test.

    Its files are train-images-idx3-ubyte and train-labels-idx1-ubyte, and two that begin with
    t10k, plain or gzip. `classes` names the labels 0, 1, ...; without it their numbers are the
    names. Raises DataError for a file that is missing, or is not what its header says.
    """
    arrays = {}
    for part, stem in (("train", "train"), ("test", "t10k")):
        images = _idx_file(folder, stem, "images", 3)
        labels = _idx_file(folder, stem, "labels", 1)
        if images and labels:
            arrays[part] = (_read_idx(images, 3), _read_idx(labels, 1))
        elif images or labels or part == "train":
            lacking = "labels-idx1" if images else "images-idx3"
            raise DataError(f"{folder} lacks {stem}-{lacking}-ubyte, plain or as .gz")
    return _parted(folder, arrays, classes)


def _idx_file(folder: Path, stem: str, kind: str, dims: int) -> Path | None:
    """The file by its usual name, or by the one that some archivers make of it, with a dot."""
    names = (f"{stem}-{kind}{sep}idx{dims}-ubyte{end}" for sep in "-." for end in ("", ".gz"))
    return next((path for path in map(folder.joinpath, names) if path.is_file()), None)


def _read_idx(file: Path, dims: int) -> UInt8[np.ndarray, "..."]:
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            header = stream.read(4 + 4 * dims)
            sizes = np.frombuffer(header[4:], ">u4").tolist() if len(header) == 4 + 4 * dims else []
            if header[:4] != _IDX_UINT8 + bytes([dims]) or not sizes:
                raise DataError(f"{file} is not an IDX file of uint8 with {dims} dimensions")
            if math.prod(sizes) > _MAX_IDX_BYTES:
                raise DataError(f"the header of {file} claims {sizes}: over {_MAX_IDX_BYTES} bytes")
            # One byte more than the header says would show that the header is wrong.
            content = stream.read(math.prod(sizes) + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {file}: {error}") from error
    if len(content) != math.prod(sizes):
        raise DataError(f"{file} is damaged: its header says {sizes}, its size is another")
    return np.frombuffer(content, np.uint8).reshape(sizes)


def _parted(where: Path, arrays: _Arrays, classes: tuple[str, ...] | None) -> PartedSource:
    """One data set of the arrays (images, labels) of each part, with one table of classes."""
    try:
        labels = np.concatenate([labels for _, labels in arrays.values()])
    except ValueError as error:
        raise DataError(f"the labels in {where} differ in shape: {error}") from error
    targets = _targets(where, labels, classes)
    ends = np.cumsum([len(labels) for _, labels in arrays.values()])
    pieces = np.split(targets.values, ends[:-1])
    return Joined(
        {
            part: ArraySource(images, piece, targets.names, prefix=part)
            for (part, (images, _)), piece in zip(arrays.items(), pieces, strict=True)
        }
    )


def _targets(where: Path, labels: np.ndarray, classes: tuple[str, ...] | None) -> Classes:
    if labels.dtype.kind not in "biu" or labels.ndim not in (1, 2):
        raise DataError(
            f"the labels in {where} are {labels.dtype} of {labels.ndim} dimensions: they must be "
            "whole numbers [n] or [n 1], or zeros and ones [n c]"
        )
    if labels.ndim == 2 and labels.shape[1] > 1:
        if labels.max(initial=0) > 1 or labels.min(initial=0) < 0:
            raise DataError(f"the labels in {where} are [n c], but not all of them 0 or 1")
        return Classes(tuple(map(str, range(labels.shape[1]))), labels.astype(np.uint8))
    values, targets = np.unique(labels.reshape(len(labels)), return_inverse=True)
    if classes is None:
        return Classes(tuple(map(str, values.tolist())), targets.astype(np.int64))
    if not set(values.tolist()) <= set(range(len(classes))):
        raise DataError(f"the labels in {where} are not all within 0..{len(classes) - 1}")
    return Classes(classes, labels.reshape(len(labels)).astype(np.int64))
