"""The machine as this process may use it: cores, memory, shared memory, open files, the clock.

Linux says all of it in /proc and /sys; elsewhere less is known, and that is no problem. `root` is
where these lie: "/", or a copy of them in the tests.
"""

import math
import os
import platform
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vitrail import proc
from vitrail.doctor.finding import Finding, on_linux
from vitrail.units import bytes_text

_GIB = 2**30
_LEAST_FREE, _LITTLE_FREE = _GIB, 4 * _GIB
_LITTLE_SHARED = _GIB
_LEAST_FILES, _FEW_FILES = 256, 1024
_NO_LIMIT = 2**60
"""cgroup v1 writes a number near 2^63 where there is no limit."""


class Cores(NamedTuple):
    """How many there are, how many this process may run on, and what time it gets on them."""

    present: int
    allowed: int
    quota: float | None
    """Cores' worth of time that the cgroup allows; None: no limit."""

    @property
    def usable(self) -> int:
        """Threads that can compute at once."""
        return max(1, min(self.allowed, math.floor(self.quota or self.allowed)))


class Memory(NamedTuple):
    """Bytes: of the machine, of the cgroup (None: no limit), and what a new program could take."""

    total: int
    limit: int | None
    free: int


def machine_findings() -> Iterator[Finding]:
    """All of this file."""
    facts = cpu_facts()
    yield Finding(
        "machine",
        "ok",
        f"{facts.name or 'unknown processor'}, {platform.system()} {platform.release()} "
        f"{platform.machine()}, Python {platform.python_version()}",
    )
    yield judge_cores(cores(), load())
    if found := memory():
        yield judge_memory(found, killed_for_memory())
    if (shared := Path("/dev/shm")).is_dir():
        yield judge_shared(os.statvfs(shared))
    yield judge_files(*resource.getrlimit(resource.RLIMIT_NOFILE))
    yield judge_clock(time.time(), _newest_source())


class CpuFacts(NamedTuple):
    """What /proc/cpuinfo says of the first processor."""

    name: str
    flags: frozenset[str]


def cpu_facts(root: Path = proc.ROOT) -> CpuFacts:
    """The processor's name and features; empty where nothing says them."""
    try:
        fields = proc.processor(root)
    except OSError:
        return CpuFacts(platform.processor(), frozenset())
    flags = fields.get("flags") or fields.get("Features") or ""  # the latter on Arm
    return CpuFacts(fields.get("model name") or platform.processor(), frozenset(flags.split()))


def cores(root: Path = proc.ROOT) -> Cores:
    """Cores by the kernel, by this process's affinity and by its cgroup's quota."""
    present = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else present
    quotas = []
    for text in _cgroup_texts(root, "cpu", "cpu.max"):  # "200000 100000", or "max 100000"
        most, period = [*text.split(), "100000"][:2]
        if most != "max":
            quotas.append(int(most) / int(period))
    for quota, period in zip(
        _cgroup_texts(root, "cpu", "cpu.cfs_quota_us"),
        _cgroup_texts(root, "cpu", "cpu.cfs_period_us"),
        strict=False,
    ):
        if int(quota) > 0:
            quotas.append(int(quota) / int(period))
    return Cores(present, allowed, min(quotas, default=None))


def load() -> float | None:
    """How many threads computed or waited to, on average over the last minute."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return None


def judge_cores(found: Cores, busy: float | None) -> Finding:
    """Fewer than there are is fine; others at work on them is worth a note."""
    text = f"{found.usable} of {found.present} may be used"
    if found.allowed < found.present:
        text += f" (affinity allows {found.allowed})"
    if found.quota is not None and found.quota < found.allowed:
        text += f" (the cgroup's quota is {found.quota:g} cores)"
    numbers = {**found._asdict(), "usable": found.usable, "load": busy}
    if busy is not None and busy > 0.5 * found.present:
        text += f"; load {busy:.1f}: other programs compute here, so measured speeds are too low"
        return Finding("cores", "note", text, "ps aux --sort=-%cpu | head", numbers)
    return Finding("cores", "ok", text, numbers=numbers)


def memory(root: Path = proc.ROOT) -> Memory | None:
    """Memory by the kernel and by this process's cgroup; None where nothing says it."""
    try:
        found = proc.memory(root)
        total, free = found["MemTotal"], found["MemAvailable"]
    except (OSError, KeyError):
        return _memory_elsewhere()
    limits = []
    for most, used, reclaimable in _cgroup_memory(root):
        limits.append(most)
        free = min(free, max(0, most - used + reclaimable))
    return Memory(total, min(limits, default=None), free)


def _memory_elsewhere() -> Memory | None:
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None
    return Memory(total, None, total)


