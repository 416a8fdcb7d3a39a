"""A checkpoint: a folder of safetensors and JSON, with the SHA-256 of every file in a manifest.

It is written beside its place, flushed to the disk and renamed into place, so that a name always
holds a whole checkpoint; a flipped bit or a cut file is an error, never a wrong model. Nothing in
it can run code.

    model.safetensors            tensors by name, in the published format of safetensors
    model.1-of-4.safetensors     the same, where four processes each wrote their rows of them
    state.json                   plain values
    manifest.json                each file's SHA-256 and size
"""

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from vitrail.disk import flush_file, flush_folder
from vitrail.errors import DataError
from vitrail.units import bytes_text

MANIFEST = "manifest.json"
STATE = "state.json"
ENDING = ".safetensors"
_FORMAT = "vitrail checkpoint 2"
_FORMATS = ("vitrail checkpoint 1", _FORMAT)
"""The first had no sizes."""
_SHARD = re.compile(r"(.+)\.([0-9]+)-of-([0-9]+)")
_PIECE = 2**20
"""Bytes that are hashed and written at a time, without Python's lock."""
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Checkpoint(NamedTuple):
    """What was read back: tensors by file name (without its ending), and the state."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    folder: Path


class Sum(NamedTuple):
    """What the manifest says of a file."""

    sha256: str
    size: int


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> None:
    """Write `folder` whole or not at all, replacing what it held.

    `tensors["model"]["head.weight"]` goes to model.safetensors; `state` (plain values) to
    state.json. Raises `DataError` when the disk is full or read-only; the old checkpoint stays.
    """
    need = sum(tensor.nbytes for part in tensors.values() for tensor in part.values())
    beside = writing(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        start_folder(beside)
        sums = {
            name + ENDING: write_tensors(
                beside / (name + ENDING),
                {key: value.detach().cpu().contiguous() for key, value in part.items()},
            )
            for name, part in tensors.items()
        }
        finish_folder(folder, sums, json.dumps(state, indent=1).encode())
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise cannot_write(folder, need, error) from error


def writing(folder: Path) -> Path:
    """Where `folder` is written before it is renamed."""
    return folder.with_name(f".{folder.name}.writing")


def start_folder(beside: Path) -> None:
    """An empty folder; what a killed process left in it goes."""
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(exist_ok=True)


def finish_folder(folder: Path, sums: Mapping[str, Sum], state: bytes) -> None:
    """Add state and manifest to what was written beside `folder`, and give it its name."""
    beside, old = writing(folder), _old(folder)
    sums = {**sums, STATE: write_file(beside / STATE, [state])}
    manifest = {
        "format": _FORMAT,
        "sha256": {name: one.sha256 for name, one in sums.items()},
        "bytes": {name: one.size for name, one in sums.items()},
    }
    write_file(beside / MANIFEST, [json.dumps(manifest, indent=1).encode()])
    flush_folder(beside)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    beside.rename(folder)
    flush_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def copied(tensor: Tensor) -> Tensor:
    """A copy on the CPU, dense and in order, whatever the strides and the device."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return copy.copy_(tensor.detach())


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> Sum:
    """Write a safetensors file from dense tensors on the CPU, as they lie in memory.

    safetensors' own `save` makes another copy of everything, and holds Python's lock for as long
    as that takes: training would stand still.
    """
    # The widest numbers first, so that all lie at multiples of their size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, end = {}, 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return write_file(file, _lying(len(text).to_bytes(8, "little") + text, ordered))


