"""The command line in this process, and what it says."""

import json

from vitrail.cli import main


def vitrail(capfd, *args) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    code = main([str(arg) for arg in args])
    captured = capfd.readouterr()
    return code, captured.out, captured.err


def last_json(out: str) -> dict:
    return json.loads(out.splitlines()[-1])
