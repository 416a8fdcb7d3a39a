"""How good answers are: one file a kind of target, every number with its interval."""

from vitrail.metrics.boxes import (
    ClassAP,
    DetectMetrics,
    Judged,
    average_precision,
    detection,
    judge_boxes,
)
from vitrail.metrics.boxes import count as count_boxes
from vitrail.metrics.classes import MEASURES, Bin, ClassScores, Metrics, classification, multi_label
from vitrail.metrics.features import FeatureMetrics
from vitrail.metrics.intervals import FEW, Estimate, paired, share
from vitrail.metrics.masks import ClassIoU, SegmentMetrics, count, mean_iou, segmentation
from vitrail.metrics.mistakes import Mistake
from vitrail.metrics.thresholds import Kept, Point

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
    "Judged",
    "Kept",
    "Metrics",
    "Mistake",
    "Point",
    "SegmentMetrics",
    "average_precision",
    "classification",
    "count",
    "count_boxes",
    "detection",
    "judge_boxes",
    "mean_iou",
    "multi_label",
    "paired",
    "segmentation",
    "share",
]
