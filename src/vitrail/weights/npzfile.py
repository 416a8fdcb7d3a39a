"""Google's .npz files: arrays by name, read without numpy's pickles."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vitrail.errors import DataError
from vitrail.weights.content import Content, from_numpy, open_zip


def read_npz(path: Path) -> Content:
    """The arrays in the .npz file at `path`. Raises `DataError` for damage, or no numbers."""
    tensors: dict[str, Tensor] = {}
    with open_zip(path) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name in tensors:
                raise DataError(f"{path} holds {name!r} twice: it is damaged or hostile")
            with archive.open(member) as stream:
                tensors[name] = from_numpy(_read_npy(stream, member.file_size), f"{path}: {name!r}")
    return Content(tensors, {}, ())


def _read_npy(stream: Any, size: int) -> np.ndarray:
    """One array of a .npz. As numpy does, but its header is held to the member's `size` first."""
    version = np.lib.format.read_magic(stream)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
        raise ValueError(f"version {version} of numpy's format is unknown here")
    shape, fortran, dtype = read_header(stream)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which need pickle and could run code")
    count = math.prod(shape)
    if min(shape, default=0) < 0 or count * dtype.itemsize > size:
        raise ValueError(f"the header of an array claims {shape}, more than its {size} bytes")
    # To the end, so that the checksum is looked at.
    content = bytearray(stream.read())
    if len(content) != count * dtype.itemsize:
        raise ValueError(f"the header of an array claims {shape}, its content is another")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
