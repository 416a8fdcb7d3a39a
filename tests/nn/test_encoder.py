import pytest
import torch

from close import close
from vitrail.nn import Block, DropPath, Encoder, LayerScale, drop_path_rates


def test_layer_scale_is_one_factor_a_channel():
    scale = LayerScale(3, 1e-5)
    assert scale.gamma.tolist() == pytest.approx([1e-5] * 3)
    with torch.no_grad():
        scale.gamma.copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(scale(torch.ones(2, 4, 3)), torch.tensor([1.0, 2.0, 3.0]).expand(2, 4, 3))


def test_a_block_whose_branches_are_scaled_by_zero_changes_nothing(randomised):
    block = randomised(Block(32, 4, 64, layer_scale=1.0))
    torch.nn.init.zeros_(block.scale1.gamma)
    torch.nn.init.zeros_(block.scale2.gamma)
    x = torch.randn(2, 5, 32)
    assert torch.equal(block(x), x)


def test_drop_path_leaves_out_whole_samples_and_scales_up_the_others():
    x = torch.randn(64, 3, 5)
    out = DropPath(0.25).train()(x)
    kept = [bool(sample.any()) for sample in out]
    assert 0 < sum(kept) < 64
    for sample, original, stays in zip(out, x, kept, strict=True):
        close(sample, original / 0.75 if stays else torch.zeros(3, 5))


def test_drop_path_keeps_the_mean():
    out = DropPath(0.25).train()(torch.ones(40_000, 1, 1))
    assert out.mean().item() == pytest.approx(1, abs=0.01)  # standard error 0.003


def test_drop_path_does_nothing_in_evaluation_or_at_rate_0():
    x = torch.randn(8, 3, 5)
    assert torch.equal(DropPath(0.9).eval()(x), x)
    assert torch.equal(DropPath(0.0).train()(x), x)


def test_the_rate_grows_linearly_with_depth():
    assert drop_path_rates(0.3, 4) == pytest.approx([0, 0.1, 0.2, 0.3])
    assert drop_path_rates(0.3, 1) == [0]


def test_the_encoder_is_its_blocks_in_turn_then_the_norm(randomised):
    encoder = randomised(Encoder([Block(32, 4, 64), Block(32, 4, 64)], 32, 1e-6))
    x = torch.randn(2, 7, 32)
    expected = encoder.norm(encoder.blocks[1](encoder.blocks[0](x)))
    assert torch.equal(encoder(x, (2, 3)), expected)


def test_a_peg_acts_once_after_the_first_block_and_on_patches_only(randomised):
    encoder = randomised(Encoder([Block(32, 4, 64), Block(32, 4, 64)], 32, 1e-6, peg=True))
    x = torch.randn(2, 7, 32)  # one prefix token, then 2 x 3 patches
    y = encoder.blocks[0](x)
    y = torch.cat([y[:, :1], encoder.peg(y[:, 1:], (2, 3))], dim=1)
    assert torch.equal(encoder(x, (2, 3)), encoder.norm(encoder.blocks[1](y)))
