import errno
import json
import math
import multiprocessing
import os
import resource
import shutil
import subprocess
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from close import close
from runs import harm
from vitrail.errors import DataError, UsageError
from vitrail.models import ViTConfig, build
from vitrail.runs import DataConfig, Run, TrainConfig, read_checkpoint, write_checkpoint
from vitrail.runs.checkpoint import flatten_optimizer, model_sha256, restore_optimizer
from vitrail.runs.load import load
from vitrail.runs.store import Checkpoints, Shard

RELEASES = Path(__file__).parent / "releases"
CLASSES = {"classes": ["a", "b"], "multi_label": False}
CONFIG = TrainConfig(
    data=DataConfig(path="photos"),
    model=ViTConfig(depth=1, width=8, heads=1, mlp=8, patch=(8, 8), image_size=(8, 8), classes=2),
    epochs=1,
)
relaxed = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "run", CONFIG)


def steps(run: Run) -> list[int]:
    return [int(folder.name.removeprefix("step-")) for folder in run.checkpoints()]


def name(run: Run, checkpoint: str) -> str:
    return run.checkpoint(checkpoint).name


# Names and retention


def test_a_run_finds_its_checkpoints_by_name(run):
    with Checkpoints(run, keep=9) as checkpoints:
        for step, score in {800: None, 1000: 0.5, 1100: 0.5, 1200: 0.25}.items():
            harm.save(checkpoints, step, score)
    assert name(run, "last") == "step-00001200" and name(run, "best") == "step-00001000"
    assert name(run, "step-800") == name(run, "step-00000800") == "step-00000800"
    assert steps(run) == [1200, 1100, 1000, 800]
    assert read_checkpoint(run.checkpoint("best")).state == {
        "progress": {"step": 1000},
        "score": 0.5,
    }
    with pytest.raises(UsageError, match=r"'first': say last, best or step-NUMBER"):
        run.checkpoint("first")
    with pytest.raises(UsageError, match="at least 2"):
        Checkpoints(run, keep=1)


@relaxed
@given(
    scores=st.lists(st.none() | st.sampled_from([0.1, 0.2, 0.3, math.nan]), min_size=1, max_size=9),
    keep=st.integers(2, 3),
)
def test_the_newest_and_the_best_stay(tmp_path, monkeypatch, scores, keep):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    run = Run.create(tmp_path / str(len(list(tmp_path.iterdir()))), CONFIG)
    with Checkpoints(run, keep) as checkpoints:
        for step, score in enumerate(scores):
            harm.save(checkpoints, step, score)
    last = len(scores) - 1
    known = [s if s is not None and s == s else -1 for s in scores]
    best = known.index(max(known)) if max(known) > 0 else None
    expected = {step for step in range(last - keep + 1, last + 1) if step >= 0} | {best}
    assert set(steps(run)) == expected - {None}
    assert name(run, "last") == f"step-{last:08d}"
    assert name(run, "best") == ("best" if best is None else f"step-{best:08d}")


def test_a_step_saved_again_is_replaced_and_what_came_after_it_goes(run):
    with Checkpoints(run, keep=3) as checkpoints:
        for step in (10, 20, 30):
            harm.save(checkpoints, step, 0.5)
        checkpoints.save(20, harm.tensors(20), {"again": True})
    assert steps(run) == [20, 10] and read_checkpoint(run.checkpoint("last")).state["again"]
    assert len(list(run.checkpoints_folder.iterdir())) == 2


def test_an_old_one_that_cannot_be_read_does_not_cost_the_best(run):
    with Checkpoints(run) as checkpoints:
        for step, score in {1: 0.9, 2: 0.1, 3: 0.3, 4: 0.2}.items():
            harm.save(checkpoints, step, score)
        checkpoints.flush()
        assert steps(run) == [4, 3, 1]
        (run.checkpoint("step-3") / "state.json").write_text("{}")
        for step in (5, 6):
            harm.save(checkpoints, step, 0.2)
    assert steps(run) == [6, 5, 3, 1] and name(run, "best") == "step-00000001"


