"""Whether a change of the code changes a run: short runs of every kind, stored and compared.

    python benchmarks/kept.py store DIR      # with the code before
    python benchmarks/kept.py compare DIR    # with the code after; ends with 1 where they differ

On one machine, with one version of torch, the same numbers must come out bit for bit: losses, what
is measured, predictions, every tensor of every checkpoint. DIR keeps the runs that `store` made, so
that `compare` also resumes and evaluates what the code before has written.
"""

import argparse
import csv
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

SIZE, IMAGES = 32, 48
TINY = [
    *("--model", "vit_mini16", "--model.image-size", "32", "32", "--model.patch", "8", "8"),
    *("--model.depth", "2", "--model.width", "32", "--model.heads", "2"),
]
USUAL = [
    *("--epochs", "2", "--minutes", "None", "--data.batch-size", "16", "--evaluations", "2"),
    *("--seed", "3", "--threads", "1"),
]
NOISY = [
    *("--augment.policy", "randaugment", "--augment.mixup", "0.8", "--augment.cutmix", "1.0"),
    *("--augment.erase", "0.25", "--augment.jitter", "0.3", "--augment.shift", "2"),
]
KINDS: dict[str, list[str]] = {
    "single": ["single", *TINY, *NOISY],
    "several": ["several/labels.csv", *TINY, "--classify.label-smoothing", "0.1"],
    "balanced": ["single", *TINY, "--classify.class-weights", "balanced", "--ema", "0.9"],
    "halves": [
        *("single", *TINY, "--precision", "bfloat16", "--accumulate", "2", "--micro-batch", "5"),
        *("--ema", "0.9", "--data.first-size", "24", "24"),
    ],
    "native": ["single", *TINY, "--data.resize", "native"],
    "recompute": ["single", *TINY, "--checkpointing", "True", "--optim.name", "muon"],
    "mobilevit": ["single", "--model", "mobilevit_xxs", "--model.image-size", "64", "64"],
    "stream": [
        "hf-stream:{data}/parquet",
        *TINY,
        "--data.stream.buffer",
        "16",
        "--data.stream.epoch",
        "36",
    ],
    "damaged": ["damaged", *TINY, "--data.max-unreadable", "0.2"],
    "two": ["single", *TINY, *NOISY, "--devices", "2"],
    "sharded": ["single", *TINY, "--devices", "2", "--parallel", "fsdp"],
    "probe": ["single", "--weights", "{runs}/single", "--recipe", "probe"],
    "lora": ["single", "--weights", "{runs}/single", "--tune.lora-rank", "2"],
    "tuned": [
        *("single", "--weights", "{runs}/single", "--tune.layer-decay", "0.8"),
        *("--tune.head-init", "probe", "--tune.head-warmup", "0.3", "--tune.last-blocks", "1"),
    ],
    "distil": [
        *("single", *TINY, "--model.distilled", "True", "--model.pool", "class"),
        *("--model.class-token", "True", "--distill.teacher", "{runs}/single"),
        *("--distill.kind", "soft"),
    ],
    "pruned": [
        *("single", "--model", "dynamicvit_s16", *TINY[2:], "--model.prune-before", "1"),
        *("--distill.teacher", "{runs}/single"),
    ],
}


