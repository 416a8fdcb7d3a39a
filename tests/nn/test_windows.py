"""Attention in windows: what a user of it relies on."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from models.families import VIT
from vitrail.errors import UsageError
from vitrail.models import DynamicViTConfig, ViT, ViTConfig
from vitrail.nn import Windows
from vitrail.nn.lora import add_lora, merged_state
from vitrail.training.engine import recompute_blocks

SIDES = st.integers(1, 12)
LOCAL = replace(
    VIT,
    position="none",
    class_token=False,
    pool="mean",
    classes=0,
    window=(2, 3),
    indivisible="pad",
)


def patches(config: ViTConfig, x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """The last map of a model at random, the same for the same parameters."""
    torch.manual_seed(seed)
    model = ViT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
        return model.features(x).maps[-1]


def image(rows: int, columns: int, batch: int = 2) -> torch.Tensor:
    """One of so many patches."""
    generator = torch.Generator().manual_seed(1)
    side = VIT.patch[0]
    return torch.randn(batch, 3, rows * side, columns * side, generator=generator)


@given(st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES))
def test_a_grid_in_windows_is_put_together_again(grid, size):
    x = torch.arange(2 * grid[0] * grid[1] * 3.0).view(2, -1, 3) + 1
    cut = Windows(size).cut(grid)
    parts = cut.partition(x)
    assert parts.shape == (2, cut.windows, size[0] * size[1], 3)
    assert torch.equal(cut.merge(parts), x)
    assert parts.count_nonzero() == x.numel()  # beyond the grid there are zeros


@given(st.tuples(SIDES, SIDES), st.integers(1, 6))
def test_so_many_windows_cover_any_grid(grid, number):
    cut = Windows(number=number).cut(grid)
    assert cut.windows <= number**2
    assert all(p < s for p, s in zip(cut.padding, cut.size, strict=True))
    x = torch.randn(1, grid[0] * grid[1], 2)
    assert torch.equal(cut.merge(cut.partition(x)), x)


@pytest.mark.parametrize("position", ["learned", "sincos_mae", "rope", "peg"])
@pytest.mark.parametrize("cut", [{"window": (4, 6)}, {"windows": 1}])
@pytest.mark.parametrize("registers", [0, 2])
def test_a_window_as_large_as_the_grid_is_global_attention(position, cut, registers):
    config = replace(VIT, position=position, registers=registers)
    x = image(4, 6)
    windowed, expected = patches(replace(config, **cut), x), patches(config, x)
    assert (windowed - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("grid", [(4, 6), (5, 7)])
def test_nothing_leaks_between_windows(grid):
    x = image(*grid)
    changed = x.clone()
    changed[:, :, :5, :5] += 1  # in the first patch, and so in the first window
    difference = (patches(LOCAL, changed) - patches(LOCAL, x)).abs().amax(dim=(0, 1))
    assert (difference[:2, :3] > 0).all()
    difference[:2, :3] = 0
    assert difference.max() == 0


def test_a_global_block_tells_all_windows():
    config = replace(LOCAL, global_blocks=(LOCAL.depth - 1,))
    x = image(4, 6)
    changed = x.clone()
    changed[:, :, :5, :5] += 1
    assert ((patches(config, changed) - patches(config, x)).abs().amax(dim=(0, 1)) > 0).all()


def test_content_moved_by_a_window_moves_what_is_found():
    side = VIT.patch[0]
    x = image(4, 9)
    found = patches(LOCAL, x)
    moved = patches(LOCAL, x.roll((2 * side, 3 * side), (2, 3)))
    assert (found.roll((2, 3), (2, 3)) - moved).abs().max() <= 1e-5 * found.abs().max()


@pytest.mark.parametrize("cut", [{"window": (2, 3)}, {"windows": 2}])
def test_class_and_registers_are_one_each_in_what_comes_out(cut):
    config = replace(VIT, registers=2, global_blocks=(1,), classes=5, **cut)
    model = ViT(config)
    features = model.features(image(5, 7))
    assert features.prefix.shape == (2, 3, config.width)
    assert model(image(5, 7)).shape == (2, 5)
    # The same parameters: any ViT's weights are one's with windows.
    assert (
        model.state_dict().keys() == ViT(replace(VIT, registers=2, classes=5)).state_dict().keys()
    )


def test_own_copies_differ_from_their_mean():
    blocks = {"class_token": True, "pool": "class"}
    x = image(4, 6)
    own = patches(replace(VIT, windows=2, **blocks), x)
    mean = patches(replace(VIT, window=(2, 3), **blocks), x)
    assert (own - mean).abs().max() > 1e-4 * own.abs().max()


RELATIVE = {"class_token": False, "pool": "mean", "position": "none", "relative": (4, 6)}


@pytest.mark.parametrize(
    "cut",
    [{"window": (2, 3)}, {"window": (3, 4)} | RELATIVE, {"windows": 2}],
    ids=["windows", "padded, relative positions", "copies of the class token"],
)
@pytest.mark.parametrize("way", ["checkpointing", "lora"])
def test_what_training_does_to_blocks_changes_nothing(cut, way):
    torch.manual_seed(0)
    model = ViT(replace(VIT, global_blocks=(1,), **cut))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    x = image(4, 6, batch=3)
    found = model(x)
    names = [name for name, _ in model.named_parameters()]
    before = torch.autograd.grad(found.square().sum(), list(model.parameters()))
    if way == "checkpointing":
        recompute_blocks(model)
    else:
        added = add_lora(model, [f"{name}.attn.qkv" for name in model.block_names()], 2, 4.0)
        nn.init.normal_(added[1], std=0.1)
    again = model(x)
    if way == "lora":  # it acts, in every block, and merges into plain weights
        assert (again - found).abs().max() > 1e-3 * found.abs().max()
        plain = ViT(model.config)
        plain.load_state_dict(merged_state(model))
        assert (plain(x) - again).abs().max() <= 1e-5 * again.abs().max()
        learned = torch.autograd.grad(again.square().sum(), added[1::2])
        assert len(learned) == len(model.block_names())
        assert all(each.count_nonzero() for each in learned)
        return
    assert (again - found).abs().max() <= 1e-5 * found.abs().max()
    after = torch.autograd.grad(again.square().sum(), list(model.parameters()))
    for name, own, theirs in zip(names, before, after, strict=True):
        assert (own - theirs).abs().max() <= 1e-4 * own.abs().max(), name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"window": (2, 3), "windows": 2}, "give one of them"),
        ({"window": (0, 3)}, "rows and columns of tokens"),
        ({"windows": -1}, "from 1"),
        ({"global_blocks": (0,)}, "do not attend in windows"),
        ({"window": (2, 3), "global_blocks": (1, 0)}, "ascending"),
        ({"window": (2, 3), "global_blocks": (99,)}, "ascending"),
        ({"window": (2, 3), "merge": 1}, "merge"),
        ({"window": (2, 3), "scales": "adaptive"}, "scales"),
        ({"relative": (8, 8)}, "class_token"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, words):
    with pytest.raises(UsageError, match=words):
        replace(VIT, **changes)


def test_images_of_several_sizes_tokens_that_go_and_queries_are_refused():
    model = ViT(replace(VIT, window=(2, 3)))
    with pytest.raises(UsageError, match="no grid in common"):
        model(image(4, 6), extent=torch.tensor([[4, 6], [2, 2]]))
    with pytest.raises(UsageError, match="all tokens attend to all"):
        model.joined(image(4, 6), torch.zeros(3, VIT.width), 1)
    with pytest.raises(UsageError, match="DynamicViT"):
        DynamicViTConfig(window=(2, 3))
