"""Keep a run's result: what it reached, on what, with which command.

python benchmarks/record.py runs/x benchmarks/results/NAME.json
"""

import argparse
import json
import statistics
from pathlib import Path

from vitrail.runs import Run


def _keys(value: object) -> list[str]:
    return list(value) if isinstance(value, dict) else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    run = Run(args.run)
    metrics = json.loads((run.path / "metrics.json").read_text())
    events = [event for event in run.metrics() if "seconds" in event]
    rates = [e["images_per_second"] for e in events if "images_per_second" in e]
    result = {
        "environment": run.environment(),
        "part": metrics["part"],
        "images": metrics["images"],
        "metrics": {
            name: value for name, value in metrics.items() if {"value", "low"} <= set(_keys(value))
        },
        "training_seconds": round(events[-1]["seconds"], 1),
        "steps": events[-1]["step"],
        "epochs": events[-1]["epoch"] + 1,
        # A probe takes no steps.
        "median_images_per_second": round(statistics.median(rates), 1) if rates else None,
        "config": run.config_file.read_text(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["metrics"]))


if __name__ == "__main__":
    main()
