"""How soon an accuracy is reached from scratch: our recipe, and timm's model with timm's recipe.

    python benchmarks/time_to_accuracy.py [--minutes 2] [--times 3] [--goal 0.9] [--json FILE]

Fashion-MNIST, two cores. Ours is `vitrail train samples:fashion-mnist --recipe fashion-mnist` with
so few minutes; timm's has `times` as many, each contestant a whole schedule over its own length. A
contestant's time is the training steps' and the data's, not the evaluations'; reached is a goal
when the held-out images (5% of the training part) are right so often.

timm's models are its VisionTransformer with as many multiply-accumulates as ours, with patches of 8
(our tokens) and of 4. Its recipe is its train.py's for a ViT: AdamW, weight decay 0.05, a cosine
with warm-up by its own scheduler, label smoothing 0.1, EMA, clipping, autocast to bfloat16 where
ours has it. It learns from the very batches ours learns from (torchvision's transforms are not
needed for that), and of its learning rates the best counts. timm's part keeps freed memory as ours
does.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import vitrail
from vitrail.bench.macs import macs
from vitrail.data import open_data
from vitrail.data.batches.batch import Batch
from vitrail.data.batches.loader import EvalLoader, TrainLoader
from vitrail.recipes import RECIPES, facts
from vitrail.runs.data import open_data_of
from vitrail.runs.machine import keep_freed_memory

DATA = "samples:fashion-mnist"
SIDE = 32
TIMM = {
    "timm, patches of 8": {"patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4},
    "timm, patches of 4": {"patch_size": 4, "embed_dim": 64, "depth": 6, "num_heads": 4},
}
LOOKS = 16
"""Evaluations of a run, evenly spread."""

Curve = list[tuple[float, float]]
"""(seconds of training, share of the held-out images right), look by look."""


def ours(minutes: float) -> tuple[Curve, dict[str, Any]]:
    config = RECIPES["fashion-mnist"].config(facts(DATA, open_data(DATA)))
    config = replace(config, minutes=minutes, evaluations=LOOKS)
    with tempfile.TemporaryDirectory() as folder:
        outcome = vitrail.train(config, Path(folder) / "run")
        events = list(outcome.run.metrics())
        test = json.loads((outcome.run.path / "metrics.json").read_text())
    curve = [(e["seconds"], e["val_accuracy"]) for e in events if "val_accuracy" in e]
    assert test["part"] == "test"
    return curve, {"test": test["top1"], "macs": macs(config.model), "lr": config.optim.lr,
                   "precision": config.precision}  # fmt: skip


def timms(kind: str, lr: float, minutes: float) -> tuple[Curve, dict[str, Any]]:
    if "torchvision" not in sys.modules:
        # No torchvision matches a CPU-only torch: its operators have no schema.
        operators = torch.library.Library("torchvision", "DEF")
        operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        globals()["operators"] = operators  # they last as long as this object
    import timm
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import ModelEmaV3, dispatch_clip_grad

    keep_freed_memory()
    torch.manual_seed(0)
    config = RECIPES["fashion-mnist"].config(facts(DATA, open_data(DATA)))
    mixed = config.precision == "bfloat16"
    splits = open_data_of(config)
    assert splits.val is not None
    train = TrainLoader(
        splits.train, config.train_preprocess(), config.augment,
        batch_size=config.data.batch_size, seed=config.seed,
    )  # fmt: skip
    judged = list(EvalLoader(splits.val, config.preprocess()))
    shape = TIMM[kind]
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=SIDE, in_chans=1, num_classes=10, **shape
    )
    with FlopCounterMode(display=False) as counter:
        model.requires_grad_(False)(torch.zeros(1, 1, SIDE, SIDE))
    model.requires_grad_(True).train()
    average = ModelEmaV3(model, decay=config.ema)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=lr, weight_decay=0.05)
    steps = 1_000_000  # a schedule over time, as ours: its place is the share of the minutes
    schedule = CosineLRScheduler(
        optimizer, t_initial=steps, lr_min=1e-5, warmup_t=steps // 20, warmup_lr_init=1e-6,
        t_in_epochs=False,
    )  # fmt: skip
    learn = LabelSmoothingCrossEntropy(0.1)
    curve: Curve = []
    seconds, started = 0.0, time.perf_counter()
    for batch in epochs(train):
        schedule.step_update(round(steps * min(seconds / (60 * minutes), 1.0)))
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = learn(model(batch.images), batch.targets["classes"].argmax(dim=1))
        loss.backward()
        dispatch_clip_grad(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(model)
        now = time.perf_counter()
        seconds, started = seconds + now - started, now
        if seconds >= 60 * minutes * (len(curve) + 1) / LOOKS:
            curve.append((seconds, accuracy(average.module, judged, mixed)))
            started = time.perf_counter()
        if len(curve) == LOOKS:
            break
    return curve, {"macs": counter.get_total_flops() // 2, "lr": lr,
                   "precision": config.precision}  # fmt: skip


def epochs(train: TrainLoader) -> Iterator[Batch]:
    for epoch in range(1_000_000):
        yield from train.epoch(epoch)


@torch.inference_mode()
def accuracy(model: torch.nn.Module, batches: list[Batch], mixed: bool) -> float:
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        found = [
            model(batch.images).argmax(dim=1) == batch.targets["classes"].argmax(dim=1)
            for batch in batches
        ]
    return torch.cat(found).float().mean().item()


def reached(curve: Curve, goal: float) -> float | None:
    """Seconds until the goal; None: not reached."""
    return next((seconds for seconds, share in curve if share >= goal), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2.0, help="our training's")
    parser.add_argument("--times", type=float, default=3.0, help="timm's minutes over ours")
    parser.add_argument("--lrs", default="1e-3,3e-3", help="timm's learning rates")
    parser.add_argument("--kinds", default=";".join(TIMM))
    parser.add_argument("--goal", type=float, default=0.9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    runs: dict[str, Any] = {}

    def keep(name: str, curve: Curve, facts: dict[str, Any]) -> None:
        seconds = reached(curve, args.goal)
        runs[name] = {**facts, "reached_seconds": seconds, "curve": curve}
        said = f"{args.goal:.0%} after {seconds:.0f} s" if seconds else f"never {args.goal:.0%}"
        best = max(share for _, share in curve)
        print(
            f"{name:<34}{facts['precision']}, {said}, best {best:.1%} in {curve[-1][0]:.0f} s",
            flush=True,
        )

    keep("ours", *ours(args.minutes))
    for kind in args.kinds.split(";"):
        for lr in map(float, args.lrs.split(",")):
            keep(f"{kind}, lr {lr:g}", *timms(kind, lr, args.minutes * args.times))
    mine = runs["ours"]["reached_seconds"]
    theirs = [run["reached_seconds"] for name, run in runs.items() if name != "ours"]
    best = min((s for s in theirs if s), default=None)
    result = {
        "command": " ".join(["python benchmarks/time_to_accuracy.py", *sys.argv[1:]]),
        "goal": args.goal, "torch": torch.__version__, "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "times_sooner": best / mine if mine and best else None,
        # Where timm did not reach it, at least so much sooner.
        "at_least": args.minutes * args.times * 60 / mine if mine and best is None else None,
        "runs": runs,
    }  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "runs"}))


if __name__ == "__main__":
    main()
