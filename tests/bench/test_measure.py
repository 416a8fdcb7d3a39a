"""Speed is measured in turns, memory in a process of its own."""

import time

import pytest
import torch

from vitrail.bench import measure
from vitrail.bench.measure import BATCH, Place, latencies, model_labeller, speeds
from vitrail.bench.memory import peak_memory
from vitrail.models import ViTConfig, build, count_parameters

HERE = Place("cpu", "float32", 1)
SMALL = ViTConfig(depth=1, width=32, heads=2, mlp=64, patch=(8, 8), image_size=(32, 32), classes=3)


def test_models_take_turns():
    calls: list[tuple[str, int]] = []
    labellers = {name: lambda batch, name=name: calls.append((name, batch)) for name in "abc"}
    speeds(labellers, HERE, seconds=0.0)
    for batch, least in ((1, 20), (BATCH, 5)):
        order = "".join(name for name, size in calls if size == batch)
        assert order == "aabbcc" + "abc" * least  # warm-up, then turns


def test_the_median_passes_over_slow_moments_and_the_percentile_tells_them():
    count = 0

    def label(batch: int) -> None:
        nonlocal count
        count += 1
        time.sleep(0.03 if count % 7 == 0 else 0.002)

    found = speeds({"one": label}, HERE, seconds=0.0)["one"]
    assert 0.002 <= found.latency < 0.02 <= found.latency_p95
    assert 0.002 <= latencies({"one": label}, HERE, seconds=0.0)["one"] < 0.02


def test_a_speed_is_what_the_clock_says():
    found = speeds({"slow": lambda batch: time.sleep(0.001 * batch)}, HERE, seconds=0.0)["slow"]
    assert 300 < found.images_per_second <= 1000
    assert 0.001 <= found.latency <= found.latency_p95


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_model_computes_as_in_inference_and_leaves_no_trace(precision, monkeypatch):
    monkeypatch.setattr(measure, "_MOST", 3)
    seen = []

    class Spy(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.inner(x)
            seen.append((len(x), out.dtype, torch.is_inference_mode_enabled()))
            seen.append(torch.get_num_threads())
            return out

    spy = Spy(build(SMALL).eval())
    threads = torch.get_num_threads()
    speeds(
        {"spy": lambda batch: spy(torch.zeros(batch, 3, 32, 32))},
        HERE._replace(precision=precision, threads=2),
        seconds=0.0,
    )
    assert (1, getattr(torch, precision), True) in seen
    assert (BATCH, getattr(torch, precision), True) in seen and 2 in seen
    assert torch.get_num_threads() == threads and not torch.is_autocast_enabled("cpu")


def test_a_real_model_is_slower_at_more_work():
    import dataclasses

    large = dataclasses.replace(SMALL, depth=12, width=128, mlp=512, image_size=(96, 96))
    labellers = {
        "small": model_labeller(SMALL, "cpu"),
        "large": model_labeller(large, "cpu"),
    }
    found = speeds(labellers, HERE, seconds=0.0)
    assert found["small"].images_per_second > 3 * found["large"].images_per_second
    assert found["small"].latency < found["large"].latency


def test_memory_is_weights_and_what_a_batch_needs():
    wide = ViTConfig(
        depth=4, width=768, heads=12, mlp=3072, patch=(16, 16), image_size=(32, 32), classes=3
    )
    with torch.device("meta"):
        weights = 4 * count_parameters(build(wide))
    assert weights > 100 * 2**20
    found, little = peak_memory({"wide": wide, "small": SMALL}, HERE).values()
    assert found is not None and little is not None
    assert weights <= found < weights + 60 * 2**20
    assert little < 30 * 2**20  # Python and torch themselves, 200 MiB and more, are left out
