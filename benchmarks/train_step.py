"""A training step beside timm's: images a second, share of the machine's peak, memory.

python benchmarks/train_step.py [--models vit_ti16,vit_s16] [--rounds 15] [--precision float32]
    [--json]

224 pixels, batch 16, AdamW, clipping; all in bfloat16 where the machine has it, else in float32.
Each contestant is a process of its own that steps when it is its turn, one at a time, so that what
else the machine does falls on all alike. timm is measured as it is used (bfloat16 under autocast),
eager and compiled, and its best counts; the numbers of a timm that keeps freed memory as ours does
(runs/machine.py) stand beside them.
"""

import argparse
import ctypes
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from vitrail.proc import forget_peak, peak_resident, resident

BATCH, SIDE, CLASSES = 16, 224, 1000
TIMM = {"vit_ti16": "vit_tiny_patch16_224", "vit_s16": "vit_small_patch16_224",
        "vit_b16": "vit_base_patch16_224"}  # fmt: skip
KINDS = ("timm", "timm compiled", "timm keeping memory", "timm compiled, keeping memory",
         "ours", "ours compiled", "ours recomputing")  # fmt: skip


Contestant = tuple[Callable[[], float], torch.optim.Optimizer]


def ours(name: str, kind: str, precision: str) -> Contestant:
    """The step as vitrail.training.loop takes it."""
    import numpy as np

    from vitrail.data.batches.batch import Batch
    from vitrail.data.targets import Classes
    from vitrail.data.views.canvas import Canvas
    from vitrail.models import build, model_config
    from vitrail.runs import DataConfig, TrainConfig
    from vitrail.runs.machine import keep_freed_memory
    from vitrail.tasks import Classify
    from vitrail.training.engine import Engine
    from vitrail.training.optim import build_optimizer

    keep_freed_memory(lean="recomputing" in kind)  # as job.train does
    config = TrainConfig(
        data=DataConfig(path="random", batch_size=BATCH),
        model=model_config(name),
        precision=precision,
        compile="compiled" in kind,
        checkpointing="recomputing" in kind,
        epochs=1,
    )
    model = build(config.model)
    classes = Classes(tuple(map(str, range(CLASSES))), np.arange(CLASSES))
    task = Classify(model, config.classify, classes)
    engine = Engine(task.train(), config, torch.device("cpu"))
    engine.enter()
    optimizer = build_optimizer(task.model, config.optim)
    targets = F.one_hot(torch.randint(0, CLASSES, (BATCH,)), CLASSES).float()
    images = Canvas(torch.randn(BATCH, 3, SIDE, SIDE), None)
    batch = Batch((images,), {"classes": targets}, np.arange(BATCH))

    def step() -> float:
        loss = engine.gradients([batch], BATCH).total
        torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        engine.follow()
        return loss

    return step, optimizer


