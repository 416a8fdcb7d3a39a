"""Merging against the paper's algorithm, written as loops over one image's tokens."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from close import close
from vitrail.errors import UsageError
from vitrail.models import ViT, ViTConfig, model_config
from vitrail.models.tokens import tokens_from, with_tokens
from vitrail.nn import Block, Encoder, encode_merging, mean_of
from vitrail.nn.attention import attend

TINY = {"depth": 3, "width": 32, "heads": 4, "mlp": 64}


def reference(encoder, tokens, prefix, r):
    """One image `[t d]`: its tokens at the end, and for each the set of patches that it stands for.

    Lists of (token, patches): merged by the definition, a weighted mean of all that is in a token.
    """
    group = [(x, []) for x in tokens[:prefix]] + [(x, [i]) for i, x in enumerate(tokens[prefix:])]
    for block in encoder.blocks:
        x = torch.stack([token for token, _ in group])
        size = torch.tensor([float(max(len(patches), 1)) for _, patches in group])
        heads = block.attn.heads
        q, k, v = block.attn.qkv(block.norm1(x)).chunk(3, dim=-1)
        q, k, v = (y.unflatten(1, (heads, -1)).transpose(0, 1) for y in (q, k, v))
        if block.attn.q_norm is not None:
            q, k = block.attn.q_norm(q), block.attn.k_norm(k)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).exp() * size
        found = (weights / weights.sum(dim=-1, keepdim=True)) @ v
        x = x + block.scale1(block.attn.proj(found.transpose(0, 1).flatten(1)))
        group = [(token, patches) for token, (_, patches) in zip(x, group, strict=True)]
        group = merged(group, k.mean(dim=0), prefix, min(r, (len(group) - prefix) // 2))
        group = [
            (token + block.scale2(block.mlp(block.norm2(token))), patches)
            for token, patches in group
        ]
    return [(encoder.norm(token), patches) for token, patches in group]


def merged(group, keys, prefix, r):
    places = range(prefix, len(group))
    sources = [i for i in places if i % 2 == 0]
    others = [i for i in places if i % 2 == 1]
    best = {
        i: max((F.cosine_similarity(keys[i], keys[j], dim=0).item(), j) for j in others)
        for i in sources
        if others
    }
    gone = sorted(best, key=lambda i: best[i][0], reverse=True)[:r]
    result = group[:prefix] + [group[i] for i in sources if i not in gone]
    for j in others:
        joined = [j, *(i for i in gone if best[i][1] == j)]
        patches = [p for i in joined for p in group[i][1]]
        total = sum(len(group[i][1]) * group[i][0] for i in joined)
        result.append((total / len(patches), patches))
    return result


def encoder_of(randomised, depth=3, **changes):
    return randomised(Encoder([Block(32, 4, 64, **changes) for _ in range(depth)], 32, 1e-6))


@pytest.mark.parametrize(
    "prefix, patches, r, changes",
    [
        (1, 16, 3, {}),
        (1, 17, 5, {"layer_scale": 0.5}),
        (0, 16, 3, {"qk_norm": True}),
        (0, 15, 7, {}),
        (2, 16, 3, {}),
        (5, 13, 6, {}),
        (1, 20, 10, {}),  # then the cap: 10, 5, 3 left
        (0, 1, 1, {}),
    ],
)
@pytest.mark.parametrize("exporting", [False, True])
@torch.inference_mode()
def test_equals_the_algorithm_one_image_at_a_time(
    prefix, patches, r, changes, exporting, randomised, monkeypatch
):
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: exporting)
    encoder = encoder_of(randomised, **changes)
    x = torch.randn(3, prefix + patches, 32)
    tokens, sizes, home = encode_merging(encoder, x, prefix, r)
    for i in range(3):
        expected = reference(encoder, x[i], prefix, r)
        close(tokens[i], torch.stack([t for t, _ in expected]))
        assert sizes[i].tolist() == [max(len(members), 1) for _, members in expected]
        for place, (_, members) in enumerate(expected):
            assert [p for p in range(patches) if home[i, p] == place] == sorted(members)


@pytest.mark.parametrize("r, left", [(0, 197), (8, 101), (13, 41), (16, 11), (98, 2)])
def test_as_many_tokens_are_left_of_197_as_published(r, left, randomised):
    encoder = encoder_of(randomised, depth=12)
    with torch.inference_mode():
        tokens, sizes, _ = encode_merging(encoder, torch.randn(1, 197, 32), 1, r)
    assert tokens.shape == (1, left, 32)
    assert sizes.sum() == 197


def test_a_decreasing_schedule_merges_first_what_it_merges(randomised):
    """The authors' `r=(16, -1)`: 32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0 of 197 tokens."""
    config = ViTConfig(**TINY | {"depth": 12}, image_size=(112, 112), patch=(8, 8), merge=16)
    config = replace(config, merge_schedule="decreasing")
    falling = randomised(ViT(config))
    lengths = []
    for block in falling.encoder.blocks:
        block.mlp.register_forward_pre_hook(lambda _, x: lengths.append(x[0].shape[1]))
    with torch.inference_mode():
        falling(torch.zeros(1, 3, 112, 112))
    assert lengths == [165, 136, 110, 87, 67, 50, 36, 25, 17, 12, 10, 10]


