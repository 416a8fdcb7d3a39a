"""Position tables on other grids and patch kernels for other patches, as the published codes do."""

from itertools import product
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed, resample_patch_embed

from close import close
from vitrail.nn import adapt_channels, resample_patch, resample_table
from vitrail.nn.resample import Resample

MODES = get_args(Resample)
GRIDS = list(product(range(8, 31), repeat=2))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("old", [(14, 14), (37, 37), (9, 16)], ids=str)
def test_every_grid_can_be_reached(mode, old):
    table = torch.randn(old[0] * old[1], 4)
    for new in GRIDS:
        there = resample_table(table, old, new, mode)
        assert there.shape == (new[0] * new[1], 4) and there.isfinite().all(), new


@pytest.mark.parametrize("mode", MODES)
def test_a_table_for_its_own_grid_is_itself(mode):
    table = torch.randn(12, 4)
    assert resample_table(table, (3, 4), (3, 4), mode) is table


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("new", [(8, 8), (20, 11), (30, 30)], ids=str)
def test_what_is_the_same_everywhere_stays_so(mode, new):
    there = resample_table(torch.ones(14 * 14, 3), (14, 14), new, mode)
    close(there, torch.ones_like(there))


@pytest.mark.parametrize("new", [(8, 8), (24, 24), (10, 20)], ids=str)
def test_as_timm_does(new):
    table = torch.randn(14 * 14, 6)
    theirs = resample_abs_pos_embed(table[None], list(new), [14, 14], num_prefix_tokens=0)[0]
    ours = resample_table(table, (14, 14), new, "bicubic_antialias")
    close(ours, theirs)


def zoom(grid: np.ndarray, new: tuple[int, int]) -> np.ndarray:
    """scipy.ndimage.zoom(order=1), as Google's code calls it: linear, end points on end points."""
    for axis, size in enumerate(new):
        places = np.linspace(0, grid.shape[axis] - 1, size)
        grid = np.apply_along_axis(
            lambda line, p=places: np.interp(p, np.arange(len(line)), line), axis, grid
        )
    return grid


@pytest.mark.parametrize("new", [(8, 8), (24, 24), (10, 20), (37, 30)], ids=str)
def test_as_googles_code_does(new):
    table = torch.randn(14 * 14, 3)
    theirs = zoom(table.view(14, 14, 3).double().numpy(), new)
    ours = resample_table(table, (14, 14), new, "bilinear_aligned").view(*new, 3)
    close(ours, torch.from_numpy(theirs).float())
    for there, here in ((0, 0), (-1, -1)):
        close(ours[here, here], table.view(14, 14, 3)[there, there])


@pytest.mark.parametrize("new", [(8, 8), (16, 30), (30, 16)], ids=str)
def test_as_dino_does(new):
    """`interpolate_pos_encoding` of facebookresearch/dino and dinov2, written from its formula."""
    table = torch.randn(37 * 37, 4)
    scale = ((new[0] + 0.1) / 37, (new[1] + 0.1) / 37)
    grid = table.view(1, 37, 37, 4).permute(0, 3, 1, 2)
    theirs = F.interpolate(grid, scale_factor=scale, mode="bicubic").flatten(2)[0].T
    assert torch.equal(resample_table(table, (37, 37), new, "bicubic_offset"), theirs)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "bicubic_offset"])
def test_a_row_and_a_column_are_treated_alike(mode):
    table = torch.randn(4, 3)
    row, column = ((1, 4), (1, 8)), ((4, 1), (8, 1))
    close(resample_table(table, *row, mode), resample_table(table, *column, mode))


def test_the_modes_are_not_the_same():
    """But for FlexiViT's, which differs in kernels from the one of its tables."""
    table = torch.randn(14 * 14, 4)
    flexivit = resample_table(table, (14, 14), (9, 12), "flexivit")
    assert torch.equal(flexivit, resample_table(table, (14, 14), (9, 12), "bilinear_antialias"))
    others = [mode for mode in MODES if mode != "flexivit"]
    made = [resample_table(table, (14, 14), (9, 12), mode) for mode in others]
    for i, one in enumerate(made):
        assert all((one - other).abs().max() > 1e-3 for other in made[:i])


@pytest.mark.parametrize("new", [(8, 8), (32, 32), (14, 14), (20, 24), (12, 10)], ids=str)
def test_patch_kernels_as_timm_does(new):
    kernel = torch.randn(5, 3, 16, 16)
    theirs = resample_patch_embed(kernel, list(new))
    # theirs inverts in float32
    close(resample_patch(kernel, new), theirs, 5e-5)


