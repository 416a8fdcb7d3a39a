"""What it costs that images in a batch have different sizes: `python benchmarks/grids.py`.

A training step on 32 square images, and on 32 of five aspects with about as many tokens each. In
float32.
"""

import time
from collections.abc import Callable

import torch

from vitrail.models import build

ASPECTS = {
    (6, 6): ((6, 6), (5, 7), (4, 9), (9, 4), (7, 5)),
    (14, 14): ((14, 14), (12, 16), (10, 19), (19, 10), (16, 12)),
}


def milliseconds(step: Callable[[], None]) -> float:
    started = time.process_time()  # of one thread: what else runs on the machine counts little
    step()
    return 1000 * (time.process_time() - started)


def measure(name: str, **changes: object) -> None:
    model = build(name, num_classes=10, **changes).train()
    grids = ASPECTS[model.config.grid]
    extent = torch.tensor([grids[i % len(grids)] for i in range(32)])
    height, width = (int(n) * p for n, p in zip(extent.amax(0), model.config.patch, strict=True))
    square, canvas = torch.randn(32, 3, *model.config.image_size), torch.randn(32, 3, height, width)

    def step(images: torch.Tensor, extent: torch.Tensor | None = None) -> None:
        model.zero_grad()
        model(images, extent).logsumexp(dim=1).sum().backward()

    ways = (lambda: step(square)), (lambda: step(canvas, extent))
    times = [[milliseconds(way) for way in ways] for _ in range(12)][2:]  # in turn, once warm
    one, many = (min(way) for way in zip(*times, strict=True))
    more = many / one - 1
    print(f"{name} {changes}: {one:.0f} ms, of different sizes {many:.0f} ms ({more:+.0%})")


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    measure("vit_mini16", stem="patch")
    measure("vit_mini16")
    measure("vit_ti16", depth=6)
