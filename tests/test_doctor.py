"""`vitrail doctor`: sick machines as plain values or copies of /proc, real folders, real runs."""

import json
import os
import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.cli import main
from vitrail.data import ArraySource, write_split
from vitrail.data.sources.csvfile import Columns
from vitrail.doctor import examine
from vitrail.doctor.compute import (
    Build,
    Driver,
    allocator,
    ask_driver,
    compiler,
    judge_driver,
    judge_precision,
    judge_threads,
)
from vitrail.doctor.finding import Finding
from vitrail.doctor.images import data_findings, judge_balance, judge_sample
from vitrail.doctor.machine import (
    Cores,
    Memory,
    cores,
    cpu_facts,
    judge_clock,
    judge_cores,
    judge_files,
    judge_memory,
    judge_shared,
    killed_for_memory,
    memory,
)
from vitrail.doctor.packages import asked_for, judge_packages, judge_torchvision
from vitrail.doctor.places import judge_cache, judge_runs
from vitrail.doctor.run import run_findings
from vitrail.models import model_config
from vitrail.runs import DataConfig, Run, RunLock, TrainConfig, write_checkpoint
from vitrail.runs.data import open_data_of
from vitrail.runs.identity import IDENTITY, identity

GIB = 2**30


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def tree(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): sha256(p.read_bytes()).hexdigest() for p in files}


def levels(findings) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for finding in findings:
        found.setdefault(finding.topic, []).append(finding.level)
    return found


def picture(file: Path, seed: int, side: int = 24) -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


@pytest.fixture
def photos(tmp_path) -> Path:
    for label in ("cat", "dog"):
        for i in range(12):
            picture(tmp_path / "photos" / label / f"{i}.png", i)
    return tmp_path / "photos"


@pytest.fixture
def run(tmp_path, photos) -> Run:
    """A run that was stopped at step 7."""
    config = TrainConfig(data=DataConfig(path=str(photos)), model=model_config("vit_s16"), epochs=1)
    splits = open_data_of(config)
    run = Run.create(tmp_path / "runs" / "a", config)
    write_split(splits, run.split_file)
    run.write(IDENTITY, json.dumps(identity(config, splits)))
    for step in (6, 7):
        run.append_metrics({"step": step, "epoch": 0, "loss": 0.5, "done": 0.2})
    for step in (3, 7):
        state = {"progress": {"step": step}}
        write_checkpoint(
            run.path / "checkpoints" / f"step-{step:08d}", {"model": {"w": torch.ones(9)}}, state
        )
    return run


VERSION_2 = {
    "proc/self/cgroup": "0::/job/step\n",
    "sys/fs/cgroup/job/cpu.max": "150000 100000\n",
    "sys/fs/cgroup/job/step/cpu.max": "max 100000\n",
    "sys/fs/cgroup/job/step/memory.max": "max\n",
    "sys/fs/cgroup/job/memory.max": f"{4 * GIB}\n",
    "sys/fs/cgroup/job/memory.current": f"{3 * GIB}\n",
    "sys/fs/cgroup/job/memory.stat": f"anon 5\ninactive_file {GIB}\n",
    "sys/fs/cgroup/job/memory.events": "low 0\noom_kill 2\n",
}
VERSION_1 = {
    "proc/self/cgroup": "5:memory:/docker/abc\n4:cpuset:/\n3:cpu,cpuacct:/docker/abc\n0::/\n",
    # Inside the container the host's path is not there.
    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "150000\n",
    "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * GIB}\n",
    "sys/fs/cgroup/memory/memory.stat": f"cache 7\ninactive_file {GIB}\n",
    "sys/fs/cgroup/memory/memory.oom_control": "oom_kill_disable 0\noom_kill 2\n",
}
MEMORY = {"proc/meminfo": "MemTotal: 67108864 kB\nMemFree: 1 kB\nMemAvailable: 62914560 kB\n"}


@pytest.mark.parametrize("files", [VERSION_2, VERSION_1], ids=["v2", "v1"])
def test_a_container_may_use_what_its_cgroup_allows(tmp_path, files):
    root = written(tmp_path, files | MEMORY)
    assert cores(root).quota == 1.5 and cores(root).usable == 1
    assert memory(root) == Memory(64 * GIB, 4 * GIB, 2 * GIB)
    assert killed_for_memory(root) == 2


