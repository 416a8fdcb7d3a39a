"""Twins: published counts, timm's outputs, and no trace of the padding that other sizes need."""

from dataclasses import fields, replace
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from vitrail.errors import UsageError
from vitrail.models.twins import ROWS, LocalAttention, SummaryAttention, Twins, TwinsConfig
from vitrail.nn import Attention
from vitrail.weights.twins import TWINS

COUNTS = {  # of the authors' logs
    "twins_svt_s": 24_060_776,
    "twins_svt_b": 56_070_952,
    "twins_svt_l": 99_271_400,
    "twins_pcpvt_s": 24_106_216,
    "twins_pcpvt_b": 43_828_456,
    "twins_pcpvt_l": 60_989_672,
}
TINY = TwinsConfig(
    depths=(3, 2),
    widths=(16, 24),
    heads=(2, 3),
    mlp=(32, 40),
    reductions=(3, 2),
    window=4,
    image_size=(50, 75),
    classes=5,
)
close = partial(torch.testing.assert_close, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ROWS)
def test_as_many_parameters_as_published(name):
    assert list(ROWS) == list(COUNTS)
    with torch.device("meta"):
        assert sum(p.numel() for p in Twins(ROWS[name]).parameters()) == COUNTS[name]


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
    """Ours with their weights, by the names of our layout."""
    state = theirs.state_dict()
    ours = Twins(config).eval()
    names = {key: TWINS.theirs(key) for key in ours.state_dict()}
    assert sorted(names.values()) == sorted(state)
    ours.load_state_dict({key: state[name] for key, name in names.items()})
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
            other = theirs[TWINS.theirs(f"{name}.weight").removesuffix(".weight")]
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
    model = randomised(Twins(TINY))
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
    model = randomised(Twins(replace(TINY, image_size=(64, 96))))
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
    model = randomised(Twins(TINY))
    x = torch.randn(2, 3, 50, 75)
    close(model(x), model(F.pad(x, (0, 1, 0, 2))))
    assert (model(x) - model(F.pad(x, (0, 5, 0, 2)))).abs().max() > 1e-3, "cells of nothing"


def test_each_image_gets_what_it_would_get_alone(randomised):
    model = randomised(Twins(TINY))
    x = torch.randn(3, 3, 45, 70)
    together = model(x)
    for i in range(3):
        close(model(x[i : i + 1]), together[i : i + 1])


# --- the contract of a family ---


def test_features(randomised):
    model = randomised(Twins(TINY))
    x = torch.randn(3, 3, 50, 75)
    features = model.features(x)
    assert features.grid == TINY.grid == (7, 10)
    assert features.strides == ((4, 4), (8, 8))
    assert TINY.stride == (8, 8)
    assert [m.shape for m in features.maps] == [(3, 16, 13, 19), (3, 24, 7, 10)]
    assert features.prefix.shape == (3, 0, 24)
    assert torch.equal(features.patches[1, 11], features.maps[-1][1, :, 1, 1]), "row by row"
    close(features.pooled, features.patches.mean(1))
    assert model.logits(features).shape == (3, 1, 5)
    assert torch.equal(model(x), model.logits(features)[:, 0])
    bare = Twins(replace(TINY, classes=0)).eval()
    assert bare.head is None
    bare.load_state_dict({k: t for k, t in model.state_dict().items() if "head" not in k})
    assert torch.equal(bare(x), features.pooled)
    strided = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    close(model(strided), model(x))


@pytest.mark.parametrize("size", [(224, 224), (225, 224), (31, 65), (1, 1)], ids=str)
def test_the_grid_is_known_beforehand(size):
    config = replace(FOUR, image_size=size)
    assert config.stride == (32, 32)
    assert Twins(config).features(torch.zeros(1, 3, *size)).grid == config.grid


def test_shape():
    assert ROWS["twins_svt_s"].shape == (
        "4 stages of 2, 2, 10, 4 blocks, widths 64, 128, 256, 512, windows of 7x7"
    )
    assert ROWS["twins_pcpvt_s"].shape.endswith("no windows")


def test_blocks_are_named_first_to_last():
    model = Twins(TINY)
    assert model.block_names() == [
        f"stages.{i}.blocks.{j}" for i, j in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))
    ]
    order = [name for name, _ in model.named_modules() if name in model.block_names()]
    assert order == model.block_names()
    kinds = [type(model.get_submodule(name).attn) for name in order]
    assert kinds == [LocalAttention, SummaryAttention, LocalAttention, *kinds[:2]]


