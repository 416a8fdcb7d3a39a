"""The one training loop, its optimisers and its schedule."""

from vitrail.train.loop import Interrupted as Interrupted
from vitrail.train.loop import fit as fit
