"""From random weights: what a ViT can learn from the user's images alone, in minutes.

A plain ViT needs millions of images to learn what a convolution knows from the start (ViT paper,
figure 3). So the small rows here have a convolutional stem (arXiv 2106.14881), average their
tokens, and are as small as the data is.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from vitrail.bench.macs import macs
from vitrail.data.views.augment import AugmentConfig
from vitrail.models import model_config
from vitrail.recipes.facts import Facts
from vitrail.runs import DataConfig, OptimConfig, TrainConfig

_SMALL = 64
"""Up to this many pixels an image is a small one: patches of 8, and no resized crops."""


_FEW = 5000
_SIDES = (96, 80, 64)
"""Pixels of a side for `vit_mini16`, which then has 36, 25 or 16 tokens."""
_ENOUGH = 60_000
"""Images to be seen, with which a run from scratch gets far enough to gain by larger ones."""
_REACHED = 0.5
"""Of the rate of a matrix product, what a training step of `vit_mini16` reaches, about."""


def scratch(facts: Facts) -> TrainConfig:
    """Train from scratch for a few minutes: the default of `vitrail train`.

    Command: `vitrail train my_photos/`. On 2 CPU cores the length is five minutes, by Muon, on
    images as large as the machine will see often enough in that time; with a GPU there is a larger
    model, at 224 pixels, for thirty.
    """
    if facts.side <= _SMALL:
        return _small_images(facts)
    # Few images are seen a hundred times in five minutes, and mixing keeps them new; many are
    # seen once or twice, and mixing would only make them harder.
    few = facts.images < _FEW
    row = "vit_s16" if facts.gpu else "vit_mini16"
    config = TrainConfig(
        data=DataConfig(path=facts.data, batch_size=batch_size(facts, 256 if facts.gpu else 64)),
        model=model_config(row, classes=facts.classes, channels=facts.channels),
        row=row,
        augment=AugmentConfig(
            crop_scale=(0.35, 1.0), mixup=0.2 if few else 0.0, cutmix=1.0 if few else 0.0
        ),
        optim=OptimConfig(lr=5e-4) if facts.gpu else OptimConfig(name="muon", lr=1e-3),
        minutes=30 if facts.gpu else 5,
        precision=precision(facts),
        ema=0.99,
    )
    return config if facts.gpu else _sized(config, facts, _SIDES)


def demo_scratch(facts: Facts) -> TrainConfig:
    """The emoji sample set in under four minutes on 2 CPU cores: what `make demo` does offline.

    Command: `vitrail train samples:emoji --recipe demo-scratch`. Score: see
    benchmarks/results/emoji.md.
    """
    return _sized(replace(scratch(facts), minutes=3.3), facts, _SIDES[1:])


def _sized(config: TrainConfig, facts: Facts, sides: Sequence[int]) -> TrainConfig:
    """With the first of the `sides` at which enough images will be seen, or the last."""
    seconds = 60 * (config.minutes or 0)
    for side in sides:
        config = replace(config, model=replace(config.model, image_size=(side, side)))
        flops = 6 * macs(config.model)  # the backward pass is twice the forward pass
        if seconds * _REACHED * facts.rate / flops >= _ENOUGH:
            break
    return config


def fashion_mnist(facts: Facts) -> TrainConfig:
    """Fashion-MNIST, official split, five minutes on 2 CPU cores.

    Command: `vitrail train samples:fashion-mnist --recipe fashion-mnist`. Score: see
    benchmarks/results/fashion-mnist.md.
    """
    config = scratch(facts)
    return replace(config, data=replace(config.data, val_fraction=0.05))


def fashion_mnist_long(facts: Facts) -> TrainConfig:
    """Fashion-MNIST, official split, under half an hour: harder augmentation for many more epochs.

    Command: `vitrail train samples:fashion-mnist --recipe fashion-mnist-long`. Score:
    see benchmarks/results/fashion-mnist.md.
    """
    config = fashion_mnist(facts)
    return replace(
        config,
        model=replace(config.model, drop_path=0.1),
        augment=replace(config.augment, erase=0.25),
        optim=OptimConfig(lr=1.5e-3),  # with which it was measured
        minutes=26,
        ema=0.999,
    )


def _small_images(facts: Facts) -> TrainConfig:
    side = -(-facts.side // 8) * 8
    return TrainConfig(
        data=DataConfig(path=facts.data, batch_size=batch_size(facts, 128)),
        model=model_config(
            "vit_nano8",
            image_size=(side, side),
            classes=facts.classes,
            channels=facts.channels,
        ),
        row="vit_nano8",
        augment=replace(AugmentConfig.off(), hflip=0.5, shift=side // 16, fill=0),
        # AdamW's five minutes gave 89.9%, these 91.5% (benchmarks/results/fashion-mnist.md).
        optim=OptimConfig(name="muon", lr=3e-3),
        minutes=5,
        precision=precision(facts),
        ema=0.99,
    )


def batch_size(facts: Facts, most: int) -> int:
    """At least eight steps an epoch, however few the images; a power of two, which processes share
    more evenly than 37.
    """
    few = max(4, min(most, facts.images // 8))
    return 1 << few.bit_length() - 1


def precision(facts: Facts) -> Literal["float32", "bfloat16"]:
    """bfloat16 where the machine has it."""
    return "bfloat16" if facts.bfloat16 else "float32"
