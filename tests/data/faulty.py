"""Decoders that go wrong, for worker processes to import; a file's name says how."""

import os
import re
import signal
import time
from pathlib import Path

import numpy as np

from vitrail.data.pixels.decode import read_pixels
from vitrail.data.pixels.workers import Request


def decode(request: Request) -> np.ndarray:
    file = request.image
    assert isinstance(file, Path)
    match file.stem.split("-"):
        case ["signal", number]:
            os.kill(os.getpid(), int(number))
        case ["exit", code]:
            os._exit(int(code))
        case ["once", _] if not file.with_suffix(".tried").exists():
            file.with_suffix(".tried").touch()
            os.kill(os.getpid(), signal.SIGSEGV)
        case ["sleep", _]:
            time.sleep(3600)
        case ["spin", _]:
            re.match("(a+)+$", "a" * 64 + "b")  # holds the interpreter, as a decoder in C may
        case ["fault", _]:
            raise ZeroDivisionError("a fault of ours")
    return read_pixels(file, mode=request.mode, shown=request.shown, fast=request.fast)
