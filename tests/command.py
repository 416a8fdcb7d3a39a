"""The command line in this process, and what it says."""

import hashlib
import json
import os
import signal
from pathlib import Path

import pytest

from vitrail import job
from vitrail.cli import main
from vitrail.runs import Run
from vitrail.training import Interrupted


def vitrail(capfd, *args) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    code = main([str(arg) for arg in args])
    captured = capfd.readouterr()
    return code, captured.out, captured.err


def last_json(out: str) -> dict:
    return json.loads(out.splitlines()[-1])


def interrupted(run: Path, other: Path, step: int) -> None:
    """The same run again, into another folder, and stopped after a step."""

    def stop(event: dict) -> None:
        if event.get("step") == step and "loss" in event:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="--resume"):
        job.train(Run(run).config(), other, listen=stop)


def contents(folder: Path) -> dict[str, str]:
    files = (f for f in sorted(folder.rglob("*")) if f.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
