"""Two sizes of patches in one sequence: one plane, whole maps, and a choice that can be learned."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from close import close
from vitrail.errors import UsageError
from vitrail.models import ViT, ViTConfig, build
from vitrail.nn import SinCosPosition, cells_cut
from vitrail.nn.multiscale import CutGrid, WholeGrids, in_fours, variance
from vitrail.nn.position import LearnedPosition, RotaryPosition, table_of

TINY = ViTConfig(
    depth=2, width=32, heads=2, mlp=48, patch=(8, 4), image_size=(32, 48), classes=7, pool="mean"
)
HIERARCHICAL = replace(TINY, scales="hierarchical")
ADAPTIVE = replace(TINY, scales="adaptive", fine=0.25)
LEARNED = replace(ADAPTIVE, saliency="learned")
KINDS = {"hierarchical": HIERARCHICAL, "variance": ADAPTIVE, "learned": LEARNED}
every_kind = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


def lengths(model: ViT) -> list[int]:
    """Fills with the tokens that the encoder got, without the class token, of each pass."""
    seen: list[int] = []
    k = 0 if model.prefix is None else len(model.prefix)
    model.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1] - k))
    return seen


@pytest.mark.parametrize(
    "name, changes, tokens",
    [
        ("vit_b16", {}, 196),
        ("vit_b16", {"scales": "hierarchical"}, 196 + 49),
        ("vit_b16", {"scales": "adaptive"}, 196 + 3 * 49),
        ("vit_b16", {"scales": "adaptive", "fine": 0.5}, 196 + 3 * 98),
        ("vit_b16", {"scales": "adaptive", "fine": 1.0}, 784),
        ("vit_b16", {"scales": "adaptive", "fine": 1e-6}, 196 + 3),
        ("vit_b32", {"scales": "adaptive", "fine": 1.0}, 196),
        ("vit_b16", {"scales": "hierarchical", "image_size": (96, 160)}, 60 + 15),
    ],
)
def test_the_encoder_gets_as_many_tokens_as_the_config_says(name, changes, tokens):
    with torch.device("meta"):
        model = build(name, depth=1, **changes)
        seen = lengths(model)
        model(torch.empty(2, 3, *model.config.image_size))
    assert [model.config.tokens] == seen == [tokens]


@every_kind
@pytest.mark.parametrize("b, size", [(1, (32, 48)), (3, (48, 32)), (2, (16, 64))])
@pytest.mark.parametrize("stem", ["patch", "overlap", "patchify", "conv"])
def test_any_size_gives_whole_features(stem, b, size, config, randomised):
    if stem in ("patchify", "conv"):
        config = replace(config, patch=(8, 8))
    model = randomised(ViT(replace(config, stem=stem)))
    features = model.features(torch.randn(b, *size, 3).permute(0, 3, 1, 2))
    grid = (size[0] // config.patch[0], size[1] // config.patch[1])
    assert features.grid == grid
    assert features.patches.shape == (b, grid[0] * grid[1], 32)
    assert [m.shape for m in features.maps] == [(b, 32, *grid)]
    assert features.strides == (config.patch,)
    assert features.valid is None
    assert features.prefix.shape == (b, 1, 32)
    assert torch.equal(features.maps[0].flatten(2).transpose(1, 2), features.patches)


# One plane.


def centres(grid: tuple[int, int], step: float) -> torch.Tensor:
    """Where the cells' centres are, in patches, (row, column), row by row."""
    y, x = ((torch.arange(n) + 0.5) * step - 0.5 for n in grid)
    return torch.cartesian_prod(y, x)


ORDER = torch.tensor([[3, 1, 4, 5, 0, 2], [5, 0, 1, 2, 4, 3]])
GRIDS = {"hierarchical": WholeGrids((2, 6)), "adaptive": CutGrid((2, 3), ORDER, cut=2)}
both_grids = pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)


def test_the_sequence_of_two_whole_grids():
    places = GRIDS["hierarchical"].stack(centres).tolist()
    assert places[:12] == [[y, x] for y in range(2) for x in range(6)]
    assert places[12:] == [[0.5, 0.5], [0.5, 2.5], [0.5, 4.5]]


