"""How good answers are: one file a kind of target, every number with its interval."""

from vitrail.metrics.classes import MEASURES, Bin, ClassScores, Metrics, classification, multi_label
from vitrail.metrics.features import FeatureMetrics
from vitrail.metrics.intervals import FEW, Estimate, paired, share

__all__ = [
    "FEW",
    "MEASURES",
    "Bin",
    "ClassScores",
    "Estimate",
    "FeatureMetrics",
    "Metrics",
    "classification",
    "multi_label",
    "paired",
    "share",
]
