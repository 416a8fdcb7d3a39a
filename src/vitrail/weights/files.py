"""Files of weights, read without trusting them: safetensors, npz, torch's pickles, ONNX.

What comes out is one flat dictionary of tensors under the names that the file uses; what the names
mean is for the layouts. Nothing here can run code: numpy reads without pickle, torch with
`weights_only`, and what needs more is refused with the way to re-save it. The kind is told by the
content, not by the suffix.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitrail.disk import sha256
from vitrail.errors import DataError
from vitrail.units import bytes_text
from vitrail.weights.content import Content, open_zip, within
from vitrail.weights.npzfile import read_npz
from vitrail.weights.onnxfile import read_onnx
from vitrail.weights.torchfile import read_torch

Kind = Literal["safetensors", "npz", "torch", "onnx"]

_MOST_JSON_BYTES = 16 << 20
_GREATEST = 1e15
"""No weight is near it; one flipped bit of an exponent takes a usual weight beyond 1e30."""

_IN_FOLDER = (
    *("model.safetensors", "model.safetensors.index.json", "open_clip_model.safetensors"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "open_clip_pytorch_model.bin"),
)
"""What `save_pretrained` of transformers, timm and open_clip call the weights; the first is it."""
_INDEX = ".index.json"
_CONFIGS = ("config.json", "open_clip_config.json")
_PREPROCESSOR = "preprocessor_config.json"

_FOREIGN = {
    b"\x1f\x8b": "gzip-compressed: unpack it first, `gzip -d FILE`",
    b"\x93NUMPY": "a single numpy array without names, not a checkpoint",
    b"\x89HDF": "an HDF5 file (Keras, TensorFlow), which vitrail does not read",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: run `git lfs pull`",
    b"<": "a web page or XML, not weights: the download went to the wrong address",
    b"BZh": "bzip2-compressed: unpack it first",
    b"\xfd7zXZ": "xz-compressed: unpack it first",
    b"\x28\xb5\x2f\xfd": "zstd-compressed: unpack it first",
}


class WeightsFile(NamedTuple):
    """What a file of weights holds. `path` is the file, or the folder of `save_pretrained`."""

    path: Path
    kind: Kind
    tensors: dict[str, Tensor]
    """On the CPU, under the file's own names; they may share memory with the file: copy to edit."""
    sha256: str
    """Of the file; for shards, of the lines 'SHA-256, two spaces, name' that sha256sum prints."""
    metadata: dict[str, str]
    """The header of a safetensors file."""
    config: dict[str, Any]
    """The config.json beside it, or {}."""
    preprocessor: dict[str, Any]
    """The preprocessor_config.json beside it, or {}."""
    notes: tuple[str, ...]
    """What a user should know: what was chosen, joined or left out."""


def read_weights(path: Path, part: str | None = None) -> WeightsFile:
    """Read the file of weights, or the folder written by `save_pretrained`, at `path`: one file, or
    several with their index.

    `part` names which of several models is wanted: a dictionary of a torch file ('model_ema'), or
    what stands before its keys in any ('ema_model.module').
    Raises `DataError`, with the path, for a file that is missing, damaged, of another kind, or
    that would have to run code; `UsageError` for a `part` that is not there.
    """
    if path.is_dir():
        weights = _read_folder(path, part)
    elif path.is_file() and path.name.endswith(_INDEX):
        weights = _read_shards(path, part)
    elif path.is_file():
        weights = _read_file(path, part)
    else:
        raise DataError(f"no weights at {path}: there is no such file or folder")
    if not weights.tensors:
        raise DataError(f"{path} holds no tensor at all")
    _check_values(path, weights.tensors)
    return weights


def _read_file(path: Path, part: str | None) -> WeightsFile:
    kind = _kind(path)
    content = _content(path, kind, part)
    described = kind in ("safetensors", "torch")  # a Google .npz never has a config of its own
    return WeightsFile(
        path,
        kind,
        content.tensors,
        sha256=sha256(path),
        metadata=content.metadata,
        config=_config(path.parent) if described else {},
        preprocessor=read_json(path.parent / _PREPROCESSOR) if described else {},
        notes=content.notes,
    )


def _content(path: Path, kind: Kind, part: str | None = None) -> Content:
    """What a file holds; of it the `part`, if one is named."""
    if kind == "torch":
        return read_torch(path, part)
    readers = {"safetensors": _read_safetensors, "npz": read_npz, "onnx": read_onnx}
    content = readers[kind](path)
    if part is not None:
        content = content._replace(tensors=within(path, content.tensors, part))
    return content


