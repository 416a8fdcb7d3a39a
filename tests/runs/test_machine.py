"""What a machine is measured to do."""

import resource

import pytest
import torch

from vitrail.runs import machine


@pytest.mark.parametrize("rate, largest", [(1e12, 2048), (2e8, 128)])
def test_a_slow_machine_is_not_measured_for_long(rate, largest, monkeypatch):
    """As one that emulates bfloat16: a product of 2048 x 2048 takes it 86 seconds."""
    now, sides = [0.0], []

    def product(a, b, out=None):
        sides.append(len(a))
        now[0] += 2 * len(a) ** 3 / rate

    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])
    found = machine.matrix_rate(torch.bfloat16, torch.device("cpu"), seconds=0.1)
    assert found == pytest.approx(rate) and max(sides) == largest and now[0] < 0.2


@pytest.mark.skipif(machine._glibc() is None, reason="another malloc than glibc's")
def test_after_a_job_memory_that_was_freed_is_used_again():
    """And not mapped anew, which fills each of its pages with zeros."""
    with machine.left_as_found():
        machine.keep_freed_memory()
    mapped = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**22)
        mapped.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert mapped[-1] < 2**24 / resource.getpagesize() / 4
