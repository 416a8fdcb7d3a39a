"""The doctor: whether this machine, its packages, a data set and a run are fit to train.

finding    one line on one thing
machine    cores, memory, shared memory, open files, the clock
compute    torch's threads, devices, precision, compiler
packages   versions against what vitrail asks for
places     disks
images     a data set
run        a run folder

Each `judge_...` is a function of plain values, so that every sick machine can be tried on a sound
one. Nothing is changed, and torch is imported only by what looks at it.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from vitrail.data.sources.csvfile import Columns
from vitrail.data.sources.layout import USUAL, FolderRules
from vitrail.data.sources.mask_meaning import AS_THEY_SAY, MaskRules
from vitrail.doctor.finding import Finding as Finding


def examine(
    data: str | None = None,
    run: Path | None = None,
    columns: Columns | None = None,
    rules: FolderRules = USUAL,
    masks: MaskRules = AS_THEY_SAY,
) -> Iterator[Finding]:
    """Look at everything, one thing after another; what cannot be told is a note."""
    from vitrail.doctor.compute import compute_findings
    from vitrail.doctor.machine import machine_findings
    from vitrail.doctor.packages import package_findings
    from vitrail.doctor.places import place_findings

    runs = run.absolute().parent if run else Path("runs")
    yield from _sheltered("machine", machine_findings)
    yield from _sheltered("packages", package_findings)
    yield from _sheltered("torch", compute_findings)
    yield from _sheltered("disk", lambda: place_findings(runs))
    text = "not needed: nothing is fetched unless you name something that is elsewhere"
    yield Finding("network", "ok", text)
    if data is not None:
        from vitrail.doctor.images import data_findings

        named, told = data, columns or Columns()
        yield from _sheltered("data", lambda: data_findings(named, told, rules, masks))
    if run is not None:
        yield from _sheltered("run", lambda: _run_findings(run))


def is_run(place: str) -> bool:
    """Whether `place` is the folder of a run, whole or not, and no data."""
    folder = Path(place).expanduser()
    return any((folder / name).exists() for name in ("config.yaml", "checkpoints"))


def _run_findings(run: Path) -> Iterator[Finding]:
    from vitrail.doctor.run import run_findings

    return run_findings(run)


def _sheltered(topic: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A machine may be stranger than we know: that must not keep the rest from being looked at."""
    try:
        yield from look()
    except (ArithmeticError, ImportError, LookupError, OSError, RuntimeError, ValueError) as error:
        yield Finding(topic, "note", f"it cannot be told: {type(error).__name__}: {error}")
