"""What is learned: model, loss and prediction together, one file a task."""

from vitrail.tasks.classify import Classify as Classify
from vitrail.tasks.classify import ClassifyConfig as ClassifyConfig
from vitrail.tasks.classify import Losses as Losses
