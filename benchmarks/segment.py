"""What a head adds on a ViT, and what U-Net and DeepLabV3+ reach from scratch in the same time.

    python benchmarks/segment.py [--minutes 8] [--only NAME ...] [--runs DIR] [--json FILE]

On samples:scenes, in one time of training each: our heads on the wheel's ViT-S/14, frozen and
fine-tuned, and segmentation_models_pytorch's U-Net and DeepLabV3+ on a ResNet-18 from random
weights, as there are no others to be had here. These learn in our loop: the same images, views,
schedule, average and measurement (whole images, masks at their own size). `pip install --no-deps
segmentation-models-pytorch` first for theirs. One run each: a difference of two points is none.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from vitrail.data import open_splits
from vitrail.data.batches.loader import EvalLoader, TrainLoader
from vitrail.data.targets import Masks
from vitrail.models import model_config
from vitrail.recipes import RECIPES, facts
from vitrail.runs import OptimConfig, Run, TrainConfig
from vitrail.tasks import SegmentConfig
from vitrail.tasks.segment import Segment
from vitrail.training import fit

DATA = "samples:scenes"
FROZEN = ["--tune.freeze", "backbone.*"]
KEPT = [*FROZEN, "--tune.kept-views", "4"]
FOUR = ["--segment.head", "linear", "--segment.taps", "four"]
OURS = {
    "linear, frozen": ["--segment.head", "linear", *KEPT],
    "linear, four taps, frozen": [*FOUR, *KEPT],
    "deeplab (side), frozen": ["--segment.head", "deeplab", "--segment.fine", "side", *KEPT],
    "queries, frozen": ["--segment.head", "queries", *FROZEN],
    "linear": ["--segment.head", "linear"],
    "linear, four taps": FOUR,
    "deeplab (side)": ["--segment.head", "deeplab", "--segment.fine", "side"],
    "deeplab (deconv)": ["--segment.head", "deeplab", "--segment.fine", "deconv"],
    "queries": ["--segment.head", "queries"],
}
THEIRS = {"U-Net, ResNet-18": "Unet", "DeepLabV3+, ResNet-18": "DeepLabV3Plus"}


def ours(flags: list[str], minutes: float, out: Path) -> dict[str, float]:
    command = [
        *(sys.executable, "-m", "vitrail", "train", DATA, "--task", "segment"),
        *("--weights", "focus_s14", "--minutes", str(minutes), "--evaluations", "1"),
        *("--out", str(out), "--json", *flags),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found = json.loads(done.stdout.splitlines()[-1])
    steps = [event for event in Run(out).metrics() if "loss" in event]
    return {**found["metrics"], "steps": len(steps), "seconds": found["seconds"]}


def let_torchvision_be_imported() -> None:
    """No torchvision matches a CPU-only torch: its operators have no schema."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        operators = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        globals()["operators"] = operators  # they last as long as this object


class Theirs(nn.Module):
    """A network of pixels' logits, as the task wants a segmenter."""

    stride = (1, 1)

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, extent: Tensor | None = None) -> Tensor:
        return self.net(x)

    def pixels(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        return logits

    def enter(self, done: float) -> None:
        """Nothing changes in a run."""

    def block_names(self) -> list[str]:
        return []


def theirs(name: str, minutes: float, out: Path) -> dict[str, float]:
    let_torchvision_be_imported()
    import segmentation_models_pytorch as smp

    splits = open_splits(DATA, seed=0, targets=Masks)
    recipe = RECIPES["segment"].config(facts(DATA, splits.parts["train"]))
    config: TrainConfig = replace(
        recipe,
        model=model_config("resnet18", classes=0, image_size=(224, 224)),
        row="resnet18",
        segment=SegmentConfig(head="linear"),
        optim=OptimConfig(lr=1e-3, weight_decay=0.05),
        minutes=minutes,
        evaluations=1,
    )
    classes = len(splits.train.targets.names)
    net = getattr(smp, name)("resnet18", encoder_weights=None, classes=classes)
    task = Segment(Theirs(net), config.segment, splits.train.targets, config.preprocess())
    started = time.perf_counter()
    torch.manual_seed(0)
    train = TrainLoader(
        splits.train, config.train_preprocess(), config.views(),
        batch_size=config.data.batch_size, seed=0,
    )  # fmt: skip
    val = EvalLoader(splits.val, config.preprocess(), batch_size=16)
    run = Run.create(out, config)
    found = fit(task, train, val, config, run).found
    assert found is not None
    metrics = task.eval().judge(found.rows)
    steps = [event for event in run.metrics() if "loss" in event]
    return {**metrics.values(), "steps": len(steps), "seconds": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--only", nargs="*", default=[*OURS, *THEIRS])
    parser.add_argument("--runs", type=Path, help="where to keep them")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as place:
        for name in asked.only:
            out = (asked.runs or Path(place)) / name.replace(", ", "-").replace(" ", "-")
            made = (
                ours(OURS[name], asked.minutes, out)
                if name in OURS
                else theirs(THEIRS[name], asked.minutes, out)
            )
            rows[name] = made
            shown = "  ".join(
                f"{key} {made[key]:6.1%}" for key in ("miou", "pixel_accuracy", "boundary_iou")
            )
            print(f"{name:<28}{shown}  {made['steps']:>5} steps", flush=True)
            if asked.json:
                asked.json.write_text(
                    json.dumps({"minutes": asked.minutes, "rows": rows}, indent=1)
                )


if __name__ == "__main__":
    main()
