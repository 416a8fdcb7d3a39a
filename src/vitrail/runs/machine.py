"""What this machine can do, measured: the floor under every other number."""

import ctypes
import sys
import time
from typing import Literal

import torch


def native_precision(device: torch.device) -> Literal["float32", "bfloat16"]:
    """bfloat16 where `device` multiplies it in hardware; elsewhere it is emulated, and slower."""
    if device.type == "cpu":  # AVX-512 BF16 or AMX
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if native else "float32"


def matrix_rate(
    dtype: torch.dtype, device: torch.device, size: int = 2048, seconds: float = 0.5
) -> float:
    """FLOP/s of the best of several square matrix products: `2 size^3` in its time."""
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    best, ends = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < ends or best == float("inf"):
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory(*, lean: bool = False) -> None:
    """Let glibc keep the memory of freed tensors for the next ones, instead of handing it back.

    By default each large tensor is a mapping of its own, whose every page the kernel fills with
    zeros when it is first touched: of a training step on a CPU that is up to a third
    (benchmarks/results/train_step.md). But what is kept lies in holes, and holes add up: where
    memory counts more than time (`lean`), large tensors stay mappings of their own, for good; by
    itself glibc would keep them too, once it has seen a few. Elsewhere than on Linux with glibc,
    nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 3 * 2**20 if lean else 2**30)
        mallopt(_M_TRIM_THRESHOLD, 3 * 2**20 if lean else 2**31 - 1)