def test_the_sequence_of_a_grid_with_cells_cut():
    first, second = GRIDS["adaptive"].stack(centres).tolist()
    assert first[:4] == [[1, 1], [1, 2], [0, 0], [0, 2]]  # cells 4, 5, 0, 2: those not cut
    assert first[4:8] == [[0.75, -0.25], [0.75, 0.25], [1.25, -0.25], [1.25, 0.25]]  # cell 3
    assert first[8:] == [[-0.25, 0.75], [-0.25, 1.25], [0.25, 0.75], [0.25, 1.25]]  # cell 1
    assert second[4:8] == [[0.75, 1.75], [0.75, 2.25], [1.25, 1.75], [1.25, 2.25]]  # cell 5
    assert GRIDS["adaptive"].longest == len(first) == 6 + 3 * 2


@pytest.mark.parametrize("size", [None, (6, 5)], ids=["its own grid", "resampled from another"])
@both_grids
def test_learned_positions_are_the_table_at_each_tokens_place(grids, size, randomised):
    position = randomised(LearnedPosition(size or grids.grid, 16, 1))
    places, patches = grids.stack(centres).expand(2, -1, -1), position.rows(grids.grid)
    # For grid_sample the borders of the plane are -1 and 1, and columns come first.
    shares = (2 * (places + 0.5) / torch.tensor(grids.grid) - 1).flip(-1)
    table = patches.T.reshape(1, 16, *grids.grid).expand(2, -1, -1, -1)
    sampled = F.grid_sample(table, shares[:, None], padding_mode="border", align_corners=False)
    close(table_of(position.rows, grids).expand(2, -1, -1), sampled[:, :, 0].mT)


