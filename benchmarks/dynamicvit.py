"""What dropping tokens costs: a trained ViT, and from there, for the same time, itself and pruned.

vitrail train samples:emoji --recipe demo --out runs/teacher
python benchmarks/dynamicvit.py runs/teacher --minutes 3.9 --json benchmarks/results/dynamicvit.json

Both learn from the teacher's weights on the same images with the same settings; the pruned one also
from the teacher's answers (arXiv 2106.02034). Counted are multiply-accumulates at the size at which
the held-out images are measured.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import vitrail
from vitrail.bench.macs import macs
from vitrail.models import ViTConfig
from vitrail.models.dynamicvit import pruned
from vitrail.runs import OptimConfig, Run, TrainConfig, TuneConfig
from vitrail.tasks import DistillConfig, PruneConfig


def _result(run: Run, config: TrainConfig) -> dict[str, Any]:
    metrics = json.loads((run.path / "metrics.json").read_text())
    return {
        "top1": metrics["top1"],
        "images": metrics["images"],
        "macs": macs(config.model),
        "model_images_per_second": metrics["model_images_per_second"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--minutes", type=float, default=3.9)
    parser.add_argument("--keep", type=float, default=0.7)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    teacher = Run(args.teacher)
    before = teacher.config()
    assert isinstance(before.model, ViTConfig)
    quarters = tuple(before.model.depth * i // 4 for i in (1, 2, 3))
    further = replace(
        before,
        weights=str(args.teacher.resolve()),
        optim=OptimConfig(lr=1e-4),
        # The predictors are new, and learn as fast as the authors' did.
        tune=TuneConfig(layer_decay=before.tune.layer_decay, head_lr=10.0),
        minutes=args.minutes,
    )
    ways = {
        "whole": further,
        f"keep {args.keep:g}": replace(
            further,
            model=pruned(before.model, keep=args.keep, prune_before=quarters),
            distill=DistillConfig(teacher=str(args.teacher.resolve())),
            # The teacher looks at its own size, where it has other tokens than these crops.
            prune=PruneConfig(tokens=0.0),
        ),
    }
    found = {"teacher": _result(teacher, before)}
    for name, config in ways.items():
        run = vitrail.train(config, args.out / f"dynamicvit-{name.replace(' ', '-')}").run
        found[name] = _result(run, config)
    for name, row in found.items():
        print(f"{name:<10} {row['top1']['value']:.1%}  {row['macs'] / 1e9:.3f} GMACs")
    if args.json:
        args.json.write_text(json.dumps(found | {"environment": teacher.environment()}, indent=1))


if __name__ == "__main__":
    main()
