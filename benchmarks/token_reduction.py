"""Fewer tokens, more images a second: a ViT whole, as DynamicViT, and with its tokens merged.

    chrt -r 10 python benchmarks/token_reduction.py [--threads 2] [--keep-pages] [--json]

The models take turns, in changing order. The figures are medians; a ratio is the median of the
ratios to the whole model within a turn, so that a slow moment of the machine hits both. Multiply-
accumulates are counted while the models run, predictors and matching among them. The random
weights do not matter: how many tokens are left follows from the image size alone.

At 384 pixels ToMe merges the same share of the tokens after each block as at 224: 13 of 196, 38 of
576. `--precision pure` has weights and activations in bfloat16, `mixed` is autocast; the default is
pure where the machine has bfloat16, else float32.

`--keep-pages` lets glibc keep the memory that is freed. By default it gives large blocks back to
the system, which has to clear them again at every call. That costs the whole model most, for its
activations are the largest: the ratios without the option hold as the machine comes, those with it
say what fewer tokens save in computing.
"""

import argparse
import ctypes
import json
import statistics
import time
from collections import defaultdict
from dataclasses import replace

import torch

from vitrail.bench.macs import macs
from vitrail.models import ViTConfig, build, model_config
from vitrail.models.dynamicvit import pruned
from vitrail.runs.machine import native_precision

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def sides(model: str, size: int, keep: float, r: int) -> dict[str, ViTConfig]:
    """The whole model, and the two with fewer tokens; `r` is for the 196 patches of 224 pixels."""
    config = model_config(model, image_size=(size, size))
    assert isinstance(config, ViTConfig)
    scaled = round(r * config.tokens / 196)
    return {
        model: config,
        f"DynamicViT keep={keep}": pruned(config, keep=keep),
        f"ToMe r={scaled}": replace(config, merge=scaled),
    }


def measure(
    configs: dict[str, ViTConfig], batch: int, rounds: int, precision: str
) -> list[dict[str, object]]:
    whole = next(iter(configs))
    images = torch.randn(batch, 3, *configs[whole].image_size)
    models = {name: build(config).eval() for name, config in configs.items()}
    if precision == "pure":
        images = images.bfloat16()
        models = {name: model.bfloat16() for name, model in models.items()}
    times: dict[str, list[float]] = defaultdict(list)
    with (
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "mixed"),
    ):
        names = list(models)
        for turn in range(rounds + 2):
            for name in names[turn % 3 :] + names[: turn % 3]:
                start = time.perf_counter()
                models[name](images)
                times[name].append(time.perf_counter() - start)
    rows = []
    for name, config in configs.items():
        taken = times[name][2:]
        ratios = [a / b for a, b in zip(times[whole][2:], taken, strict=True)]
        quarters = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "model": name,
                "size": config.image_size[0],
                "precision": precision,
                "gmacs": round(macs(config) / 1e9, 3),
                "macs_saved": round(1 - macs(config) / macs(configs[whole]), 3),
                "images_per_second": round(batch / statistics.median(taken), 1),
                "ratio": round(statistics.median(ratios), 3),
                "ratio_quartiles": [round(quarters[0], 3), round(quarters[2], 3)],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_s16")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 384])
    parser.add_argument("--keep", type=float, default=0.7)
    parser.add_argument("--r", type=int, default=13)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=["pure", "mixed", "float32"])
    parser.add_argument("--keep-pages", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.keep_pages:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    if args.precision is None:
        native = native_precision(torch.device("cpu")) == "bfloat16"
        args.precision = "pure" if native else "float32"
    rows = []
    for size in args.sizes:
        configs = sides(args.model, size, args.keep, args.r)
        for row in measure(configs, args.batch, args.rounds, args.precision):
            print("  ".join(f"{value!s:<20}" for value in row.values()), flush=True)
            rows.append(row)
    if args.json:
        about = {"torch": torch.__version__, **vars(args)}
        print(json.dumps({**about, "rows": rows}))


if __name__ == "__main__":
    main()
