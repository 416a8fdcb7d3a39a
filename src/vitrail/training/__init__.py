"""The one training loop, its optimisers and its schedule; and the probe, which needs none."""

from vitrail.training.loop import Interrupted as Interrupted
from vitrail.training.loop import fit as fit
from vitrail.training.probe import fit_probe as fit_probe
