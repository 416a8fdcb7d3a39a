"""MobileViT: the outputs of timm and transformers, images of any size."""

from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
import transformers as hf
from torch import nn

from close import close
from models.families import MOBILEVIT
from models.theirs import images, lively, transformers_mobilevit
from vitrail.models.mobilevit import (
    ROWS,
    InvertedResidual,
    MobileViT,
    MobileViTBlock,
    MobileViTConfig,
    fold,
    unfold,
)
from vitrail.weights import mobilevit as weights

# --- the same outputs ---


class Transformers(nn.Module):
    """A model of theirs that gets images as their processor gives them: blue, green, red."""

    def __init__(self, config: MobileViTConfig) -> None:
        super().__init__()
        self.model = hf.MobileViTForImageClassification(transformers_mobilevit(config))
        self.state_dict = self.model.state_dict

    def forward(self, x):
        return self.model(x.flip(1)).logits


XXS = ROWS["mobilevit_xxs"]
# Config; theirs; our layout of theirs.
CASES = {
    "xxs, timm": (XXS, partial(timm.create_model, "mobilevit_xxs"), weights.TIMM_MOBILEVIT),
    "xs, timm, one channel": (
        replace(ROWS["mobilevit_xs"], channels=1, classes=7),
        partial(timm.create_model, "mobilevit_xs", in_chans=1, num_classes=7),
        weights.TIMM_MOBILEVIT,
    ),
    "s, timm": (
        ROWS["mobilevit_s"],
        partial(timm.create_model, "mobilevit_s"),
        weights.TIMM_MOBILEVIT,
    ),
    "xxs, transformers": (XXS, partial(Transformers, XXS), weights.HUGGINGFACE_MOBILEVIT),
    "xs, transformers": (
        ROWS["mobilevit_xs"],
        partial(Transformers, ROWS["mobilevit_xs"]),
        weights.HUGGINGFACE_MOBILEVIT,
    ),
}
SIZES = [(64, 96), (128, 64), (75, 33), (97, 130), (16, 16)]


def ours_with(theirs: nn.Module, config: MobileViTConfig, layout: weights.FamilyLayout):
    ours = MobileViT(config).eval()
    ours.load_state_dict(layout.read(theirs.state_dict(), config))
    return ours


@pytest.mark.parametrize("case", CASES)
def test_logits_with_their_weights(case, randomised):
    config, build, layout = CASES[case]
    theirs = lively(randomised(build()))
    ours = ours_with(theirs, config, layout)
    for size in SIZES:  # where a map has an odd side, it is scaled
        x = images(3, config.channels, size)
        with torch.inference_mode():
            expected = theirs(x)
            scale = expected.std().clamp(min=1)
            assert (expected - expected.mean(0)).std() > 5e-3 * scale, "images tell"
            close(ours(x) / scale, expected / scale)
            close(ours(x[:1]) / scale, theirs(x[:1]) / scale)


def test_the_order_of_the_channels_matters_to_transformers_files(randomised):
    """Else the test above would say nothing of it."""
    theirs = lively(randomised(Transformers(XXS)))
    x = images(2, 3, (64, 64))
    with torch.inference_mode():
        assert (theirs(x) - theirs.model(x).logits).abs().max() > 0.01


@pytest.mark.parametrize("size", [(64, 96), (75, 97)], ids=str)
def test_the_maps_are_timms(size, randomised):
    theirs = lively(randomised(timm.create_model("mobilevit_xxs", features_only=True)))
    whole = randomised(timm.create_model("mobilevit_xxs"))
    loaded = whole.load_state_dict(
        {k.replace("stages_", "stages."): t for k, t in theirs.state_dict().items()}, strict=False
    )
    assert set(loaded.missing_keys) == {"head.fc.weight", "head.fc.bias"}
    ours = ours_with(whole, XXS, weights.TIMM_MOBILEVIT)
    x = images(2, 3, size)
    with torch.inference_mode():
        features = ours.features(x)
        *maps, last = theirs(x.contiguous(memory_format=torch.channels_last))  # as ours
    # timm calls the expanded map the last stage's.
    for map_, expected in zip(features.maps[:-1], maps, strict=True):
        close(map_, expected)
    close(features.patches.mT.reshape(last.shape), last)


def test_every_norm_has_timms_epsilon():
    theirs = dict(timm.create_model("mobilevit_xxs").named_modules())
    kinds = set()
    for name, module in MobileViT(XXS).named_modules():
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            other = theirs[weights.TIMM_MOBILEVIT.theirs(f"{name}.weight").removesuffix(".weight")]
            assert module.eps == other.eps, name
            kinds.add(type(module).__name__)
    assert kinds == {"LayerNorm", "BatchNorm"}


# --- what attends to what ---


def test_unfolding_takes_the_same_place_of_every_patch():
    x = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    tokens = unfold(x, side=2)
    assert tokens.shape == (2 * 4, 6, 3)
    # Image 1, the right cell of a patch's lower row; the fifth patch lies in row 1, column 1.
    assert torch.equal(tokens[1 * 4 + 3, 4], x[1, :, 3, 3])
    assert torch.equal(fold(tokens, (2, 3), side=2), x)


def test_a_cell_attends_to_those_at_its_own_place(randomised):
    """Without the convolutions, one cell moves every second cell of every second row, no other."""
    block = randomised(MobileViTBlock(MOBILEVIT, 8, 0, 0.0))
    y = torch.randn(1, 16, 6, 8)
    moved = y.clone()
    moved[0, :, 2, 3] += 1
    ways = [fold(block.blocks(unfold(z, 2)), (3, 4), 2) for z in (y, moved)]
    changed = (ways[0] - ways[1]).abs().amax(dim=(0, 1)) > 1e-7
    expected = torch.zeros(6, 8, dtype=torch.bool)
    expected[0::2, 1::2] = True
    assert torch.equal(changed, expected)


def test_tokens_are_the_expanded_cells_row_by_row(randomised):
    model = randomised(MobileViT(MOBILEVIT))
    features = model.features(torch.rand(3, 3, 50, 75))
    expanded = model.expand(features.maps[-1])
    close(features.patches[1, 11], expanded[1, :, 1, 1])
    close(features.pooled, expanded.mean((2, 3)))


def test_what_the_blocks_are():
    model = MobileViT(MOBILEVIT)
    kinds = [type(model.get_submodule(name)) for name in model.block_names()]
    assert kinds == [InvertedResidual] * 3 + [MobileViTBlock, InvertedResidual, MobileViTBlock]


def test_only_a_residual_with_a_shortcut_is_left_out():
    """Without one, there would be nothing left."""
    x = torch.rand(64, 8, 6, 6)
    halved = InvertedResidual(8, 8, 2, expansion=2, drop_path=0.9).train()(x)
    assert (halved.flatten(1).abs().sum(1) > 0).all()
    kept = InvertedResidual(8, 8, 1, expansion=2, drop_path=0.9).train()(x)
    assert 40 < (kept == x).flatten(1).all(1).sum() < 64
