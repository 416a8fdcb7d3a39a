"""What patch and image size cost: an article's claims, counted and measured.

"384/32 costs 0.7 times, 512/16 3.2 times what 256/16 does", says the article (image side / patch
side), of no model in particular. What decides is the number of tokens, and how the cost of a model
grows with it: the linear layers in proportion, attention with its square.
"""

from collections.abc import Callable
from typing import NamedTuple

from vitrail.bench.macs import macs
from vitrail.bench.measure import Place, latencies, model_labeller
from vitrail.models import model_config

CLAIMS = {(384, 32): 0.7, (512, 16): 3.2}
"""(image side, patch side) -> the article's cost in units of `BASE`."""
BASE = (256, 16)
ROWS = ("vit_ti16", "vit_s16", "vit_b16")
_NEAR = 0.1
"""A claim holds within so much of it."""


class Case(NamedTuple):
    """One model at one image and patch size."""

    model: str
    side: int
    patch: int
    tokens: int
    """Of patches, without the class token."""
    macs: int
    latency: float
    """Seconds for one image alone, the median."""
    macs_ratio: float
    """To the same model at `BASE`."""
    latency_ratio: float
    claim: float | None


class Verdict(NamedTuple):
    """What became of one claim."""

    side: int
    patch: int
    claim: float
    macs: tuple[float, float]
    """The least and the greatest ratio of the models."""
    latency: tuple[float, float]
    counted: int
    """Models whose ratio of multiply-accumulates is near the claim."""
    measured: int
    """Models whose ratio of latencies is."""
    models: int


def measure_patches(
    place: Place,
    rows: tuple[str, ...] = ROWS,
    seconds: float = 5.0,
    notify: Callable[[str], None] = lambda sentence: None,
) -> list[Case]:
    """Count and time every model of `rows` at every size; all sizes of a model take turns."""
    cases = []
    for row in rows:
        notify(f"{row} at {1 + len(CLAIMS)} sizes")
        configs = {
            (side, patch): model_config(row, image_size=(side, side), patch=(patch, patch))
            for side, patch in (BASE, *CLAIMS)
        }
        labellers = {
            f"{side}/{patch}": model_labeller(config, place.device)
            for (side, patch), config in configs.items()
        }
        times = latencies(labellers, place, seconds)
        counts = {key: macs(config) for key, config in configs.items()}
        name = row.rstrip("0123456789")  # less its patch
        for (side, patch), config in configs.items():
            cases.append(
                Case(
                    name,
                    side,
                    patch,
                    config.grid[0] * config.grid[1],
                    counts[side, patch],
                    times[f"{side}/{patch}"],
                    counts[side, patch] / counts[BASE],
                    times[f"{side}/{patch}"] / times[f"{BASE[0]}/{BASE[1]}"],
                    CLAIMS.get((side, patch)),
                )
            )
    return cases


def verdicts(cases: list[Case]) -> list[Verdict]:
    """What the cases say of each claim."""
    found = []
    for (side, patch), claim in CLAIMS.items():
        own = [case for case in cases if (case.side, case.patch) == (side, patch)]
        counted = [case.macs_ratio for case in own]
        measured = [case.latency_ratio for case in own]
        found.append(
            Verdict(
                side,
                patch,
                claim,
                (min(counted), max(counted)),
                (min(measured), max(measured)),
                sum(abs(ratio / claim - 1) <= _NEAR for ratio in counted),
                sum(abs(ratio / claim - 1) <= _NEAR for ratio in measured),
                len(own),
            )
        )
    return found