@pytest.mark.parametrize("r", [3, 8])
@torch.inference_mode()
def test_merging_equal_tokens_changes_nothing(r, randomised):
    """What proportional attention is for: a token that stands for two acts as the two did."""
    encoder = encoder_of(randomised, depth=2)
    pairs = torch.randn(2, 8, 32).repeat_interleave(2, dim=1)
    x = torch.cat([torch.randn(2, 1, 32), pairs], dim=1)
    tokens, sizes, _ = encode_merging(encoder, x, 1, r)
    assert sizes.max() >= 2
    # What the second block merges, which are no pairs, comes after the class token has looked.
    close(tokens[:, :1], encoder(x, (4, 4))[:, :1])


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_a_key_that_counts_three_times_is_three_keys(dtype, tol):
    q, k, v = torch.randn(3, 2, 4, 7, 16)
    times = torch.tensor([[1, 3, 1, 2, 1, 1, 5], [1, 1, 1, 1, 1, 1, 1]])
    found = attend(q.to(dtype), k.to(dtype), v.to(dtype), times.float())
    assert found.dtype == dtype
    for i in range(2):
        every = torch.arange(7).repeat_interleave(times[i])
        expected = F.scaled_dot_product_attention(q[i], k[i][:, every], v[i][:, every])
        close(found[i].float(), expected, tol)


def test_a_mean_may_count_tokens_or_weigh_them():
    x = torch.tensor([[[1.0], [2.0], [6.0]]])
    assert mean_of(x).item() == 3
    assert mean_of(x, torch.tensor([[True, False, True]])).item() == 3.5
    assert mean_of(x, torch.tensor([[4.0, 1.0, 1.0]])).item() == 2


# Rows of every kind of ViT, smaller.
KINDS = {
    "deit_s16": {},
    "deit_s16_distilled": {},
    "deit3_s16": {"layer_scale": 0.5},
    "dinov2_s14_reg": {"patch": (16, 16), "layer_scale": 0.5},
    "clip_b16": {},
    "siglip_b16": {},
    "vit_mini16": {},
}


