"""DINO's head (Caron et al., arXiv 2104.14294): how alike features are to learned prototypes.

    Linear, GELU, Linear, GELU, Linear, length 1, cosines with the prototypes

Prototypes are the last layer's rows, of length 1 as well: its "weight norm" with a scale that stays
1, as in most of the authors' runs and in DINOv2. They are what no rule but the loss holds together,
so DINO keeps them as they were drawn in the first epoch.

Letters: d features, e hidden, o what is compared, k prototypes.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.nn import full_precision, normal_, precise


class PrototypeHead(nn.Module):
    """From features `[... d]` to cosines with prototypes `[... k]`, in float32 at least.

    >>> import torch
    >>> PrototypeHead(384, hidden=64, out=32, prototypes=100)(torch.zeros(2, 384)).shape
    torch.Size([2, 100])
    """

    def __init__(
        self, width: int, hidden: int = 2048, out: int = 256, prototypes: int = 65_536
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            *(nn.Linear(width, hidden), nn.GELU()),
            *(nn.Linear(hidden, hidden), nn.GELU()),
            nn.Linear(hidden, out),
        )
        self.last = nn.Linear(out, prototypes, bias=False)
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b k"]:
        x = self.mlp(x)
        with full_precision(x.device):
            return F.linear(
                F.normalize(precise(x), dim=-1), F.normalize(precise(self.last.weight), dim=1)
            )
