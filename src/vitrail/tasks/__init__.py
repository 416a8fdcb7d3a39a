"""What is learned: model, loss and prediction together, one file a task.

The names are imported when they are first used: an exported model's answers need no torch.
"""

from typing import TYPE_CHECKING

from vitrail.lazy import lazy

if TYPE_CHECKING:
    from vitrail.tasks.answers import Detections as Detections
    from vitrail.tasks.answers import Embedding as Embedding
    from vitrail.tasks.answers import Prediction as Prediction
    from vitrail.tasks.answers import Segmentation as Segmentation
    from vitrail.tasks.classify import Classify as Classify
    from vitrail.tasks.classify import ClassifyConfig as ClassifyConfig
    from vitrail.tasks.detect import Detect as Detect
    from vitrail.tasks.detect import DetectConfig as DetectConfig
    from vitrail.tasks.dino import Dino as Dino
    from vitrail.tasks.dino import DinoConfig as DinoConfig
    from vitrail.tasks.distill import Distill as Distill
    from vitrail.tasks.distill import DistillConfig as DistillConfig
    from vitrail.tasks.distill import Teacher as Teacher
    from vitrail.tasks.distill_features import DistillFeatures as DistillFeatures
    from vitrail.tasks.distill_features import DistillFeaturesConfig as DistillFeaturesConfig
    from vitrail.tasks.embed import Embed as Embed
    from vitrail.tasks.embed import EmbedConfig as EmbedConfig
    from vitrail.tasks.lejepa import Lejepa as Lejepa
    from vitrail.tasks.lejepa import LejepaConfig as LejepaConfig
    from vitrail.tasks.mae import Mae as Mae
    from vitrail.tasks.mae import MaeConfig as MaeConfig
    from vitrail.tasks.moco import Moco as Moco
    from vitrail.tasks.moco import MocoConfig as MocoConfig
    from vitrail.tasks.pair import Pair as Pair
    from vitrail.tasks.pair import PairConfig as PairConfig
    from vitrail.tasks.prune import Prune as Prune
    from vitrail.tasks.prune import PruneConfig as PruneConfig
    from vitrail.tasks.segment import Segment as Segment
    from vitrail.tasks.segment import SegmentConfig as SegmentConfig
    from vitrail.tasks.table import TASKS as TASKS
    from vitrail.tasks.table import Kind as Kind
    from vitrail.tasks.table import backbone_of as backbone_of
    from vitrail.tasks.task import Losses as Losses
    from vitrail.tasks.task import Metrics as Metrics
    from vitrail.tasks.task import Task as Task

_ROOMS = {
    "answers": ("Detections", "Embedding", "Prediction", "Segmentation"),
    "classify": ("Classify", "ClassifyConfig"),
    "detect": ("Detect", "DetectConfig"),
    "dino": ("Dino", "DinoConfig"),
    "distill": ("Distill", "DistillConfig", "Teacher"),
    "distill_features": ("DistillFeatures", "DistillFeaturesConfig"),
    "embed": ("Embed", "EmbedConfig"),
    "lejepa": ("Lejepa", "LejepaConfig"),
    "mae": ("Mae", "MaeConfig"),
    "moco": ("Moco", "MocoConfig"),
    "pair": ("Pair", "PairConfig"),
    "prune": ("Prune", "PruneConfig"),
    "segment": ("Segment", "SegmentConfig"),
    "table": ("TASKS", "Kind", "backbone_of"),
    "task": ("Losses", "Metrics", "Task"),
}

_HOMES = {name: (f"vitrail.tasks.{room}", name) for room, names in _ROOMS.items() for name in names}
__all__ = [*_HOMES]
__getattr__, __dir__ = lazy(__name__, _HOMES)
