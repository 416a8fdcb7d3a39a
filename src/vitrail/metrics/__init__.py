"""How good answers are: one file a kind of target, every number with its interval."""

from vitrail.metrics.boxes import ClassAP, DetectMetrics, average_precision, detection
from vitrail.metrics.boxes import count as count_boxes
from vitrail.metrics.classes import MEASURES, Bin, ClassScores, Metrics, classification, multi_label
from vitrail.metrics.features import FeatureMetrics
from vitrail.metrics.intervals import FEW, Estimate, paired, share
from vitrail.metrics.masks import ClassIoU, SegmentMetrics, count, mean_iou, segmentation

__all__ = [
    "FEW",
    "MEASURES",
    "Bin",
    "ClassAP",
    "ClassIoU",
    "ClassScores",
    "DetectMetrics",
    "Estimate",
    "FeatureMetrics",
    "Metrics",
    "SegmentMetrics",
    "average_precision",
    "classification",
    "count",
    "count_boxes",
    "detection",
    "mean_iou",
    "multi_label",
    "paired",
    "segmentation",
    "share",
]
