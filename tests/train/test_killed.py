"""A run that is killed at any time goes on as if nothing had happened; by the benchmark's code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vitrail

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "reliability.py"


def measured(*args: str) -> dict:
    """What the script found, in an interpreter of its own: it forks, and must have no threads."""
    if not SCRIPT.is_file():
        pytest.skip("a source distribution has no benchmarks")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *args, "--json"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(vitrail.__file__).parents[1])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_kills_at_random_times_change_nothing():
    found = measured("--part", "kills", "--count", "12")["kills"]
    assert found["kills"] == 12 and found["mismatches"] == found["orphans"] == 0
    # They did strike while something was going on.
    assert found["killed"]["killed between them"] >= 1


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced():
    found = measured("--part", "processes", "--count", "3")["processes"]
    assert found["kills"] == 3 and found["mismatches"] == 0


@pytest.mark.slow
def test_memory_does_not_grow():
    found = measured("--part", "memory", "--count", "4000")["memory"]
    assert found["steps"] == 4000 and found["mb_per_1000_steps"] < 1
