"""What each method learns from images without labels, and what that is worth to fine-tune from.

    python benchmarks/pretrain.py [--json FILE] [--minutes 10] [--finetune-minutes 4]
                                  [--methods dino mae ...] [-- --FLAG VALUE ...]

On the emoji, whose labels only measure: k-NN by 20 of the training images and a linear probe of the
364 held-out ones, of pixels, of random weights, of the published teacher, and of each method after
as long, with the flags behind `--`. Then a classifier is fine-tuned from each, and one is trained
from scratch by the recipe that is made for it. One after the other, through the command line. What
FILE holds already is not run again.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrail.data.batches.loader import EvalLoader
from vitrail.data.targets import Nothing
from vitrail.data.views.preprocess import Preprocess
from vitrail.evaluation import evaluate
from vitrail.metrics.features import judged, knn, leave_one_out, rights
from vitrail.models import build
from vitrail.runs import Run
from vitrail.runs.data import open_data_of
from vitrail.runs.machine import matrix_rate
from vitrail.tasks import TASKS
from vitrail.weights import open_weights
from vitrail.weights.fetch import cached_file

DATA = "samples:emoji"
TEACHER, SIDE = "focus_s14", 112
NOTHING = ("--epochs", "1", "--minutes", "None", "--optim.lr", "1e-12", "--optim.final-lr", "0")
METHODS = tuple(name for name, kind in TASKS.items() if kind.targets is Nothing)


def vitrail(*words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "vitrail", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def learned(out: Path, method: str, *flags: str) -> dict[str, Any]:
    """What a run of a method reached; its folder is `out`."""
    words = ("--task", method, "--evaluations", "1", "--out", str(out))
    found = vitrail("train", DATA, *words, *flags)
    rows = evaluate(out).rows
    alone = rights(leave_one_out(rows["features"], rows["classes"]), rows["classes"])
    steps = [event for event in Run(out).metrics() if "loss" in event]
    rates = [event["images_per_second"] for event in steps]
    return {
        "features": found["estimates"],
        "knn_among_themselves": alone.double().mean().item(),
        "steps": len(steps),
        "images_per_second": statistics.median(rates),
        "seconds": found["seconds"],
    }


def looked_at(run: Path, preprocess: Preprocess, say: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """What `say` says of images, measured as a run's features are, on its split."""
    config = Run(run).config()
    splits = open_data_of(config, Run(run).split_file)
    found = []
    for source in (splits.train, splits.val):
        loader = EvalLoader(source, preprocess, batch_size=64, workers=config.data.workers)
        with torch.inference_mode():
            batches = [(say(batch.images), batch.targets["classes"]) for batch in loader]
        found.append([torch.cat(parts) for parts in zip(*batches, strict=True)])
    (bank, of_bank), (features, classes) = found
    votes = knn(features, bank, of_bank)
    metrics = judged(features, classes, votes=votes, bank=len(bank))
    alone = rights(leave_one_out(features, classes), classes)
    return {
        "features": metrics.to_dict(),
        "knn_among_themselves": alone.double().mean().item(),
    }


def pixels(run: Path) -> dict[str, Any]:
    preprocess = replace(Run(run).config().preprocess(), size=(32, 32), patch=(1, 1))
    return looked_at(run, preprocess, lambda images: images.flatten(1))


def teacher(run: Path) -> dict[str, Any]:
    opened = open_weights(TEACHER)
    model = build(opened.config).eval()
    model.load_state_dict(opened.state)
    assert opened.preprocess is not None
    return looked_at(run, replace(opened.preprocess, size=(SIDE, SIDE)), model)


def finetuned(*words: str, minutes: float, out: Path) -> dict[str, Any]:
    found = vitrail("train", DATA, *words, "--minutes", str(minutes), "--out", str(out))
    return found["estimates"]["top1"]


def line(name: str, row: dict[str, Any]) -> str:
    def share(number: dict[str, float] | None) -> str:
        return f"{number['value']:>8.1%}" if number else f"{'':>8}"

    features = row.get("features", {})
    shown = "".join(share(features.get(number)) for number in ("knn", "probe"))
    return f"{name:<24}{shown}{share(row.get('finetuned'))}  {row.get('steps', '')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--finetune-minutes", type=float, default=4)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("flags", nargs="*", metavar="FLAG")
    args = parser.parse_args()
    told = {
        "minutes": args.minutes,
        "finetune_minutes": args.finetune_minutes,
        "flags": args.flags,
    }
    result: dict[str, Any] = {"rows": {}}
    if args.json and args.json.is_file():
        result = json.loads(args.json.read_text())
        if other := {name for name, value in told.items() if result[name] != value}:
            raise SystemExit(f"{args.json} is of other {', '.join(sorted(other))}")
    result |= {
        **told,
        "date": datetime.now().date().isoformat(),
        "torch": torch.__version__,
        "bfloat16_gflops": round(matrix_rate(torch.bfloat16, torch.device("cpu")) / 1e9),
    }
    print(f"{'':<24}{'k-NN':>8}{'probe':>8}{'tuned':>8}  steps")

    def keep(name: str, make: Callable[[], dict[str, Any]]) -> None:
        if name not in result["rows"]:
            result["rows"][name] = make()
            if args.json:
                args.json.write_text(json.dumps(result, indent=1) + "\n")
        print(line(name, result["rows"][name]), flush=True)

    with tempfile.TemporaryDirectory() as place:
        random = Path(place) / "random"

        def tuned(source: str) -> dict[str, Any]:
            out = Path(place) / f"tuned-{Path(source).name}"
            words = ("--weights", source)
            return {"finetuned": finetuned(*words, minutes=args.finetune_minutes, out=out)}

        def after(method: str) -> dict[str, Any]:
            run = Path(place) / method
            found = learned(run, method, "--minutes", str(args.minutes), *args.flags)
            return found | tuned(str(run))

        def scratch() -> dict[str, Any]:
            out = Path(place) / "scratch"
            return {"finetuned": finetuned(minutes=args.finetune_minutes, out=out)}

        # Made even where FILE has it: its folder says the split of the images.
        drawn = learned(random, "mocov3", *NOTHING)
        del drawn["steps"]
        keep("random weights", lambda: drawn | tuned(str(random)))
        keep("pixels", lambda: pixels(random))
        if cached_file(TEACHER).is_file():
            keep(TEACHER, lambda: teacher(random) | tuned(TEACHER))
        for method in args.methods:
            keep(method, lambda method=method: after(method))
        keep("from scratch", scratch)


if __name__ == "__main__":
    main()
