"""Which layers have to stay in float, for int8 to lose no more than a user's budget.

Three sets of images, none in two of them: those that calibrate, those on which this search decides
(both of the training part), and the held-out ones, which judge what was decided, once. A search
that decided on the images that judge would find what happens to suit them.

What is lost is the mean, over images, of the float model's score less the other's: of classes 1 or
0, else whatever lies between. On the images that decide it has to lie within the budget; on those
that judge its 95% interval has to (vitrail.deploy.export.make): so few can only show large losses.

The search, where all of int8 loses too much: each block alone back in float, on few images; then as
many of them as are needed, found by halving, of those that bring the outputs nearest to float's.
Last, of the block that made the difference, the layers are tried in the same way.
"""

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from vitrail.deploy.export.int8 import Layer
from vitrail.errors import DataError, UsageError, setting
from vitrail.metrics import Estimate
from vitrail.metrics.intervals import paired_scores
from vitrail.units import bytes_text

Scores = Float[np.ndarray, " n"]
"""How good the answer about each image is, 0 to 1."""


# ------------------------------------------------------------------------------ what is lost


def lost(before: Scores, after: Scores) -> Estimate:
    """The mean of what `after` is worse than `before` on the same images, as a share: 0.005 is half
    a point.

    >>> tuple(round(end, 4) for end in lost(np.ones(1000), np.ones(1000)))
    (0.0, -0.0028, 0.0028)
    """
    return paired_scores(torch.from_numpy(np.subtract(before, after, dtype=np.float64)))


def points_text(found: Estimate) -> str:
    """`0.55 points lost (-0.91 to 2.03)`."""
    value, low, high = (100 * end + 0.0 for end in found)
    return f"{value:.2f} points lost ({low:.2f} to {high:.2f})"


# ------------------------------------------------------------------------------- the search


class Attempt(NamedTuple):
    """A model, and how it did on the images that decide."""

    file: Path
    scores: Scores
    seconds: float
    """For an image."""
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A float model to be made int8: the whole one, or with fewer tokens."""

    name: str
    layers: Sequence[Layer]
    quantise: Callable[[Collection[str]], Path]
    """Write it in int8, with the layers of these nodes in float."""
    measure: Callable[[Path], Attempt]
    """On all images that decide."""
    far: Callable[[Path], float]
    """How far a file's outputs are from the float model's, on a few images: 0 for the same."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """An attempt, and what was asked for."""

    name: str
    """The variant's."""
    floats: tuple[str, ...]
    """Names of the blocks and layers in float."""
    int8: int
    """How many layers are not."""
    lost: Estimate
    holds: bool
    attempt: Attempt = field(repr=False)

    def line(self) -> str:
        """For the user who waits."""
        floats = ", ".join(self.floats) if self.int8 else "everything"
        return (
            f"{self.name}, {floats or 'nothing'} in float: {points_text(self.lost)}, "
            f"{bytes_text(self.attempt.bytes)}, {1000 * self.attempt.seconds:.1f} ms an image"
        )


class Bounds(NamedTuple):
    """What the search may take; when either is used up, the best that was found is taken."""

    trials: int = 16
    """Those that only rank blocks are not among them."""
    seconds: float = 1800.0


USUAL = Bounds()


def search(
    variants: Iterable[Variant],
    before: Scores,
    budget: float,
    tell: Callable[[str], None],
    bounds: Bounds = USUAL,
) -> Trial:
    """The fastest trial that loses at most `budget` points of `before`, the scores of the float
    model with all its tokens. `tell` is given a line for each trial.

    Raises `UsageError` for a budget that is none, and `DataError` where no trial holds.
    """
    if not 0 < budget < 100:
        raise UsageError(f"a budget of {budget:g} points: give {setting('budget', 0.5)}, or so")
    searching = _Search(before, budget, tell, bounds)
    for variant in variants:
        searching.look(variant)
    holding = [trial for trial in searching.trials if trial.holds and trial.int8]
    if not holding:
        least = min(
            (trial for trial in searching.trials if trial.int8), key=lambda trial: trial.lost.value
        )
        raise DataError(
            f"none of {len(searching.trials)} int8 models is within {budget:g} points; the best: "
            f"{least.line()}. Give a larger {setting('budget')}, another kind or another precision"
        )
    return min(holding, key=lambda trial: trial.attempt.seconds)


Groups = Mapping[str, Sequence[str]]
"""The nodes of some blocks, or layers."""


class _Search:
    """The trials so far."""

    def __init__(
        self, before: Scores, budget: float, tell: Callable[[str], None], bounds: Bounds
    ) -> None:
        self.before, self.budget, self.tell, self.bounds = before, budget, tell, bounds
        self.trials: list[Trial] = []
        self.ends = time.monotonic() + bounds.seconds

    def look(self, variant: Variant) -> None:
        """Try a variant: all of it in int8, else with the least in float that holds."""
        groups = blocks(variant.layers)
        if (self.trials and self.over) or self.trial(variant, {}).holds or self.over:
            return
        if not self.trial(variant, groups).holds or self.over:  # fewer tokens alone lose too much
            return
        needed = self.fewest(variant, self.ranked(variant, groups, {}), {})
        if not needed:
            return
        # The last of them made the difference; perhaps not all of it has to be in float.
        *sure, last = needed
        inner = {layer.name: [layer.node] for layer in variant.layers if layer.node in needed[last]}
        if len(inner) > 1:
            base = {name: needed[name] for name in sure}
            self.fewest(variant, self.ranked(variant, inner, base), base)

    def trial(self, variant: Variant, floats: Groups) -> Trial:
        """Make it with these in float, measure and tell."""
        nodes = _nodes(floats)
        attempt = variant.measure(variant.quantise(nodes))
        found = lost(self.before, attempt.scores)
        trial = Trial(
            name=variant.name,
            floats=tuple(floats),
            int8=len(variant.layers) - len(nodes),
            lost=found,
            holds=found.value <= self.budget / 100,
            attempt=attempt,
        )
        self.trials.append(trial)
        self.tell(trial.line())
        return trial

    def ranked(self, variant: Variant, groups: Groups, base: Groups) -> Groups:
        """Those first that, alone in float beside `base`, bring the outputs nearest to float's."""
        far: dict[str, float] = {}
        for name, nodes in groups.items():
            if self.over:
                break
            far[name] = variant.far(variant.quantise(_nodes(base) + list(nodes)))
        return {name: groups[name] for name in sorted(far, key=far.__getitem__)}

    def fewest(self, variant: Variant, ranked: Groups, base: Groups) -> Groups | None:
        """`base` and the least number of the ranked, from the first on, with which it holds; None
        where none but all of them would do.

        Found by halving: with more in float no more is lost, but for chance.
        """
        names = list(ranked)
        fails, holds, found = 0, len(names), None
        while holds - fails > 1 and not self.over:
            middle = (fails + holds) // 2
            floats = {**base, **{name: ranked[name] for name in names[:middle]}}
            if self.trial(variant, floats).holds:
                holds, found = middle, floats
            else:
                fails = middle
        return found

    @property
    def over(self) -> bool:
        """Whether the bounds are reached."""
        return len(self.trials) >= self.bounds.trials or time.monotonic() > self.ends


def _nodes(groups: Groups) -> list[str]:
    return [node for nodes in groups.values() for node in nodes]


def blocks(layers: Iterable[Layer]) -> Groups:
    """The nodes of each block."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        found.setdefault(layer.block, []).append(layer.node)
    return found
