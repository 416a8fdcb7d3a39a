"""What an optimiser must know of tensors whose rows lie on several processes (FSDP2's DTensors).

Elementwise arithmetic runs on what each process holds; norms and matrix products need the whole.
Each of these functions takes plain tensors too, and then does nothing. What talks to the other
processes must be called by all of them, in the same order.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def _sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """There are DTensors only where their module, which takes half a second, was imported: wholly,
    for another thread may be about it.
    """
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def held(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The parts that this process holds: writing into them writes into the tensors."""
    return [t.to_local() if _sharded(t) else t for t in tensors]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process."""
    return tensor.full_tensor() if _sharded(tensor) else tensor


def settled(tensor: Tensor) -> Tensor:
    """A sum over a sharded dimension, with what the other processes have of it."""
    if not _sharded(tensor):
        return tensor
    from torch.distributed.tensor import Replicate

    return tensor.redistribute(
        placements=[Replicate() if p.is_partial() else p for p in tensor.placements]
    )


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """A whole `value`, the same on every process, laid out as `like` is."""
    if not _sharded(like) or _sharded(value):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    everywhere = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=like.placements)


def norms(parts: Sequence[Tensor], like: Sequence[Tensor]) -> Float[Tensor, " n"]:
    """The L2 norm of each whole tensor, of which `parts` are held here, and `like` has the layout.

    All of one layout take one exchange between the processes.
    """
    found = torch.stack(list(torch._foreach_norm(list(parts))))
    layouts: dict[tuple[object, ...], list[int]] = {}
    for i, tensor in enumerate(like):
        if _sharded(tensor):
            layouts.setdefault((tensor.device_mesh, *tensor.placements), []).append(i)
    if not layouts:
        return found
    from torch.distributed.tensor import DTensor, Partial, Replicate

    for indices in layouts.values():
        tensor = like[indices[0]]
        assert isinstance(tensor, DTensor)
        places = [Replicate() if p.is_replicate() else Partial() for p in tensor.placements]
        squares = DTensor.from_local(
            found[indices].square(), tensor.device_mesh, places, run_check=False
        )
        found[indices] = squares.full_tensor().sqrt()
    return found