def test_what_killed_processes_left_is_cleared_away(run):
    harm.save(checkpoints := Checkpoints(run), 1, 0.1)
    harm.save(checkpoints, 2, 0.2)
    checkpoints.close()
    place = run.checkpoints_folder
    shutil.copytree(place / "step-00000001", place / ".step-00000003.writing")
    shutil.copytree(place / "step-00000001", place / ".step-00000002.deleting")
    shutil.copytree(place / "step-00000001", place / ".step-00000001.old")
    (place / "step-00000002").rename(place / ".step-00000002.old")  # between two renames
    assert steps(run) == [2, 1] and name(run, "best") == "step-00000002"
    assert checkpoints.newest()[0].state["progress"]["step"] == 2
    checkpoints.tidy()
    assert sorted(p.name for p in place.iterdir()) == ["step-00000001", "step-00000002"]
    assert checkpoints.newest()[0].state["progress"]["step"] == 2


# Writing


def test_a_save_copies_and_the_next_one_waits(run, monkeypatch):
    writing, go = threading.Event(), threading.Event()
    real = os.fsync

    def slow(descriptor):
        writing.set()
        assert go.wait(30)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    weight, state = torch.ones(4), {"list": [1]}
    with Checkpoints(run) as checkpoints:
        checkpoints.save(1, {"model": {"w": weight}}, state)
        assert writing.wait(30)
        weight.zero_()
        state["list"].append(2)
        second = threading.Thread(
            target=checkpoints.save, args=(2, {"model": {"w": weight}}, state), daemon=True
        )
        second.start()
        assert steps(run) == [] and second.is_alive()
        go.set()
        second.join()
    found = read_checkpoint(run.checkpoint("step-1"))
    assert found.tensors["model"]["w"].tolist() == [1] * 4 and found.state == {"list": [1]}
    assert steps(run) == [2, 1]


ODD = {
    "double": torch.ones(2, dtype=torch.float64),
    "half": torch.arange(3).to(torch.float16),
    "bfloat16": torch.arange(5).to(torch.bfloat16),
    "number": torch.tensor(7),
    "flag": torch.tensor([True, False, True]),
    "bytes": torch.arange(3, dtype=torch.uint8),
    "small": torch.arange(3, dtype=torch.int8),
    "empty": torch.zeros(0, 3),
    "turned": torch.arange(6.0).view(2, 3).T,
    "channels_last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "spread": torch.ones(1, 3).expand(4, 3),
    "part": torch.arange(10.0)[3:7:2],
    "learnt": torch.nn.Parameter(torch.ones(3)),
}
ODD["tied"] = ODD["learnt"]


@pytest.mark.parametrize("way", ["background", "at once"])
def test_every_kind_of_tensor_comes_back(run, way):
    if way == "at once":
        write_checkpoint(run.checkpoint("last"), {"model": ODD}, {})
    else:
        with Checkpoints(run) as checkpoints:
            checkpoints.save(1, {"model": ODD}, {})
    ours = read_checkpoint(run.checkpoint("last")).tensors["model"]
    theirs = load_file(run.checkpoint("last") / "model.safetensors")
    for found in (ours, theirs):
        assert found.keys() == ODD.keys()
        for key, tensor in ODD.items():
            assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key
    content = (run.checkpoint("last") / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    for key, tensor in json.loads(content[8 : 8 + length]).items():
        assert tensor["data_offsets"][0] % ODD[key].element_size() == 0, "can be read in place"


def test_every_bit_of_a_manifest_counts(run):
    write_checkpoint(run.checkpoint("last"), {"model": {}}, {"a": 1})
    file = run.checkpoint("last") / "manifest.json"
    good = file.read_bytes()
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bad)
        with pytest.raises(DataError):
            read_checkpoint(run.checkpoint("last"))


# What goes wrong while writing


def filled(run: Run) -> Checkpoints:
    with Checkpoints(run) as checkpoints:
        for step in (1, 2):
            harm.save(checkpoints, step, 0.1 * step)
    return checkpoints


def told(checkpoints: Checkpoints, tensors: dict[str, dict[str, Tensor]]) -> str:
    """What a save says that cannot succeed; the checkpoints before it are whole."""
    checkpoints.save(3, tensors, {"progress": {"step": 3}})
    with pytest.raises(DataError) as error:
        checkpoints.flush()
    checkpoints.flush()  # it is said once
    return str(error.value)


