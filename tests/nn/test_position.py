import math
from typing import get_args

import pytest
import torch
from timm.layers import RotaryEmbeddingCat, RotaryEmbeddingDinoV3, apply_rot_embed_cat
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from transformers import DINOv3ViTConfig, ViTMAEConfig
from transformers.models.dinov3_vit.modeling_dinov3_vit import (
    DINOv3ViTRopePositionEmbedding,
    apply_rotary_pos_emb,
)
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEEmbeddings

from close import close
from vitrail.nn import LearnedPosition, Peg, RotaryPosition, SinCosPosition, sincos_table
from vitrail.nn.position import ROPES, Rope, resample_table, rotate

SINCOS = ["sincos_moco", "sincos_mae", "sincos_bigvision", "sincos_1d"]


def published(kind: str, row: int, column: int, columns: int, channel: int, width: int) -> float:
    """One number of each table, from the definitions in the papers' own code."""
    if kind == "sincos_1d":  # T2T-ViT: even channels sine, odd cosine, of the row-major index
        angle = (row * columns + column) / 10_000 ** (2 * (channel // 2) / width)
        return math.sin(angle) if channel % 2 == 0 else math.cos(angle)
    part, k = divmod(channel, width // 4)
    if kind == "sincos_bigvision":  # mgrid gives y, x; sin x, cos x, sin y, cos y; last 1/10000
        place, exponent = (column, column, row, row)[part], k / (width // 4 - 1)
    elif kind == "sincos_moco":  # "w" of meshgrid(w, h, indexing="ij") runs along the rows
        place, exponent = (row, row, column, column)[part], k / (width // 4)
    else:  # MAE: the half called emb_h is fed grid[0] of meshgrid(w, h), which runs along columns
        place, exponent = (column, column, row, row)[part], k / (width // 4)
    return (math.sin, math.cos)[part % 2](place * 10_000**-exponent)


@pytest.mark.parametrize("kind", SINCOS)
@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 7)])
def test_each_fixed_table_is_as_published(kind, grid):
    expected = [
        [published(kind, row, column, grid[1], channel, 32) for channel in range(32)]
        for row in range(grid[0])
        for column in range(grid[1])
    ]
    close(sincos_table(grid, 32, kind), torch.tensor(expected))


def test_no_two_of_the_fixed_tables_agree():
    tables = [sincos_table((14, 14), 64, kind) for kind in SINCOS]
    for i, one in enumerate(tables):
        for other in tables[:i]:
            assert (one - other).abs().max() > 0.1


@pytest.mark.parametrize("grid", [(14, 14), (6, 9)])
def test_mocos_table_is_timms_interleaved_one(grid):
    theirs = build_sincos2d_pos_embed(grid, 64, interleave_sin_cos=True)
    close(sincos_table(grid, 64, "sincos_moco"), theirs)


def test_maes_table_is_that_of_transformers():
    embeddings = ViTMAEEmbeddings(ViTMAEConfig(hidden_size=64))
    embeddings.initialize_weights()  # a whole new ViTMAEModel of transformers 5.23 has zeros
    theirs = embeddings.position_embeddings[0].detach()
    assert not theirs[0].any()  # the class token's
    close(sincos_table((14, 14), 64, "sincos_mae"), theirs[1:])


@pytest.mark.parametrize("kind", SINCOS)
def test_a_fixed_table_is_computed_anew_for_another_grid(kind):
    position = SinCosPosition((4, 4), 32, kind)
    zeros, prefix = torch.zeros(2, 15, 32), torch.randn(2, 3, 32)
    patches, same = position(zeros, prefix, (3, 5))
    assert torch.equal(patches[1], sincos_table((3, 5), 32, kind))
    assert torch.equal(same, prefix)
    assert not position.state_dict(), "a fixed table belongs to no checkpoint"


def test_learned_rows_go_to_patches_and_to_the_first_prefix_tokens(randomised):
    position = randomised(LearnedPosition((2, 3), 8, prefix=1))
    patches, prefix = position(torch.zeros(2, 6, 8), torch.zeros(2, 5, 8), (2, 3))
    assert torch.equal(patches[1], position.table[1:])
    assert torch.equal(prefix[1, 0], position.table[0])
    assert not prefix[:, 1:].any(), "registers have no position"


def test_a_table_at_its_own_grid_is_left_alone():
    table = torch.randn(12, 8)
    assert torch.equal(resample_table(table, (3, 4), (3, 4)), table)
    assert not torch.equal(resample_table(table, (3, 4), (4, 3)), table)


def test_a_learned_table_serves_every_grid_from_8_to_30():
    flat = LearnedPosition((14, 14), 8, prefix=0)
    torch.nn.init.ones_(flat.table)
    for side in range(8, 31):
        for grid in [(side, side), (side, 38 - side)]:
            zeros = torch.zeros(1, grid[0] * grid[1], 8)
            patches, _ = flat(zeros, torch.zeros(1, 0, 8), grid)
            close(patches, zeros + 1)


def test_a_resampled_ramp_still_rises_along_the_same_axis():
    rows = torch.arange(6.0).repeat_interleave(4)[:, None]  # a table that tells the row
    finer = resample_table(rows, (6, 4), (12, 8)).view(12, 8)
    assert (finer.diff(dim=0) > 0).all()
    close(finer[:, :1].expand(12, 8), finer)


@pytest.mark.parametrize("grid", [(7, 7), (3, 5)])
def test_rotary_angles_are_timms_and_transformers(grid):
    sin, cos, _ = RotaryPosition(32)(grid)
    theirs = RotaryEmbeddingDinoV3(32).get_embed(list(grid))
    close(torch.cat([sin, cos], -1), theirs)

    config = DINOv3ViTConfig(hidden_size=64, num_attention_heads=2, patch_size=16)
    image = torch.zeros(1, 3, grid[0] * 16, grid[1] * 16)
    cos_theirs, sin_theirs = DINOv3ViTRopePositionEmbedding(config).eval()(image)
    close(cos, cos_theirs)
    close(sin, sin_theirs)


def test_rotation_is_that_of_transformers_and_spares_the_prefix():
    q, k = torch.randn(2, 3, 4 + 15, 32), torch.randn(2, 3, 4 + 15, 32)
    rotation = RotaryPosition(32)((3, 5))
    q_theirs, k_theirs = apply_rotary_pos_emb(q, k, rotation.cos, rotation.sin)
    close(rotate(q, rotation), q_theirs)
    close(rotate(k, rotation), k_theirs)
    assert torch.equal(rotate(q, rotation)[:, :, :4], q[:, :, :4])


TIMMS = {
    "eva": {"temperature": 10_000.0},
    "pe": {"temperature": 10_000.0, "grid_offset": 1.0, "grid_indexing": "xy"},
    "axial": {"temperature": 100.0, "grid_indexing": "xy"},
}


@pytest.mark.parametrize("reference", [None, (16, 16), (2, 9)], ids=str)
@pytest.mark.parametrize("grid", [(7, 7), (3, 5)])
@pytest.mark.parametrize("rope", TIMMS)
def test_rotation_is_that_of_timm(rope, grid, reference):
    theirs = RotaryEmbeddingCat(32, in_pixels=False, ref_feat_shape=reference, **TIMMS[rope])
    x, embedded = torch.randn(2, 3, 4 + grid[0] * grid[1], 32), theirs.get_embed(list(grid))
    rotation = RotaryPosition(32, rope, reference)(grid)
    close(torch.cat(rotation[:2], -1), embedded)
    turned = rotate(x, rotation)
    close(turned[:, :, 4:], apply_rot_embed_cat(x[:, :, 4:], embedded))
    assert torch.equal(turned[:, :, :4], x[:, :, :4])


def test_every_rope_has_a_test_and_no_two_agree():
    assert ROPES.keys() == {"dinov3", *TIMMS} == set(get_args(Rope))
    angles = [RotaryPosition(32, rope).angles((4, 6)) for rope in ROPES]
    for i, one in enumerate(angles):
        for other in angles[:i]:
            assert (one.sin() - other.sin()).abs().max() > 0.1


@pytest.mark.parametrize("reference", [None, (16, 16)], ids=str)
@pytest.mark.parametrize("rope", ROPES)
def test_a_coarse_cell_lies_amid_the_patches_below_it(rope, reference):
    rotary = RotaryPosition(32, rope, reference)
    fine, coarse = rotary.angles((4, 6)), rotary.angles((2, 3), 2.0)
    close(coarse, fine.view(2, 2, 3, 2, 32).mean((1, 3)).view(6, 32))


def test_a_finer_grid_samples_the_plane_of_the_reference():
    """EVA-02 at 448 pixels: its cells lie from 0 to 16, as they do at 224."""
    places = RotaryPosition(8, "eva", (16, 16)).angles((32, 32)).view(32, 32, 8)
    close(places[:, 0, 0], torch.arange(32) / 2)  # the first period is 1
    assert RotaryPosition(8, "eva").angles((32, 32)).max() == 31


def test_tokens_at_some_places_are_turned_as_there():
    rotation = RotaryPosition(32, "pe")((3, 5))
    places = torch.tensor([[0, 7], [14, 3]])
    x = torch.randn(2, 3, 15, 32)
    some = torch.stack([x[i, :, places[i]] for i in range(2)])
    whole = rotate(x, rotation)
    close(rotate(some, rotation.at(places)), torch.stack([whole[i, :, places[i]] for i in (0, 1)]))


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_attention_depends_on_offsets_only(rope):
    grid = (4, 6)
    same = torch.randn(2, 32)  # one query and one key, at every place
    q, k = same[:, None, None, None].expand(2, 1, 1, 24, 32)
    rotation = RotaryPosition(32, rope)(grid)
    logits = (rotate(q, rotation) @ rotate(k, rotation).mT).view(*grid, *grid)
    close(logits[1:, 2:, 1:, 2:], logits[:-1, :-2, :-1, :-2])
    assert logits.std() > 0.1


def test_a_peg_is_its_depthwise_convolution_by_hand_plus_the_input(randomised):
    peg = randomised(Peg(4))
    x = torch.randn(1, 6, 4)  # a grid of 2 x 3
    weight, bias = peg.conv.weight.detach(), peg.conv.bias.detach()
    expected = x.clone()
    for row in range(2):
        for column in range(3):
            expected[0, row * 3 + column] += bias
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    r, c = row + dy, column + dx
                    if 0 <= r < 2 and 0 <= c < 3:
                        near = x[0, r * 3 + c] * weight[:, 0, dy + 1, dx + 1]
                        expected[0, row * 3 + column] += near
    close(peg(x, (2, 3)), expected)
