"""What attention costs on large images: a forward pass of one image, in time and in memory.

    python benchmarks/detect_attention.py [--rounds 5] [--json FILE]

ViT-S/16 with attention to all tokens, in windows with four global blocks (ViTDet's) and with none,
with patches of 32 and 16 pixels in one sequence, and Twins-SVT-S, whose attention is in windows or
to summaries. Each model at each size is a process of its own; those of one size take turns, and
medians count: of seconds, and of the processors' seconds (`busy`), which other work on the machine
changes less. Memory is the most that the process holds during its first pass, less what it held
before, weights and libraries included: so it is what a pass needs beyond the weights.

An article claims "-37% memory" on BDD100K for patches of 32 + 16 in a detector, without saying
what was measured, on which model, nor against what: `memory` beside `global` is what can be said.
"""

import argparse
import ctypes
import json
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch

from vitrail.models import ModelConfig, ViTConfig, build, model_config
from vitrail.proc import forget_peak, peak_resident, processor, resident
from vitrail.runs.machine import native_precision

SIZES = {"640x360": (360, 640), "1280x720": (720, 1280), "2560x1440": (1440, 2560)}
LARGEST = "2560x1440"
QUARTERS = (2, 5, 8, 11)
# 45x80 tokens of 1280x720 are 3x5 of these windows and 90x160 of 2560x1440 6x10, without padding;
# the largest squares that would divide them have 5x5 tokens.
WINDOW = (15, 16)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "global": ("vit_s16", {}),
    "windows": ("vit_s16", {"window": WINDOW, "global_blocks": QUARTERS}),
    "windows-14": ("vit_s16", {"window": (14, 14), "global_blocks": QUARTERS}),
    "windows-only": ("vit_s16", {"window": WINDOW}),
    "two-scale": ("vit_s16", {"scales": "hierarchical"}),
    "twins": ("twins_svt_s", {}),
}


def config_of(kind: str, size: tuple[int, int]) -> ModelConfig:
    name, changes = KINDS[kind]
    if name.startswith("vit"):
        # 360 and 720 pixels are no whole number of patches of 16 and of 32.
        changes = {**changes, "indivisible": "pad"}
    return model_config(name, classes=0, image_size=size, **changes)


def tokens(config: ModelConfig) -> dict[str, int]:
    """How many patches a ViT has, and how many tokens its windows have."""
    if not isinstance(config, ViTConfig):
        return {}
    counts = {"tokens": config.tokens}
    if config.cuts is not None:
        cut = config.cuts.cut(config.grid)
        counts["in_windows"] = cut.windows * cut.size[0] * cut.size[1]
    return counts


def work(kind: str, size: str, precision: str) -> None:
    """One contestant: a line in is one pass to make, a line out what it took."""
    torch.manual_seed(0)
    model = build(config_of(kind, SIZES[size])).eval()
    x = torch.randn(1, 3, *SIZES[size])
    mixed = precision == "bfloat16"
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        model(torch.randn(1, 3, 64, 64))  # the weights are cast, the libraries loaded
        ctypes.CDLL(None).malloc_trim(0)
        forget_peak()
        before = resident()
        model(x)
        print(peak_resident() - before, flush=True)
        for _ in sys.stdin:
            started, busy = time.perf_counter(), time.process_time()
            model(x)
            taken = time.perf_counter() - started, time.process_time() - busy
            print(json.dumps(taken), flush=True)


def measure(size: str, precision: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds and bytes of each kind."""
    workers: dict[str, subprocess.Popen[str]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        workers[kind] = subprocess.Popen(
            [sys.executable, __file__, "--worker", kind, size, precision],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        rows[kind] = {
            **tokens(config_of(kind, SIZES[size])),
            "memory": int(answer(workers[kind])),
            "each": [],
        }
    for _ in range(rounds):
        for kind, worker in workers.items():
            assert worker.stdin is not None
            worker.stdin.write("\n")
            worker.stdin.flush()
            rows[kind]["each"].append(json.loads(answer(worker)))
    for worker in workers.values():
        worker.communicate()
    for kind, row in rows.items():
        row["seconds"], row["busy"] = map(median, zip(*row["each"], strict=True))
        row["times_as_fast"] = rows["global"]["seconds"] / row["seconds"]
        row["times_less_busy"] = rows["global"]["busy"] / row["busy"]
        row["memory_share"] = row["memory"] / rows["global"]["memory"]
        took = f"{row['seconds']:.2f} s, {row['busy']:.2f} s busy"
        print(f"{size} {precision} {kind}: {took}, {row['memory'] / 2**20:.0f} MiB", flush=True)
    return rows


def answer(worker: subprocess.Popen[str]) -> str:
    assert worker.stdout is not None
    if not (line := worker.stdout.readline()):
        sys.exit("a contestant has died: see above")
    return line


def table(found: dict[str, dict[str, dict[str, Any]]], precision: str) -> str:
    """In Markdown. Microseconds a token count patches of 16x16 pixels of the image, in all rows."""
    lines = [
        f"### {precision}",
        "",
        "| image | attention | tokens | in windows | seconds | times as fast | busy | times less |"
        " MiB | share | busy us a patch |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for size, rows in found.items():
        height, width = SIZES[size]
        patches = height * width / 256
        lines += [
            f"| {size} | {kind} | {row.get('tokens', '')} | {row.get('in_windows', '')} "
            f"| {row['seconds']:.2f} | {row['times_as_fast']:.2f} "
            f"| {row['busy']:.2f} | {row['times_less_busy']:.2f} | {row['memory'] / 2**20:.0f} "
            f"| {row['memory_share']:.2f} | {row['busy'] / patches * 1e6:.0f} |"
            for kind, row in rows.items()
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--precisions", nargs="+", default=None)
    parser.add_argument("--json", type=Path, help="where to keep the result")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(*args.worker)
    native = native_precision(torch.device("cpu"))
    found: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for precision in args.precisions or dict.fromkeys((native, "float32")):
        found[precision] = {
            size: measure(size, precision, 1 if size == LARGEST else args.rounds)
            for size in args.sizes
        }
    facts = {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": processor().get("model name", platform.processor()),
        "threads": torch.get_num_threads(),
        "native_precision": native,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "command": f"python benchmarks/detect_attention.py --rounds {args.rounds}",
        "claimed": "memory -37%, of nothing that is said (BDD100K, patches of 32 + 16)",
    }
    models = {kind: asdict(config_of(kind, SIZES["1280x720"])) for kind in KINDS}
    if args.json:
        text = json.dumps({"machine": facts, "models": models, "found": found}, indent=1)
        args.json.write_text(text + "\n")
    print("\n".join(f"- {name}: {value}" for name, value in facts.items()))
    for precision, sizes in found.items():
        print("", table(sizes, precision), sep="\n")


if __name__ == "__main__":
    main()