def _kind(path: Path) -> Kind:
    """What kind of file this is, by its first bytes; a word on each other kind one may be given."""
    try:
        with path.open("rb") as stream:
            head = stream.read(512)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if not head:
        raise DataError(f"{path} is empty (0 bytes): fetch or copy it again")
    # The header's length in 8 bytes, then the header. First of all: its low bytes may be anything,
    # the beginning of a pickle or of a zip too.
    if head[5:9] == b"\0\0\0{":
        return "safetensors"
    if head.startswith(b"PK"):
        return _kind_of_zip(path)
    if head.startswith(b"\x80"):  # a bare pickle: torch before 1.6
        return "torch"
    # Protobuf has no magic bytes, but its first field is the format's version: 08, then a number.
    # The name has to say the rest, and the parser is the judge.
    if head.startswith(b"\x08") and path.suffix == ".onnx":
        return "onnx"
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            raise DataError(f"{path} is {what}")
    if head[257:262] == b"ustar":
        raise DataError(f"{path} is a tar archive: unpack it, and give the file of weights in it")
    raise DataError(
        f"{path} is no file of weights that vitrail reads (.safetensors, .npz, .pth, .pt, .bin, "
        f"or .onnx by its suffix), or its beginning is damaged"
    )


def _kind_of_zip(path: Path) -> Kind:
    with open_zip(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        raise DataError(
            f"{path} is a TorchScript archive, a program and not only weights. OpenAI's CLIP is "
            f"on the Hugging Face hub as plain safetensors (`vitrail weights` lists clip_*); any "
            f'other, if you trust its source, can be re-saved: python -c "import torch; '
            f"from safetensors.torch import save_file; save_file(dict(torch.jit.load('FILE', "
            f"map_location='cpu').state_dict()), 'weights.safetensors')\""
        )
    if any(name.endswith("data.pkl") for name in names):
        return "torch"
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    raise DataError(f"{path} is a zip archive without weights at its top: unpack it first")


def _read_safetensors(path: Path) -> Content:
    try:
        with safe_open(path, framework="pt") as file:  # checks the header against the file's size
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Content(tensors, dict(file.metadata() or {}), ())
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged or cut short: {error}. Fetch it again") from error


def _read_folder(folder: Path, part: str | None) -> WeightsFile:
    name = next((name for name in _IN_FOLDER if (folder / name).is_file()), None)
    if name is None:
        raise DataError(
            f"{folder} holds no weights: none of {', '.join(_IN_FOLDER)}. "
            f"Give the file itself if it has another name"
        )
    read = _read_shards if name.endswith(_INDEX) else _read_file
    return read(folder / name, part)._replace(path=folder)


def _read_shards(index: Path, part: str | None) -> WeightsFile:
    """All the files that `index` names, of safetensors or of torch."""
    folder = index.parent
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(v, str) for v in shards.values()):
        raise DataError(f"{index} is damaged: it has no 'weight_map' of names to files")
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    notes: list[str] = []
    sums = ""
    kind: Kind = "safetensors"
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard:
            raise DataError(f"{index} names a file outside its folder: {shard!r}")
        if not (folder / shard).is_file():
            raise DataError(f"{index} names {shard}, which is missing: fetch it too")
        kind = _kind(folder / shard)
        content = _content(folder / shard, kind)
        for name, tensor in content.tensors.items():
            if shards.get(name) != shard:
                raise DataError(f"{folder / shard} holds {name!r}, which {index} does not say")
            tensors[name] = tensor
        metadata |= content.metadata
        notes += content.notes
        sums += f"{sha256(folder / shard)}  {shard}\n"
    if lacking := sorted(set(shards) - set(tensors)):
        raise DataError(f"{lacking[0]!r} is not in {shards[lacking[0]]}, where {index} says it is")
    return WeightsFile(
        index,
        kind,
        tensors if part is None else within(index, tensors, part),
        sha256=hashlib.sha256(sums.encode()).hexdigest(),
        metadata=metadata,
        config=_config(folder),
        preprocessor=read_json(folder / _PREPROCESSOR),
        notes=(f"{index.name}: {sums.count(chr(10))} files", *notes),
    )


def _config(folder: Path) -> dict[str, Any]:
    return next((found for name in _CONFIGS if (found := read_json(folder / name))), {})


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is no such file. Raises `DataError`."""
    if not path.is_file():
        return {}
    try:
        with path.open("rb") as stream:
            content = stream.read(_MOST_JSON_BYTES + 1)
        if len(content) > _MOST_JSON_BYTES:
            raise ValueError(f"it is over {bytes_text(_MOST_JSON_BYTES)}")
        value = json.loads(content)
        if not isinstance(value, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {path}: {error}. Mend it or move it away") from error
    return value


def _check_values(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        # As Python's numbers: in float16 the limit itself would be infinite.
        low, high = map(float, torch.aminmax(tensor.float() if tensor.itemsize == 1 else tensor))
        if not max(-low, high) <= _GREATEST:  # so that NaN is caught as well
            what = "NaN" if math.isnan(low) else f"{max(-low, high):.3g}"
            raise DataError(
                f"{name!r} in {path} holds {what}: the file is damaged, or its training failed. "
                f"Fetch it again, or take another"
            )