def _cgroup_memory(root: Path) -> Iterator[tuple[int, int, int]]:
    """Limit, use, and what of the use is only a cache of files, of each group with a limit."""
    for names in (("memory.max", "memory.current"), ("memory.limit_in_bytes",) * 2):
        for folder in _cgroup_folders(root, "memory"):
            most = _number(folder / names[0])
            if most is None or most >= _NO_LIMIT:
                continue
            used = _number(folder / names[1].replace("limit", "usage")) or 0
            yield most, used, _statistic(folder / "memory.stat", "inactive_file")


def killed_for_memory(root: Path = proc.ROOT) -> int:
    """How many processes of this cgroup the kernel has killed because memory ran out."""
    return max(
        (
            _statistic(folder / file, "oom_kill")
            for folder in _cgroup_folders(root, "memory")
            for file in ("memory.events", "memory.oom_control")
        ),
        default=0,
    )


def judge_memory(found: Memory, killed: int) -> Finding:
    """A model and its data need some gigabytes."""
    text = f"{bytes_text(found.free)} free of {bytes_text(found.limit or found.total)}"
    if found.limit is not None and found.limit < found.total:
        text += f" that the cgroup allows (the machine has {bytes_text(found.total)})"
    numbers = {**found._asdict(), "killed": killed}
    look = "ps aux --sort=-rss | head"
    if found.free < _LEAST_FREE:
        return Finding("memory", "problem", f"{text}: too little to train", look, numbers)
    if killed:
        text += f"; the kernel has killed {killed} processes here for want of it"
        return Finding("memory", "note", text, look, numbers)
    if found.free < _LITTLE_FREE:
        text += ": enough for small models (--micro-batch and --checkpointing need less)"
        return Finding("memory", "note", text, look, numbers)
    return Finding("memory", "ok", text, numbers=numbers)


def judge_shared(disk: os.statvfs_result) -> Finding:
    """Worker processes and processes that train together exchange tensors through /dev/shm."""
    size, free = disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize
    numbers = {"size": size, "free": free}
    text = f"/dev/shm has {bytes_text(free)} free of {bytes_text(size)}"
    if free < _LITTLE_SHARED:
        text += ": enough for one process; several, as with --devices, may need more"
        mend = "sudo mount -o remount,size=8g /dev/shm"
        return Finding("shared memory", "note", text, mend, numbers)
    return Finding("shared memory", "ok", text, numbers=numbers)


def judge_files(soft: int, hard: int) -> Finding:
    """Shards, workers and logs are open at once."""
    unlimited = soft == resource.RLIM_INFINITY
    numbers = {"soft": soft, "hard": hard}
    if unlimited or soft >= _FEW_FILES:
        most = "any number of" if unlimited else f"{soft:,}"
        return Finding("open files", "ok", f"{most} files may be open", numbers=numbers)
    target = 4096 if hard == resource.RLIM_INFINITY else min(hard, 4096)
    few = soft < _LEAST_FILES
    text = f"only {soft} files may be open: {'too few' if few else 'few'} for several workers"
    return Finding("open files", "problem" if few else "note", text, f"ulimit -n {target}", numbers)


def judge_clock(now: float, newest_source: float) -> Finding:
    """A clock that lags behind the program's own files is wrong."""
    shown = time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(now))
    if now < newest_source - 86400:
        text = f"it says {shown}, before vitrail's own files were made: logs will mislead"
        return Finding("clock", "problem", text, "sudo timedatectl set-ntp true")
    return Finding("clock", "ok", shown)


def _newest_source() -> float:
    return max(file.stat().st_mtime for file in Path(__file__).parents[1].rglob("*.py"))


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """The folders of this process's cgroup and of those above it, of version 2 and version 1.

    Inside a container the path may be that of the host, which is not there: the controller's own
    folder is then this container's.
    """
    if not on_linux() and root == proc.ROOT:
        return []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, names, path = [*line.split(":", 2), "", ""][:3]
        if names and controller not in names.split(","):
            continue
        base = root / "sys/fs/cgroup" / (controller if names else "")
        inner = [part for part in path.split("/") if part and part != ".."]
        for depth in range(len(inner), -1, -1):
            folder = base.joinpath(*inner[:depth])
            if folder.is_dir():
                folders.append(folder)
    return folders


def _cgroup_texts(root: Path, controller: str, name: str) -> Iterator[str]:
    for folder in _cgroup_folders(root, controller):
        try:
            yield (folder / name).read_text().strip()
        except OSError:
            continue


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _statistic(file: Path, name: str) -> int:
    """The number behind a name, one pair a line; 0 if there is none."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    pairs = (line.split() for line in lines)
    return next((int(pair[1]) for pair in pairs if len(pair) == 2 and pair[0] == name), 0)
