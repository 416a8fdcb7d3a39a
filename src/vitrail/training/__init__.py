"""The one training loop, its optimisers and its schedule."""

from vitrail.training.loop import Interrupted as Interrupted
from vitrail.training.loop import fit as fit
