"""Twins: timm's outputs, and no trace of the padding that other sizes need."""

from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from close import close
from models.families import TWINS
from vitrail.models.twins import ROWS, LocalAttention, SummaryAttention, Twins, TwinsConfig
from vitrail.nn import Attention
from vitrail.weights.twins import TWINS as LAYOUT

# --- timm's outputs, where all is divisible ---


def theirs_of(config: TwinsConfig) -> nn.Module:
    return timm.models.Twins(
        img_size=config.image_size,
        in_chans=config.channels,
        num_classes=config.classes,
        embed_dims=config.widths,
        num_heads=config.heads,
        mlp_ratios=[m / w for m, w in zip(config.mlp, config.widths, strict=True)],
        depths=config.depths,
        sr_ratios=config.reductions,
        wss=[config.window] * len(config.depths) if config.window else None,
        norm_layer=partial(nn.LayerNorm, eps=config.norm_eps),
    )


FOUR = TwinsConfig(
    depths=(2, 1, 3, 2),
    widths=(16, 24, 32, 64),
    heads=(1, 2, 4, 4),
    mlp=(32, 48, 128, 64),
    image_size=(224, 448),
    classes=7,
)
CASES = {
    "svt": FOUR,
    "svt, one channel, a large epsilon": replace(FOUR, channels=1, norm_eps=0.1),
    "svt, other windows": replace(FOUR, window=2, image_size=(64, 192)),
    "pcpvt": replace(FOUR, window=0, image_size=(64, 96)),
    "pcpvt, no head": replace(FOUR, window=0, image_size=(128, 64), classes=0),
}


def ours_with(theirs: nn.Module, config: TwinsConfig) -> Twins:
    ours = Twins(config).eval()
    ours.load_state_dict(LAYOUT.read(theirs.state_dict(), config))
    return ours


@pytest.mark.parametrize("case", CASES)
def test_logits_with_timms_weights(case, randomised):
    config = CASES[case]
    theirs = randomised(theirs_of(config))
    ours = ours_with(theirs, config)
    x = torch.randn(3, config.channels, *config.image_size)
    with torch.inference_mode():
        expected = theirs(x)
        assert 0.2 < expected.std() < 3, "of order 1"
        assert (expected - expected.mean(0)).std() > 5e-3, "images tell"
        close(ours(x), expected)
        close(ours(x[:1]), theirs(x[:1]))


@pytest.mark.parametrize(
    "name, timm_name", [("twins_svt_s", "twins_svt_small"), ("twins_pcpvt_s", "twins_pcpvt_small")]
)
def test_logits_of_a_whole_row(name, timm_name, randomised):
    theirs = randomised(timm.create_model(timm_name))
    ours = ours_with(theirs, ROWS[name])
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        expected = theirs(x)
        scale = expected.std().clamp(min=1)
        close(ours(x) / scale, expected / scale)


def test_the_maps_are_timms(randomised):
    config = replace(FOUR, window=2, image_size=(64, 128), reductions=(4, 2, 1, 1))
    theirs = randomised(theirs_of(config))
    x = torch.randn(2, 3, 64, 128)
    with torch.inference_mode():
        _, maps = theirs.forward_intermediates(x, norm=True)
        features = ours_with(theirs, config).features(x)
    for map_, expected in zip(features.maps, maps, strict=True):
        close(map_, expected)


def test_every_norm_has_timms_epsilon():
    theirs = dict(theirs_of(replace(FOUR, norm_eps=1e-6)).named_modules())
    seen = set()
    for name, module in Twins(FOUR).named_modules():
        if isinstance(module, nn.LayerNorm):
            other = theirs[LAYOUT.theirs(f"{name}.weight").removesuffix(".weight")]
            assert module.eps == other.eps, name
            seen.add(module.eps)
    assert seen == {1e-6, 1e-5}


# --- any size ---


def test_a_window_over_the_border_is_a_smaller_window(randomised):
    """Attention in it is attention among its real cells alone."""
    layer = randomised(LocalAttention(24, heads=3, window=4, dropout=0.0))
    grid = (5, 10)  # windows of 4x4 and 1x4, 4x2 and 1x2
    x = torch.randn(3, *grid, 24)
    ours = layer(x.flatten(1, 2), grid).view(3, *grid, 24)
    for rows in (slice(0, 4), slice(4, 5)):
        for columns in (slice(0, 4), slice(4, 8), slice(8, 10)):
            alone = x[:, rows, columns]
            expected = layer.attention(alone.flatten(1, 2)).view(alone.shape)
            close(ours[:, rows, columns], expected)


