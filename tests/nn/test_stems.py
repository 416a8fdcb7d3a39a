"""The stems beside the linear one: against timm's parts, and what each token sees."""

from functools import partial

import pytest
import torch
from timm.models.convnext import ConvNeXt
from timm.models.pvt_v2 import OverlapPatchEmbed
from torch import nn

from close import close
from vitrail.errors import UsageError
from vitrail.models import ViT, build, model_config
from vitrail.nn import ConvStem, PatchEmbed, PatchifyStem
from vitrail.nn.conv import BatchNorm
from vitrail.nn.patch import ChannelNorm

OverlapEmbed = partial(PatchEmbed, overlap=True)
STEMS = {"overlap": OverlapEmbed, "patchify": PatchifyStem}


def convnext_parts(side: int, channels: int, width: int) -> nn.Sequential:
    """ConvNeXt's stem and its downsampling, of timm, without the blocks in between."""
    steps = {4: 0, 8: 1, 16: 2, 32: 3}[side]
    dims = tuple(width * 2**i // 2**steps for i in range(4))
    model = ConvNeXt(in_chans=channels, depths=(1, 1, 1, 1), dims=dims, num_classes=0)
    return nn.Sequential(model.stem, *(stage.downsample for stage in model.stages[1 : steps + 1]))


@pytest.mark.parametrize("scale", [1.0, 1e-4], ids=["usual", "where the epsilon is what counts"])
@pytest.mark.parametrize("side", [4, 8, 16, 32])
def test_patchify_is_timms_convnext_stem_and_downsampling(side, scale, randomised):
    theirs = randomised(convnext_parts(side, 2, 32))
    ours = PatchifyStem(2, (side, side), 32).eval()
    # The same modules in the same order: two in the stem, two in each downsampling.
    for mine, other in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        mine.copy_(other)
    for b, size in ((1, (64, 64)), (3, (32, 96))):
        x = scale * torch.randn(b, 2, *size)
        if scale < 1:
            ours.patchify[0].bias.data.zero_()
            theirs[0][0].bias.data.zero_()
        tokens, grid = ours(x)
        with torch.no_grad():
            expected = theirs(x)
        assert grid == expected.shape[2:]
        close(tokens, expected.flatten(2).transpose(1, 2))


def test_a_channel_norm_is_over_the_channels_of_each_cell(randomised):
    norm = randomised(ChannelNorm(6, eps=1e-6))
    x = 3 + 2 * torch.randn(2, 6, 6, 9)  # as wide as it has channels: the wrong axis would pass
    mean, variance = x.mean(1, keepdim=True), x.var(1, correction=0, keepdim=True)
    normal = (x - mean) / (variance + 1e-6).sqrt()
    close(norm(x), normal * norm.weight[:, None, None] + norm.bias[:, None, None])


def test_patchify_doubles_its_channels_up_to_the_width():
    stem = build("vit_s16", stem="patchify", depth=1).stem
    seen = [(m.in_channels, m.out_channels) for m in stem.modules() if isinstance(m, nn.Conv2d)]
    assert seen == [(3, 96), (96, 192), (192, 384)]  # as in ConvNeXt-T


@pytest.mark.parametrize("side, kernel", [(4, 7), (2, 3)])  # PVTv2's first and later stages
def test_overlapping_patches_are_timms_pvt_v2_embedding(side, kernel, randomised):
    theirs = randomised(OverlapPatchEmbed(patch_size=kernel, stride=side, in_chans=3, embed_dim=24))
    ours = OverlapEmbed(3, (side, side), 24, norm_eps=theirs.norm.eps).eval()
    ours.load_state_dict(theirs.state_dict())
    for x in (torch.randn(1, 3, 32, 32), torch.randn(3, 3, 16, 40)):
        tokens, grid = ours(x)
        expected = theirs(x)  # [b h w c]
        assert grid == expected.shape[1:3]
        close(tokens, expected.flatten(1, 2))


@pytest.mark.parametrize("norm_eps", [None, 1e-6])
def test_the_norm_of_overlapping_patches_can_be_left_out(norm_eps):
    stem = OverlapEmbed(3, (4, 8), 24, norm_eps=norm_eps)
    assert isinstance(stem.norm, nn.Identity) == (norm_eps is None)
    assert stem.proj.kernel_size == (7, 15)


def seen_by_the_middle_token(stem: nn.Module, size: tuple[int, int]) -> torch.Tensor:
    """Where a pixel of the image changes the token in the middle of its 3 x 3."""
    x = torch.randn(1, 3, *size, requires_grad=True)
    tokens, grid = stem.eval()(x)
    assert grid == (3, 3)
    tokens[0, 4].square().sum().backward()
    return x.grad[0].abs().sum(0) > 0


def test_what_a_token_sees(randomised):
    own = torch.zeros(24, 24, dtype=torch.bool)
    own[8:16, 8:16] = True
    seen = partial(seen_by_the_middle_token, size=(24, 24))
    assert torch.equal(seen(randomised(PatchifyStem(3, (8, 8), 16))), own)
    above_and_left = torch.zeros_like(own)
    above_and_left[1:16, 1:16] = True
    assert torch.equal(seen(randomised(OverlapEmbed(3, (8, 8), 16))), above_and_left)


@pytest.mark.parametrize("stem", STEMS.values(), ids=STEMS)
def test_padding_adds_zeros_below_and_at_the_right(stem, randomised):
    padded = randomised(stem(3, (8, 8), 16, indivisible="pad"))
    x = torch.randn(2, 3, 17, 30)
    tokens, grid = padded(x)
    whole = torch.zeros(2, 3, 24, 32)
    whole[:, :, :17, :30] = x
    assert grid == (3, 4)
    assert torch.equal(tokens, padded(whole)[0])
    with pytest.raises(UsageError, match=r"17x30 .*8x8: use 16x24, or indivisible='pad'"):
        stem(3, (8, 8), 16)(x)


def test_the_convolutional_stem_is_that_of_moco_v3():
    """Four 3x3 convolutions of stride 2, d/8 channels doubling to d, batch norm, ReLU, then 1x1."""
    stem = build("vit_s16", stem="conv", depth=1).stem
    seen = [[type(part) for part in step] for step in stem.convs]
    assert seen == [[nn.Conv2d, BatchNorm, nn.ReLU]] * 4
    convolutions = [step[0] for step in stem.convs]
    assert [c.out_channels for c in convolutions] == [48, 96, 192, 384]
    assert {(c.kernel_size, c.stride, c.padding) for c in convolutions} == {
        ((3, 3), (2, 2), (1, 1))
    }
    assert stem.proj.weight.shape == (384, 384, 1, 1) and stem.proj.bias is not None


def parameters(name: str, **changes) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build(name, **changes).stem.parameters())


