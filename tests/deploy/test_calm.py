"""OpenVINO: where it is kept from reporting, and from taking a process down with it."""

import re
import subprocess
import sys
from pathlib import Path

import onnx
from onnx import TensorProto, helper

import vitrail

IMPORTED = re.compile(r"^\s*(import|from)\s+(openvino|nncf)\b", re.MULTILINE)
ANOTHER = re.compile(r"(openvino\(\)|ov)\.(Core|compile_model)\(")
LEFT_IN_A_THREAD = """
import gc, os, signal, sys, threading
from pathlib import Path
from vitrail.deploy.engines.openvino import load_file

for _ in range(2):
    engines = [load_file(Path(sys.argv[1]), "views", "float32")]
    thread = threading.Thread(target=lambda: (engines.clear(), gc.collect()))
    thread.start()
    thread.join()
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGTERM)
"""


def sources() -> list[Path]:
    files = list(Path(vitrail.__file__).parent.rglob("*.py"))
    assert len(files) > 100
    return files


def test_nothing_imports_openvino_but_where_it_is_kept_from_reporting() -> None:
    assert IMPORTED.search("    import openvino as ov") and IMPORTED.search("from nncf import x")
    assert [file for file in sources() if IMPORTED.search(file.read_text("utf-8"))] == []


def test_nothing_makes_a_core_but_the_one_that_is_kept() -> None:
    """A Core that another thread frees makes the next signal a segmentation fault (with AMX)."""
    assert [file.name for file in sources() if ANOTHER.search(file.read_text("utf-8"))] == [
        "calm.py"
    ]


def test_an_engine_that_a_thread_frees_leaves_signals_as_they_were(tmp_path: Path) -> None:
    node = helper.make_node("Relu", ["views"], ["logits"])
    ends = [helper.make_tensor_value_info(x, TensorProto.FLOAT, [1]) for x in ("views", "logits")]
    graph = helper.make_graph([node], "one", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "m")
    done = subprocess.run(
        [sys.executable, "-c", LEFT_IN_A_THREAD, tmp_path / "m"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
