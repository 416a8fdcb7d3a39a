"""A teacher that is a slow copy of its student: MoCo v3's, DINO's.

After the optimiser's step it moves, by parameters alone (its batch norms have statistics of their
own), with s the share of the run that is over and m_0 how much of itself it keeps at the start:

    t <- m t + (1 - m) f,   m = 1 - (1 + cos(pi s)) / 2 (1 - m_0)

The authors' code of MoCo v3 moves it within the next step, before the keys are computed: by the
same weights of f, which nobody changes in between, and the same s. Their first move does nothing,
for t is f then; their last step has none after it, and ours has m = 1. So the two are the same, and
here a checkpoint holds the teacher that the next step will ask.
"""

import copy
import math

import torch
from torch import nn


class MomentumTeacher(nn.Module):
    """Slow copies of a student's parts, by their names; what they compute a task's own says."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, copy.deepcopy(part))
        self.requires_grad_(False)

    @torch.no_grad()
    def follow(self, student: nn.Module, start: float, done: float) -> None:
        """Move towards the parts of `student` that have the same names. `done` (0 to 1) of the run
        is over, and `start` is how much of itself a teacher keeps in its first step.
        """
        slow = list(self.parameters())
        parts = (student.get_submodule(name) for name, _ in self.named_children())
        fast = [parameter for part in parts for parameter in part.parameters()]
        share = 1 - momentum(start, done)
        torch._foreach_lerp_([p.data for p in slow], [p.data for p in fast], share)


def momentum(start: float, done: float) -> float:
    """How much of itself a teacher keeps when `done` (0 to 1) of the run is over.

    >>> momentum(0.99, 0.0), momentum(0.99, 0.5), momentum(0.99, 1.0)
    (0.99, 0.995, 1.0)
    """
    return 1 - (1 + math.cos(math.pi * min(done, 1.0))) / 2 * (1 - start)
