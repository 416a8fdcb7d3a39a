"""How good answers are: one file a kind of target, every number with its interval.

The names are imported when they are first used: to print a number takes no torch.
"""

from typing import TYPE_CHECKING

from vitrail.lazy import lazy

if TYPE_CHECKING:
    from vitrail.metrics.boxes import ClassAP as ClassAP
    from vitrail.metrics.boxes import DetectMetrics as DetectMetrics
    from vitrail.metrics.boxes import Judged as Judged
    from vitrail.metrics.boxes import average_precision as average_precision
    from vitrail.metrics.boxes import count as count_boxes  # noqa: F401
    from vitrail.metrics.boxes import detection as detection
    from vitrail.metrics.boxes import judge_boxes as judge_boxes
    from vitrail.metrics.classes import MEASURES as MEASURES
    from vitrail.metrics.classes import Bin as Bin
    from vitrail.metrics.classes import ClassScores as ClassScores
    from vitrail.metrics.classes import Metrics as Metrics
    from vitrail.metrics.classes import classification as classification
    from vitrail.metrics.classes import multi_label as multi_label
    from vitrail.metrics.estimate import FEW as FEW
    from vitrail.metrics.estimate import Estimate as Estimate
    from vitrail.metrics.features import FeatureMetrics as FeatureMetrics
    from vitrail.metrics.intervals import paired as paired
    from vitrail.metrics.intervals import share as share
    from vitrail.metrics.masks import ClassIoU as ClassIoU
    from vitrail.metrics.masks import SegmentMetrics as SegmentMetrics
    from vitrail.metrics.masks import count as count
    from vitrail.metrics.masks import mean_iou as mean_iou
    from vitrail.metrics.masks import segmentation as segmentation
    from vitrail.metrics.mistakes import Mistake as Mistake
    from vitrail.metrics.thresholds import Kept as Kept
    from vitrail.metrics.thresholds import Point as Point

_ROOMS = {
    "boxes": (
        "ClassAP",
        "DetectMetrics",
        "Judged",
        "average_precision",
        "detection",
        "judge_boxes",
    ),
    "classes": ("MEASURES", "Bin", "ClassScores", "Metrics", "classification", "multi_label"),
    "estimate": ("FEW", "Estimate"),
    "features": ("FeatureMetrics",),
    "intervals": ("paired", "share"),
    "masks": ("ClassIoU", "SegmentMetrics", "count", "mean_iou", "segmentation"),
    "mistakes": ("Mistake",),
    "thresholds": ("Kept", "Point"),
}

_HOMES = {
    **{n: (f"vitrail.metrics.{room}", n) for room, names in _ROOMS.items() for n in names},
    "count_boxes": ("vitrail.metrics.boxes", "count"),
}
__all__ = [*_HOMES]
__getattr__, __dir__ = lazy(__name__, _HOMES)
