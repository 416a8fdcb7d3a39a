"""Checkpoints in and out: for each source one pure mapping between its names and ours."""

from vitrail.weights.huggingface import from_huggingface as from_huggingface
from vitrail.weights.huggingface import to_huggingface as to_huggingface
from vitrail.weights.timm import from_timm as from_timm
from vitrail.weights.timm import to_timm as to_timm
