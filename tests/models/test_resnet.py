"""ResNet and BiT: the outputs of timm, torchvision and transformers."""

from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
import torchvision
import transformers as hf
from torch import nn

from close import close
from models.families import BASIC, BIT, RESNET
from models.theirs import transformers_bit
from vitrail.models import MODELS, BiTConfig, build
from vitrail.weights import resnet as weights


def timm_bit(config: BiTConfig) -> nn.Module:
    return timm.models.ResNetV2(
        layers=config.depths,
        channels=config.widths,
        stem_chs=config.widths[0] // 4,
        num_classes=config.classes,
        in_chans=config.channels,
        stem_type="fixed",
        conv_layer=partial(timm.layers.StdConv2d, eps=1e-8),
    )


class Transformers(nn.Module):
    """A model of theirs that gives its logits."""

    def __init__(self, config: BiTConfig) -> None:
        super().__init__()
        self.model = hf.BitForImageClassification(transformers_bit(config))
        self.state_dict = self.model.state_dict

    def forward(self, x):
        return self.model(x).logits


WIDE = replace(BIT, widths=(256, 512), eps="timm")
GREY = replace(BIT, channels=1, eps="timm")
BOTTLENECK, RSB = torchvision.models.resnet.Bottleneck, timm.models.resnet.BasicBlock
# Config; theirs; our layout of theirs.
CASES = {
    "resnet18, torchvision": (
        MODELS["resnet18"],
        partial(torchvision.models.resnet18),
        weights.RESNET,
    ),
    "resnet50, timm": (
        MODELS["resnet50"],
        partial(timm.create_model, "resnet50"),
        weights.RESNET,
    ),
    "resnet50, torchvision": (
        replace(MODELS["resnet50"], depths=(1, 2, 1, 1)),
        partial(torchvision.models.ResNet, BOTTLENECK, (1, 2, 1, 1)),
        weights.RESNET,
    ),
    "resnet18, timm": (
        replace(MODELS["resnet18"], depths=(1, 1, 2, 1), channels=1),
        partial(timm.models.ResNet, RSB, (1, 1, 2, 1), in_chans=1),
        weights.RESNET,
    ),
    "bit_r50x1, timm": (
        replace(MODELS["bit_r50x1"], eps="timm"),
        partial(timm.create_model, "resnetv2_50x1_bit"),
        weights.TIMM_BIT,
    ),
    "bit, wide, timm": (WIDE, partial(timm_bit, WIDE), weights.TIMM_BIT),
    "bit, grey, timm": (GREY, partial(timm_bit, GREY), weights.TIMM_BIT),
    "bit, transformers": (WIDE, partial(Transformers, WIDE), weights.HUGGINGFACE_BIT),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_with_their_weights(case, randomised):
    config, maker, layout = CASES[case]
    theirs = randomised(maker())
    ours = build(config).eval()
    ours.load_state_dict(layout.read(theirs.state_dict(), config))
    for size in [(64, 96), (75, 33)]:  # an odd side has its own padding
        x = torch.randn(3, config.channels, *size)
        with torch.inference_mode():
            expected = theirs(x)
            # Sums over blocks grow; what float32 keeps of them is of their size.
            scale = expected.std().clamp(min=1)
            close(ours(x) / scale, expected / scale)
            close(ours(x[:1]) / scale, theirs(x[:1]) / scale)


def test_the_maps_are_timms(randomised):
    theirs = randomised(timm_bit(BIT))
    config = replace(BIT, eps="timm")
    ours = build(config).eval()
    ours.load_state_dict(weights.TIMM_BIT.read(theirs.state_dict(), config))
    x = torch.randn(2, 3, 40, 56)
    with torch.inference_mode():
        last, (_, *maps) = theirs.forward_intermediates(x, indices=[0, 1, 2], norm=True)
        features = ours.features(x)
    for ours_, theirs_ in zip(features.maps, maps, strict=True):
        close(ours_ / theirs_.max(), theirs_ / theirs_.max())
    assert torch.equal(maps[-1], last), "normed"


def test_the_epsilons_are_the_makers_unless_told(randomised):
    """By 1e-8 under the root timm's kernels differ from Google's where they are small."""
    assert MODELS["bit_r50x1"].eps == "big_transfer"
    ours = randomised(build(BIT))
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "conv" in name:
                parameter.mul_(1e-4 / parameter.std())
    theirs = build(replace(BIT, eps="timm")).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert (ours(x) - theirs(x)).abs().max() > 1e-4


@pytest.mark.parametrize("config", [RESNET, BASIC, BIT], ids=["resnet", "basic", "bit"])
def test_the_last_map_is_after_a_relu(config, randomised):
    assert randomised(build(config)).features(torch.randn(3, 3, 40, 56)).maps[-1].min() >= 0
