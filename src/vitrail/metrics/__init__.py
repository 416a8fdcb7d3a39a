"""How good answers are: one file a kind of target, every number with its interval."""

from vitrail.metrics.classes import MEASURES, Bin, ClassScores, Metrics, classification, multi_label
from vitrail.metrics.features import FeatureMetrics
from vitrail.metrics.intervals import FEW, Estimate, paired, share
from vitrail.metrics.masks import ClassIoU, SegmentMetrics, count, mean_iou, segmentation

__all__ = [
    "FEW",
    "MEASURES",
    "Bin",
    "ClassIoU",
    "ClassScores",
    "Estimate",
    "FeatureMetrics",
    "Metrics",
    "SegmentMetrics",
    "classification",
    "count",
    "mean_iou",
    "multi_label",
    "paired",
    "segmentation",
    "share",
]