def test_the_stems_parameter_counts():
    # vit_ti16: width 192. patchify: 4x4 from 3 to 48, two norms of 48, 2x2 to 96, norm, 2x2 to 192.
    first = 48 * 3 * 16 + 48 + 2 * 48
    second, third = 2 * 48 + 96 * 48 * 4 + 96, 2 * 96 + 192 * 96 * 4 + 192
    assert parameters("vit_ti16", stem="patchify") == first + second + third
    assert parameters("vit_ti16", stem="overlap") == 192 * 3 * 31 * 31 + 192
    assert parameters("vit_ti16", stem="patchify", stem_bias=False) == first + second + third - 192
    assert parameters("vit_ti16", stem="patchify", stem_norm=True) == first + second + third + 384


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("b, size", [(1, (32, 48)), (3, (48, 32))])
def test_a_training_step_in_bfloat16(stem, b, size):
    model = build("vit_ti16", stem=stem, depth=1, width=48, mlp=64, image_size=(32, 32), classes=2)
    nn.init.normal_(model.head.weight)
    x = torch.randn(b, *size, 3).permute(0, 3, 1, 2)  # not contiguous
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(x).float().square().mean()
    loss.backward()
    for name, parameter in model.stem.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("name", ["vit_ti16", "vit_s32", "vit_b8"])
def test_every_row_of_such_patches_takes_them(stem, name):
    with torch.device("meta"):
        model = build(name, stem=stem, depth=1)
        features = model.features(torch.empty(2, 3, 64, 96))
    side = model.config.patch[0]
    assert isinstance(model, ViT)
    assert features.grid == (64 // side, 96 // side)


@pytest.mark.parametrize(
    "patch, width, message",
    [
        ((14, 14), 64, "must be square and 4, 8, 16, 32 or so, not 14x14"),
        ((8, 16), 64, "square"),
        ((2, 2), 64, "not 2x2"),
        ((1, 1), 64, "not 1x1"),
        ((16, 16), 18, "needs a width divisible by 4, not 18"),
    ],
)
def test_a_patchify_stem_that_cannot_be_built_says_why(patch, width, message):
    with pytest.raises(UsageError, match=message):
        PatchifyStem(3, patch, width)


@pytest.mark.parametrize(
    "wrong, right", [("patchfy", "patchify"), ("overlaps", "overlap"), ("convolution", "conv")]
)
def test_a_misspelt_stem_is_answered_with_the_near_name(wrong, right):
    with pytest.raises(UsageError, match=f"unknown stem '{wrong}': did you mean '{right}'"):
        model_config("vit_ti16", stem=wrong)


def test_stems_start_where_the_linear_one_does():
    """Tokens of the same size: positions and the first block need not wait for either."""
    x = torch.randn(4, 3, 64, 64)
    linear = build("vit_ti16", depth=1).stem(x)[0].std()
    overlap = build("vit_ti16", depth=1, stem="overlap").stem(x)[0].std()
    assert 0.5 < overlap / linear < 2
    assert isinstance(build("vit_ti16", depth=1, stem="conv").stem, ConvStem)
