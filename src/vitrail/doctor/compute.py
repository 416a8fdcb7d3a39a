"""What computes: torch's threads, its devices, how fast they multiply, and the compiler.

Only this file of the doctor imports torch, and only when it is asked.
"""

import os
import platform
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vitrail.doctor.finding import Finding, on_linux
from vitrail.doctor.machine import cores, cpu_facts
from vitrail.units import bytes_text

if TYPE_CHECKING:
    import torch

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "KMP_AFFINITY", "GOMP_CPU_AFFINITY")
_FAST_BFLOAT16 = {
    "amx_bf16": "AMX",
    "avx512_bf16": "AVX-512 BF16",
    "bf16": "Arm BF16",
}
_WORTH = 1.2
"""bfloat16 is advised where it multiplies so much faster: the rest of a step gains nothing."""
_CPU_SIZE, _GPU_SIZE = 1024, 8192
_SECONDS = 0.3
_CUDA_WHEELS = ((13, 0), (12, 8), (12, 6))
"""CUDA versions that torch is published for, the newest first."""
_ASK_SECONDS = 20
_COMPILE_SECONDS = 60


def compute_findings() -> Iterator[Finding]:
    """All of this file; of torch alone why it cannot be imported."""
    try:
        import torch
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        yield Finding(
            "torch",
            "problem",
            f"it cannot be imported: {reason}",
            "pip install --force-reinstall torch",
        )
        return
    yield judge_threads(torch.get_num_threads(), cores().usable, os.environ)
    driver = ask_driver()
    build = Build(
        torch.__version__,
        torch.version.cuda,
        torch.cuda.is_available(),
        os.environ.get("CUDA_VISIBLE_DEVICES"),
    )
    yield judge_driver(driver, build)
    yield from _gpus()
    device = torch.device("cuda" if build.available else "cpu")
    yield _precision(device)
    yield compiler()
    yield allocator(os.environ)


def judge_threads(threads: int, usable: int, environment: Mapping[str, str]) -> Finding:
    """As many as there are cores is best; more get in each other's way at every operation."""
    given = {name: environment[name] for name in _THREAD_VARIABLES if environment.get(name)}
    text = f"torch computes in {threads} of {usable} usable"
    if given:
        text += f" ({', '.join(f'{name}={value}' for name, value in given.items())})"
    numbers = {"threads": threads, "usable": usable}
    if threads > usable:
        text += ": more than there are cores for, so they wait for each other"
        return Finding(
            "threads", "problem", text, f"export OMP_NUM_THREADS={usable}  # or --threads {usable}",
            numbers,
        )  # fmt: skip
    if threads < usable and given:
        names = " ".join(name for name in given if name.endswith("THREADS")) or "OMP_NUM_THREADS"
        return Finding(
            "threads", "note", f"{text}: the others stand idle",
            f"unset {names}  # or --threads {usable}", numbers,
        )  # fmt: skip
    return Finding("threads", "ok", text, numbers=numbers)


class Driver(NamedTuple):
    """What NVIDIA's own tool says."""

    gpus: tuple[str, ...]
    version: str
    cuda: tuple[int, int] | None
    """The newest CUDA that it can run."""


class Build(NamedTuple):
    """What torch was built for, and whether it finds a GPU."""

    version: str
    cuda: str | None
    available: bool
    visible: str | None
    """CUDA_VISIBLE_DEVICES."""


