"""What makes a small ViT learn quickly on a CPU: the recipe with one thing changed at a time.

    python benchmarks/fast_recipe.py [--minutes 1] [--data samples:fashion-mnist] [--json FILE]

Each way trains for the same time with a whole schedule, from random weights; the table has the
held-out accuracy at its end (of the averaged weights where there is an average) and the images a
second. One seed a way: two runs of one setting differ by a point or less, so read the order of
clear differences, not of near ones.
"""

import argparse
import json
import platform
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import vitrail
from vitrail.data import open_data
from vitrail.recipes import RECIPES, facts
from vitrail.runs import TrainConfig
from vitrail.runs.config import with_changes

WAYS: Mapping[str, Mapping[str, Any]] = {
    "the recipe": {},
    "AdamW": {"optim.name": "adamw", "optim.lr": 1.5e-3},
    "trapezoid": {"optim.schedule": "trapezoid"},
    "patch stem": {"model.stem": "patch"},
    "batch 64": {"data.batch_size": 64},
    "batch 256": {"data.batch_size": 256},
    "no average": {"ema": 0.0},
    "from three quarters of the size": {"first": 0.75},
    "from half the size": {"first": 0.5},
    "lr 6e-3": {"optim.lr": 6e-3},
    "Muon, lr 1e-3": {"optim.name": "muon", "optim.lr": 1e-3},
    "Muon, lr 3e-3": {"optim.name": "muon", "optim.lr": 3e-3},
}


def config_of(data: str, way: Mapping[str, Any], minutes: float) -> TrainConfig:
    name = "fashion-mnist" if data == "samples:fashion-mnist" else "scratch"
    config = RECIPES[name].config(facts(data, open_data(data)))
    config = replace(config, minutes=minutes, evaluations=1)
    changes = dict(way)
    if share := changes.pop("first", None):
        size, steps = config.train_preprocess().size, config.model.stride
        changes["data.first_size"] = [
            round(share * side / step) * step for side, step in zip(size, steps, strict=True)
        ]
    return with_changes(config, changes, "this way")


def learn(config: TrainConfig) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        outcome = vitrail.train(config, Path(folder) / "run")
        events = list(outcome.run.metrics())
    rates = [event["images_per_second"] for event in events if "loss" in event]
    return {
        "held_out": next(e["val_accuracy"] for e in reversed(events) if "val_accuracy" in e),
        "images_per_second": statistics.median(rates),
        "steps": events[-1]["step"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="samples:fashion-mnist")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--ways", default=";".join(WAYS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = {}
    for name in args.ways.split(";"):
        config = config_of(args.data, WAYS[name], args.minutes)
        found[name] = learn(config)
        row = found[name]
        print(
            f"{name:<34}{row['held_out']:6.1%}  {row['images_per_second']:6.0f} images/s, "
            f"{config.precision}",
            flush=True,
        )
    if args.json:
        machine = platform.processor() or platform.machine()
        result = {
            "data": args.data, "minutes": args.minutes, "torch": torch.__version__,
            "machine": machine, "threads": torch.get_num_threads(), "precision": config.precision,
            "ways": found,
        }  # fmt: skip
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