def _lying(header: bytes, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[bytes | memoryview]:
    yield header
    for _, tensor in tensors:
        yield tensor.reshape(-1).view(torch.uint8).numpy().data


def write_file(file: Path, parts: Iterable[bytes | memoryview]) -> Sum:
    """Write a file to the disk itself, and say what was written."""
    digest, size = hashlib.sha256(), 0
    with open(file, "wb") as stream:
        for part in parts:
            view = memoryview(part)
            for start in range(0, len(view), _PIECE):
                piece = view[start : start + _PIECE]
                digest.update(piece)
                stream.write(piece)
            size += len(view)
        flush_file(stream)
    return Sum(digest.hexdigest(), size)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint, every byte of it checked. Raises `DataError` if one is not as written.

    What several processes wrote is put together: it does not matter how many read it.
    """
    parts: dict[tuple[str, int], dict[int, dict[str, Tensor]]] = {}
    state = None
    try:
        for name, content in _contents(folder):
            if name.endswith(ENDING):
                part = name.removesuffix(ENDING)
                shard = _SHARD.fullmatch(part)
                part, number, of = shard.groups() if shard else (part, 1, 1)
                parts.setdefault((part, int(of)), {})[int(number)] = load(content)
            elif name == STATE:
                state = json.loads(content)
        if not isinstance(state, dict):
            raise ValueError(f"{STATE} holds no object")
        tensors = {part: _joined(parts.pop((part, of)), of) for part, of in list(parts)}
        return Checkpoint(tensors, state, folder)
    except (ValueError, KeyError, SafetensorError, RuntimeError) as error:
        raise DataError(f"the checkpoint {folder} is damaged: {error}") from error


def _joined(pieces: dict[int, dict[str, Tensor]], of: int) -> dict[str, Tensor]:
    """Whole tensors from the rows that `of` processes wrote, in the order of the processes."""
    if lacks := set(range(1, of + 1)) - pieces.keys():
        raise ValueError(f"the rows of process {min(lacks)} of {of} are missing")
    ordered = [pieces[number] for number in range(1, of + 1)]
    whole = {}
    for name in dict.fromkeys(name for piece in ordered for name in piece):
        rows = [piece.pop(name) for piece in ordered if name in piece]
        whole[name] = torch.cat(rows) if len(rows) > 1 else rows[0]
    return whole


def check_checkpoint(folder: Path) -> None:
    """Raise `DataError` if a byte of a checkpoint is not as it was written."""
    for _ in _contents(folder):
        pass


def read_state(folder: Path) -> dict[str, Any]:
    """The state alone: a small read. Raises `DataError` as `read_checkpoint` does."""
    for name, content in _contents(folder, only=STATE):
        try:
            return dict(json.loads(content))
        except (ValueError, RecursionError) as error:
            raise DataError(f"the checkpoint {folder} is damaged: {name}: {error}") from error
    raise DataError(f"the checkpoint {folder} is damaged: it has no {STATE}")


def model_sha256(folder: Path) -> str:
    """What identifies the model in a checkpoint: the SHA-256 of its file, or of its files' sums."""
    sums = _manifest(folder)
    if (whole := "model" + ENDING) in sums:
        return sums[whole][0]
    shards = sorted(name for name in sums if name.startswith("model."))
    return hashlib.sha256("".join(sums[name][0] for name in shards).encode()).hexdigest()


def _contents(folder: Path, only: str | None = None) -> Iterator[tuple[str, bytes]]:
    """Each file of a checkpoint, checked; or one of them."""
    place = _place(folder)
    for name, (sha256, size) in _manifest(folder).items():
        if only not in (None, name):
            continue
        try:
            content = (place / name).read_bytes()
        except OSError as error:
            raise _unreadable(folder, error) from error
        if size is not None and len(content) != size:
            raise DataError(f"{place / name} is damaged: it has {len(content)} bytes, not {size}")
        if hashlib.sha256(content).hexdigest() != sha256:
            raise DataError(f"{place / name} is damaged: its SHA-256 is not the manifest's")
        yield name, content


def _manifest(folder: Path) -> dict[str, tuple[str, int | None]]:
    """Each file's SHA-256 and size."""
    file = _place(folder) / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
        sums = manifest["sha256"]
        for name in sums:
            if Path(name).name != name:
                raise DataError(f"the checkpoint {folder} names a file outside itself: {name!r}")
        # It needs no sum of its own: whatever bit is wrong in it, it is no JSON, or does not say
        # of the files what is so.
        if manifest["format"] not in _FORMATS:
            raise ValueError(f"unknown format {manifest['format']!r}: is this vitrail too old?")
        if manifest["format"] == _FORMATS[0]:
            return {name: (sha256, None) for name, sha256 in sums.items()}
        return {name: (sha256, manifest["bytes"][name]) for name, sha256 in sums.items()}
    except OSError as error:
        raise _unreadable(folder, error) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"the checkpoint {folder} is damaged: {MANIFEST}: {error}") from error


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint: under a name first that nobody takes for one."""
    going = folder.with_name(f".{folder.name}.deleting")
    shutil.rmtree(going, ignore_errors=True)
    _place(folder).rename(going)
    shutil.rmtree(going, ignore_errors=True)


def tidy_checkpoints(place: Path) -> None:
    """Clear away what killed processes left beside the checkpoints in `place`."""
    for entry in list(place.iterdir()) if place.is_dir() else ():
        if not (left := re.fullmatch(r"\.(.+)\.(writing|deleting|old)", entry.name)):
            continue
        if left[2] == "old" and not entry.with_name(left[1]).exists():
            entry.rename(entry.with_name(left[1]))
        else:
            shutil.rmtree(entry, ignore_errors=True)


def _old(folder: Path) -> Path:
    """Where the earlier one goes while a checkpoint is replaced."""
    return folder.with_name(f".{folder.name}.old")


def _place(folder: Path) -> Path:
    """Where a checkpoint lies: a kill between two renames leaves the earlier one beside."""
    old = _old(folder)
    return old if old.is_dir() and not folder.is_dir() else folder


def _unreadable(folder: Path, error: OSError) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"no whole checkpoint in {folder}: {error.filename} is missing")
    return DataError(f"the checkpoint {folder} cannot be read: {error.strerror}: {error.filename}")


_WAYS_OUT = {
    errno.ENOENT: "Was the run moved or removed while it trained? Put it back",
    errno.EACCES: "Make that folder writable",
    errno.EPERM: "Make that folder writable",
    errno.EROFS: "Make that disk writable",
    errno.EFBIG: "Lift the limit on the size of files (ulimit -f)",
    errno.EIO: "The disk itself fails: move the run to another",
}


def cannot_write(folder: Path, need: int, error: OSError) -> DataError:
    """The error for a checkpoint of `need` bytes that could not be written."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(there).free
    way_out = _WAYS_OUT.get(error.errno or 0, "Make room or move the run to another disk")
    return DataError(
        f"cannot write the checkpoint {folder}: {error.strerror or error} (it needs "
        f"{bytes_text(need)}, {bytes_text(free)} are free there). What was saved before is "
        f"not touched. {way_out}, then go on with --resume"
    )


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as named tensors: `{"0.exp_avg": ...}`.

    A Python number is marked as one (`"0.step:int"`): it must come back as what it was, for
    arithmetic with tensors rounds elsewhere.
    """
    flat = {}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if isinstance(value, (bool, int, float)):
                kind = type(value)
                flat[f"{index}.{name}:{kind.__name__}"] = torch.tensor(value, dtype=_NUMBERS[kind])
            elif value is not None:
                flat[f"{index}.{name}"] = torch.as_tensor(value)
    return flat


_NUMBERS = {bool: torch.bool, int: torch.int64, float: torch.float64}
_NUMBER = re.compile(r"(.+):(?:bool|int|float)")


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `flatten_optimizer`, for an optimiser over the same parameters.

    Whole tensors are laid out as their parameters are, where these lie on several processes.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        values = state.setdefault(int(index), {})
        if marked := _NUMBER.fullmatch(name):
            values[marked[1]] = value.item()
        else:
            values[name] = laid_out(value, parameters[int(index)])
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    # It has brought every tensor to its parameter's device, which is right, and to its type, which
    # is not: float32 moments of bfloat16 weights would be rounded.
    for number, restored in state.items():
        kept = optimizer.state[parameters[number]]
        for name, value in restored.items():
            if isinstance(value, Tensor) and kept[name].dtype != value.dtype:
                kept[name] = value.to(kept[name].device)
    # torch's fused kernels read a state as if it lay in memory as its parameter does.
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if _lies_otherwise(value, parameter):
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _lies_otherwise(value: Any, parameter: Tensor) -> bool:
    if not isinstance(value, Tensor) or hasattr(parameter, "device_mesh"):
        return False
    return value.shape == parameter.shape and value.stride() != parameter.stride()


def restore_weights(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load a whole state dict, laid out as the module's is where that lies on several processes.

    Raises as `load_state_dict` does.
    """
    like = module.state_dict()
    there = {name: laid_out(value, like.get(name, value)) for name, value in tensors.items()}
    module.load_state_dict(there)


def laid_out(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same on every process, as `like` lies on them (FSDP2)."""
    if not (hasattr(like, "device_mesh") and value.shape == like.shape and value.ndim):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    # Each process has the whole and takes its own part of it: nothing is sent.
    there = value.to(like.device_mesh.device_type)
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)
