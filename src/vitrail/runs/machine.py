"""What this machine can do, measured: the floor under every other number."""

import ctypes
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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
    """FLOP/s of the best of several square matrix products: `2 side^3` in its time.

    Sides are doubled up to `size` while the next product still fits into `seconds`: in a format
    that is emulated, a large one takes a minute.
    """
    best, side = 0.0, min(size, 128)
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    torch.mm(a[:side, :side], b[:side, :side])  # the first one also loads libraries
    ends = time.perf_counter() + seconds
    while not best or time.perf_counter() < ends:
        out = torch.empty(side, side, dtype=dtype, device=device)
        started = time.perf_counter()
        torch.mm(a[:side, :side], b[:side, :side], out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken = time.perf_counter() - started
        best = max(best, 2 * side**3 / taken)
        if side < size and time.perf_counter() + 8 * taken < ends:
            side = min(size, 2 * side)
    return best


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_MOST_OF_ITS_OWN = 32 * 2**20
"""Where glibc's threshold for mappings ends that rises by itself (DEFAULT_MMAP_THRESHOLD_MAX)."""


def keep_freed_memory(*, lean: bool = False) -> None:
    """Let glibc keep the memory of freed tensors for the next ones, instead of handing it back.

    By default each large tensor is a mapping of its own, whose every page the kernel fills with
    zeros when it is first touched: of a training step on a CPU that is up to a third
    (benchmarks/results/train_step.md). But what is kept lies in holes, and holes add up: where
    memory counts more than time (`lean`), large tensors stay mappings of their own, for good; by
    itself glibc would keep them too, once it has seen a few. Elsewhere than on Linux with glibc,
    nothing happens.
    """
    if glibc := _glibc():
        glibc.mallopt(_M_MMAP_THRESHOLD, 3 * 2**20 if lean else 2**30)
        glibc.mallopt(_M_TRIM_THRESHOLD, 3 * 2**20 if lean else 2**31 - 1)


def hand_freed_memory_back() -> None:
    """After `keep_freed_memory`: what is free goes back, and what is freed later does as by glibc's
    own rule.

    Its thresholds start at 128 KiB and rise with what is freed, to 32 MiB and twice that. Once they
    were set they no longer move, so they are set to where they would have come: at their start
    every larger tensor would be a mapping, in a process that went on for ever after.
    """
    if glibc := _glibc():
        glibc.mallopt(_M_MMAP_THRESHOLD, _MOST_OF_ITS_OWN)
        glibc.mallopt(_M_TRIM_THRESHOLD, 2 * _MOST_OF_ITS_OWN)
        glibc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    return library if hasattr(library, "mallopt") else None


@contextmanager
def left_as_found() -> Iterator[None]:
    """Whatever a job changes of the process is in the end as it was before: torch's threads and
    random numbers, what is warned of, and how freed memory is kept. A notebook or a server goes on
    undisturbed.
    """
    threads, drawn = torch.get_num_threads(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        with warnings.catch_warnings():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(drawn)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)
        hand_freed_memory_back()
