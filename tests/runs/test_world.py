import json
import os
import re
import threading
import time
from dataclasses import replace

import pytest
import torch
from torch.distributed import HashStore, PrefixStore

from vitrail.errors import DataError, UsageError
from vitrail.recipes import RECIPES, Facts
from vitrail.runs import join as joining
from vitrail.runs import watchdog
from vitrail.runs.join import check_layout, join_world
from vitrail.runs.notes import TOLD_IN, Notes
from vitrail.runs.watchdog import Lost, Pulse
from vitrail.runs.world import ALONE, World


@pytest.fixture
def config():
    facts = Facts("", 1000, 10, 3, 224, gpu=False, bfloat16=False, start=None)
    return replace(RECIPES["scratch"].config(facts), device="cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(watchdog, "_BEAT_SECONDS", 0.01)


def test_one_process_hears_itself():
    assert ALONE.gather({"a": 1}) == [{"a": 1}]
    assert ALONE.lead_says("x") == "x"
    rows = torch.ones(3, 2)
    assert ALONE.rows(rows) is rows and ALONE.sum(rows) is rows


def test_what_processes_say_is_gathered_in_their_order():
    store, heard = HashStore(), {}

    def speak(rank):
        world = World(rank, 3, rank, store)
        heard[rank] = [world.gather(rank * 10 + talk) for talk in range(4)]

    threads = [threading.Thread(target=speak, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert heard[0] == heard[1] == heard[2] == [[i, 10 + i, 20 + i] for i in range(4)]


def test_processes_agree_on_a_name_although_others_have_talked_in_their_store():
    store, names = HashStore(), set()
    store.set("here 1", "one that has died")
    for _ in range(3):
        agreed = {}

        def join(rank, agreed=agreed):
            agreed[rank] = joining._agreed_name(store, rank, 3, 60)

        threads = [threading.Thread(target=join, args=(rank,)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert agreed.keys() == {0, 1, 2} and len(set(agreed.values())) == 1
        names |= set(agreed.values())
    assert len(names) == 3
    with pytest.raises(TimeoutError, match="no word from process 1, 2"):
        joining._agreed_name(store, 0, 3, 0.1)
    with pytest.raises(TimeoutError, match="the first"):
        joining._agreed_name(store, 1, 3, 0.1)


def test_a_lost_process_is_told_once_a_start_and_an_error_of_the_users_once_a_launch():
    store, (lost, fault) = HashStore(), (Lost("process 1 is gone", "."), DataError("no images"))
    launch, first, second = (Notes(PrefixStore(name, store)) for name in "abc")
    assert [joining._tells(lost, launch, each) for each in (first, first, second)] == [1, 0, 1]
    assert launch.get("told") is None
    assert [joining._tells(fault, launch, each) for each in (first, second)] == [1, 0]
    assert launch.get("told") == {"error": "no images", "exit_code": 3}


def test_a_launcher_of_ours_tells_what_the_first_has_left_for_it(tmp_path, monkeypatch):
    monkeypatch.setenv(TOLD_IN, str(tmp_path))
    notes = Notes()
    for name in ("process 1 is gone", "process 2 is gone"):
        assert not joining._tells(Lost(name, "."), notes, notes)
    assert json.loads((tmp_path / "missing").read_text())["what"] == "process 1 is gone"


def wait_for(said):
    until = time.monotonic() + 60
    while not said and time.monotonic() < until:
        time.sleep(0.01)
    return str(said[0])


def test_a_process_that_stays_behind_is_named(monkeypatch):
    monkeypatch.setattr(Pulse.missing, "__defaults__", (0.3,))
    store, said = HashStore(), []
    first = Pulse(0, 2, store, 0.5, said.append)
    second = Pulse(1, 2, store, 1e9, said.append)
    try:
        second.at(3)
        first.at(4)
        words = rf"step 5 .*process 1 \(pid {os.getpid()} .* still at step 3"
        assert re.search(words, wait_for(said))
    finally:
        first.stop()
        second.stop()


def test_a_process_that_is_silent_is_named_even_between_steps(monkeypatch):
    store, said = HashStore(), []
    monkeypatch.setattr(Pulse.missing, "__defaults__", (0.3,))
    first = Pulse(0, 2, store, 0.5, said.append)
    second = Pulse(1, 2, store, 1e9, said.append)
    second.stop()
    try:
        assert re.search(r"silent for .*process 1 \(pid .* is silent", wait_for(said))
    finally:
        first.stop()


def test_what_is_no_step_may_take_as_long_as_it_wants(monkeypatch):
    store, said = HashStore(), []
    monkeypatch.setattr(Pulse.missing, "__defaults__", (0.1,))
    pulses = [Pulse(rank, 2, store, 0.3, said.append) for rank in range(2)]
    try:
        time.sleep(0.6)
        for pulse in pulses:
            pulse.at(1)
            pulse.rest()
        time.sleep(0.6)
        assert not said
    finally:
        for pulse in pulses:
            pulse.stop()


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_others_that_cannot_be_reached(host, monkeypatch):
    monkeypatch.setattr(joining, "_LEAST_JOIN_SECONDS", 0.1)
    names = {"WORLD_SIZE": 2, "RANK": 1, "LOCAL_RANK": 1, "MASTER_ADDR": host, "MASTER_PORT": 9}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    with (
        pytest.raises(Lost, match=f"process 1 of 2 .* cannot reach the others at {host}:9: "),
        join_world("cpu", 0.1),
    ):
        pass


def test_a_layout_that_cannot_be(config):
    check_layout(config, 1)
    check_layout(config, 2)
    with pytest.raises(UsageError, match=r"set data.batch_size to \d+ or \d+"):
        check_layout(config, 7)
    with pytest.raises(UsageError, match="one device"):
        check_layout(replace(config, device="cuda:1"), 2)


def test_more_processes_than_gpus(config, monkeypatch):
    monkeypatch.setattr(joining, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DataError, match="it has 1: take devices 1"):
        check_layout(replace(config, device="cuda"), 2)