@pytest.mark.parametrize("size", [(1, 1), (32, 32), (50, 31)], ids=str)
def test_it_trains_on_one_image_of_any_size_in_bfloat16(size):
    model = Twins(TINY).train()
    x = torch.randn(1, *size[::-1], 3).permute(0, 3, 2, 1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(x).float(), torch.tensor([1]))
    loss.backward()
    assert model.head.weight.grad.abs().sum() > 0
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("size", [(64, 96), (50, 75)], ids=str)
def test_inference_in_bfloat16_is_near(size, randomised):
    model = randomised(Twins(TINY))
    x = torch.randn(2, 3, *size)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        low = model(x).float()
    torch.testing.assert_close(low, model(x), atol=0.1, rtol=0)


def test_a_new_model_says_nothing_and_can_learn():
    model = Twins(TINY).train()
    x = torch.randn(4, 3, 40, 56)
    assert model(x).abs().max() == 0, "a head of zeros"
    step = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(model(x), torch.arange(4))
        step.zero_grad()
        loss.backward()
        step.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_kernels_start_as_the_authors_do():
    model = Twins(ROWS["twins_svt_s"])
    peg = model.stages[2].peg.conv.weight
    assert peg.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.1), "depth-wise"
    assert model.stem.proj.weight.std().item() == pytest.approx((2 / 16 / 64) ** 0.5, rel=0.1)
    assert model.stages[3].blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)


CHANGES = {
    "depths": (3, 1),
    "widths": (16, 48),
    "heads": (1, 3),
    "mlp": (32, 48),
    "reductions": (2, 2),
    "window": 3,
    "image_size": (50, 76),
    "channels": 1,
    "classes": 6,
    "norm_eps": 0.5,
    "dropout": 0.5,
    "drop_path": 0.5,
}


def test_every_field_is_tried():
    assert {field.name for field in fields(TwinsConfig)} == {"family", *CHANGES}


@pytest.mark.parametrize("field", [f for f in CHANGES if f != "image_size"])
def test_every_field_has_an_effect(field, randomised):
    def outputs(config: TwinsConfig) -> list[torch.Tensor]:
        model = Twins(config)
        model.load_state_dict(state)
        torch.manual_seed(1)
        return [model.train()(x), model.eval()(x)]

    before, after = Twins(TINY), Twins(replace(TINY, **{field: CHANGES[field]}))
    shapes = [{k: t.shape for k, t in m.state_dict().items()} for m in (before, after)]
    if shapes[0] == shapes[1]:
        state, x = randomised(before).state_dict(), torch.randn(4, 3, 50, 75)
        pairs = zip(outputs(TINY), outputs(after.config), strict=True)
        assert max((a - b).abs().max() for a, b in pairs) > 1e-4


def test_stochastic_depth_grows_and_acts_in_training_alone(randomised):
    model = randomised(Twins(replace(TINY, drop_path=0.8)))
    rates = [model.get_submodule(f"{name}.drop_path").rate for name in model.block_names()]
    assert rates == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8])
    plain = Twins(TINY).eval()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(8, 3, 32, 48)
    assert torch.equal(model(x), plain(x))


def test_what_it_does_not_take_is_refused():
    model = Twins(TINY)
    with pytest.raises(UsageError, match="have 1 channels, the model takes 3: build it with chan"):
        model(torch.zeros(1, 1, 32, 48))
    with pytest.raises(UsageError, match="twins takes resize crop or squash"):
        model(torch.zeros(1, 3, 32, 48), torch.tensor([[1, 1]]))
    with pytest.raises(UsageError, match="at least 1x1 pixels, not 0x32"):
        TINY.check_size((0, 32))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"family": "vit"}, "of the family"),
        ({"depths": (1, 0)}, r"depths has a number from 1 for each stage, not \(1, 0\)"),
        ({"reductions": ()}, "reductions has a number from 1"),
        ({"heads": (1, 2, 3)}, "are of the same stages: give as many of each"),
        ({"heads": (3, 3)}, "width 16 is not divisible by 3 heads"),
        ({"window": -1}, "or 0 for no windows, not -1"),
        ({"channels": 0}, "channels must be at least 1"),
        ({"classes": -1}, "classes cannot be negative"),
        ({"norm_eps": 0.0}, "norm_eps must be in"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\)"),
        ({"image_size": (32,)}, "image_size is a pair"),
    ],
    ids=str,
)
def test_a_config_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        replace(TINY, **changes)
