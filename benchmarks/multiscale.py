"""What patches of two sizes are worth: ViTs from scratch on the emoji, each for the same time.

    python benchmarks/multiscale.py --minutes 3.3 --seeds 3 --out multiscale.json

The recipe is `scratch`'s (`vit_mini16` at 96 pixels: 36 patches); only the patches differ. Seeds
take turns, not models, so that a slow hour of the machine is everybody's. A seed also decides which
images are held out, so models are compared seed by seed: `gain` is the mean difference to `one`.
"""

import argparse
import json
import platform
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

import vitrail
from vitrail.bench.macs import macs
from vitrail.data import open_data
from vitrail.models import ViTConfig, build, count_parameters
from vitrail.recipes import RECIPES, facts
from vitrail.runs import TrainConfig

DATA = "samples:emoji"
KINDS: dict[str, dict[str, Any]] = {
    "one": {},
    "hierarchical": {"scales": "hierarchical"},
    "adaptive-variance": {"scales": "adaptive", "saliency": "variance"},
    "adaptive-learned": {"scales": "adaptive", "saliency": "learned"},
    # What all fine patches would cost and be worth.
    "fine": {"patch": (8, 8)},
}


def config_of(kind: str, minutes: float, seed: int) -> TrainConfig:
    recipe = RECIPES["scratch"].config(facts(DATA, open_data(DATA)))
    return replace(
        recipe,
        model=replace(recipe.model, **KINDS[kind]),
        minutes=minutes,
        seed=seed,
        evaluations=1,
    )


def cost(model: ViTConfig) -> dict[str, int]:
    return {
        "tokens": model.tokens,
        "macs": macs(model),
        "parameters": count_parameters(build(model)),
    }


def result(config: TrainConfig, out: Path) -> dict[str, Any]:
    """One run, in numbers."""
    outcome = vitrail.train(config, out)
    last = [event for event in outcome.run.metrics() if "loss" in event][-1]
    evaluation = outcome.evaluation
    return {
        "seed": config.seed,
        "precision": config.precision,
        "top1": evaluation.metrics.values()["top1"],
        "log_loss": evaluation.metrics.values()["log_loss"],
        "epochs": last["epoch"] + 1,
        "steps": last["step"],
        "seconds": round(last["seconds"], 1),
        "images_per_second": round(evaluation.model_images_per_second, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=3.3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--out", type=Path, help="where to keep the result as JSON")
    arguments = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in arguments.kinds}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seeds):
            for kind in arguments.kinds:
                config = config_of(kind, arguments.minutes, seed)
                runs[kind].append(result(config, Path(folder) / f"{kind}-{seed}"))
                print(kind, runs[kind][-1], flush=True)
    rows = {}
    for kind, results in runs.items():
        model = config_of(kind, arguments.minutes, 0).model
        assert isinstance(model, ViTConfig)
        scores = [run["top1"] for run in results]
        rows[kind] = {**cost(model), "top1": mean(scores), "runs": results}
        if "one" in runs and kind != "one":
            gains = [a - b["top1"] for a, b in zip(scores, runs["one"], strict=True)]
            error = stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None
            rows[kind] |= {"gain": mean(gains), "gain_standard_error": error}
        print(f"{kind:18} {rows[kind]['tokens']:4} tokens {rows[kind]['macs'] / 1e6:8.1f} M MACs")
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    text = json.dumps({"machine": machine, "minutes": arguments.minutes, "models": rows}, indent=1)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
