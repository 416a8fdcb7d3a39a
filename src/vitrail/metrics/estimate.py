"""A number with the interval that chance could explain: what everything measured is."""

from typing import NamedTuple

FEW = 30
"""With fewer images an interval is said to be a rough one."""


class Estimate(NamedTuple):
    """A number and its 95% interval, which always has a width and holds the number."""

    value: float
    low: float
    high: float
