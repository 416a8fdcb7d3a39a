"""The linear head: what a backbone's features say of each cell by themselves.

As DINOv2 and DINOv3 are judged on ADE20K (arXiv 2304.07193, section 7.4; 2508.10104, section 6.1):
dropout of whole channels, batch norm, and one matrix a cell.

Letters: b batch, d channels of all maps together, c classes, h w cells.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.nn import BatchNorm, normal_


class LinearHead(nn.Module):
    """Dropout, batch norm, 1x1 convolution of the maps, one beside the other.

    >>> maps = (torch.zeros(2, 8, 3, 4), torch.zeros(2, 16, 3, 4))
    >>> LinearHead((8, 16), classes=5)(maps).shape
    torch.Size([2, 5, 3, 4])
    """

    def __init__(self, widths: tuple[int, ...], classes: int, dropout: float = 0.1) -> None:
        """`widths`: the channels of each map."""
        super().__init__()
        self.drop = nn.Dropout2d(dropout)
        self.norm = BatchNorm(sum(widths))
        self.classifier = nn.Conv2d(sum(widths), classes, 1)
        normal_(self.classifier.weight, std=0.01)
        assert self.classifier.bias is not None
        nn.init.zeros_(self.classifier.bias)

    def forward(self, maps: tuple[Float[Tensor, "b _d h w"], ...]) -> Float[Tensor, "b c h w"]:
        """The logits of maps of one size."""
        return self.classifier(self.norm(self.drop(torch.cat(maps, dim=1))))
