import shutil

import pytest

from runs import harm


@pytest.fixture(scope="module")
def some():
    try:
        with harm.victims() as found:
            yield found
    except OSError as error:
        pytest.skip(f"cannot trace a process: {error}")


@pytest.fixture(scope="module")
def place(some, tmp_path_factory):
    """A run to be copied and harmed, and every system call of a save of a fourth checkpoint."""
    place = tmp_path_factory.mktemp("kills")
    try:
        return place, harm.points(some, place, step=4)
    except OSError as error:
        pytest.skip(f"strace may not attach to a process: {error}")


def test_a_save_is_flushed_and_renamed(place):
    calls = {call for call, _ in place[1]}
    assert {"fsync", "openat", "write"} <= calls and calls & {"rename", "renameat"}


def some_of(points, number):
    """Evenly over all of them."""
    return points[:: -(-len(points) // number)]


def test_a_kill_at_any_system_call_leaves_a_whole_checkpoint(some, place):
    removals = [(call, n) for call, n in place[1] if call.startswith(("unlink", "rmdir"))]
    points = some_of(place[1], 13) + some_of(removals[1:], 3)
    assert all([harm.kill_at(some, place[0], 4, *point) for point in points])


def test_a_kill_while_a_checkpoint_is_replaced_leaves_a_whole_one(some, place):
    renames = [(call, n) for call, n in place[1] if call.startswith("rename")]
    assert any([harm.kill_at(some, place[0], 3, *point) for point in renames])


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_a_failing_disk_is_told_and_leaves_a_whole_checkpoint(some, place, error):
    writes = [(call, n) for call, n in place[1] if call in ("write", "fsync", "rename", "mkdir")]
    told = [harm.fail_at(some, place[0], 4, *point, error) for point in some_of(writes, 5)]
    assert any(told)


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 4])
def test_every_system_call(some, place, step):
    points = place[1] if step == 4 else harm.points(some, place[0] / "again", step)
    assert all([harm.kill_at(some, place[0], step, *point) for point in points])
    shutil.rmtree(place[0] / "again", ignore_errors=True)
