"""Files of weights, written whole or not at all: safetensors and npz."""

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vitrail.disk import whole
from vitrail.errors import DataError, UsageError


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write a .safetensors file, whole or not at all.

    Raises `UsageError` where there is a file and `overwrite` is False, `DataError` where the disk
    is full or read-only.
    """
    with _new(path, overwrite) as file:
        # Copies: the format allows no two names on one memory.
        plain = {k: _plain(v).clone() for k, v in tensors.items()}
        save_file(plain, file, {"format": "pt", **(metadata or {})})


def write_npz(path: Path, tensors: Mapping[str, Tensor], *, overwrite: bool = False) -> None:
    """Write a .npz file, bfloat16 as two-byte voids like big_vision. Raises as write_safetensors.

    Every byte follows from the tensors: no time of writing is in it.
    """
    with _new(path, overwrite) as file, zipfile.ZipFile(file, "w") as archive:
        for name, tensor in tensors.items():
            plain = _plain(tensor)
            if plain.dtype == torch.bfloat16:
                array = plain.view(torch.int16).numpy().view("V2")
            else:
                array = plain.numpy()
            member = zipfile.ZipInfo(f"{name}.npy")
            with archive.open(member, "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


@contextmanager
def _new(path: Path, overwrite: bool) -> Iterator[Path]:
    """A name to write to, which becomes `path` if nothing goes wrong."""
    if path.exists() and not overwrite:
        raise UsageError(f"{path} is there already: choose another name, or move it away")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as beside:
            yield beside
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"cannot write {path}: {error}. Make room, or choose another place"
        ) from error
