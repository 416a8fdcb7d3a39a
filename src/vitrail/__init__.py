"""vitrail: Vision Transformers, from a folder of images to a model that is trained and measured.

    model = vitrail.build("vit_b16", num_classes=10)      # a fresh model, by name
    model = vitrail.pretrained("deit_s16")                # a published one, by name, file, address
    model = vitrail.load("runs/x")                        # a trained one, ready to use
    outcome = vitrail.train(config)                       # the main job; recipes make configs
    label = vitrail.Predictor("runs/x")("cat.jpg").label
    evaluation = vitrail.evaluate(vitrail.Run("runs/x"))

The names are imported when they are first used: `import vitrail` costs nothing.
"""

from typing import TYPE_CHECKING

from vitrail.lazy import lazy

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vitrail.deploy import Predictor as Predictor
    from vitrail.errors import VitrailError as VitrailError
    from vitrail.evaluation import Evaluation as Evaluation
    from vitrail.evaluation import evaluate as evaluate
    from vitrail.job import resume as resume
    from vitrail.job import train as train
    from vitrail.models import MODELS as MODELS
    from vitrail.models import ViTConfig as ViTConfig
    from vitrail.models import build as build
    from vitrail.runs import Run as Run
    from vitrail.runs import TrainConfig as TrainConfig
    from vitrail.runs.load import load_model as load
    from vitrail.tasks import Prediction as Prediction
    from vitrail.weights import pretrained as pretrained

_HOMES = {
    "MODELS": ("vitrail.models", "MODELS"),
    "Evaluation": ("vitrail.evaluation", "Evaluation"),
    "Prediction": ("vitrail.tasks", "Prediction"),
    "Predictor": ("vitrail.deploy", "Predictor"),
    "Run": ("vitrail.runs", "Run"),
    "TrainConfig": ("vitrail.runs", "TrainConfig"),
    "ViTConfig": ("vitrail.models", "ViTConfig"),
    "VitrailError": ("vitrail.errors", "VitrailError"),
    "build": ("vitrail.models", "build"),
    "evaluate": ("vitrail.evaluation", "evaluate"),
    "load": ("vitrail.runs.load", "load_model"),
    "pretrained": ("vitrail.weights", "pretrained"),
    "resume": ("vitrail.job", "resume"),
    "train": ("vitrail.job", "train"),
}
__all__ = [
    "MODELS",
    "Evaluation",
    "Prediction",
    "Predictor",
    "Run",
    "TrainConfig",
    "ViTConfig",
    "VitrailError",
    "build",
    "evaluate",
    "load",
    "pretrained",
    "resume",
    "train",
]

__getattr__, __dir__ = lazy(__name__, _HOMES)
