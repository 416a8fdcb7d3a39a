"""Whoever imports vitrail goes on with the settings they had."""

import json
import os
import subprocess
import sys
from pathlib import Path

import vitrail

# What other packages change when they are first imported is theirs: they come before the first
# look. The names of the modules are taken from the files, for to ask for them would import them.
PROGRAM = """
import importlib, json, logging, os, signal, sys, threading, warnings

import matplotlib, numpy, PIL.Image, PIL.ImageFile, sympy, torch, tyro, yaml

def look():
    return {
        "environ": dict(os.environ),
        "warnings": [repr(each) for each in warnings.filters],
        "signals": {each.name: repr(signal.getsignal(each)) for each in signal.Signals},
        "hooks": [repr(sys.excepthook), sys.getrecursionlimit()],
        "logging": [logging.getLogger().level, repr(logging.getLogger().handlers)],
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "numpy": [numpy.geterr(), repr(numpy.get_printoptions())],
        "matplotlib": {name: repr(value) for name, value in matplotlib.rcParams.items()},
        "pillow": [PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES],
        "torch": [
            torch.get_num_threads(),
            torch.get_num_interop_threads(),
            repr(torch.get_default_dtype()),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
            torch.is_grad_enabled(),
            torch.initial_seed(),
            torch.get_rng_state().tolist(),
            torch.backends.cudnn.benchmark,
            torch.backends.mkldnn.enabled,
            torch.multiprocessing.get_sharing_strategy(),
            torch.multiprocessing.get_start_method(allow_none=True),
        ],
    }

HEAVY = ("torch._dynamo", "torch.distributed.tensor", "torch.distributed.fsdp", "transformers")
before = look()
changed = []
for name in sys.argv[1:]:
    importlib.import_module(name)
    after = look()
    changed += [[name, what] for what in before if before[what] != after[what]]
    before = after
changed += [[name, "imported"] for name in HEAVY if name in sys.modules]
print(json.dumps(changed))
"""


def test_importing_changes_nothing_of_the_process_and_imports_nothing_that_few_need() -> None:
    root = Path(vitrail.__file__).parent
    files = [f.relative_to(root.parent).with_suffix("") for f in sorted(root.rglob("*.py"))]
    names = [".".join(file.parts).removesuffix(".__init__") for file in files]
    names = [name for name in names if not name.endswith("__main__")]
    assert len(names) > 150
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *names],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
