import pytest
import torch
import torch.nn.functional as F

from close import close
from vitrail.errors import UsageError
from vitrail.nn import ConvStem, PatchEmbed, patch_grid


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize(
    "size, patch", [((32, 32), (8, 8)), ((24, 40), (8, 8)), ((24, 40), (4, 8))]
)
def test_the_convolution_is_unfold_and_one_matrix(channels, size, patch, randomised):
    embed = randomised(PatchEmbed(channels, patch, 16))
    x = torch.randn(2, channels, *size)
    tokens, grid = embed(x)
    flat = F.unfold(x, patch, stride=patch).transpose(1, 2)  # each patch as (c, p, q)
    expected = F.linear(flat, embed.proj.weight.flatten(1), embed.proj.bias)
    assert grid == (size[0] // patch[0], size[1] // patch[1])
    close(tokens, expected)


def test_tokens_run_row_by_row(randomised):
    embed = randomised(PatchEmbed(3, (8, 8), 16))
    x = torch.randn(1, 3, 24, 40)
    tokens, grid = embed(x)
    alone, _ = embed(x[:, :, 8:16, 32:40])  # second row, fifth column
    close(tokens[:, 1 * grid[1] + 4], alone[:, 0])


def test_the_optional_norm_normalises_each_token():
    tokens, _ = PatchEmbed(3, (8, 8), 64, norm_eps=1e-6)(torch.randn(2, 3, 16, 16))
    close(tokens.mean(-1), torch.zeros(2, 4), size=1)
    close(tokens.var(-1, correction=0), torch.ones(2, 4), 1e-3)


@pytest.mark.parametrize("stem", [PatchEmbed, ConvStem])
def test_padding_adds_zeros_below_and_at_the_right(stem, randomised):
    padded = randomised(stem(3, (8, 8), 16, indivisible="pad"))
    x = torch.randn(2, 3, 17, 30)
    tokens, grid = padded(x)
    whole = torch.zeros(2, 3, 24, 32)
    whole[:, :, :17, :30] = x
    expected, same_grid = padded(whole)
    assert grid == same_grid == (3, 4)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("stem", [PatchEmbed, ConvStem])
def test_an_image_that_does_not_fit_is_refused_with_a_size_that_does(stem):
    with pytest.raises(UsageError, match=r"17x30 .*8x8: use 16x24, or indivisible='pad'"):
        stem(3, (8, 8), 16)(torch.zeros(1, 3, 17, 30))


def test_the_size_proposed_for_an_image_smaller_than_a_patch_is_one_patch():
    with pytest.raises(UsageError, match="use 16x16"):
        patch_grid((8, 20), (16, 16), "refuse")


@pytest.mark.parametrize("patch", [2, 4, 8, 16, 32])
def test_the_convolutional_stem_gives_the_grid_of_its_patch(patch):
    tokens, grid = ConvStem(3, (patch, patch), 32)(torch.randn(2, 3, 64, 96))
    assert grid == (64 // patch, 96 // patch)
    assert tokens.shape == (2, grid[0] * grid[1], 32)


@pytest.mark.parametrize(
    "patch, width, message",
    [
        ((14, 14), 64, "power of two"),
        ((8, 16), 64, "square"),
        ((1, 1), 64, "power of two"),
        ((16, 16), 12, "width divisible by 8"),
    ],
)
def test_a_convolutional_stem_that_cannot_be_built_says_why(patch, width, message):
    with pytest.raises(UsageError, match=message):
        ConvStem(3, patch, width)
