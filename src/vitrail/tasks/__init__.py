"""What is learned: model, loss and prediction together, one file a task."""

from vitrail.tasks.classify import Classify as Classify
from vitrail.tasks.classify import ClassifyConfig as ClassifyConfig
from vitrail.tasks.classify import Prediction as Prediction
from vitrail.tasks.detect import Detect as Detect
from vitrail.tasks.detect import DetectConfig as DetectConfig
from vitrail.tasks.detect import Detections as Detections
from vitrail.tasks.distill import Distill as Distill
from vitrail.tasks.distill import DistillConfig as DistillConfig
from vitrail.tasks.distill import Teacher as Teacher
from vitrail.tasks.embed import Embed as Embed
from vitrail.tasks.embed import Embedding as Embedding
from vitrail.tasks.moco import Moco as Moco
from vitrail.tasks.moco import MocoConfig as MocoConfig
from vitrail.tasks.prune import Prune as Prune
from vitrail.tasks.prune import PruneConfig as PruneConfig
from vitrail.tasks.segment import Segment as Segment
from vitrail.tasks.segment import Segmentation as Segmentation
from vitrail.tasks.segment import SegmentConfig as SegmentConfig
from vitrail.tasks.table import TASKS as TASKS
from vitrail.tasks.table import Kind as Kind
from vitrail.tasks.table import backbone_of as backbone_of
from vitrail.tasks.task import Losses as Losses
from vitrail.tasks.task import Metrics as Metrics
from vitrail.tasks.task import Task as Task
