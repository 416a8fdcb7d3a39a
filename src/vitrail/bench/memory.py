"""The most memory that labelling takes, each model in a process of its own.

On a CPU: the most resident memory while a batch is labelled, less what was resident before there
was a model, with the libraries loaded and warm. So weights, what the batch needs, and what the
libraries allocate for both count; Python and torch themselves do not. On a GPU: the most that torch
has allocated at one time, weights and batch.

`python -m vitrail.bench.memory` loads the libraries once and then forks for every model, so that
none finds memory that another has left. It has computed nothing by then, so no thread is lost.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Discriminator, TypeAdapter

from vitrail import proc
from vitrail.bench.hog import hog_features, hog_labeller
from vitrail.bench.measure import BATCH, Labeller, Place, computing, model_labeller
from vitrail.models import ModelConfig

_CONFIGS: TypeAdapter[ModelConfig] = TypeAdapter(Annotated[ModelConfig, Discriminator("family")])


def peak_memory(subjects: Mapping[str, ModelConfig | Path], place: Place) -> dict[str, int | None]:
    """Bytes that labelling `BATCH` images takes; a subject is a model, or a folder of `hog`.

    None where the system does not tell (it takes Linux's /proc), or killed the process because it
    had no memory left.
    """
    if not proc.can_forget_peak():
        return dict.fromkeys(subjects)
    asked = [
        {"hog": str(each)} if isinstance(each, Path) else {"model": asdict(each)}
        for each in subjects.values()
    ]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "vitrail.bench.memory"],
        input=json.dumps([place, asked]),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"memory could not be measured: {done.stderr}")
    return dict(zip(subjects, map(json.loads, done.stdout.splitlines()), strict=True))


def main() -> None:
    """Read the question from stdin as JSON, and print the bytes of each subject on a line."""
    where, subjects = json.load(sys.stdin)
    for asked in subjects:
        child = os.fork()
        if not child:
            _measure(asked, Place(*where))
            sys.stdout.flush()
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            print("null", flush=True)
        elif status:
            sys.exit(1)


def _measure(asked: dict[str, Any], place: Place) -> None:
    try:
        print(_on_cpu(asked, place) if place.device == "cpu" else _on_gpu(asked, place))
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _on_gpu(asked: dict[str, Any], place: Place) -> int:
    with computing(place):
        _labeller(asked, place)(BATCH)
    return torch.cuda.max_memory_allocated(place.device)


def _labeller(asked: dict[str, Any], place: Place) -> Labeller:
    if "hog" in asked:
        return hog_labeller(Path(asked["hog"]))
    return model_labeller(_CONFIGS.validate_python(asked["model"]), place.device)


def _on_cpu(asked: dict[str, Any], place: Place) -> int:
    with computing(place):
        _warm("hog" in asked)
    before = proc.resident()
    label = _labeller(asked, place)
    proc.forget_peak()  # how the model was built does not count
    with computing(place):
        label(BATCH)
        label(BATCH)
    return proc.peak_resident() - before


def _warm(hog: bool) -> None:
    """Have the libraries load, and allocate what they keep whatever the model."""
    if hog:
        hog_features(np.zeros((3, 16, 16), np.uint8), 4)
        return
    x = torch.randn(2, 8, 16, 16)
    x = torch.nn.functional.conv2d(x, torch.randn(8, 8, 3, 3))
    x.flatten(1) @ torch.randn(x[0].numel(), 8)


if __name__ == "__main__":
    main()
