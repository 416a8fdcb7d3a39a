"""Whether another version of vitrail is slower: two source trees, run in turns.

    git worktree add ../before COMMIT
    python benchmarks/trees.py ../before [--rounds 7] [--seconds 60] [--json FILE]

Of each tree, in fresh processes that take turns: how long `vitrail --help` and the import of the
main job take (the least of five), how long the demo takes besides its training (start, data,
weights, measuring, report), how many images a second it trains on, and how many of the whole
command if it trains as long as its recipe has it. A ratio is of the two in one round, this tree's
speed over the other's, so that above 1 this tree is faster; its median over the rounds counts.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from statistics import median

import torch

HERE = Path(__file__).parents[1]


MAIN = "import sys; from vitrail.cli import main; sys.exit(main())"
_STARTS = 5
_DEMO = 234.0
"""Seconds that `make demo` trains for, as its recipe has it."""


def run(tree: Path, program: str, *words: str) -> float:
    """Seconds that a program takes with a tree."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", program, *words],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(tree / "src")},
    )
    return time.perf_counter() - start


def measured(tree: Path, seconds: float) -> dict[str, float]:
    """Seconds of each start and of the demo besides its training; images a second of that."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "run"
        minutes = str(seconds / 60)
        whole = run(
            *(tree, MAIN, "train", "samples:emoji", "--recipe", "demo"),
            *("--minutes", minutes, "--evaluations", "1", "--out", str(out)),
        )
        events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rates = [event["images_per_second"] for event in events if "images_per_second" in event]
    besides, rate = whole - events[-1]["seconds"], median(rates[1:])
    return {
        "help": min(run(tree, MAIN, "--help") for _ in range(_STARTS)),
        "import": min(run(tree, "import vitrail.job") for _ in range(_STARTS)),
        "besides": besides,
        "images_per_second": rate,
        "demo": _DEMO * rate / (_DEMO + besides),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=60, help="of training")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(args.rounds + 1):
        # Who goes first alternates; the first round fills the caches.
        order = [("this", HERE), ("other", args.other.resolve())][:: 1 if number % 2 else -1]
        found = {name: measured(tree, args.seconds) for name, tree in order}
        if number:
            rounds.append(found)
            print(json.dumps(found), flush=True)
    ratios = {}
    for name in rounds[0]["this"]:
        faster = 1 if name in ("images_per_second", "demo") else -1
        ratios[name] = [(r["this"][name] / r["other"][name]) ** faster for r in rounds]
    for name, each in ratios.items():
        print(f"{name:<20}{median(each):.3f}  ({min(each):.3f} to {max(each):.3f})")
    if args.json:
        result = {
            "date": datetime.now().date().isoformat(),
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "rounds": rounds,
            "ratios": {name: median(each) for name, each in ratios.items()},
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
