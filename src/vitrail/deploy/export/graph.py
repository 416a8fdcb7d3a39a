"""What a graph is of: pixels in, what a task says out, around a model that is left as it is."""

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from vitrail.data.views.preprocess import Preprocess
from vitrail.errors import UsageError, setting
from vitrail.tasks import Task

VIEWS, BATCH = "views", "batch"
"""The input, and the name of its first axis."""


class Graph(nn.Module):
    """From views, pixels 0 to 255, to a task's outputs by their names."""

    def __init__(self, task: Task, preprocess: Preprocess) -> None:
        """`task` is in evaluation mode, and stays as it is.

        Raises `UsageError` for views of several sizes.
        """
        super().__init__()
        if not preprocess.one_size and not task.reading.window:
            raise UsageError(
                f"a model that is shown images by the rule {preprocess.resize} sees each at its "
                f"own size, and a graph has one: train with {setting('data.resize', 'crop')} or "
                f"squash to export"
            )
        self.task = task
        scale = torch.tensor([1 / (255 * std) for std in preprocess.std])
        pairs = zip(preprocess.mean, preprocess.std, strict=True)
        shift = torch.tensor([mean / std for mean, std in pairs])
        self.register_buffer("scale", scale[:, None, None], persistent=False)
        self.register_buffer("shift", shift[:, None, None], persistent=False)
        self.scale: Tensor
        self.shift: Tensor

    def forward(self, views: UInt8[Tensor, "b c h w"]) -> dict[str, Tensor]:
        return self.task.outputs(views.float() * self.scale - self.shift)


def example(preprocess: Preprocess, batch: int = 2) -> UInt8[Tensor, "b c h w"]:
    """Views of noise, to trace a graph with."""
    draw = torch.Generator().manual_seed(0)
    shape = batch, preprocess.channels, *preprocess.size
    return torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
