"""Which patches a student does not see: blocks of them, as BEiT, iBOT and DINOv2 hide them.

Half of the views have a share of their patches hidden, drawn evenly from a range; blocks of a
random area and shape are laid down until there are nearly as many, and single ones fill it up to
exactly that (DINOv3's code; DINOv2's leaves it at the blocks). DINOv2 deals the shares out over a
batch; here each view draws its own, by (seed, epoch, image, view) alone.
"""

import math

import numpy as np
from jaxtyping import Bool, Int

from vitrail.data.keyed import uniform

_TRIES = 24
"""Blocks that are drawn, at most."""
_LEAST = 4
"""Patches of the smallest block."""
_NARROWEST = math.log(0.3)
"""Height by width of a block, from 0.3 to its inverse, as a logarithm."""


def block_masks(
    grid: tuple[int, int],
    indices: Int[np.ndarray, " b"],
    *,
    seed: int,
    epoch: int,
    view: int,
    chance: float,
    shares: tuple[float, float],
) -> Bool[np.ndarray, "b n"]:
    """Of each image's view which of the patches on its `grid` (rows, columns) are hidden: none, or
    with the `chance` one of these `shares`, rounded to whole patches.
    """
    n = grid[0] * grid[1]
    purpose = f"mask {view}"
    drawn = uniform(seed, epoch, indices, purpose, 2 + 4 * _TRIES + n).astype(np.float64)
    masks = np.zeros((len(indices), *grid), bool)
    for mask, (chosen, share, *rest) in zip(masks, drawn, strict=True):
        if chosen < chance:
            due = round(n * (shares[0] + (shares[1] - shares[0]) * share))
            blocks, order = np.split(np.array(rest), [4 * _TRIES])
            _hide(mask, due, blocks.reshape(_TRIES, 4), order)
    return masks.reshape(len(indices), n)


def _hide(mask: Bool[np.ndarray, "gh gw"], due: int, blocks: np.ndarray, order: np.ndarray) -> None:
    """Hide `due` patches: blocks, then single ones in an `order`."""
    gh, gw = mask.shape
    left = due
    for area, shape, top, side in blocks:
        if left < _LEAST:
            break
        size, ratio = _LEAST + area * (left - _LEAST), math.exp(_NARROWEST * (2 * shape - 1))
        h, w = round(math.sqrt(size * ratio)), round(math.sqrt(size / ratio))
        if h > gh or w > gw:
            continue
        y, x = int(top * (gh - h + 1)), int(side * (gw - w + 1))
        block = mask[y : y + h, x : x + w]
        new = block.size - int(block.sum())
        if new <= left:
            block[:] = True
            left -= new
    shown = np.flatnonzero(~mask)
    mask.flat[shown[np.argsort(order[shown], kind="stable")[:left]]] = True