def triangles(old: int, new: int, antialias: bool) -> np.ndarray:
    """The matrix of bilinear resizing along one axis, from its definition: a triangle at each new
    pixel's centre, as wide as a pixel or, with antialiasing, as the larger of the two pixels.

    What lies beyond the border is left out with antialiasing (jax.image.resize, torch), and is the
    border's own pixel without (tf.image.resize).
    """
    scale = old / new
    width = max(scale, 1.0) if antialias else 1.0
    matrix = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * scale - 0.5
        for j in range(-2 * old, 3 * old):
            weight = max(0.0, 1 - abs(j - centre) / width)
            if 0 <= j < old or not antialias:
                matrix[i, min(max(j, 0), old - 1)] += weight
    return matrix / matrix.sum(1, keepdims=True)


@pytest.mark.parametrize("new", [(3, 3), (5, 12), (12, 5), (15, 30)], ids=str)
@pytest.mark.parametrize("mode", ["bilinear_antialias", "flexivit"])
def test_tables_as_tips_and_flexivit_do(mode, new):
    """jax.image.resize, written from its definition; and timm's function, which has the mode."""
    table = torch.randn(7 * 7, 6)
    rows, columns = (triangles(7, n, antialias=True) for n in new)
    theirs = np.einsum("ai,bj,ijd->abd", rows, columns, table.view(7, 7, 6).double().numpy())
    ours = resample_table(table, (7, 7), new, mode)
    close(ours, torch.from_numpy(theirs).float().flatten(0, 1))
    timms = resample_abs_pos_embed(
        table[None], list(new), [7, 7], num_prefix_tokens=0, interpolation="bilinear"
    )
    close(ours, timms[0])


@pytest.mark.parametrize("new", [(16, 16), (4, 4), (12, 12), (4, 6)], ids=str)
def test_patch_kernels_as_flexivit_does(new):
    """The pseudo-inverse of the whole matrix of both axes, bilinear and not antialiased."""
    old = (8, 8)
    kernel = torch.randn(5, 3, *old)
    matrix = np.kron(*(triangles(o, n, antialias=False) for o, n in zip(old, new, strict=True)))
    theirs = np.linalg.pinv(matrix.T) @ kernel.double().flatten(2).numpy()[..., None]
    ours = resample_patch(kernel, new, "flexivit")
    close(ours, torch.from_numpy(theirs).float().view(5, 3, *new))
    timms = resample_patch_embed(kernel, list(new), interpolation="bilinear", antialias=False)
    close(ours, timms, 5e-5)  # theirs inverts in float32
    if min(new) < 8:
        assert (ours - resample_patch(kernel, new)).abs().max() > 0.1, "timm's bicubic is another"


def test_a_patch_may_grow_one_way_and_shrink_the_other():
    kernel = torch.randn(5, 3, 16, 16)
    there = resample_patch(kernel, (12, 20))
    assert there.std() < 3 and there.isfinite().all()


def test_a_patch_twice_as_large_sees_the_same_in_an_image_twice_as_large():
    """FlexiViT's promise, exactly; an interpolated kernel does not keep it."""
    kernel, patch = torch.randn(4, 3, 8, 8), torch.randn(2, 3, 8, 8)
    larger = F.interpolate(patch, size=(16, 16), mode="bicubic", antialias=True)
    before = F.conv2d(patch, kernel)
    close(F.conv2d(larger, resample_patch(kernel, (16, 16))), before, 1e-4)
    interpolated = F.interpolate(kernel, size=(16, 16), mode="bicubic", antialias=True)
    assert (F.conv2d(larger, interpolated) - before).abs().max() > 1


def test_a_grey_image_gives_what_its_rgb_copy_gave():
    kernel, grey = torch.randn(4, 3, 8, 8), torch.randn(2, 1, 8, 8)
    before = F.conv2d(grey.expand(-1, 3, -1, -1), kernel)
    close(F.conv2d(grey, adapt_channels(kernel, 1)), before)


@pytest.mark.parametrize("channels", [2, 3, 4, 5, 6, 13])
def test_more_channels_give_outputs_of_the_same_size(channels):
    kernel = torch.randn(4, 3, 8, 8)
    wide = adapt_channels(kernel, channels)
    assert wide.shape == (4, channels, 8, 8)
    if channels % 3 == 0:
        close(wide.sum(1), kernel.sum(1))
    back = adapt_channels(adapt_channels(kernel, 1), channels)
    close(back.sum(1), kernel.sum(1))
