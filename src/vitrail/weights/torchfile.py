"""torch's own files (.pth, .pt, .bin, .ckpt, .pth.tar), read with `weights_only` and nothing else.

A training checkpoint holds more than weights, one dictionary inside the other. `read_torch` goes
down to the one that its authors evaluate, and says what it left.
"""

import re
import shlex
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from vitrail.errors import DataError
from vitrail.units import bytes_text
from vitrail.weights.content import MOST_BYTES, Content, open_zip, within

PREFERRED = (
    *("state_dict", "model", "model_state_dict", "teacher", "student", "module", "net"),
    "base_encoder",
)
"""Which of several dictionaries is the model, the first that is there.

DINO and its heirs evaluate the teacher. An average of the weights (model_ema, state_dict_ema) is
taken only where it is asked for, because some files hold one that never was evaluated.
"""

_MOST_LEVELS = 8


def read_torch(path: Path, part: str | None) -> Content:
    """The model's tensors in a file of torch's; `part` names another dictionary of it.

    Raises `DataError` for damage and for what could run code, `UsageError` for an unknown `part`.
    """
    if path.suffix == ".safetensors":  # torch would go by the name, and misread it
        raise DataError(
            f"{path} is a pickle of torch's, though its name says safetensors: if you trust its "
            f"source, rename it to {path.stem}.pth"
        )
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        _check_zip(path)
    content = _load(path, mmap=is_zip)
    found, notes = _choose(path, content, part)
    tensors = {}
    left = []
    for name, value in found.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            tensors[name] = _checked(path, name, value)
        else:
            left.append(str(name))
    if sum(tensor.nbytes for tensor in tensors.values()) > MOST_BYTES:
        raise DataError(f"{path} claims over {bytes_text(MOST_BYTES)}: it is damaged or hostile")
    if left:
        notes.append(f"left out, no tensor: {', '.join(left)}")
    return Content(tensors, {}, tuple(notes))


def _check_zip(path: Path) -> None:
    """Hold every member to its checksum, which torch itself does not look at."""
    with open_zip(path) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise DataError(f"{path} is compressed, which torch never does: it is hostile")
        if bad := archive.testzip():
            raise DataError(f"{path} is damaged: '{bad}' in it fails its checksum. Fetch it again")


def _load(path: Path, mmap: bool) -> Any:
    # DeiT, DINO and MAE store their arguments. A Namespace is inert: loading one does no more
    # than set its attributes, and it is left out again.
    try:
        with torch.serialization.safe_globals([Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on the pickle's protocol: it is read all the same
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # whatever torch throws at damage, the file is at fault
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if isinstance(error, UnpicklingError) and wanted:
            raise DataError(_refusal(path, wanted[1])) from error
        raise DataError(
            f"{path} is damaged, or a pickle of other things than weights: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """The one line of torch's message that is about the file; around it is advice to trust it."""
    return str(error).split("\n\nCheck the doc")[0].rstrip().rsplit("\n", 1)[-1].strip()[:200]


def _refusal(path: Path, wanted: str) -> str:
    return (
        f"{path} wants to load '{wanted}', and not weights alone: a pickle could run any code, so "
        f"vitrail does not open it. If you trust its source, re-save the weights where code may "
        f"run (and the model's own code is found), and give weights.safetensors: {recipe(path)}"
    )


def recipe(path: Path) -> str:
    """A command that takes the weights out of a pickle of anything: of a model, of a dictionary
    with a model or its state dict in it. Tensors that share memory are written once each.
    """
    keys = ", ".join(map(repr, PREFERRED))
    program = (
        "import sys, torch; from safetensors.torch import save_file; "
        "d = torch.load(sys.argv[1], map_location='cpu', weights_only=False); "
        "whole = lambda x: isinstance(x, torch.nn.Module); "
        "d = d if isinstance(d, dict) else {'model': d}; "
        f"d = ([d[k] for k in ({keys}) if k in d] + [*filter(whole, d.values())] + [d])[0]; "
        "d = d.state_dict() if whole(d) else d; "
        "save_file({k: t.contiguous().clone() for k, t in d.items() if torch.is_tensor(t)}, "
        "'weights.safetensors')"
    )
    return f'python -c "{program}" {shlex.quote(str(path))}'


def _choose(path: Path, content: Any, part: str | None) -> tuple[Mapping[Any, Any], list[str]]:
    """The dictionary of tensors that is wanted, and what is to be said about the choice."""
    notes: list[str] = []
    for _ in range(_MOST_LEVELS):
        if not isinstance(content, dict):
            raise DataError(
                f"{path} holds a {type(content).__name__}, not a dictionary of names and tensors"
            )
        parts = {name: value for name, value in content.items() if isinstance(value, dict)}
        if part in content:
            chosen, part = part, None
        elif not (chosen := _preferred(content, parts)):
            if part is not None:
                notes.append(f"taken: '{part}'")
                return within(path, content, part), notes
            if any(isinstance(value, Tensor) for value in content.values()):
                return content, notes
            raise DataError(
                f"{path} holds no tensors, or several sets of them: say which part is meant, of "
                f"{', '.join(map(str, content)) or 'none'}: part=NAME, or `vitrail weights convert "
                f"{path} ONE.safetensors --to vitrail --part NAME`"
            )
        left = [str(name) for name in content if name != chosen]
        notes.append(f"taken: '{chosen}'" + (f"; left out: {', '.join(left)}" if left else ""))
        content = content[chosen]
    raise DataError(f"{path} nests its dictionaries over {_MOST_LEVELS} deep: it is hostile")


def _preferred(content: Mapping[Any, Any], parts: Mapping[Any, Any]) -> str | None:
    """The part to go down to: a preferred one, or the only one with tensors; None to stay."""
    if chosen := next((name for name in PREFERRED if name in parts), None):
        return chosen
    if any(isinstance(value, Tensor) for value in content.values()):
        return None
    holding = [name for name, value in parts.items() if isinstance(name, str) and _holds(value)]
    return holding[0] if len(holding) == 1 else None


def _holds(part: Any, levels: int = _MOST_LEVELS) -> bool:
    """Whether a dictionary has tensors by name, however deep. An optimizer's are numbered."""
    return isinstance(part, dict) and any(
        isinstance(name, str) and (isinstance(x, Tensor) or (levels and _holds(x, levels - 1)))
        for name, x in part.items()
    )


def _checked(path: Path, name: str, tensor: Tensor) -> Tensor:
    """A plain dense tensor that is no larger than the memory behind it."""
    tensor = tensor.detach()
    if (
        type(tensor) is not Tensor
        or tensor.layout != torch.strided
        or tensor.device.type != "cpu"
        or tensor.is_quantized
        or tensor.is_complex()
    ):
        raise DataError(f"{name!r} in {path} is no plain tensor of numbers ({tensor.dtype})")
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise DataError(f"{name!r} in {path} claims {tensor.nbytes} bytes, more than it holds")
    return tensor
