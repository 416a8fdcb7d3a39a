"""What MoCo v3 learns in ten minutes from images without labels, beside random weights.

    python benchmarks/mocov3.py [--minutes 10] [--json FILE] [-- --FLAG VALUE ...]

`vitrail train samples:emoji --task mocov3` twice: an epoch at a learning rate of nearly nothing,
which leaves the features as they were drawn, and as long as is asked, with the flags behind `--`.
Labels only measure: k-NN by 20 neighbours of each held-out image, among the training images (as
published numbers are) and among the other held-out images.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from vitrail.evaluation import evaluate
from vitrail.metrics.features import leave_one_out, rights
from vitrail.runs import Run
from vitrail.runs.machine import matrix_rate

TRAIN = ("train", "samples:emoji", "--task", "mocov3", "--evaluations", "1")
NOTHING = ("--epochs", "1", "--minutes", "None", "--optim.lr", "1e-12", "--optim.final-lr", "0")


def vitrail(*words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "vitrail", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def measured(out: Path, *flags: str) -> dict[str, Any]:
    found = vitrail(*TRAIN, *flags, "--out", str(out))
    rows = evaluate(out).rows
    alone = rights(leave_one_out(rows["features"], rows["classes"]), rows["classes"])
    steps = [event for event in Run(out).metrics() if "loss" in event]
    return {
        "knn": found["estimates"]["knn"],
        "knn_among_themselves": alone.double().mean().item(),
        "metrics": found["metrics"],
        "steps": len(steps),
        "images_per_second": steps[len(steps) // 2]["images_per_second"],
        "seconds": found["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("flags", nargs="*", metavar="FLAG")
    args = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as place:
        for name, more in (
            ("random weights", NOTHING),
            ("learned", ("--minutes", str(args.minutes))),
        ):
            rows[name] = found = measured(Path(place) / name, *more, *args.flags)
            shown = f"k-NN {found['knn']['value']:.1%} ({found['knn_among_themselves']:.1%})"
            print(f"{name:<16}{shown}  {found['steps']} steps", flush=True)
    if args.json:
        result = {
            "minutes": args.minutes,
            "flags": args.flags,
            "date": datetime.now().date().isoformat(),
            "torch": torch.__version__,
            "bfloat16_gflops": round(matrix_rate(torch.bfloat16, torch.device("cpu")) / 1e9),
            "rows": rows,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
