import errno
import json
import os
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vitrail.errors import DataError
from vitrail.runs import read_checkpoint, write_checkpoint

TENSORS = {
    "model": {"head.weight": torch.arange(6.0).view(2, 3), "steps": torch.tensor(7)},
    "optimizer": {"0.exp_avg": torch.ones(2, 3, dtype=torch.bfloat16)},
}
STATE = {"progress": {"step": 3}, "classes": ["a", "b"]}


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(tmp_path / "last", TENSORS, STATE)
    return tmp_path / "last"


def test_round_trip(folder):
    checkpoint = read_checkpoint(folder)
    assert checkpoint.state == STATE
    for part, named in TENSORS.items():
        for name, tensor in named.items():
            assert torch.equal(checkpoint.tensors[part][name], tensor)
            assert checkpoint.tensors[part][name].dtype == tensor.dtype
    assert sorted(p.name for p in folder.parent.iterdir()) == ["last"]


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_flipped_bit_or_cut_is_noticed(folder, data):
    victim = data.draw(st.sampled_from(sorted(folder.iterdir())))
    good = victim.read_bytes()
    place = data.draw(st.integers(0, len(good) - 1))
    if data.draw(st.booleans()):
        bad = bytearray(good)
        bad[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        bad = good[:place]
    victim.write_bytes(bad)
    try:
        with pytest.raises(DataError, match=re.escape(str(folder))):
            read_checkpoint(folder)
    finally:
        victim.write_bytes(good)


@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_a_full_disk_leaves_the_old_checkpoint(folder, monkeypatch, failing):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if failing == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr("pathlib.Path.rename", full)
    with pytest.raises(DataError, match=r"No space left.*Make room"):
        write_checkpoint(folder, TENSORS, {"progress": {"step": 4}})
    monkeypatch.undo()
    assert read_checkpoint(folder).state == STATE


@pytest.mark.parametrize("kill_at", range(1, 5))
def test_a_kill_at_any_rename_leaves_a_whole_checkpoint(folder, monkeypatch, kill_at):
    class Killed(BaseException):
        pass

    calls = 0
    from pathlib import Path

    rename = Path.rename

    def dying(self, target):
        nonlocal calls
        calls += 1
        if calls == kill_at:
            raise Killed
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", dying)
    newer = {"progress": {"step": 4}}
    try:
        write_checkpoint(folder, TENSORS, newer)
    except Killed:
        assert read_checkpoint(folder).state == STATE
    else:
        assert kill_at > 2 and read_checkpoint(folder).state == newer
    monkeypatch.undo()
    write_checkpoint(folder, TENSORS, newer)
    assert read_checkpoint(folder).state == newer
    assert sorted(p.name for p in folder.parent.iterdir()) == ["last"]


def test_nothing_outside_the_folder_is_read(folder):
    (folder.parent / "secret").write_text("x")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"]["../secret"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="outside itself"):
        read_checkpoint(folder)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no whole checkpoint in .*nowhere"):
        read_checkpoint(tmp_path / "nowhere")
