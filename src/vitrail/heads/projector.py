"""MoCo v3's heads: from an image's features to the space in which views are compared.

    projector   Linear, BatchNorm, ReLU, Linear, BatchNorm, ReLU, Linear, BatchNorm
    predictor   Linear, BatchNorm, ReLU, Linear, BatchNorm

(Chen et al., arXiv 2104.02057, section 4.2.) No layer has a bias, and the last norm neither scale
nor shift. Layers are numbered as in the authors' checkpoints (`base_encoder.head.0.weight`).

Letters: b images, d features, e hidden, o what is compared.
"""

from jaxtyping import Float
from torch import Tensor, nn

from vitrail.nn import BatchNorm


class Projector(nn.Sequential):
    """From features `[b d]` to `[b o]`.

    >>> import torch
    >>> Projector(384, hidden=64, out=32)(torch.zeros(2, 384)).shape
    torch.Size([2, 32])
    """

    def __init__(
        self, width: int, hidden: int = 4096, out: int = 256, last_norm: bool = True
    ) -> None:
        """`last_norm`: without it the last layer is a Linear with a bias, as LeJEPA has it."""
        last = nn.Linear(hidden, out, bias=not last_norm)
        super().__init__(
            *(nn.Linear(width, hidden, bias=False), _Norm(hidden), nn.ReLU()),
            *(nn.Linear(hidden, hidden, bias=False), _Norm(hidden), nn.ReLU()),
            *((last, _Norm(out, affine=False)) if last_norm else (last,)),
        )


class Predictor(nn.Sequential):
    """From what a projector gives `[b o]` to a guess at what another gives `[b o]`."""

    def __init__(self, width: int = 256, hidden: int = 4096) -> None:
        super().__init__(
            *(nn.Linear(width, hidden, bias=False), _Norm(hidden), nn.ReLU()),
            *(nn.Linear(hidden, width, bias=False), _Norm(width, affine=False)),
        )


class _Norm(BatchNorm):
    """Of vectors, each an image of one cell."""

    def forward(self, x: Float[Tensor, "b c"]) -> Float[Tensor, "b c"]:
        return super().forward(x[:, :, None, None])[:, :, 0, 0]