def timms(name: str, kind: str, precision: str) -> Contestant:
    """The step as timm's train.py takes it; for bfloat16 with --amp --amp-dtype bfloat16."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except RuntimeError:
        # No torchvision matches a CPU-only torch: its operators have no schema.
        operators = torch.library.Library("torchvision", "DEF")
        operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        globals()["operators"] = operators  # they last as long as this object
    import timm

    if "keeping" in kind:
        from vitrail.runs.machine import keep_freed_memory

        keep_freed_memory()
    model = timm.create_model(TIMM[name], num_classes=CLASSES).train()
    compiled = torch.compile(model) if "compiled" in kind else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
    images = torch.randn(BATCH, 3, SIDE, SIDE)
    targets = F.one_hot(torch.randint(0, CLASSES, (BATCH,)), CLASSES).float()

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = F.cross_entropy(compiled(images).float(), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step, optimizer


def create_state(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimiser make its state, which is not the step's memory, and change nothing."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    ctypes.CDLL(None).malloc_trim(0)


def memory() -> tuple[float, float]:
    """MiB that the process holds now, and the most it has held since the last `forget_peak`."""
    return resident() / 2**20, peak_resident() / 2**20


def work(name: str, kind: str, precision: str) -> None:
    """One contestant: a line in is a number of steps to take, a line out what they took."""
    torch.manual_seed(0)
    step, optimizer = (timms if kind.startswith("timm") else ours)(name, kind, precision)
    create_state(optimizer)
    forget_peak()
    before = memory()[0]
    for _ in range(2):
        step()
    print(json.dumps({"memory": memory()[1] - before}), flush=True)
    for line in sys.stdin:
        taken = []
        for _ in range(int(line)):
            started = time.perf_counter()
            step()
            taken.append(time.perf_counter() - started)
        print(json.dumps(taken), flush=True)


def flops(name: str) -> int:
    """Of one image, forward and backward: matrix products and convolutions, as torch counts."""
    from torch.utils.flop_counter import FlopCounterMode

    from vitrail.models import build, model_config

    model = build(model_config(name))
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 3, SIDE, SIDE)).sum().backward()
    return counter.get_total_flops() // 2


def measure(name: str, kinds: list[str], precision: str, rounds: int, steps: int) -> dict[str, Any]:
    here = [sys.executable, __file__, "--worker", name]
    workers: dict[str, subprocess.Popen[str]] = {}
    found: dict[str, Any] = {}
    for kind in kinds:  # one after another: compiling is not to disturb anyone
        workers[kind] = worker = subprocess.Popen(
            [*here, kind, precision], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert worker.stdout
        found[kind] = {**json.loads(worker.stdout.readline()), "seconds": []}
    for _ in range(rounds):
        for kind, worker in workers.items():
            assert worker.stdin and worker.stdout
            print(steps, file=worker.stdin, flush=True)
            found[kind]["seconds"].append(statistics.median(json.loads(worker.stdout.readline())))
    for worker in workers.values():
        worker.communicate()
    work_of_one = flops(name)
    for each in found.values():
        seconds = each.pop("seconds")
        each["images_per_second"] = BATCH / statistics.median(seconds)
        each["best"] = BATCH / min(seconds)
        each["gflops"] = each["images_per_second"] * work_of_one / 1e9
        each["rounds"] = [round(BATCH / s, 2) for s in seconds]
    return found


def ratio(found: dict[str, Any], ours: str, theirs: list[str]) -> float:
    """The median over the rounds of our images a second over the best of theirs on the whole."""
    best = max(theirs, key=lambda kind: found[kind]["images_per_second"])
    pairs = zip(found[ours]["rounds"], found[best]["rounds"], strict=True)
    return statistics.median(a / b for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="vit_ti16,vit_s16")
    parser.add_argument("--kinds", default=",".join(KINDS).replace(", keeping", "; keeping"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=2, help="of one turn")
    parser.add_argument(
        "--precision", choices=["float32", "bfloat16"], help="default: the machine's"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(*args.worker)
    from vitrail.runs.machine import matrix_rate, native_precision

    cpu = torch.device("cpu")
    precision = args.precision or native_precision(cpu)
    kinds = [kind.replace("; keeping", ", keeping") for kind in args.kinds.split(",")]
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/train_step.py", *sys.argv[1:]]),
        "batch": BATCH, "side": SIDE, "threads": torch.get_num_threads(),
        "torch": torch.__version__, "machine": platform.processor() or platform.machine(),
        "precision": precision,
        "peak_gflops": matrix_rate(getattr(torch, precision), cpu) / 1e9,
        "models": {}, "ratio_to_timm": {}, "ratio_to_timm_keeping_memory": {},
        "memory_ratio": {}, "memory_ratio_recomputing": {},
    }  # fmt: skip
    for name in args.models.split(","):
        found = measure(name, kinds, precision, args.rounds, args.steps)
        result["models"][name] = found
        mine = [k for k in kinds if k in ("ours", "ours compiled")] or ["ours recomputing"]
        theirs = [k for k in kinds if k in ("timm", "timm compiled")]
        keeping = [k for k in kinds if k.startswith("timm") and "keeping" in k]
        top = max(mine, key=lambda kind: found[kind]["images_per_second"])
        print(f"\n{name}, {SIDE} px, batch {BATCH}, {precision}", file=sys.stderr)
        for kind, each in found.items():
            print(
                f"  {kind:<32}{each['images_per_second']:7.1f} images/s  "
                f"{each['gflops'] / result['peak_gflops']:5.0%} of peak  "
                f"{each['memory']:6.0f} MiB",
                file=sys.stderr,
            )
        if theirs:
            result["ratio_to_timm"][name] = round(ratio(found, top, theirs), 3)
            least = min(found[kind]["memory"] for kind in theirs)
            if "ours" in found:
                result["memory_ratio"][name] = round(found["ours"]["memory"] / least, 3)
            if "ours recomputing" in found:
                share = found["ours recomputing"]["memory"] / least
                result["memory_ratio_recomputing"][name] = round(share, 3)
        if keeping:
            result["ratio_to_timm_keeping_memory"][name] = round(ratio(found, top, keeping), 3)
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
