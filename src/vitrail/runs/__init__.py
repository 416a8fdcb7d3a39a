"""What a run is: its config, its folder, its checkpoints."""

from vitrail.runs.checkpoint import Checkpoint as Checkpoint
from vitrail.runs.checkpoint import read_checkpoint as read_checkpoint
from vitrail.runs.checkpoint import write_checkpoint as write_checkpoint
from vitrail.runs.config import DataConfig as DataConfig
from vitrail.runs.config import OptimConfig as OptimConfig
from vitrail.runs.config import TrainConfig as TrainConfig
from vitrail.runs.config import TuneConfig as TuneConfig
from vitrail.runs.folder import Run as Run
from vitrail.runs.folder import RunLock as RunLock