def test_too_large_a_file_is_told(run):
    checkpoints = filled(run)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        said = told(checkpoints, {"model": {"w": torch.zeros(2**18)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{run.path}/checkpoints/step-00000003: File too large (it needs 1.0 MiB, " in said
    assert "ulimit -f" in said and "go on with --resume" in said
    assert steps(run) == [2, 1] and checkpoints.newest()[1] == ()
    with checkpoints:
        harm.save(checkpoints, 4, None)
    assert steps(run) == [4, 2]


@pytest.fixture
def disk(tmp_path):
    """A disk of one MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_or_read_only_disk_is_told(disk):
    checkpoints = filled(run := Run.create(disk / "run", CONFIG))
    said = told(checkpoints, {"model": {"w": torch.zeros(2**18)}})
    assert "No space left on device (it needs 1.0 MiB, " in said and "are free there" in said
    assert "Make room" in said
    assert sorted(p.name for p in run.checkpoints_folder.iterdir()) == [
        "step-00000001",
        "step-00000002",
    ]
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    said = told(checkpoints, harm.tensors(3))
    assert "Read-only file system" in said and "Make that disk writable" in said
    assert checkpoints.newest()[0].state["progress"]["step"] == 2
    checkpoints.tidy()
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    with checkpoints:
        harm.save(checkpoints, 4, None)


def test_a_run_that_vanished_is_told_and_not_made_anew(run):
    checkpoints = filled(run)
    run.path.rename(run.path.with_name("moved"))
    said = told(checkpoints, harm.tensors(3))
    assert "No such file" in said and "Put it back" in said
    assert not run.path.exists()
    assert len(Run(run.path.with_name("moved")).checkpoints()) == 2


def test_an_error_of_the_disk_does_not_hide_another(run, monkeypatch):
    checkpoints = filled(run)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="first") as error, checkpoints:
        harm.save(checkpoints, 3, None)
        raise ValueError("first")
    assert "No space left" in error.value.__notes__[0]
    with pytest.raises(DataError, match="No space left"), checkpoints:
        harm.save(checkpoints, 3, None)


def test_a_fault_of_ours_is_not_swallowed(run):
    with pytest.raises(KeyError), Checkpoints(run) as checkpoints:
        checkpoints.save(1, {"model": {"w": torch.zeros(2, dtype=torch.complex128)}}, {})
    with pytest.raises(TypeError):
        checkpoints.save(1, {}, {"progress": object()})


# What goes wrong on the disk


def test_flipped_bits_and_cuts_are_noticed_and_the_one_before_is_used(tmp_path):
    run = harm.made_run(tmp_path / "run")
    assert harm.damage(run, flips=60, cuts=20) == {"flips": 60, "cuts": 20}


def test_damaged_ones_are_passed_over_with_a_sentence_each(run):
    checkpoints = Checkpoints(run)
    with pytest.raises(DataError, match="has no checkpoint any more"):
        checkpoints.newest()
    run = harm.made_run(run.path.with_name("three"))
    checkpoints = Checkpoints(run)
    (run.checkpoint("step-3") / "model.safetensors").unlink()
    file = run.checkpoint("step-2") / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    found, problems = checkpoints.newest()
    assert found.folder == run.checkpoint("step-1")
    assert "model.safetensors is missing" in problems[0]
    assert "optimizer.safetensors is damaged: it has 32087 bytes, not 32088" in problems[1]
    (run.checkpoint("step-1") / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match=r"no checkpoint of .* is whole: .*missing.*damaged"):
        checkpoints.newest()


def test_a_damaged_checkpoint_names_those_that_can_be_used(run):
    model = {"model": build(CONFIG.model).state_dict()}
    with Checkpoints(run, keep=4) as checkpoints:
        for step, score in {1: 0.3, 2: 0.9, 3: 0.5, 4: 0.4}.items():
            checkpoints.save(step, model, CLASSES, score)
    loaded = load(run, "best")
    assert loaded.checkpoint == "best" and loaded.folder == run.checkpoint("step-2")
    assert loaded.sha256 == model_sha256(run.checkpoint("step-1"))
    assert load(run, "step-4").folder == load(run).folder == run.checkpoint("last")
    for step in (2, 4):
        (run.checkpoint(f"step-{step}") / "model.safetensors").write_bytes(b"")
    with pytest.raises(DataError) as error:
        load(run, "last")
    assert str(error.value).endswith(
        "What can be used instead: checkpoint step-3 (the best of them) or step-1"
    )
    with pytest.raises(DataError, match=r"no whole checkpoint in .*step-00000007.* checkpoint s"):
        load(run, "step-7")


def test_a_run_that_goes_on_while_it_is_read(run, monkeypatch):
    """The last checkpoint goes between being found and being read; another takes its place."""
    model = {"model": build(CONFIG.model).state_dict()}
    with Checkpoints(run) as checkpoints:
        checkpoints.save(1, model, CLASSES)
        checkpoints.flush()
        place = type(run).checkpoint

        def then_gone(self, name):
            found = place(self, name)
            monkeypatch.undo()
            for step in (2, 3, 4):
                checkpoints.save(step, model, CLASSES)
            checkpoints.flush()
            return found

        monkeypatch.setattr(Run, "checkpoint", then_gone)
        assert load(run, "last").folder.name == "step-00000004"


# Runs of earlier releases


RELEASED = {"last": -1.033407211303711, "best": -0.7917606830596924}
"""The first logit of what the releases trained, for a picture of a ramp, as they gave it."""


@pytest.mark.parametrize("file", sorted(RELEASES.glob("*.zip")), ids=lambda file: file.stem)
def test_runs_of_every_release_load_and_go_on(tmp_path, file):
    with zipfile.ZipFile(file) as packed:
        packed.extractall(tmp_path)
    run = Run(tmp_path)
    ramp = torch.linspace(-1, 1, 256).view(1, 1, 16, 16)
    for checkpoint, logit in RELEASED.items():
        loaded = load(run, checkpoint)
        with torch.inference_mode():
            assert loaded.model(ramp)[0, 0].item() == pytest.approx(logit, abs=1e-5)
        assert loaded.names == ("dark", "light", "striped")
    assert [folder.name for folder in run.checkpoints()] == ["last", "best"]
    with Checkpoints(run) as checkpoints:
        found, problems = checkpoints.newest()
        assert found.state["progress"]["step"] == 12 and not problems
        checkpoints.save(13, found.tensors, found.state, score=0.2)
        checkpoints.flush()
        assert [folder.name for folder in run.checkpoints()] == ["step-00000013", "last", "best"]
        assert name(run, "last") == "step-00000013" and name(run, "best") == "best"
        checkpoints.save(14, found.tensors, found.state, score=0.9)
    assert [folder.name for folder in run.checkpoints()] == ["step-00000014", "step-00000013"]


KINDS = Path(__file__).parent / "kinds.zip"
"""Tiny runs of every kind that there was before tasks had one contract, and what they answer."""


def test_runs_of_every_kind_from_before_the_contract_answer_the_same(tmp_path):
    with zipfile.ZipFile(KINDS) as packed:
        packed.extractall(tmp_path)
    logits = json.loads((tmp_path / "logits.json").read_text())
    assert set(logits) == {"distil", "lora", "native", "probe", "pruned", "several", "single"}
    ramp = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    for kind, expected in logits.items():
        loaded = load(Run(tmp_path / kind))
        with torch.inference_mode():
            close(loaded.model(ramp)[0], torch.tensor(expected))
        assert loaded.task.targets.several == (kind == "several")
        assert loaded.names == ("blue", "green", "red")
        with Checkpoints(Run(tmp_path / kind)) as checkpoints:
            found, problems = checkpoints.newest()
            assert found.state["progress"]["step"] and not problems


# Several processes


class Threads:
    """A crew of threads."""

    def __init__(self, rank: int, said: list[str], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, len(said)
        self._said, self._barrier = said, barrier

    def gather(self, value):
        self._said[self.rank] = json.dumps(value)
        self._barrier.wait(30)
        heard = [json.loads(said) for said in self._said]
        self._barrier.wait(30)
        return heard


def crew(size: int) -> list[Threads]:
    said, barrier = [""] * size, threading.Barrier(size)
    return [Threads(rank, said, barrier) for rank in range(size)]


def together(crew: list[Threads], act) -> list[object]:
    """What `act(member)` gives or raises in each member's thread."""
    results: list[object] = [None] * len(crew)

    def work(member: Threads) -> None:
        try:
            results[member.rank] = act(member)
        except Exception as error:
            results[member.rank] = error

    threads = [threading.Thread(target=work, args=(member,)) for member in crew]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def dealt(whole: Tensor, rank: int, size: int) -> Shard:
    chunks = whole.chunk(size)
    local = chunks[rank] if rank < len(chunks) else whole[:0]
    return Shard(local, len(whole))


@relaxed
@given(
    size=st.integers(1, 4),
    readers=st.integers(1, 3),
    rows=st.lists(st.integers(0, 9), min_size=1, max_size=3),
)
def test_rows_of_several_processes_make_whole_tensors(tmp_path, monkeypatch, size, readers, rows):
    run = Run.create(tmp_path / str(len(list(tmp_path.iterdir()))), CONFIG)
    whole = {str(i): torch.randn(n, 2) for i, n in enumerate(rows)}

    monkeypatch.setattr(os, "fsync", lambda descriptor: None)

    def act(member: Threads) -> None:
        part = {key: dealt(value, member.rank, size) for key, value in whole.items()}
        same = {"count": torch.tensor(5)}
        with Checkpoints(run, crew=member) as checkpoints:
            checkpoints.save(1, {"model": part | same, "same": same}, {"a": member.rank}, 0.5)

    assert together(crew(size), act) == [None] * size
    names = {file.name for file in run.checkpoint("last").iterdir()}
    shards = {f"model.{i + 1}-of-{size}.safetensors" for i in range(size)}
    models = shards if size > 1 else {"model.safetensors"}
    assert names == models | {"same.safetensors", "state.json", "manifest.json"}
    for found, problems in together(crew(readers), lambda m: Checkpoints(run, crew=m).newest()):
        assert problems == () and found.state == {"a": 0, "score": 0.5}
        assert found.tensors["same"] == {"count": torch.tensor(5)}
        assert found.tensors["model"].keys() == whole.keys() | {"count"}
        for key, value in whole.items():
            assert torch.equal(found.tensors["model"][key], value)


def rows_of(member: Threads, step: int) -> dict[str, dict[str, Shard]]:
    whole = torch.full((7, 3), float(step))
    return {"model": {"w": dealt(whole, member.rank, member.size)}}


@pytest.mark.parametrize("failing", range(3))
def test_if_one_process_cannot_write_all_are_told(run, monkeypatch, failing):
    import vitrail.runs.store as store

    real = store.write_tensors
    broken = False

    def full(file, tensors):
        if broken and f".{failing + 1}-of-" in file.name:
            raise OSError(errno.EIO, "Input/output error")
        return real(file, tensors)

    monkeypatch.setattr(store, "write_tensors", full)
    threads = crew(3)
    made = [Checkpoints(run, crew=member) for member in threads]

    def act(member: Threads, step: int) -> None:
        made[member.rank].save(step, rows_of(member, step), {})
        made[member.rank].flush()

    together(threads, lambda member: act(member, 1))
    broken = True
    for rank, error in enumerate(together(threads, lambda member: act(member, 2))):
        assert isinstance(error, DataError) and "Input/output error" in str(error)
        assert rank == failing or f"process {failing} of 3: " in str(error)
    assert [entry.name for entry in run.checkpoints_folder.iterdir()] == ["step-00000001"]
    broken = False
    assert together(threads, lambda member: act(member, 3)) == [None] * 3
    assert steps(run) == [3, 1]
    # The newest that is whole for all: one process's disk gives other bytes.
    damaged = read_checkpoint

    def unlucky(folder):
        if threading.current_thread().name == "unlucky" and folder.name.endswith("3"):
            raise DataError("its disk is bad")
        return damaged(folder)

    monkeypatch.setattr(store, "read_checkpoint", unlucky)

    def newest(member: Threads):
        if member.rank == failing:
            threading.current_thread().name = "unlucky"
        return made[member.rank].newest()

    for found, problems in together(threads, newest):
        assert found.folder.name == "step-00000001" and problems == ("its disk is bad",)


def test_machines_without_a_common_disk_are_told(tmp_path):
    runs = [Run.create(tmp_path / str(i), CONFIG) for i in range(2)]
    runs[1].checkpoints_folder.joinpath(".step-00000001.writing").mkdir(parents=True)

    def act(member: Threads) -> None:
        with Checkpoints(runs[member.rank], crew=member) as checkpoints:
            checkpoints.save(1, rows_of(member, 1), {})

    for error in together(crew(2), act):
        assert isinstance(error, DataError) and "a disk that all machines share" in str(error)
    assert runs[0].checkpoints() == []


def test_missing_rows_are_noticed(run):
    threads = crew(2)

    def act(member: Threads) -> None:
        with Checkpoints(run, crew=member) as checkpoints:
            checkpoints.save(1, rows_of(member, 1), {})

    together(threads, act)
    manifest = run.checkpoint("last") / "manifest.json"
    fields = json.loads(manifest.read_text())
    del fields["sha256"]["model.2-of-2.safetensors"]
    manifest.write_text(json.dumps(fields, indent=1))
    with pytest.raises(DataError, match="rows of process 2 of 2 are missing"):
        read_checkpoint(run.checkpoint("last"))
    with pytest.raises(ValueError, match=r"process 0 of 1 holds 4 of the 7 rows of w, not 7"):
        Checkpoints(run).save(2, {"model": {"w": Shard(torch.zeros(4, 3), 7)}}, {})


# Optimisers


class Counting(torch.optim.Optimizer):
    """Keeps Python numbers, and moments that are more exact than the weights."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"count": 0, "power": 1.0, "odd": False, "none": None}
                    state["moment"] = torch.zeros_like(p, dtype=torch.float32)
                state["count"] += 1
                state["power"] *= 0.9
                state["odd"] = not state["odd"]
                state["moment"].mul_(0.9).add_(p.grad.float())
                p -= group["lr"] * (state["moment"] / (1 - state["power"])).to(p.dtype)


def stepped(optimizer, parameters, number: int) -> None:
    for i in range(number):
        for j, p in enumerate(parameters):
            p.grad = torch.sin(torch.arange(p.numel()) + 10.0 * i + j).view_as(p).to(p.dtype)
        optimizer.step()


OPTIMIZERS = {
    "adamw": lambda ps: torch.optim.AdamW(ps, fused=True),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "plain": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "counting": Counting,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimiser_goes_on_exactly(run, kind, dtype):
    first = [torch.ones(3, 2, dtype=dtype), torch.ones(2, dtype=dtype)]
    optimizer = OPTIMIZERS[kind](first)
    stepped(optimizer, first, 3)
    write_checkpoint(run.checkpoint("last"), {"optimizer": flatten_optimizer(optimizer)}, {})
    second = [p.clone() for p in first]
    restored = OPTIMIZERS[kind](second)
    restore_optimizer(restored, read_checkpoint(run.checkpoint("last")).tensors["optimizer"])
    for before, after in zip(first, second, strict=True):
        ours, theirs = optimizer.state[before], restored.state[after]
        assert {k: type(v) for k, v in ours.items() if v is not None} == {
            k: type(v) for k, v in theirs.items()
        }
        for key, value in theirs.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(ours[key])), key
            assert not isinstance(value, Tensor) or value.dtype == ours[key].dtype
    stepped(optimizer, first, 2)
    stepped(restored, second, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# FSDP2


class Store:
    """A crew of processes, over the store that they met in."""

    def __init__(self, store, rank: int, size: int) -> None:
        self.store, self.rank, self.size, self.talks = store, rank, size, 0

    def gather(self, value):
        self.talks += 1
        self.store.set(f"{self.talks}/{self.rank}", json.dumps(value))
        return [json.loads(self.store.get(f"{self.talks}/{i}")) for i in range(self.size)]


def _small() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 1))


def _fsdp(rank: int, size: int, port: int, place: Path) -> None:
    """Train sharded, save, go on; and go on from what was saved alike."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    store = dist.TCPStore("localhost", port, size, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    mesh = dist.device_mesh.init_device_mesh("cpu", (size,))
    model = _small()
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    member = Store(dist.PrefixStore("crew", store), rank, size)
    checkpoints = Checkpoints(Run(place), crew=member)

    def step(i: int) -> None:
        model(torch.sin(torch.arange(10.0).view(2, 5) + i)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def save(number: int) -> None:
        parts = {"model": model.state_dict(), "optimizer": flatten_optimizer(optimizer)}
        checkpoints.save(number, parts, {})

    step(0)
    save(1)
    step(1)
    save(2)
    checkpoints.flush()
    found = read_checkpoint(Run(place).checkpoint("step-1"))
    for key, parameter in model.state_dict().items():
        whole = found.tensors["model"][key]
        layout = torch.distributed.tensor.distribute_tensor(
            whole, mesh, parameter.placements, src_data_rank=None
        )
        parameter.to_local().copy_(layout.to_local())
    optimizer = torch.optim.AdamW(model.parameters())
    restore_optimizer(optimizer, found.tensors["optimizer"])
    step(1)
    save(3)
    checkpoints.flush()
    member.gather("done")
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_sharded_model_is_saved_in_parts_and_goes_on_alone(run):
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_fsdp, args=(i, 2, port, run.path)) for i in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    two, three = (read_checkpoint(run.checkpoint(f"step-{i}")).tensors for i in (2, 3))
    assert (run.checkpoint("last") / "optimizer.2-of-2.safetensors").is_file()
    assert {k: v.shape for k, v in _small().state_dict().items()} == {
        k: v.shape for k, v in two["model"].items()
    }
    for part, named in two.items():
        for key, value in named.items():
            assert torch.equal(value, three[part][key]), (part, key)
