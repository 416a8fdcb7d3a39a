"""A checkpoint: a folder of safetensors and JSON, with the SHA-256 of every file in a manifest.

It is written beside its place, flushed to the disk and renamed into place, so that a name always
holds a whole checkpoint; a flipped bit or a cut file is an error, never a wrong model. Nothing in
it can run code.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vitrail.errors import DataError

MANIFEST = "manifest.json"


class Checkpoint(NamedTuple):
    """What was read back: tensors by file name (without its ending), and the state."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> None:
    """Write `folder` whole or not at all, replacing what it held.

    `tensors["model"]["head.weight"]` goes to model.safetensors; `state` (plain values) to
    state.json. Raises `DataError` when the disk is full or read-only; the old checkpoint stays.
    """
    files = {
        f"{name}.safetensors": save({k: v.detach().cpu().contiguous() for k, v in part.items()})
        for name, part in tensors.items()
    }
    files["state.json"] = json.dumps(state, indent=1).encode()
    manifest = {
        "format": "vitrail checkpoint 1",
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    files[MANIFEST] = json.dumps(manifest, indent=1).encode()
    beside = folder.with_name(f".{folder.name}.writing")
    old = folder.with_name(f".{folder.name}.old")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        for name, content in files.items():
            with open(beside / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        _flush_folder(beside)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        beside.rename(folder)
        _flush_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        need = sum(map(len, files.values())) / 2**20
        raise DataError(
            f"cannot write the checkpoint {folder} ({need:.0f} MiB): {error.strerror}; what was "
            f"saved before is still there. Make room or choose another place with --out, then go "
            f"on with --resume"
        ) from error


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint, every byte of it checked. Raises `DataError` if one is not as written."""
    # A kill between the two renames of write_checkpoint leaves the previous one under this name.
    old = folder.with_name(f".{folder.name}.old")
    place = old if old.is_dir() and not folder.is_dir() else folder
    contents = {}
    try:
        sums = json.loads((place / MANIFEST).read_bytes())["sha256"]
        for name, expected in sums.items():
            if Path(name).name != name:
                raise DataError(f"the checkpoint {folder} names a file outside itself: {name!r}")
            contents[name] = (place / name).read_bytes()
            if hashlib.sha256(contents[name]).hexdigest() != expected:
                raise DataError(
                    f"{place / name} is damaged: its SHA-256 is not the manifest's. Use another "
                    f"checkpoint of the run, or a copy of this one"
                )
        tensors = {
            name.removesuffix(".safetensors"): load(content)
            for name, content in contents.items()
            if name.endswith(".safetensors")
        }
        return Checkpoint(tensors, json.loads(contents["state.json"]))
    except FileNotFoundError as error:
        raise DataError(f"no whole checkpoint in {folder}: {error.filename} is missing") from error
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise DataError(f"the checkpoint {folder} is damaged: {error}") from error


def _flush_folder(folder: Path) -> None:
    """Make the names in a folder as durable as the files' contents."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as named tensors: `{"0.exp_avg": ...}`."""
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `flatten_optimizer`, for an optimiser over the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