def ask_driver() -> Driver | None:
    """NVIDIA's driver and its GPUs; None where there is no driver."""
    listed = _said(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    if not listed:
        return None
    rows = [line.rpartition(",") for line in listed.splitlines() if "," in line]
    found = re.search(r"CUDA Version: *(\d+)\.(\d+)", _said(["nvidia-smi"]) or "")
    return Driver(
        tuple(name.strip() for name, _, _ in rows),
        rows[0][2].strip() if rows else "",
        (int(found[1]), int(found[2])) if found else None,
    )


def _said(command: list[str]) -> str | None:
    """A command's output; None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def judge_driver(driver: Driver | None, build: Build) -> Finding:
    """Whether the driver and this build of torch fit; without a GPU the CPU computes."""
    if driver is None or not driver.gpus:
        if build.available:
            return Finding("devices", "ok", f"torch {build.version} finds a GPU")
        if build.cuda:
            text = f"no GPU: the CPU computes (torch {build.version} would also know GPUs)"
            return Finding("devices", "ok", text)
        return Finding("devices", "ok", f"no GPU: the CPU computes (torch {build.version})")
    there = f"{len(driver.gpus)} GPU{'s' * (len(driver.gpus) > 1)} ({driver.gpus[0]})"
    if build.available:
        text = f"{there}, driver {driver.version}, torch {build.version}"
        return Finding("devices", "ok", text)
    if build.cuda is None:
        return Finding(
            "devices", "problem", f"{there}, but torch {build.version} is built for the CPU alone",
            "pip uninstall -y torch && pip install torch" + _index(driver.cuda),
        )  # fmt: skip
    if build.visible is not None and not re.match(r"\d|GPU|MIG", build.visible):
        return Finding(
            "devices", "note", f"{there}, hidden by CUDA_VISIBLE_DEVICES='{build.visible}'",
            "unset CUDA_VISIBLE_DEVICES",
        )  # fmt: skip
    text = f"{there}, but torch {build.version} cannot use it"
    needed = tuple(map(int, build.cuda.split(".")[:2]))
    if driver.cuda and driver.cuda < needed:
        text += (
            f": it is built for CUDA {build.cuda}, and driver {driver.version} knows CUDA up to "
            f"{driver.cuda[0]}.{driver.cuda[1]}"
        )
        mend = "pip uninstall -y torch && pip install torch" + _index(driver.cuda)
        return Finding("devices", "problem", text, mend)
    why = f"{shlex.quote(sys.executable)} -c 'import torch; torch.zeros(1, device=\"cuda\")'"
    return Finding("devices", "problem", f"{text}; this says why:", why)


def _index(cuda: tuple[int, int] | None) -> str:
    """Where pip finds the newest torch that a driver can run: within a major version, any."""
    if cuda is None:
        return ""
    fitting = [each for each in _CUDA_WHEELS if each[0] <= cuda[0]]
    if not fitting:
        return "  # after the driver was renewed: it is older than any CUDA that torch knows"
    number = "".join(map(str, fitting[0]))
    return f" --index-url https://download.pytorch.org/whl/cu{number}"


def _gpus() -> Iterator[Finding]:
    """Each device that torch finds: memory, and whether it computes."""
    import torch

    for index in range(torch.cuda.device_count()):
        name = f"cuda:{index}"
        try:
            free, total = torch.cuda.mem_get_info(index)
            major, minor = torch.cuda.get_device_capability(index)
            torch.ones(2, 2, device=name).mm(torch.ones(2, 2, device=name)).sum().item()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            yield Finding(
                name, "problem", f"it cannot compute: {reason}", "nvidia-smi  # or --device cpu"
            )
            continue
        text = (
            f"{torch.cuda.get_device_name(index)}, {bytes_text(free)} free of {bytes_text(total)}, "
            f"compute capability {major}.{minor}"
        )
        numbers = {"free": free, "total": total, "capability": [major, minor]}
        if free < total / 2:
            text += ": another program holds much of it"
            yield Finding(name, "note", text, "nvidia-smi", numbers)
        else:
            yield Finding(name, "ok", text, numbers=numbers)
    if torch.backends.mps.is_available():
        yield Finding("mps", "ok", "Apple's GPU can be used: --device mps")


def _precision(device: "torch.device") -> Finding:
    """Both precisions, measured by one matrix product in each."""
    import torch

    from vitrail.runs.machine import matrix_rate

    size = _GPU_SIZE if device.type == "cuda" else _CPU_SIZE
    rates = [
        matrix_rate(dtype, device, size=size, seconds=_SECONDS) / 1e9
        for dtype in (torch.float32, torch.bfloat16)
    ]
    if device.type == "cuda":
        native = "its tensor cores" if torch.cuda.is_bf16_supported(False) else ""
    else:
        flags = cpu_facts().flags
        native = " and ".join(word for flag, word in _FAST_BFLOAT16.items() if flag in flags)
    return judge_precision(device.type, rates[0], rates[1], native)


def judge_precision(device: str, float32: float, bfloat16: float, native: str) -> Finding:
    """Which `--precision` to take, from GFLOP/s of a matrix product in each."""
    measured = f"{float32:,.0f} GFLOP/s in float32, {bfloat16:,.0f} in bfloat16"
    has = f"bfloat16 by {native}" if native else "no instructions for bfloat16"
    numbers = {"device": device, "float32": round(float32, 1), "bfloat16": round(bfloat16, 1)}
    take = "bfloat16" if bfloat16 >= _WORTH * float32 else "float32"
    place = "CPU" if device == "cpu" else "GPU"
    text = f"{measured} on the {place} ({has}): take --precision {take}"
    return Finding("precision", "ok", text, numbers={**numbers, "take": take})


def compiler() -> Finding:
    """The C++ compiler that torch.compile calls on a CPU: a small program, translated."""
    command = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "program.cpp")
        source.write_text("#include <cmath>\n#include <vector>\nint main() { return 0; }\n")
        try:
            done = subprocess.run(
                [*shlex.split(command), "-std=c++17", "-O1", *openmp, "-shared", "-fPIC",
                 str(source), "-o", str(Path(folder, "program.so"))],
                capture_output=True, text=True, timeout=_COMPILE_SECONDS, cwd=folder,
            )  # fmt: skip
            failure = done.stderr.strip().splitlines()[-1:] if done.returncode else None
        except FileNotFoundError:
            text = f"there is no {command}, so --compile cannot be used on the CPU; all else works"
            return Finding("compiler", "note", text, "sudo apt-get install g++")
        except (OSError, subprocess.SubprocessError) as error:
            failure = [str(error)]
    if failure is not None:
        text = f"{command} fails, so --compile cannot be used on the CPU: {' '.join(failure)}"
        return Finding("compiler", "note", text, "sudo apt-get install --reinstall g++ libc6-dev")
    if not headers.is_file():
        text = f"{command} works, but Python.h is missing, so --compile cannot be used on the CPU"
        return Finding("compiler", "note", text, "sudo apt-get install python3-dev")
    return Finding("compiler", "ok", f"{command} works: --compile can be used")


def allocator(environment: Mapping[str, str]) -> Finding:
    """Which library gives out memory; one that is named but not there is ignored by the loader."""
    named = [entry for entry in re.split(r"[: ]+", environment.get("LD_PRELOAD", "")) if entry]
    lost = [entry for entry in named if "/" in entry and not Path(entry).exists()]
    if lost:
        text = f"LD_PRELOAD names {', '.join(lost)}, which is not there"
        return Finding("allocator", "note", text, "unset LD_PRELOAD")
    known = {"jemalloc", "tcmalloc", "mimalloc"}
    chosen = [name for name in known if any(name in entry for entry in named)]
    if chosen:
        return Finding("allocator", "ok", f"{chosen[0]} (LD_PRELOAD)")
    if not on_linux() or platform.libc_ver()[0] != "glibc":
        return Finding("allocator", "ok", "the system's")
    return Finding("allocator", "ok", "glibc's, told to keep what is freed while vitrail trains")
