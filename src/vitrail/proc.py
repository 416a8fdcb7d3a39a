"""What Linux says in /proc of the machine and of its processes; other systems have no such thing.

`root` is where it lies: "/", or a copy of it in the tests. Where nothing is said: `OSError`.
"""

from pathlib import Path

ROOT = Path("/")
_FORGET_PEAK = "5"  # proc(5), clear_refs


def _pairs(text: str) -> dict[str, str]:
    """`name: value`, one a line."""
    lines = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, colon, value in lines if colon}


def _bytes(value: str) -> int:
    """Of `1234 kB`, by which 1,024 bytes are meant; some counts have no unit."""
    number, *unit = value.split()
    return int(number) * (1024 if unit else 1)


def processor(root: Path = ROOT) -> dict[str, str]:
    """The first processor's fields: `model name`, `flags` (on Arm `Features`)."""
    text = (root / "proc/cpuinfo").read_text(errors="replace")
    return _pairs(text.split("\n\n")[0])


def memory(root: Path = ROOT) -> dict[str, int]:
    """Bytes of the machine's memory: `MemTotal`, `MemAvailable`."""
    pairs = _pairs((root / "proc/meminfo").read_text())
    return {name: _bytes(value) for name, value in pairs.items()}


def resident() -> int:
    """Bytes of this process that are in memory."""
    return _of_status("VmRSS")


def peak_resident() -> int:
    """The most bytes of this process that were in memory, since `forget_peak`."""
    return _of_status("VmHWM")


def forget_peak() -> None:
    """Count the peak from now on."""
    (ROOT / "proc/self/clear_refs").write_text(_FORGET_PEAK)


def can_forget_peak() -> bool:
    """Whether this system counts the peak, and can start anew."""
    return (ROOT / "proc/self/clear_refs").exists()


def _of_status(name: str) -> int:
    return _bytes(_pairs((ROOT / "proc/self/status").read_text())[name])


def state(pid: int) -> str:
    """One letter: R runs, S sleeps, T stopped, Z is over and not yet waited for."""
    stat = (ROOT / f"proc/{pid}/stat").read_text()
    return stat.rpartition(")")[2].split()[0]  # its name, in brackets, may hold anything
