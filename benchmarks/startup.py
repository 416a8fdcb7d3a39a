"""How long `import vitrail`, a first model and `vitrail --help` take, beside torch's own import.

    python benchmarks/startup.py [--runs 7] [--json]

Each command is a fresh process; they take turns, so that a slow moment of the machine meets all.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python": "pass",
    "import torch": "import torch",
    "import vitrail": "import vitrail",
    "import vitrail, then vitrail.build": "import vitrail; vitrail.build",
    "vitrail --help": "import sys; from vitrail.cli import main; sys.exit(main(['--help']))",
}


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for run in range(args.runs + 1):
        for name, code in COMMANDS.items():
            taken = seconds(code)
            if run:  # the first round fills the disk cache
                times[name].append(taken)
    medians = {name: round(statistics.median(taken), 3) for name, taken in times.items()}
    for name, median in medians.items():
        print(f"{name:<38}{median:>8.3f} s")
    if args.json:
        print(json.dumps({"runs": args.runs, "median_seconds": medians}))


if __name__ == "__main__":
    main()