def test_a_machine_without_limits_or_without_such_files(tmp_path):
    none = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.stat": ""}
    root = written(tmp_path / "free", none | MEMORY)
    assert memory(root) == Memory(64 * GIB, None, 60 * GIB) and cores(root).quota is None
    huge = {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}
    root = written(tmp_path / "huge", VERSION_1 | huge | MEMORY)
    assert memory(root) == Memory(64 * GIB, None, 60 * GIB)
    assert cores(tmp_path / "nothing").quota is None and killed_for_memory(tmp_path) == 0
    assert cpu_facts(tmp_path).flags == frozenset()


@pytest.mark.parametrize(
    ("text", "name", "flag"),
    [
        ("model name\t: AMD EPYC\nflags\t\t: fpu avx512_bf16\n\nmodel name: x", "AMD EPYC",
         "avx512_bf16"),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", None, "bf16"),
    ],
)  # fmt: skip
def test_processors(tmp_path, text, name, flag):
    found = cpu_facts(written(tmp_path, {"proc/cpuinfo": text}))
    assert flag in found.flags and (name is None or found.name == name)


@pytest.mark.parametrize(
    ("finding", "level", "said", "mend"),
    [
        (judge_cores(Cores(64, 64, 2.0), 0.3), "ok", "2 of 64 may be used .*quota is 2", ""),
        (judge_cores(Cores(8, 4, None), 7.9), "note", "4 of 8.*affinity.*load 7.9", "ps aux"),
        (judge_memory(Memory(64 * GIB, None, 30 * GIB), 0), "ok", "30.0 GiB free of 64.0", ""),
        (judge_memory(Memory(64 * GIB, 8 * GIB, 5 * GIB), 1), "note", "has killed 1", "ps"),
        (judge_memory(Memory(4 * GIB, None, 3 * GIB), 0), "note", "small models", "ps"),
        (judge_memory(Memory(4 * GIB, None, GIB // 2), 0), "problem", "too little", "ps aux"),
        (judge_shared(os.statvfs_result((4096, 4096, 16384, 0, 16384, 9, 9, 9, 0, 255))),
         "note", "64 MiB free of 64 MiB", "remount,size=8g"),
        (judge_files(20000, 20000), "ok", "20,000 files", ""),
        (judge_files(512, 4096), "note", "only 512", "ulimit -n 4096"),
        (judge_files(64, 2048), "problem", "only 64 .*too few", "ulimit -n 2048"),
        (judge_clock(2e9, 1.9e9), "ok", "2033", ""),
        (judge_clock(0.0, 1.9e9), "problem", "1970.*before", "set-ntp"),
        (judge_threads(2, 2, {}), "ok", "2 of 2", ""),
        (judge_threads(64, 2, {}), "problem", "64 of 2 .*wait", "OMP_NUM_THREADS=2 .*--threads 2"),
        (judge_threads(1, 8, {"OMP_NUM_THREADS": "1"}), "note", "idle", "unset OMP_NUM_THREADS"),
        (judge_threads(4, 8, {}), "ok", "4 of 8", ""),  # cores are often two threads each
        (judge_precision("cpu", 180.0, 350.0, "AMX"), "ok", "AMX.*--precision bfloat16", ""),
        (judge_precision("cpu", 80.0, 20.0, ""), "ok", "no instr.*--precision float32", ""),
        (allocator({"LD_PRELOAD": "/no/such/libjemalloc.so"}), "note", "not there", "unset"),
        (allocator({"LD_PRELOAD": "libtcmalloc.so.4"}), "ok", "tcmalloc", ""),
        (judge_torchvision("cpu", "cu130"), "note", "for cpu.*for cu130", "whl/cpu"),
    ],
)  # fmt: skip
def test_what_a_machine_is_told(finding, level, said, mend):
    assert finding.level == level
    assert_matches(finding.text, said)
    assert_matches(finding.mend, mend)
    assert bool(finding.mend) == (level != "ok")


def assert_matches(text: str, pattern: str) -> None:
    assert re.search(pattern, text), text


H200 = Driver(("NVIDIA H200",), "570.86", (12, 8))


@pytest.mark.parametrize(
    ("driver", "build", "level", "said", "mend"),
    [
        (None, Build("2.13.0+cpu", None, False, None), "ok", "no GPU: the CPU computes", "^$"),
        (None, Build("2.13.0+cu130", "13.0", False, None), "ok", "would also know GPUs", "^$"),
        (H200, Build("2.13.0+cu128", "12.8", True, None), "ok", "NVIDIA H200.*570.86", "^$"),
        (H200, Build("2.13.0+cpu", None, False, None), "problem", "built for the CPU alone",
         r"pip uninstall -y torch && pip install torch --index-url \S+/cu128$"),
        (H200, Build("2.13.0+cu130", "13.0", False, None), "problem", "CUDA 13.0, .*up to 12.8",
         "cu128$"),
        (H200, Build("2.13.0+cu128", "12.8", False, ""), "note", "hidden by CUDA_VISIBLE_DEVICES",
         "^unset CUDA_VISIBLE_DEVICES$"),
        (H200, Build("2.13.0+cu128", "12.8", False, "0"), "problem", "cannot use it",
         "torch.zeros"),
        (Driver(("K80",), "470.1", (11, 4)), Build("2.13.0+cpu", None, False, None), "problem",
         "K80", "driver was renewed"),
        (None, Build("2.13.0+rocm7", None, True, None), "ok", "finds a GPU", "^$"),
    ],
)  # fmt: skip
def test_driver_and_torch_have_to_fit(driver, build, level, said, mend):
    finding = judge_driver(driver, build)
    assert finding.level == level
    assert_matches(finding.text, said)
    assert_matches(finding.mend, mend)


def test_what_the_drivers_own_tool_says(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\ncase "$1" in\n--query*) echo "NVIDIA A100, SXM4, 570.86.15";;\n'
        '*) echo "| NVIDIA-SMI 570.86.15   Driver Version: 570.86.15   CUDA Version: 12.8  |";;\n'
        "esac\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert ask_driver() == Driver(("NVIDIA A100, SXM4",), "570.86.15", (12, 8))
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    assert ask_driver() is None


@pytest.mark.parametrize(
    ("command", "said", "mend"),
    [("no-such-compiler", "there is no no-such-compiler", "install g"), ("false", "fails", "g++")],
)
def test_without_a_compiler_only_compile_is_lost(monkeypatch, command, said, mend):
    monkeypatch.setenv("CXX", command)
    finding = compiler()
    assert finding.level == "note" and said in finding.text and mend in finding.mend


def test_packages_out_of_range_are_named():
    asked = ["torch>=99", "numpy>=1.26", "no-such-thing>=1", "numpy<1; python_version < '3'"]
    asked += ["nope; extra == 'more'", "rich<1; extra == 'pretty'", "pytest<1; extra == 'dev'"]
    found = list(judge_packages(asked))
    assert [f.level for f in found] == ["problem", "problem", "ok", "problem", "ok"]
    assert found[0].text.startswith("torch is 2.") and found[0].mend == "pip install 'torch>=99'"
    assert found[1].text == "no-such-thing is not installed"
    assert found[2].text.startswith("1 of 3 have versions")
    assert found[3].mend == "pip install 'vitrail[pretty]'"
    assert found[4].text == "pretty; not installed: more (pip install 'vitrail[more]')"


def test_what_is_asked_for_is_what_pyproject_says(tmp_path):
    asked = asked_for()
    assert asked and any(one.startswith("torch>=") for one in asked)
    assert [f for f in judge_packages(asked) if f.topic == "packages" and f.level != "ok"] == []
    assert "torch>=2.9" in (asked_for(tmp_path) or ())  # as pip noted it


@pytest.fixture
def quick_disk(monkeypatch):
    """However slow it is while other tests run."""
    monkeypatch.setattr("vitrail.doctor.places._SLOW", 0)


def test_the_run_folder_is_written_to_and_left_as_it_was(tmp_path, quick_disk):
    finding = judge_runs(tmp_path / "not" / "yet")
    assert finding.level == "ok" and finding.numbers["bytes_per_second"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch):
    finding = judge_runs(Path("/proc/nothing/runs"))  # closed even to root
    assert finding.level == "problem" and "cannot be written" in finding.text and finding.mend
    monkeypatch.setattr(os, "access", lambda *args: False)
    assert judge_cache(tmp_path).level == "problem"


@pytest.mark.parametrize(
    ("free", "entries", "level", "said"),
    [
        (100, 10**6, "ok", "free"),
        (5, 10**6, "note", "little for large models"),
        (0.5, 10**6, "problem", "too little"),
        (100, 3, "problem", "room for only 3 more files"),
    ],
)
def test_room_on_the_disk(tmp_path, monkeypatch, quick_disk, free, entries, level, said):
    blocks = int(free * GIB / 4096)
    values = (4096, 4096, 10**9, blocks, blocks, 10**6, entries, entries, 0, 255)
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(values))
    finding = judge_runs(tmp_path)
    assert finding.level == level and said in finding.text and bool(finding.mend) != (level == "ok")


def test_data_is_counted_and_a_sample_is_read(photos):
    before = tree(photos)
    found = list(data_findings(str(photos), Columns()))
    assert levels(found) == {"data": ["ok"], "classes": ["ok"], "decoding": ["ok"]}
    assert found[0].text.startswith("24 images in 2 classes (train 20, val 4)")
    assert found[2].numbers["images_per_second"] > 0 and found[2].numbers["largest"] == [24, 24]
    assert tree(photos) == before


def test_data_that_is_sick(photos, tmp_path):
    (photos / "cat" / "3.png").write_bytes(b"no image")
    picture(photos / "owl" / "1.png", 0)
    (photos / "stray.png").write_bytes(b"")
    found = list(data_findings(str(photos), Columns()))
    assert levels(found) == {
        "data": ["problem", "note"],
        "classes": ["note"],
        "images": ["problem"],
        "decoding": ["ok"],
    }
    assert "two images" in found[0].text and "stray.png" in found[1].text
    assert "cat/3.png" in found[3].text and found[3].mend.startswith("vitrail data check ")
    (nothing,) = data_findings(str(tmp_path / "photo"), Columns())
    assert nothing.level == "problem" and "did you mean" in nothing.text


def test_uneven_classes_and_large_images():
    pixels = np.zeros((60, 8, 8), np.uint8)
    labels = np.array([0] * 58 + [1] * 2)
    finding = judge_balance(ArraySource(pixels, labels, ("many", "few"), "train").targets)
    assert finding.level == "note" and "class-weights balanced" in finding.mend
    large = ArraySource(np.zeros((1, 6000, 5000), np.uint8), np.array([0]), ("a",), "train")
    (finding,) = judge_sample(large, "look", threads=1, of=None)
    assert finding.level == "note" and "5000 x 6000 (train/0)" in finding.text


def test_a_stopped_run_says_how_to_go_on(run):
    before = tree(run.path)
    found = list(run_findings(run.path))
    assert levels(found) == {
        "run": ["ok"], "lock": ["ok"], "log": ["ok"], "checkpoint": ["ok", "ok"], "resume": ["ok"]
    }  # fmt: skip
    assert "step 7, epoch 1, loss 0.500; written just now" in found[2].text
    assert "step-00000007 is whole: step 7" in found[3].text
    assert f"vitrail train --resume {run.path}" in found[-1].text
    assert tree(run.path) == before


def test_a_run_in_progress_is_told(run):
    with RunLock(run):
        found = list(run_findings(run.path))
    assert levels(found)["lock"] == ["note"]
    with RunLock(run):  # and it can be locked again
        pass


def test_a_damaged_checkpoint_is_found_and_the_whole_one_named(run):
    file = run.path / "checkpoints" / "step-00000007" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    found = [f for f in run_findings(run.path) if f.topic in ("checkpoint", "resume")]
    assert [f.level for f in found] == ["ok", "problem", "ok"]
    assert "model.safetensors is damaged" in found[1].text and "step-00000003" in found[1].mend
    (run.path / "checkpoints" / "step-00000003" / "state.json").unlink()
    found = [f for f in run_findings(run.path) if f.topic in ("checkpoint", "resume")]
    assert [f.level for f in found] == ["problem"] * 3 and "--config" in found[2].mend


def test_what_a_resume_would_say(run, photos, monkeypatch):
    picture(photos / "cat" / "3.png", 3, side=25)
    found = [f for f in run_findings(run.path) if f.topic == "resume"]
    assert [f.level for f in found] == ["problem"]
    assert_matches(found[0].text, r"^1 (training|validation) image was changed \(cat/3.png\)$")
    assert found[0].mend == f"vitrail train --resume {run.path} --accept-changes"
    picture(photos / "cat" / "new.png", 3)
    assert "cat/new.png" in next(f.text for f in run_findings(run.path) if f.level == "note")
    (photos / "cat" / "3.png").unlink()
    found = [f for f in run_findings(run.path) if f.topic == "resume"]
    assert found[0].level == "problem" and "cat/3.png" in found[0].text
    photos.rename(photos.with_name("elsewhere"))
    found = [f for f in run_findings(run.path) if f.topic == "resume"]
    assert "no such file or folder" in found[0].text and found[0].mend.startswith("ln -s")


def test_what_mends_a_run_is_what_helps_there(run, photos):
    def problems():
        found = [f for f in run_findings(run.path) if f.level == "problem"]
        return [f.mend for f in found]

    go_on = f"vitrail train --resume {run.path} --accept-changes"
    (photos / "cat" / "3.png").unlink()
    assert problems() == [go_on, go_on]  # what the split lacks, and what has changed
    identity_file = run.path / IDENTITY
    before = identity_file.read_text()
    identity_file.write_text("{")
    assert problems() == [f"rm {identity_file}"]
    identity_file.write_text(before)
    (photos / "dog").rename(photos / "wolf")
    assert all(mend.startswith(f"vitrail train {photos} --weights") for mend in problems())
    checkpoints = run.path / "checkpoints"
    checkpoints.rename(run.path / "moved")
    checkpoints.write_text("")
    assert problems()[0].startswith("ls -la")


def test_a_run_from_before_identities_and_what_is_no_run(run, tmp_path):
    (run.path / IDENTITY).unlink()
    found = [f for f in run_findings(run.path) if f.topic == "resume"]
    assert [f.level for f in found] == ["note"] and "--resume" in found[0].text
    (finding,) = run_findings(tmp_path)
    assert finding.level == "problem" and "no config.yaml" in finding.text


def test_something_unforeseen_does_not_end_the_examination(monkeypatch):
    import vitrail.doctor.machine as machine

    def strange():
        raise ValueError("cpu.max holds poetry")

    monkeypatch.setattr(machine, "cpu_facts", strange)
    found = list(examine())
    assert found[0] == Finding(
        "machine", "note", "it cannot be told: ValueError: cpu.max holds poetry"
    )
    assert {"packages", "precision", "run folder", "network"} <= set(levels(found))


def test_the_command(run, photos, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    before = tree(tmp_path)
    code = main(["doctor", "photos", "runs/a", "--json"])
    *lines, last = capfd.readouterr().out.splitlines()
    result = json.loads(last)
    problems = [f for f in result["findings"] if f["level"] == "problem"]
    assert (code, result["problems"]) == (3 if problems else 0, len(problems))
    shown = [line for line in lines[:-1] if not line.startswith(" ")]
    assert len(shown) == len(result["findings"]) and lines[-1].startswith(
        f"{len(problems)} problem"
    )
    assert tree(tmp_path) == before
    assert {"data", "resume"} <= {f["topic"] for f in result["findings"]}
    assert main(["doctor", "photos", "more"]) == 2
    assert "at a time" in capfd.readouterr().err

    (photos / "cat" / "0.png").write_bytes(b"")
    assert main(["doctor", "photos"]) == 3
    assert "mend: vitrail data check photos" in capfd.readouterr().out


def test_the_list_of_verbs_needs_no_torch():
    code = "import sys, vitrail.cli as c; c.main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "doctor" in done.stdout, done.stderr