@pytest.mark.parametrize("size", [(4, 6), (8, 2)])
def test_a_coarse_cells_position_is_the_mean_of_its_four_fine_ones(size, randomised):
    position = randomised(LearnedPosition((4, 6), 16, 1))
    coarse = (size[0] // 2, size[1] // 2)
    close(position.rows(coarse, 2.0), in_fours(position.rows(size), coarse).mean(1))


@pytest.mark.parametrize("kind", ["sincos_moco", "sincos_mae", "sincos_bigvision"])
@both_grids
def test_sine_cosine_positions_are_the_function_at_each_tokens_place(grids, kind):
    position = SinCosPosition(grids.grid, 16, kind)
    y, x = grids.stack(centres).double().split(1, dim=-1)
    omega = 10_000 ** (-torch.arange(4.0) / (3 if kind == "sincos_bigvision" else 4))
    axes = (y, x) if kind == "sincos_moco" else (x, y)
    parts = [f(axis * omega) for axis in axes for f in (torch.sin, torch.cos)]
    close(table_of(position.rows, grids), torch.cat(parts, dim=-1).float())


@both_grids
def test_rotations_are_those_of_each_tokens_place(grids):
    rotary = RotaryPosition(16)
    shares = 2 * (grids.stack(centres) + 0.5) / torch.tensor(grids.grid) - 1
    angles = (2 * torch.pi * shares[..., None] / rotary.periods).flatten(-2)
    for found, function in zip(rotary(grids)[:2], (torch.sin, torch.cos), strict=True):
        expected = function(torch.cat([angles, angles], dim=-1))
        close(found, expected[:, None] if expected.ndim == 3 else expected)


@every_kind
def test_content_that_moves_by_a_coarse_cell_moves_in_both_grids(config, randomised):
    model = randomised(ViT(replace(config, position="none")))
    down, right = (2 * p for p in config.patch)  # one coarse cell, or two
    x = torch.randn(1, 3, 32, 48)

    def tokens_by_place(x: torch.Tensor) -> dict[tuple[float, float], torch.Tensor]:
        tokens, grid, _ = model.embed(x)
        places = grid.stack(centres).reshape(-1, 2)
        return dict(zip(map(tuple, places.tolist()), tokens[0, 1:], strict=True))

    before, after = tokens_by_place(x), tokens_by_place(x.roll((down, right), dims=(2, 3)))
    assert len(before) == len(after) == config.tokens
    rows, columns = config.grid
    for (y, x_), token in before.items():
        # Around the border and back: the fine cells of the first row are above its centre.
        moved = ((y + 2 + 0.5) % rows - 0.5, (x_ + 2 + 0.5) % columns - 0.5)
        close(after[moved], token)


@every_kind
def test_only_the_second_scales_tokens_have_its_vector(config, randomised):
    model = randomised(ViT(config))
    x = torch.randn(2, 3, 32, 48)
    before, grid, _ = model.embed(x)
    model.stem_second.scale.data.add_(1)
    change = (model.embed(x)[0] - before).mean(-1)[:, 1:]
    second = 48 // 4 if config.scales == "hierarchical" else 4 * cells_cut(0.25, 48)
    expected = torch.zeros(2, grid.longest)
    expected[:, -second:] = 1
    close(change, expected)


# Which cells are cut.


def textured(cells: list[int]) -> torch.Tensor:
    """An image of 3 x 4 cells of 8 x 4 pixels, of which `cells` have texture, the others a tone."""
    tone = torch.rand(1, 3, 3, 4).repeat_interleave(8, 2).repeat_interleave(4, 3)
    mask = torch.zeros(12)
    mask[cells] = 1
    shown = mask.view(1, 1, 3, 4).repeat_interleave(8, 2).repeat_interleave(4, 3)
    return tone + shown * torch.randn(1, 3, 24, 16)


def test_the_variance_of_a_cell_is_that_of_its_own_pixels():
    x = torch.randn(3, 2, 24, 16)
    found = variance(x, (3, 4))
    for b, cell in ((0, 0), (1, 6), (2, 11)):
        i, j = divmod(cell, 4)
        pixels = x[b, :, 8 * i : 8 * i + 8, 4 * j : 4 * j + 4]
        close(found[b, cell], pixels.flatten(1).var(dim=1, correction=0).mean())


def test_textured_cells_are_cut_in_each_image_its_own():
    model = ViT(replace(ADAPTIVE, image_size=(24, 16)))
    cells = [[0, 5, 10], [3, 4, 11]]
    _, grid, _ = model.embed(torch.cat([textured(c) for c in cells]))
    assert grid.cut == 3
    assert [sorted(order[:3]) for order in grid.order.tolist()] == cells


@pytest.mark.parametrize("config", [ADAPTIVE, LEARNED], ids=["variance", "learned"])
def test_where_no_cell_is_above_another_the_first_are_cut(config):
    """Of one colour, as is a photograph's background, but for what rounding makes of it."""
    x = 0.7 + 1e-7 * torch.randn(2, 3, 32, 48)
    _, grid, _ = ViT(config).embed(x)
    assert grid.order.tolist() == 2 * [list(range(48))]


def test_a_learned_score_ranks_the_coarse_tokens(randomised):
    model = randomised(ViT(LEARNED))
    x = torch.randn(3, 3, 32, 48)
    _, grid, _ = model.embed(x)
    score = model.stem(x)[0] @ model.stem_second.score.weight[0]
    ranked = score.gather(1, grid.order)
    assert (ranked[:, :-1] >= ranked[:, 1:]).all() and ranked.std() > 0.1


def test_a_learned_score_changes_nothing_but_the_ranks(randomised):
    second = randomised(ViT(LEARNED)).stem_second
    x, cells = torch.randn(2, 3, 32, 48), torch.randn(2, 48, 32)
    tokens, grid = second(x, cells, (4, 12))
    close(tokens, grid.join(cells, second.stem(x)[0] + second.scale))


def test_the_gradient_of_a_score_is_that_of_a_gate_between_coarse_and_fine(randomised):
    second = randomised(ViT(LEARNED)).stem_second
    x, cells = torch.randn(2, 3, 32, 48), torch.randn(2, 48, 32)
    tokens, grid = second(x, cells, (4, 12))
    upstream = torch.randn_like(tokens)
    (tokens * upstream).sum().backward()

    with torch.no_grad():
        change = in_fours(second.stem(x)[0] + second.scale, (4, 12)) - cells[:, :, None]
        expected = torch.zeros(2, 48)
        for b, order in enumerate(grid.order.tolist()):
            cut, whole = order[: grid.cut], order[grid.cut :]
            for place, cell in enumerate(whole):  # its one token would become their mean
                expected[b, cell] = upstream[b, place] @ change[b, cell].mean(0)
            for place, cell in enumerate(cut):
                four = upstream[b, len(whole) + 4 * place :][:4]
                expected[b, cell] = (four * change[b, cell]).sum()
        slope = second.score(cells)[..., 0].sigmoid()
        slope = slope * (1 - slope)
        close(second.score.weight.grad[0], ((slope * expected)[..., None] * cells).sum((0, 1)))


def test_a_learned_score_finds_the_cells_whose_detail_matters():
    """Bright cells hide a fine sign that the coarse token, a mean, does not show."""
    config = replace(LEARNED, image_size=(16, 16), patch=(4, 4), channels=1, stem="patch")
    second, coarse = ViT(config).stem_second, nn.Conv2d(1, 32, 4, stride=4)
    nn.init.constant_(coarse.weight, 1 / 16)  # brightness
    nn.init.normal_(second.stem.proj.weight)
    optimiser = torch.optim.SGD([second.score.weight], lr=0.5)
    bright = torch.rand(64, 16).argsort(1)[:, :4]
    x = torch.zeros(64, 16).scatter(1, bright, 1.0).view(64, 1, 4, 4)
    x = x.repeat_interleave(4, 2).repeat_interleave(4, 3)
    sign = torch.randn(64, 1, 16, 16)
    cells = coarse(x).flatten(2).mT.detach()
    wanted = in_fours(second.stem(x + x * sign)[0].detach() + second.scale.detach(), (4, 4))

    def right() -> float:
        _, grid = second(x + x * sign, cells, (4, 4))
        return (grid.order[:, :4].sort(1).values == bright.sort(1).values).float().mean().item()

    nn.init.zeros_(second.score.weight)
    second.score.weight.data[0] = -cells.mean((0, 1))  # dark cells first
    assert right() < 0.2
    for _ in range(30):
        tokens, grid = second(x + x * sign, cells, (4, 4))
        target = grid.join(wanted.mean(2), _rows(wanted))
        loss = (tokens - target).square().sum(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert right() > 0.9


# Whole features.


def test_a_cell_that_was_cut_is_the_mean_of_its_four():
    grids = GRIDS["adaptive"]
    cells, fine = torch.randn(2, 6, 5), torch.randn(2, 24, 5)
    expected = cells.clone()
    for b, order in enumerate(ORDER.tolist()):
        for cell in order[:2]:
            expected[b, cell] = in_fours(fine, (2, 3))[b, cell].mean(0)
    close(grids.cells(grids.join(cells, fine)), expected)


def test_the_patches_of_two_whole_grids_are_the_fine_ones():
    cells, coarse = torch.randn(2, 12, 5), torch.randn(2, 3, 5)
    grids = GRIDS["hierarchical"]
    assert torch.equal(grids.cells(grids.join(cells, coarse)), cells)


@pytest.mark.parametrize("position", ["rope", "none"])
def test_all_cells_cut_are_the_vit_of_half_the_patch(position, randomised):
    config = replace(ADAPTIVE, position=position, fine=1.0, width=64, registers=2)
    model = randomised(ViT(config))
    small = ViT(replace(config, scales="one", patch=(4, 2))).eval()
    state = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("stem")}
    second = model.stem_second
    state["stem.proj.weight"] = second.stem.proj.weight
    state["stem.proj.bias"] = second.stem.proj.bias + second.scale
    small.load_state_dict(state)
    x = torch.randn(3, 3, 32, 48)
    two, one = model.features(x), small.features(x)
    close(two.pooled, one.pooled)
    close(two.prefix, one.prefix)
    close(two.maps[0], F.avg_pool2d(one.maps[0], 2))
    close(model(x), small(x))


@every_kind
@pytest.mark.parametrize(
    "changes",
    [
        {"pool": "class"},
        {"pool": "class_mean"},
        {"pool": "map", "class_token": False},
        {"pool": "class", "distilled": True, "registers": 2},
        {"position": "none", "class_token": False},
        {"position": "sincos_bigvision", "pool_norm": True},
        {"position": "rope", "registers": 1, "width": 64},
        {"position": "learned_rope", "rope": "pe", "rope_grid": (4, 6), "width": 64},
    ],
    ids=str,
)
def test_the_vector_is_of_all_tokens_of_both_scales(config, changes, randomised):
    model = randomised(ViT(replace(config, **changes)))
    seen = []
    model.encoder.register_forward_hook(lambda *args: seen.append(args[2]))
    x = torch.randn(2, 3, 32, 48)
    features = model.features(x)
    prefix, tokens = model.split(seen[0])
    assert tokens.shape[1] == model.config.tokens
    assert torch.equal(features.prefix, prefix)
    close(features.pooled, model.vector(prefix, tokens))
    if model.config.pool == "mean" and not model.config.pool_norm:
        close(features.pooled, tokens.mean(1))
    assert model(x).shape == (2, 7)


# Learning.


@every_kind
@pytest.mark.parametrize("b, size", [(1, (32, 48)), (3, (16, 64))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_training_step_reaches_every_parameter(config, b, size, dtype, randomised):
    model = randomised(ViT(replace(config, pool="class_mean"))).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = model(torch.randn(b, 3, *size)).float().square().sum()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
    assert any(name.startswith("stem_second.score") for name, _ in model.named_parameters()) == (
        config is LEARNED
    )


@every_kind
def test_a_fresh_model_has_a_choice_and_tells_scales_apart(config):
    second = ViT(config).stem_second
    assert 0.01 < second.scale.std() < 0.03
    if config is LEARNED:
        assert second.score.weight.std() > 0.05


@every_kind
def test_a_model_of_one_scale_has_all_other_weights(config):
    """Published weights start it: position table, first stem and encoder are as ever."""
    shapes = {
        scales: {k: v.shape for k, v in ViT(replace(config, scales=scales)).state_dict().items()}
        for scales in ("one", config.scales)
    }
    one, two = shapes["one"], shapes[config.scales]
    assert one.items() <= two.items()
    assert {key.split(".")[0] for key in two.keys() - one.keys()} == {"stem_second"}


# What does not go together.


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"position": "peg"}, r"position='peg' is for .*: use 'learned', 'sincos_mae' or 'rope'"),
        ({"position": "sincos_1d"}, "position='sincos_1d' is for the cells of one"),
        ({"stem": "resnet", "patch": (8, 8)}, "two ResNets: use stem='patch', 'overlap'"),
        ({"merge": 2}, "merge=2 do not go together"),
    ],
    ids=str,
)
@every_kind
def test_what_does_not_go_together_is_refused(config, changes, message):
    with pytest.raises(UsageError, match=message):
        replace(config, **changes)