@pytest.mark.parametrize("name", KINDS)
@torch.inference_mode()
def test_any_vit_with_merging_is_the_algorithm_and_what_it_reads_out(name, randomised):
    changes = {**TINY, "image_size": (64, 96), "classes": 7, **KINDS[name]}
    config = model_config(name, **changes, merge=4)
    model = randomised(ViT(config))
    x = torch.randn(2, 3, 64, 96)
    features = model.features(x)
    assert features.grid == (4, 6)
    assert features.maps[0].shape == (2, 32, 4, 6)
    tokens = model.embed(x)[0]
    k = features.prefix.shape[1]
    for i in range(2):
        expected = reference(model.encoder, tokens[i], k, 4)
        assert len(expected) == k + 24 - 3 * 4
        for place, (token, members) in enumerate(expected):
            if place < k:
                close(features.prefix[i, place], token)
            for patch in members:
                close(features.patches[i, patch], token)
    # The vector is what the pooling makes of the patches, as if none of them had been merged.
    pooled = model.vector(features.prefix, features.patches)
    close(features.pooled, pooled)
    assert model(x).shape == (2, 7)
    close(model(x)[:1], model(x[:1]))


def test_weights_know_nothing_of_merging(randomised):
    plain = randomised(ViT(ViTConfig(**TINY, image_size=(64, 64))))
    merging = ViT(ViTConfig(**TINY, image_size=(64, 64), merge=5)).eval()
    merging.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 96)
    assert (merging(x) - plain(x)).abs().max() > 1e-3


@pytest.mark.parametrize("training", [False, True])
def test_merges_in_bfloat16_and_learns(training, randomised):
    model = randomised(ViT(ViTConfig(**TINY, image_size=(64, 64), merge=5))).train(training)
    x = torch.randn(2, 3, 64, 64).transpose(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    close(out.float(), model(x), 0.1)
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"merge": 99},
            r"merge=99: of the 196 patch tokens .* 0 to 98 can be merged .* usually 13",
        ),
        ({"merge": -1}, "0 to 98 can be merged"),
        ({"merge": 13, "position": "rope"}, "position='rope' .* use merge=0"),
        ({"merge": 13, "position": "peg"}, "position='peg'"),
    ],
)
def test_what_cannot_be_merged_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        ViTConfig(**changes)


def test_images_of_different_sizes_are_refused():
    model = ViT(ViTConfig(**TINY, image_size=(64, 64), merge=5))
    extent = torch.tensor([[4, 4], [2, 4]])
    with pytest.raises(UsageError, match=r"merge=0, or resize crop or squash"):
        model(torch.zeros(2, 3, 64, 64), extent)


def test_a_user_says_it_in_a_word():
    assert tokens_from("tome:r=13") == {"merge": 13, "merge_schedule": "constant"}
    assert tokens_from("none") == {"merge": 0, "merge_schedule": "constant"}
    falling = with_tokens(ViTConfig(), "tome-decreasing:r=13")
    assert (falling.merge, falling.merge_schedule) == (13, "decreasing")
    assert with_tokens(falling, "tome:r=8").merge_schedule == "constant"
    assert tokens_from("dynamicvit:keep=0.5") == {"keep": 0.5}
    assert with_tokens(ViTConfig(), "tome:r=16").merge == 16


@pytest.mark.parametrize(
    "text, message",
    [
        ("tom:r=13", "unknown method to have fewer tokens 'tom': did you mean 'tome'"),
        ("tome", "write it as tome:r=13"),
        ("tome:k=13", "write it as tome:r=13"),
        ("tome:r=-1", "r is a whole number from 0, as in tome:r=13"),
        ("tome:r=1.5", "r is a whole number from 0"),
        ("tome:r=", "r is a whole number from 0"),
        ("dynamicvit:keep=0", r"keep is a number in \(0, 1\]"),
        ("dynamicvit:keep=1.1", r"keep is a number in \(0, 1\]"),
        ("dynamicvit:keep=nan", r"keep is a number in \(0, 1\]"),
        ("tome:r=99", "0 to 98 can be merged"),
        ("tome-decreasing:r=50", "0 to 49 can be merged"),
        ("dynamicvit:keep=0.5", "is for DynamicViTs, and this model is of the family 'vit'"),
    ],
)
def test_what_a_user_says_wrong_is_answered_with_what_is_right(text, message):
    with pytest.raises(UsageError, match=message):
        with_tokens(ViTConfig(), text)
