"""`vitrail doctor`: is this machine, this data, this run fit to train; and if not, what to do."""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.text import Text

from vitrail.cli.dataset import ALL_AS_FOUND, OfAnyData
from vitrail.cli.parse import parse
from vitrail.cli.table import print_facts
from vitrail.doctor import Finding, examine, is_run
from vitrail.doctor.finding import Level
from vitrail.errors import UsageError

_ABOUT = """Look at machine, packages, devices and disks; of DATA at a sample of its images, of a
run's folder at its checkpoints, and at what a resume would say. Nothing is changed. Each problem
comes with the command that mends it; the exit code is 3 if there is one."""
_COLOURS: dict[Level, str] = {"ok": "green", "note": "yellow", "problem": "bold red"}


@dataclass(frozen=True)
class DoctorArgs:
    """What `vitrail doctor` takes."""

    places: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[DATA] [RUN]")
    ] = ()
    """DATA is a folder, a .csv or .txt, a .npz, IDX files, shards, samples:NAME, hf:NAME, or
    hf-stream:NAME; RUN is a folder that vitrail train wrote."""
    how: OfAnyData = ALL_AS_FOUND


def doctor(args: Sequence[str]) -> dict[str, Any]:
    """Examine, and print one line a finding."""
    given = parse(DoctorArgs, args, "doctor", _ABOUT)
    runs = [Path(place) for place in given.places if is_run(place)]
    data = [place for place in given.places if not is_run(place)]
    if len(runs) > 1 or len(data) > 1:
        raise UsageError(
            f"one data set and one run at a time: {' '.join(given.places)} are more than that"
        )
    looks = examine(
        data[0] if data else None,
        runs[0] if runs else None,
        given.how.columns(),
        given.how.rules(),
        given.how.masks,
    )
    findings = list(_shown(looks))
    counts = Counter(finding.level for finding in findings)
    levels: tuple[Level, ...] = ("problem", "note", "ok")
    print(", ".join(_counted(counts[level], level) for level in levels))
    return {
        "findings": [asdict(finding) for finding in findings],
        "problems": counts["problem"],
        "exit_code": 3 if counts["problem"] else 0,
    }


def _counted(count: int, level: Level) -> str:
    return f"{count} {level}" if level == "ok" or count == 1 else f"{count} {level}s"


def _shown(findings: Iterator[Finding]) -> Iterator[Finding]:
    """A table on a terminal; elsewhere a line each as soon as it is known."""
    if not sys.stdout.isatty():
        for finding in findings:
            print(f"{finding.level:<9}{finding.topic:<14}{finding.text}")
            if finding.mend:
                print(f"{'':<23}mend: {finding.mend}", flush=True)
            yield finding
        return
    rows: list[tuple[str | Text, ...]] = []
    live = Console(stderr=True).status("looking") if sys.stderr.isatty() else nullcontext()
    with live:
        for finding in findings:
            topic, text = Text(finding.topic, "bold"), Text(finding.text)
            rows.append((Text(finding.level, _COLOURS[finding.level]), topic, text))
            if finding.mend:
                rows.append(("", "", Text(finding.mend, "cyan")))
            yield finding
    print_facts(rows)
