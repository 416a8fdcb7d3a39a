"""How alike the position embeddings are: figure 7 (centre) of the ViT paper, arXiv 2010.11929."""

from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vitrail.models import Model, ViTConfig
from vitrail.nn.position import LearnedPosition, SinCosPosition
from vitrail.report.pictures import Picture, embed
from vitrail.tasks.table import backbone_of

_TILES = 16
"""More tiles along a side than this are too small to see: some are left out."""


class Similarity(NamedTuple):
    """One tile a position: its row's cosine similarity to every position's."""

    picture: Picture
    low: float
    high: float
    """The similarities at the two ends of the colours."""
    near: float
    """Mean similarity of positions side by side."""
    far: float
    """Mean similarity of positions at least half the grid apart."""
    learned: bool
    step: int
    """Every so many positions has a tile."""


def similarity(model: Model) -> Similarity | None:
    """The picture, and what it shows in numbers; None for a model without a table."""
    position = getattr(backbone_of(model), "position", None)
    if not isinstance(position, LearnedPosition | SinCosPosition):
        return None
    learned = isinstance(position, LearnedPosition)
    prefix = position.prefix if isinstance(position, LearnedPosition) else 0
    rows, grid = position.table[prefix:].detach().float().cpu(), position.grid
    if len(rows) < 2:
        return None
    cosines = F.normalize(rows, dim=1) @ F.normalize(rows, dim=1).T
    apart = _distances(grid)
    others = cosines[apart > 0]
    low, high = (others.quantile(q).item() if len(others) < 2**24 else bound
                 for q, bound in ((0.01, -1.0), (0.99, 1.0)))  # fmt: skip
    step = -(-max(grid) // _TILES)
    return Similarity(
        _picture(cosines, grid, low, high, step),
        low,
        high,
        near=cosines[apart == 1].mean().item(),
        far=cosines[apart >= max(grid) / 2].mean().item(),
        learned=learned,
        step=step,
    )


def why_none(model: Model) -> str:
    """What a reader is told of a model whose positions are not in a table."""
    if not isinstance(model.config, ViTConfig):
        return (
            "This model has no table of positions: its convolutions, or the fixed places of its "
            "inputs, tell it what is where."
        )
    return {
        "none": "This model has no position embedding: it sees its patches as a set.",
        "rope": "This model has no table of positions: rotary embeddings turn queries and keys by "
        "fixed angles in every block, so there is nothing that it learned.",
        "peg": "This model has no table of positions: a depth-wise convolution over the tokens "
        "tells each one where it is (CPVT), so there are no rows to compare.",
    }.get(model.config.position, "The grid has a single position, so there is nothing to compare.")


def _distances(grid: tuple[int, int]) -> Float[Tensor, "n n"]:
    """Between all pairs of positions, in patches."""
    places = torch.cartesian_prod(*(torch.arange(size, dtype=torch.float32) for size in grid))
    return torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")


def _picture(
    cosines: Float[Tensor, "n n"], grid: tuple[int, int], low: float, high: float, step: int
) -> Picture:
    gh, gw = grid
    tiles = cosines.reshape(gh, gw, gh, gw)[::step, ::step]
    shown = ((tiles - low) / max(high - low, 1e-6)).clamp(0, 1).numpy()
    colours = (matplotlib.colormaps["viridis"](shown) * 255).round().astype(np.uint8)
    th, tw = tiles.shape[:2]
    canvas = np.zeros((th, gh + 1, tw, gw + 1, 4), np.uint8)
    canvas[:, :gh, :, :gw] = colours.transpose(0, 2, 1, 3, 4)
    image = canvas.reshape(th * (gh + 1), tw * (gw + 1), 4)[:-1, :-1]
    return embed(Image.fromarray(np.ascontiguousarray(image)), lossless=True)