def make_data(place: Path) -> None:
    """Folders of small pictures whose class is a colour, a list of several labels, parquet."""
    rng = np.random.default_rng(0)
    names, colours = ("red", "green", "blue"), np.eye(3) * 120
    rows = []
    for i in range(IMAGES):
        label = i % 3
        height, width = (int(n) for n in rng.integers(SIZE, 2 * SIZE, 2))
        noise = rng.integers(0, 120, (height, width, 3))
        picture = Image.fromarray((noise + colours[label]).astype(np.uint8))
        for folder in ("single", "damaged"):
            file = place / folder / names[label] / f"{i:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.save(file)
        (place / "several").mkdir(exist_ok=True)
        picture.save(place / "several" / f"{i:03}.png")
        second = names[(label + 1) % 3] if i % 2 else ""
        rows.append((f"{i:03}.png", "|".join(filter(None, (names[label], second)))))
    with (place / "several" / "labels.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("image", "label"), *rows])
    for i in (4, 17):
        file = place / "damaged" / names[i % 3] / f"{i:03}.png"
        file.write_bytes(file.read_bytes()[:200])
    make_parquet(place)


def make_parquet(place: Path) -> None:
    import datasets

    files = sorted((place / "single").rglob("*.png"), key=lambda file: file.name)
    table = datasets.Dataset.from_dict(
        {"image": [str(f) for f in files], "label": [f.parent.name for f in files]}
    )
    table = table.cast_column("image", datasets.Image()).class_encode_column("label")
    for part, rows in (("train", range(12, IMAGES)), ("test", range(12))):
        folder = place / "parquet" / "data"
        folder.mkdir(parents=True, exist_ok=True)
        chosen = table.select(list(rows))
        chosen.to_parquet(folder / f"{part}-00000-of-00001.parquet")


def vitrail(*args: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vitrail", *args], capture_output=True, text=True, env=environment()
    )
    if done.returncode:
        raise SystemExit(f"vitrail {' '.join(args)}\n{done.stdout}\n{done.stderr}")


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": str(random.randrange(9999))}


def make_runs(data: Path, runs: Path, kinds: list[str], before: Path) -> None:
    """`before`: where the runs lie that others start from."""
    for kind in kinds:
        source, *flags = (part.format(data=data, runs=before) for part in KINDS[kind])
        place = source if source.startswith("hf-") else str(data / source)
        print(f"  {kind}", flush=True)
        vitrail("train", place, *flags, *USUAL, "--out", str(runs / kind))


def facts(run: Path) -> dict[str, object]:
    """All of a run that must not change, by name."""
    found: dict[str, object] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        event = json.loads(line)
        kept = {k: v for k, v in event.items() if "second" not in k}
        found[f"log {len(found)}"] = kept
    measured = json.loads((run / "metrics.json").read_text())
    found["measured"] = {k: v for k, v in measured.items() if "second" not in k and k != "data"}
    found["predictions"] = (run / "predictions.csv").read_text()
    found["split"] = (run / "split.csv").read_text()
    for file in sorted(run.glob("checkpoints/*/*.safetensors")):
        name = re.sub(r"step-\d+", file.parent.name, str(file.relative_to(run)))
        found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def go_on(run: Path, copy: Path) -> dict[str, object]:
    """What a run is after an epoch more, and what is measured of it anew."""
    shutil.copytree(run, copy)
    (copy / "metrics.json").unlink()
    vitrail("evaluate", str(copy))
    if "probe" not in run.name:
        vitrail("train", "--resume", str(copy), "--epochs", "3", "--accept-changes")
    return facts(copy)


def differing(before: dict[str, object], now: dict[str, object]) -> list[str]:
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=("store", "compare"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    data, before, now = folder / "data", folder / "before", folder / "now"
    if asked.verb == "store":
        make_data(data)
        make_runs(data, before, asked.kinds, before)
        stored = {kind: facts(before / kind) for kind in asked.kinds}
        later = {kind: go_on(before / kind, folder / "later" / kind) for kind in asked.kinds}
        (folder / "facts.json").write_text(json.dumps({"stored": stored, "later": later}))
        return
    shutil.rmtree(now, ignore_errors=True)
    kept = json.loads((folder / "facts.json").read_text())
    faults = 0
    make_runs(data, now, asked.kinds, before)
    for kind in asked.kinds:
        made = json.loads(json.dumps(facts(now / kind)))
        later = json.loads(json.dumps(go_on(before / kind, now / f"later-{kind}")))
        pairs = {"made": (kept["stored"][kind], made), "resumed": (kept["later"][kind], later)}
        for what, (then, today) in pairs.items():
            names = differing(then, today)
            faults += bool(names)
            told = f"{len(names)} differ: {', '.join(names[:4])}" if names else "equal"
            print(f"{kind:<10} {what:<8} {len(then)} facts, {told}", flush=True)
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
