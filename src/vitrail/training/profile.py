"""Where a step's time goes: a trace for chrome://tracing or Perfetto, and one page to read."""

import time
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from vitrail.runs import Run
from vitrail.runs.machine import matrix_rate

PARTS = ("data", "forward", "backward", "optimiser")
"""What a step is made of; the loop and the engine mark these as `vitrail/NAME`."""

_WARM = 3
_ROWS = 15


class Profile:
    """Looks at `steps` steps after the first few, and writes RUN/profile; 0 steps: nothing."""

    def __init__(self, steps: int, run: Run, lead: bool, precision: str = "float32") -> None:
        self.steps = steps if lead else 0
        self.run = run
        self.precision = precision
        self._taken = 0
        self._profiler: Any = None
        self._flops: FlopCounterMode | None = None
        self._started = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._profiler is not None:
            self._write()
        if self._flops is not None:
            self._flops.__exit__(None, None, None)

    def step(self) -> None:
        """A step is over."""
        if not self.steps:
            return
        self._taken += 1
        if self._taken == _WARM:
            # One step to count, which takes longer, before those whose time is looked at.
            self._flops = FlopCounterMode(display=False)
            self._flops.__enter__()
        elif self._taken == _WARM + 1:
            assert self._flops is not None
            self._flops.__exit__(None, None, None)
            self.flops = self._flops.get_total_flops()
            self._flops = None
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profiler = profile(activities=activities)
            self._profiler.__enter__()
            self._started = time.perf_counter()
        elif self._taken == _WARM + 1 + self.steps:
            self._write()
            self.steps = 0

    def _write(self) -> None:
        taken = max(self._taken - _WARM - 1, 1)
        seconds = (time.perf_counter() - self._started) / taken
        self._profiler.__exit__(None, None, None)
        folder = self.run.path / "profile"
        folder.mkdir(exist_ok=True)
        self._profiler.export_chrome_trace(str(folder / "trace.json.gz"))
        averages = self._profiler.key_averages()
        self._profiler = None
        self.run.write("profile/summary.txt", self._page(averages, taken, seconds))

    def _page(self, averages: Any, taken: int, seconds: float) -> str:
        spent = {row.key: row.cpu_time_total / 1e6 / taken for row in averages}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if self.precision == "bfloat16" else torch.float32
        peak = matrix_rate(dtype, torch.device(device))
        rate = self.flops / seconds
        lines = [
            f"{taken} steps of {seconds:.3f} s (the profiler itself included), {self.precision}",
            "",
            *(
                f"{name:<12}{spent.get(f'vitrail/{name}', 0.0):8.3f} s  "
                f"{spent.get(f'vitrail/{name}', 0.0) / seconds:6.1%}"
                for name in PARTS
            ),
            "",
            f"{self.flops / 1e9:.1f} GFLOP a step (matrix products and convolutions), "
            f"{rate / 1e9:.0f} GFLOP/s: {rate / peak:.0%} of the {peak / 1e9:.0f} GFLOP/s that "
            f"this machine's matrix product reaches",
            "",
            "the trace: trace.json.gz, for https://ui.perfetto.dev or chrome://tracing",
            "",
            averages.table(
                sort_by=f"self_{device}_time_total", row_limit=_ROWS, max_name_column_width=60
            ),
        ]
        return "\n".join(lines) + "\n"