def test_images_of_different_sizes_are_refused():
    with pytest.raises(UsageError, match="need scales='one': with adaptive take resize crop"):
        ViT(ADAPTIVE)(torch.zeros(2, 3, 32, 48), torch.tensor([[2, 2], [4, 4]]))


def test_an_odd_patch_cannot_be_halved():
    with pytest.raises(UsageError, match="must be even, not 7x8"):
        replace(ADAPTIVE, patch=(7, 8), image_size=(28, 32))
    replace(HIERARCHICAL, patch=(7, 8), image_size=(28, 32))  # doubled it can be


def test_an_image_is_a_whole_number_of_coarse_patches_or_padded(randomised):
    message = "40x48 pixels .* patches of 16x8: use 32x48, or indivisible='pad'"
    with pytest.raises(UsageError, match=message):
        ViT(HIERARCHICAL)(torch.zeros(1, 3, 40, 48))
    with pytest.raises(UsageError, match=message):
        HIERARCHICAL.check_size((40, 48))
    ADAPTIVE.check_size((40, 48))
    padded = replace(HIERARCHICAL, indivisible="pad", image_size=(33, 45))
    assert padded.grid == (6, 12) and padded.tokens == 72 + 18
    model = randomised(ViT(padded))
    x = torch.randn(2, 3, 33, 45)
    features = model.features(x)
    assert features.grid == (6, 12)
    close(model.features(F.pad(x, (0, 3, 0, 15))).pooled, features.pooled)


def _rows(fours: torch.Tensor) -> torch.Tensor:
    """Of 4 x 4 cells with four parts each, the parts row by row."""
    b, _, _, d = fours.shape
    return fours.view(b, 4, 4, 2, 2, d).transpose(2, 3).reshape(b, 64, d)
