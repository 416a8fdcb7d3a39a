"""Checkpoints in and out: published weights by name, file or address, to our models and back."""

from vitrail.weights.huggingface import from_huggingface as from_huggingface
from vitrail.weights.huggingface import to_huggingface as to_huggingface
from vitrail.weights.load import OURS as OURS
from vitrail.weights.load import TARGETS as TARGETS
from vitrail.weights.load import Opened as Opened
from vitrail.weights.load import convert as convert
from vitrail.weights.load import load_into as load_into
from vitrail.weights.load import open_weights as open_weights
from vitrail.weights.load import pretrained as pretrained
from vitrail.weights.load import save_weights as save_weights
from vitrail.weights.load import started as started
from vitrail.weights.pair import Pair as Pair
from vitrail.weights.pair import TextWeights as TextWeights
from vitrail.weights.pair import open_pair as open_pair
from vitrail.weights.pair import open_text_weights as open_text_weights
from vitrail.weights.pair import save_pair as save_pair
from vitrail.weights.table import WEIGHTS as WEIGHTS
from vitrail.weights.table import Published as Published
from vitrail.weights.text_table import TEXT_WEIGHTS as TEXT_WEIGHTS
from vitrail.weights.timm import from_timm as from_timm
from vitrail.weights.timm import to_timm as to_timm