def test_a_window_larger_than_the_map_is_the_map(randomised):
    layer = randomised(LocalAttention(24, heads=3, window=7, dropout=0.0))
    x = torch.randn(2, 6, 24)
    close(layer(x, (2, 3)), layer.attention(x))


def test_a_summary_at_the_border_is_of_its_real_cells(randomised):
    """The part of the kernel that lies over them, and nothing for the rest."""
    layer = randomised(SummaryAttention(16, heads=2, reduction=3, dropout=0.0))
    x = torch.randn(2, 16, 4, 5)
    tokens = []
    for rows in (slice(0, 3), slice(3, 4)):
        for columns in (slice(0, 3), slice(3, 5)):
            cells = x[:, :, rows, columns]
            kernel = layer.reduce.proj.weight[:, :, : cells.shape[2], : cells.shape[3]]
            token = torch.einsum("bcij,ocij->bo", cells, kernel) + layer.reduce.proj.bias
            tokens.append(layer.reduce.norm(token))
    k, v = layer.kv(torch.stack(tokens, dim=1)).chunk(2, dim=-1)
    q = layer.q(x.flatten(2).transpose(1, 2))
    q, k, v = (t.unflatten(2, (2, 8)).transpose(1, 2) for t in (q, k, v))
    expected = (q @ k.mT / 8**0.5).softmax(dim=-1) @ v
    expected = layer.proj(expected.transpose(1, 2).flatten(2))
    close(layer(x.flatten(2).transpose(1, 2), (4, 5)), expected)


@pytest.mark.parametrize("size", [(50, 75), (64, 41), (7, 100)], ids=str)
def test_what_is_in_the_padding_changes_nothing(size, randomised):
    model = randomised(Twins(TWINS))
    x = torch.randn(3, 3, *size)
    with torch.inference_mode():
        expected = model(x)
        changed = 0

        def spoil(module, args, kwargs):
            nonlocal changed
            windows, keys = args[0].clone(), kwargs["keys"]
            windows[~keys] = 1e4 * torch.randn(int((~keys).sum()), windows.shape[2])
            changed += int((~keys).sum())
            return (windows,), kwargs

        for module in model.modules():
            if isinstance(module, Attention):
                module.register_forward_pre_hook(spoil, with_kwargs=True)
        close(model(x), expected)
        assert changed > 0


def test_whole_windows_have_no_mask(randomised):
    model = randomised(Twins(replace(TWINS, image_size=(64, 96))))
    seen = []
    for module in model.modules():
        if isinstance(module, Attention):
            module.register_forward_pre_hook(
                lambda module, args, kwargs: seen.append(kwargs["keys"]), with_kwargs=True
            )
    model(torch.randn(1, 3, 64, 96))
    assert seen == [None] * 3


def test_half_a_patch_is_filled_with_zeros(randomised):
    """As if the image had them to its right and below, up to a whole patch and no further."""
    model = randomised(Twins(TWINS))
    x = torch.randn(2, 3, 50, 75)
    close(model(x), model(F.pad(x, (0, 1, 0, 2))))
    assert (model(x) - model(F.pad(x, (0, 5, 0, 2)))).abs().max() > 1e-3, "cells of nothing"


def test_each_image_gets_what_it_would_get_alone(randomised):
    model = randomised(Twins(TWINS))
    x = torch.randn(3, 3, 45, 70)
    together = model(x)
    for i in range(3):
        close(model(x[i : i + 1]), together[i : i + 1])


def test_the_two_attentions_take_turns():
    model = Twins(TWINS)
    kinds = [type(model.get_submodule(name).attn) for name in model.block_names()]
    assert kinds == [LocalAttention, SummaryAttention, LocalAttention, *kinds[:2]]


def test_kernels_start_as_the_authors_do():
    model = Twins(ROWS["twins_svt_s"])
    peg = model.stages[2].peg.conv.weight
    assert peg.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.1), "depth-wise"
    assert model.stem.proj.weight.std().item() == pytest.approx((2 / 16 / 64) ** 0.5, rel=0.1)
    assert model.stages[3].blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
