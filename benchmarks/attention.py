"""Attention three ways, forward and backward: torch's fused kernel, its math path, three products.

    python benchmarks/attention.py [--threads 2] [--json]

This is why `vitrail.nn.attention.attend` does not use the fused kernel for bfloat16 on a CPU. The
ways take turns; the figures are medians of seven, in milliseconds, after a warm-up.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

SHAPES = [(128, 4, 16, 32), (64, 4, 37, 32), (64, 3, 50, 64), (16, 6, 197, 64), (4, 6, 577, 64)]


def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v


def math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "fused": F.scaled_dot_product_attention,
    "math": math,
    "products": products,
}


def once(way: Callable[[Tensor, Tensor, Tensor], Tensor], qkv: Tensor) -> tuple[float, float]:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    start = time.perf_counter()
    out = way(q, k, v).transpose(1, 2).flatten(2)
    forward = time.perf_counter()
    out.backward(torch.ones_like(out))
    return forward - start, time.perf_counter() - forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            b, h, n, e = shape
            qkv = torch.randn(b, n, 3, h, e, dtype=dtype, requires_grad=True)
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
            for _ in range(8):
                for name, way in WAYS.items():
                    times[name].append(once(way, qkv))
            for name, taken in times.items():
                forward, backward = (
                    round(1000 * statistics.median(column), 2)
                    for column in zip(*taken[1:], strict=True)
                )
                row = {
                    "shape [b h n e]": list(shape),
                    "dtype": str(dtype).removeprefix("torch."),
                    "way": name,
                    "forward_ms": forward,
                    "backward_ms": backward,
                }
                print("  ".join(f"{value!s:<18}" for value in row.values()))
                rows.append(row)
    if args.json:
        print(json.dumps({"torch": torch.__version__, "threads": args.threads, "rows": rows}))


if __name__ == "__main__":
    main()
